"""What the rest of the program knows of a model family: names of its parts, nothing of its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """Dotted names below the model: `linears` are relative to one decoder layer, the rest absolute.

    model_class: transformers' ForCausalLM; rotary_class: its rotary embedding, built from the config alone;
    linears: what is quantized and what `--lora_target_modules all` means; default_targets: what `default`
    means, PEFT's choice for the family, by last name; sublayers: attention and MLP, relative to a layer.
    """

    model_class: type[nn.Module]
    rotary_class: type[nn.Module]
    linears: tuple[str, ...] = ATTENTION + GATED_MLP
    default_targets: tuple[str, ...] = ("q_proj", "v_proj")
    sublayers: tuple[str, ...] = ("self_attn", "mlp")
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"

    def layer_linears(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(absolute dotted name, module) of every linear of every decoder layer, in order."""
        for i in range(len(model.get_submodule(self.layers))):
            for linear in self.linears:
                name = f"{self.layers}.{i}.{linear}"
                yield name, model.get_submodule(name)

    def ignores(self, tensor: str, tied: bool) -> bool:
        """Tensors that old checkpoints carry and no parameter needs: rotary tables, a tied head's copy."""
        return tensor.endswith(".rotary_emb.inv_freq") or (tied and tensor == f"{self.head}.weight")


def clean(name: str) -> str:
    """A parameter's or module's dotted name without the segments that wrapping put in."""
    return ".".join(part for part in name.split(".") if part != "_checkpoint_wrapped_module")
