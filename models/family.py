"""What the rest of the program knows of a model family: names of its parts, nothing of its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

ROTARY_TABLE = ".rotary_emb.inv_freq"  # of old Llama files, at the end of a tensor's name
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """Dotted names below the model: `linears` are relative to one decoder layer, the rest absolute.

    model_class: transformers' ForCausalLM; norm: whose result the head reads; rotary_class: the model's rotary
    embedding, built from the config alone;
    linears: what is quantized and what `--lora_target_modules all` means; default_targets: what `default`
    means, PEFT's choice for the family, by last name; sublayers: attention and MLP, relative to a layer;
    outputs: the projections whose results a layer adds to the hidden states (attention's, the MLP's), by their
    names in checkpoints, * for any one segment.

    Only where a family needs them:
    silent: what a new block of Llama-Pro sets so that it adds nothing, (tensors, named as in `outputs`, their value);
    empty: its outputs are zero. Where norms follow the outputs it must be those: models/llama_pro.py;
    attention: the implementation that computes all of its attention, by transformers' name;
    linears_of: what is quantized in the given decoder layer, if that is more than `linears` or differs from
    layer to layer, relative to the layer;
    as_stored: changes the meta model in place until its parameters are the files' tensors;
    compiles: whether a layer is one graph, without a break;
    logit_scale: what the head's result is multiplied with, before any cap;
    logit_cap: c of logits c tanh(z / c), None = no cap;
    constants: full contents of the buffers that no file holds, rotary tables apart, by absolute name.
    """

    model_class: type[nn.Module]
    rotary_class: type[nn.Module]
    linears: tuple[str, ...] = ATTENTION + GATED_MLP
    default_targets: tuple[str, ...] = ("q_proj", "v_proj")
    sublayers: tuple[str, ...] = ("self_attn", "mlp")
    outputs: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    silent: tuple[tuple[str, float], ...] = ()
    attention: str = "sdpa"
    linears_of: Callable[[nn.Module], tuple[str, ...]] | None = None
    as_stored: Callable[[PreTrainedModel], None] = lambda model: None
    constants: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}
    compiles: bool = True
    logit_scale: Callable[[PretrainedConfig], float] = lambda config: 1.0
    logit_cap: Callable[[Any], float | None] = lambda config: None
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def layer_linears(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(absolute dotted name, module) of every linear of every decoder layer, in order: all that is
        quantized. Raises AttributeError for a name that a layer does not have."""
        for i, layer in enumerate(self.decoder_layers(model)):
            for linear in self.linears_of(layer) if self.linears_of else self.linears:
                yield f"{self.layers}.{i}.{linear}", layer.get_submodule(linear)

    def locate_layer(self, name: str) -> tuple[int | None, str]:
        """(layer, name below it) of a parameter or a checkpoint's tensor; (None, name) outside the layers."""
        below = name.removeprefix(f"{self.layers}.")
        number, _, rest = below.partition(".")
        return (int(number), rest) if below != name and number.isdecimal() else (None, name)

    def silent_value(self, rest: str) -> float | None:
        """What fills a tensor of a new block, by its name below the layer: one that `silent` names, or its module.
        None: it is copied."""
        parts = rest.split(".")
        for name, value in self.silent or [(output, 0.0) for output in self.outputs]:
            pattern = name.split(".")
            if _matches(pattern, parts) or _matches(pattern, parts[:-1]):
                return value
        return None

    def ignores(self, tensor: str, tied: bool) -> bool:
        """Whether no parameter needs a tensor, which repeats something else (models/redundant.py compares
        it): a rotary table, a tied head."""
        return tensor.endswith(ROTARY_TABLE) or (tied and tensor == f"{self.head}.weight")


def _matches(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(p in ("*", n) for p, n in zip(pattern, parts, strict=True))


def rope_switch(config: PretrainedConfig) -> float:
    """Tokens of a row above which it is rotated by other frequencies, and where nobody says how long rows are, all of a
    batch (longrope, of Phi-3 and Phi-4: https://arxiv.org/abs/2402.13753); inf where there are none."""
    rope = _rope(config)
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


def follows_the_longest(config: PretrainedConfig) -> bool:
    """Whether lines beyond max_position_embeddings change the frequencies that later lines are rotated by: of RoPE of
    type dynamic transformers keeps those of the longest one so far."""
    kinds = [_rope(config), *_ropes_by_layer(config)]
    return any("dynamic" in str(kind.get("rope_type")) for kind in kinds)


def switches_by_layer(config: PretrainedConfig) -> bool:
    """Whether only some kinds of layers have RoPE of type longrope, which `rope_switch` knows nothing of."""
    return any(kind.get("rope_type") == "longrope" for kind in _ropes_by_layer(config))


def _rope(config: PretrainedConfig) -> dict:
    return getattr(config, "rope_parameters", None) or {}


def _ropes_by_layer(config: PretrainedConfig) -> list[dict]:
    """Gemma 3's, one for each kind of layer."""
    return [kind for kind in _rope(config).values() if isinstance(kind, dict)]


def clean(name: str) -> str:
    """A parameter's or module's dotted name without the segments that wrapping put in."""
    return ".".join(part for part in name.split(".") if part != "_checkpoint_wrapped_module")
