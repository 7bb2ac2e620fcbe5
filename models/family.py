"""The description of a model family: names of its parts, and the settings that differ between families.

The rest of the program knows nothing else of a family. Its arithmetic is transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from files.config_parts import text_config
from models.vision import Vision

# Names of the attention of models/attention.py in transformers' registry. CAUSAL_VARLEN is CAUSAL with VARLEN
# for images. transformers takes no name with "sdpa" in it for a model with sinks, whose own SDPA lacks them.
FUSED, CAUSAL, VARLEN = "fused_kernels", "causal_lines", "varlen_rows"
CAUSAL_VARLEN = "causal_lines_varlen_images"
ROTARY_TABLE = ".rotary_emb.inv_freq"  # end of a tensor's name in old Llama files
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def equal_head_sizes(config: Any) -> tuple[int, int]:
    """Return the features of a head, of queries and keys and of values: the same number twice."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size, size


@dataclass(frozen=True)
class Family:
    """The dotted names of a family's modules, and its settings.

    linears, sublayers, outputs, identity_init and wide_linears are relative to one decoder layer; other names
    are absolute.

    Attributes:
        model_class: transformers' ForCausalLM class.
        rotary_class: class of the model's rotary embedding, built from the config alone.
        linears: the linears to quantize, and the meaning of `--lora_target_modules all`.
        default_targets: the meaning of `--lora_target_modules default`: last names, PEFT's choice for the
            family.
        sublayers: attention and MLP.
        outputs: the projections whose results a layer adds to the hidden states (attention's, the MLP's), by
            their names in checkpoints. * stands for any one segment.
        layers, embedding, head, rotary: the list of decoder layers, and single modules.
        norm: the norm whose result the head reads.

    Attributes that few families need:
        identity_init: (name, value) of the tensors or modules that make a new block of Llama-Pro the
            identity. Empty: all `outputs` are zero. Where norms follow the outputs, it must name these norms
            (models/llama_pro.py), which are also those that fp16 needs in fp32 (models/wide_norms.py).
        changed_results: returns the linears whose results transformers changes in place (OLMo's clipping).
            Packed ones return a copy, as their operator allows no change of its result.
        attention: name, in transformers' registry, of the implementation for all of its attention.
        select_linears: returns the linears to quantize in the given decoder layer, relative to it. For layers
            that differ, or where more than `linears` is quantized.
        match_checkpoint: changes the meta text model (transformers' class without a head, whose config is the
            text model's) in place so that its parameters are the files' tensors. It may replace a module by
            one with the same parameters and a larger range (Nemotron). It may raise ValueError for a config
            that describes no such model.
        stacks_experts: whether the files hold a tensor for the linear of all experts of a layer
            (files/expert_stacks.py), in 16 bits or MXFP4, and not one for each expert.
        constant_buffers: returns {absolute name: full contents} of the buffers that no file holds, other than
            rotary tables.
        fixed_parameters: parameters of a layer that no train type trains, such as the bias by which a router
            chooses experts. transformers has them as buffers, and `match_checkpoint` makes them parameters.
            They are fp32 in every precision, and whole on every rank.
        extra_layers: returns the number of layers that the files hold behind the model's. They predict
            further tokens, and transformers does not build them. A saved model gets their tensors unchanged.
        head_sizes: returns (features of a head of queries and of keys, of values).
        wide_linears: linears of a layer whose results, or products of them, may be beyond fp16's 65,504
            (models/wide_linears.py).
        compiles: whether a layer compiles to one graph, without a break.
        passes_row_bounds: whether transformers' layers hand on to attention the bounds of packed rows, which
            the variable-length kernel needs. Without them packed rows are separated by masks.
        passes_window: whether transformers' layers hand on to attention their sliding window. If not, a model
            with a window needs masks.
        logit_scale: returns the factor that is applied to the head's result, before any cap.
        logit_cap: returns c of the logits c tanh(z / c); None without a cap.
        texts: of a wrapper, {known model_type of its text_config: the wrapper's family around such a model}.
        unused: the modules of a wrapper that text alone does not need, such as a vision tower. They are not
            built, unless `has_images`; a saved model gets their tensors unchanged.
        vision: the description of these modules, for a wrapper that can be trained on images.
        has_images: whether the model is built with them (`with_images`).

    The functions of a config get that of the text model (`text_config`).
    """

    model_class: type[nn.Module]
    rotary_class: type[nn.Module]
    linears: tuple[str, ...] = ATTENTION + GATED_MLP
    default_targets: tuple[str, ...] = ("q_proj", "v_proj")
    sublayers: tuple[str, ...] = ("self_attn", "mlp")
    outputs: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    changed_results: Callable[[Any], tuple[str, ...]] = lambda config: ()
    identity_init: tuple[tuple[str, float], ...] = ()
    attention: str = FUSED
    select_linears: Callable[[nn.Module], tuple[str, ...]] | None = None
    match_checkpoint: Callable[[PreTrainedModel], None] = lambda text_model: None
    stacks_experts: bool = False
    constant_buffers: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}
    fixed_parameters: tuple[str, ...] = ()
    extra_layers: Callable[[Any], int] = lambda config: 0
    head_sizes: Callable[[Any], tuple[int, int]] = equal_head_sizes
    wide_linears: tuple[str, ...] = ()
    compiles: bool = True
    passes_row_bounds: bool = True
    passes_window: bool = True
    logit_scale: Callable[[PretrainedConfig], float] = lambda config: 1.0
    logit_cap: Callable[[Any], float | None] = lambda config: None
    texts: Mapping[str, Family] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    vision: Vision | None = None
    has_images: bool = False
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"

    def text_model(self, model: nn.Module) -> PreTrainedModel:
        """Return the part that holds the decoder layers: `model` or, in a wrapper, `language_model`."""
        part = model.get_submodule(self.layers.rpartition(".")[0])
        assert isinstance(part, PreTrainedModel)
        return part

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the decoder layers, in order."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def layer_linears(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield (full dotted name, module) of each decoder linear that is quantized, layer by layer.

        Raises AttributeError for a name that a layer does not have.
        """
        layers = self.decoder_layers(model)
        for name in self.layer_linear_names(model):
            index, below = self.locate_layer(name)
            assert index is not None
            yield name, layers[index].get_submodule(below)

    def layer_linear_names(self, model: nn.Module) -> Iterator[str]:
        """Yield the names of `layer_linears`. Of 18,000 in a model with experts, modules take a second."""
        for i, layer in enumerate(self.decoder_layers(model)):
            for linear in self.select_linears(layer) if self.select_linears else self.linears:
                yield f"{self.layers}.{i}.{linear}"

    def locate_layer(self, name: str) -> tuple[int | None, str]:
        """Split a tensor's name into (layer's index, name within it); (None, name) outside of the layers."""
        below = name.removeprefix(f"{self.layers}.")
        number, _, rest = below.partition(".")
        return (int(number), rest) if below != name and number.isdecimal() else (None, name)

    def is_fixed(self, name: str) -> bool:
        """Return whether a parameter of a decoder layer is one of `fixed_parameters`, by its full name."""
        return self.locate_layer(name)[1] in self.fixed_parameters

    def set_fixed_parameters(self, model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each of the model's `fixed_parameters` by make(its contents), frozen."""
        for path, module in model.named_modules() if self.fixed_parameters else ():
            for last, parameter in list(module.named_parameters(recurse=False)):
                if self.is_fixed(unwrapped_name(f"{path}.{last}")):
                    fixed = nn.Parameter(make(parameter.detach()), requires_grad=False)
                    module.register_parameter(last, fixed)

    def is_output(self, name_in_layer: str) -> bool:
        """Return whether a linear of a layer is one of `outputs`."""
        return any(_matches(output.split("."), name_in_layer.split(".")) for output in self.outputs)

    def identity_value(self, name_in_layer: str) -> float | None:
        """Return the number that fills this tensor of Llama-Pro's new layers; None if the tensor is copied.

        `identity_init` and `outputs` name such a tensor, or its module.
        """
        segments = name_in_layer.split(".")
        for pattern, value in self.identity_init or [(output, 0.0) for output in self.outputs]:
            if any(_matches(pattern.split("."), found) for found in (segments, segments[:-1])):
                return value
        return None

    def is_redundant(self, tensor: str, tied: bool) -> bool:
        """Return whether the tensor's name is that of a rotary table or, if `tied`, of the head's weight.

        No parameter needs such a tensor. models/redundant.py compares it with what it should repeat.
        """
        return tensor.endswith(ROTARY_TABLE) or (tied and tensor == f"{self.head}.weight")

    def unbuilt_parts(self) -> tuple[str, ...]:
        """Return the modules of `unused` that are not built: none of them with images."""
        return () if self.has_images else self.unused

    def is_unused(self, tensor: str) -> bool:
        """Return whether the tensor belongs to a module that is not built."""
        return tensor.startswith(tuple(f"{module}." for module in self.unbuilt_parts()))

    def is_of_vision(self, tensor: str) -> bool:
        """Return whether the tensor belongs to a vision part that is built."""
        return self.has_images and tensor.startswith(tuple(f"{module}." for module in self.unused))

    def with_images(self) -> Family:
        """Return the family of the same model with its vision parts."""
        assert self.vision is not None
        return replace(self, has_images=True)

    def built_vision(self) -> Vision | None:
        """Return `vision` if the model is built with it, else None."""
        return self.vision if self.has_images else None

    def all_constant_buffers(self, config: PretrainedConfig) -> dict[str, torch.Tensor]:
        """Return `constant_buffers` of the text model and of the vision parts that are built.

        config: the whole model's.
        """
        vision = self.built_vision()
        return self.constant_buffers(text_config(config)) | (
            vision.constant_buffers(config) if vision else {}
        )


def wrap_family(
    texts: Mapping[str, Family],
    model_class: type[nn.Module],
    unused: tuple[str, ...],
    vision: Vision | None = None,
) -> Family:
    """Return the family of a wrapper, whose part `model.language_model` is a text family's `model`.

    Its `texts` has a family for each kind of text model, with all that the text family says. The result is
    the first of these, for what does not depend on the kind.

    Args:
        texts: {model_type of text_config: the family of such a text model alone}.
        model_class: transformers' class of the wrapper.
        unused, vision: as in `Family`.
    """
    wrapped = {name: _wrap(text, model_class, unused, vision) for name, text in texts.items()}
    return replace(next(iter(wrapped.values())), texts=wrapped)


def _wrap(
    text: Family, model_class: type[nn.Module], unused: tuple[str, ...], vision: Vision | None
) -> Family:
    """Return the family of the wrapper around one kind of text model; arguments as in `wrap_family`."""

    def wrapped(name: str) -> str:
        return f"model.language_model.{name.removeprefix('model.')}"

    return replace(
        text,
        model_class=model_class,
        unused=unused,
        vision=vision,
        layers=wrapped(text.layers),
        embedding=wrapped(text.embedding),
        norm=wrapped(text.norm),
        rotary=wrapped(text.rotary),
        constant_buffers=lambda config: {
            wrapped(name): content for name, content in text.constant_buffers(config).items()
        },
    )


def _matches(pattern: list[str], segments: list[str]) -> bool:
    same_length = len(pattern) == len(segments)
    return same_length and all(p in ("*", s) for p, s in zip(pattern, segments, strict=True))


def longrope_threshold(config: PretrainedConfig) -> float:
    """Return the row length in tokens above which longrope uses its other frequencies; inf without longrope.

    Phi-3 and Phi-4 have RoPE of type longrope (https://arxiv.org/abs/2402.13753). Without the row lengths,
    transformers switches the frequencies of all rows of a batch.
    """
    rope = _rope_parameters(config)
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


def uses_dynamic_rope(config: PretrainedConfig) -> bool:
    """Return whether any layer has RoPE of type dynamic: a long sequence changes later ones' frequencies.

    transformers keeps the frequencies of the longest sequence so far beyond max_position_embeddings.
    """
    ropes = [_rope_parameters(config), *_ropes_by_layer(config)]
    return any("dynamic" in str(rope.get("rope_type")) for rope in ropes)


def has_longrope_by_layer(config: PretrainedConfig) -> bool:
    """Return whether a kind of layer has longrope of its own (which `longrope_threshold` does not detect)."""
    return any(rope.get("rope_type") == "longrope" for rope in _ropes_by_layer(config))


def _rope_parameters(config: PretrainedConfig) -> dict:
    return getattr(text_config(config), "rope_parameters", None) or {}


def _ropes_by_layer(config: PretrainedConfig) -> list[dict]:
    """Return the RoPE parameters of each kind of layer; [] if all share one (all but Gemma 3, OLMo 3)."""
    return [rope for rope in _rope_parameters(config).values() if isinstance(rope, dict)]


def unwrapped_name(name: str) -> str:
    """Return a parameter's or module's dotted name without the segments of activation checkpointing."""
    return ".".join(segment for segment in name.split(".") if segment != "_checkpoint_wrapped_module")
