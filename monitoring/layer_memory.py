"""What the activations of one decoder layer take: saved for backward, and at the peak of each direction.

The counts are of the tensors that PyTorch's autograd and Inductor hold for transformers' layers with the
linears of quantization/operators.py. Each count names the tensors that it stands for. docs/memory.md compares
the results with the allocator's counters on an H200.

Widths are in elements of a token: `hidden` of the hidden states, `query`, `key`, `value` and `result` (of
attention) of all heads together, `mlp` between gate and down, of all experts that a token visits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from files.config_parts import router_loss_factor, text_config
from launch.gpus import Gpu
from launch.precision import Precision
from models.family import Family
from options.config import Config


@dataclass(frozen=True)
class LayerWidths:
    """The widths of a model's decoder layers, and what else the number of their activations depends on.

    Attributes:
        hidden, query, key, value, result, mlp: see above. `value` is the width of the tensor that holds the
            values; that of latent attention also holds the keys without their rotated features.
        heads: query heads.
        latents: results of the first linears of latent attention (GLM-4.7-Flash); 0 in other attention.
        experts, experts_per_token: routed experts of a layer, and those of a token; 0 without.
        has_router_loss: whether the routers have an auxiliary loss (models/router_loss.py).
        mlp_tensors: tensors as wide as `mlp` that are saved: gate, up and their product; without a gate, the
            activation function's input and result, and of gelu_new (Phi) the tanh in it.
        has_four_norms: norms follow attention and MLP as well as precede them (Gemma).
        norms_read_outputs: norms follow attention and MLP (Gemma, GLM-4, OLMo, EXAONE 4), and so keep the
            results of the last projections.
        widens_product: under autocast to fp16 the MLP's product is in fp32 (Gemma, OLMo, EXAONE 4;
            models/wide_linears.py).
        widens_inputs: then query, key and gate are fp32, too (OLMo, EXAONE 4).
        has_one_norm: attention and MLP read the result of the same norm (Cohere2, Phi).
        has_head_norms: queries and keys are normalized (Qwen3, Gemma 3, OLMo 2, EXAONE 4, HunYuan).
        has_fused_qkv: query, key and value are one linear (Phi-3, GPT-NeoX).
        has_fused_gate: gate and up are one linear (Phi-3, GLM-4).
        is_eager: attention is eager and keeps its scores (Gemma 2).
        drops_scores: attention has dropout, which the variable-length kernel lacks (Seed-OSS).
        window: tokens of a sliding window; 0 without.
        compiles: whether --compile auto compiles the layers.
        passes_row_bounds: whether packed rows need no masks where the variable-length kernel runs.
        sees_whole_image: whether the tokens of an image see each other both ways (Gemma 3). That takes masks
            where the kernel does not run.
        passes_window: whether a sliding window needs no masks there.
    """

    hidden: int
    query: int
    key: int
    value: int
    result: int
    mlp: int
    heads: int
    latents: int = 0
    experts: int = 0
    experts_per_token: int = 0
    has_router_loss: bool = False
    mlp_tensors: int = 3
    has_four_norms: bool = False
    norms_read_outputs: bool = False
    widens_product: bool = False
    widens_inputs: bool = False
    has_one_norm: bool = False
    has_head_norms: bool = False
    has_fused_qkv: bool = False
    has_fused_gate: bool = False
    is_eager: bool = False
    drops_scores: bool = False
    window: int = 0
    compiles: bool = True
    passes_row_bounds: bool = True
    sees_whole_image: bool = False
    passes_window: bool = True


def layer_widths(model: PreTrainedModel, family: Family) -> LayerWidths:
    """Return the widths of a meta model's decoder layers; where some have experts, of such a layer."""
    config, layers = text_config(model.config), family.decoder_layers(model)
    layer = next(filter(_has_experts, layers), layers[0])
    head_dim, value_dim = family.head_sizes(config)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    latents, value = _latent_widths(layer) or (0, key_heads * value_dim)
    vision = family.built_vision()
    names = [name for name, _ in layer.named_modules()]
    norms = sum("norm" in name for name, _ in layer.named_children())
    per_token = config.num_experts_per_tok if _has_experts(layer) else 0
    mlp, mlp_inputs = _mlp_widths(layer, family, per_token)
    return LayerWidths(
        hidden=config.hidden_size,
        query=heads * head_dim,
        key=key_heads * head_dim,
        value=value,
        result=heads * value_dim,
        mlp=mlp,
        heads=heads,
        latents=latents,
        experts=len(layer.mlp.experts) if per_token else 0,  # type: ignore[union-attr,arg-type]
        experts_per_token=per_token,
        has_router_loss=router_loss_factor(config) is not None,
        mlp_tensors=3 if mlp_inputs > mlp or getattr(config, "hidden_act", None) == "gelu_new" else 2,
        has_four_norms=norms > 2,
        norms_read_outputs=bool(family.identity_init),
        widens_product=any(name.startswith(f"{family.sublayers[1]}.") for name in family.wide_linears),
        widens_inputs=any(name.endswith("q_proj") for name in family.wide_linears),
        has_one_norm=norms == 1,
        has_head_norms=any(name.endswith(("q_norm", "q_layernorm", "query_layernorm")) for name in names),
        has_fused_qkv=any(name.endswith(("qkv_proj", "query_key_value")) for name in names),
        has_fused_gate=any(name.endswith("gate_up_proj") for name in names),
        is_eager=family.attention == "eager",
        drops_scores=bool(getattr(config, "attention_dropout", 0)),
        window=getattr(config, "sliding_window", None) or 0,
        compiles=family.compiles,
        passes_row_bounds=family.passes_row_bounds,
        sees_whole_image=bool(vision and vision.sees_whole_image),
        passes_window=family.passes_window,
    )


def _latent_widths(layer: nn.Module) -> tuple[int, int] | None:
    """Return (results of latent attention's first linears, of its last for keys and values); None without."""
    linears = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    if "kv_b_proj" not in linears:
        return None
    first = linears["q_a_proj"].out_features + linears["kv_a_proj_with_mqa"].out_features
    return first, linears["kv_b_proj"].out_features


def _has_experts(layer: nn.Module) -> bool:
    return any("experts" in name for name, _ in layer.named_modules())


def _mlp_widths(layer: nn.Module, family: Family, experts: int) -> tuple[int, int]:
    """Return (input features of a layer's last MLP linears, output features of its first ones).

    Of all experts that a token visits, and of one that all tokens share. experts: those of a token.
    """
    last = first = 0
    for name in family.select_linears(layer) if family.select_linears else family.linears:
        _, is_routed, expert = name.partition(".experts.")
        is_beyond = bool(is_routed) and int(expert.partition(".")[0]) >= experts
        if is_beyond or not name.startswith(f"{family.sublayers[1]}."):
            continue
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if family.is_output(name):
            last += linear.in_features
        else:
            first += linear.out_features
    return last, first


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer's activations, for a micro-batch.

    Attributes:
        input: its input, which is all that gradient checkpointing saves.
        saved: what backward needs beside the input, without gradient checkpointing.
        forward: most beside the input while the layer computes and saves nothing.
        backward: most beside the input while backward recomputes the layer and forms its gradients.
        last_backward: what backward of a layer that saved everything adds to it.
        matmuls: results of its matmuls and attention, which --activation_budget may save.
    """

    input: float
    saved: float
    forward: float
    backward: float
    last_backward: float
    matmuls: float


def layer_input_bytes(config: Config, precision: Precision, tokens: int, hidden: int) -> int:
    """Return the bytes of one layer's input, which gradient checkpointing saves.

    Args:
        config: the run's options.
        precision: dtypes of the run.
        tokens: T.
        hidden: H.
    """
    return config.batch_size * tokens * hidden * precision.frozen.itemsize


def is_compiled(config: Config, widths: LayerWidths, gpu: Gpu | None) -> bool:
    """Return whether the layers are compiled on this kind of GPU (--compile)."""
    return config.compile == "true" or bool(
        config.compile == "auto" and gpu and gpu.runs_triton and widths.compiles
    )


def layer_memory(
    config: Config,
    precision: Precision,
    widths: LayerWidths,
    gpu: Gpu | None,
    *,
    tokens: int,
    branches: int,
) -> LayerMemory:
    """Return the bytes that a decoder layer's activations take.

    Args:
        config: the run's options.
        precision: its dtypes.
        widths: of the model's layers.
        gpu: the kind of GPU.
        tokens: of the longest sequence.
        branches: adapted linears of a layer.
    """
    rows = config.batch_size * tokens
    compiled, adapter = is_compiled(config, widths, gpu), config.method.adapter
    width, stream = precision.matmul_dtype.itemsize, precision.frozen.itemsize
    hidden, query, key, mlp = widths.hidden, widths.query, widths.key, widths.mlp
    value, latents = widths.value, widths.latents
    is_autocast = stream > width
    # The norms' results, and the output of attention where a norm follows it.
    saved: float = (3 if widths.has_four_norms else 1 if widths.has_one_norm else 2) * hidden
    saved += query + key + value + widths.result  # query, key and value, and what attention returns
    saved += (2 if width == 4 else 3) * latents  # before their norms, cast to fp32, and behind them
    names_linears_apart = widths.has_head_norms or widths.has_fused_qkv
    if names_linears_apart:  # query and key before their norm; or the result of the fused linear
        saved += query + key
    saved += widths.mlp_tensors * mlp
    if adapter:
        saved += branches * config.lora_rank  # A x of each
    # Not compiled, norms in 16 bits keep their inputs as casts to fp32.
    keeps_outputs = widths.norms_read_outputs and (compiled or width == 4)
    if adapter == "dora" and latents:  # outputs: queries before their rotation, one projection's, latents
        saved += hidden + query + (0 if width == 4 else latents)
    elif adapter == "dora":  # outputs, for the gradients of magnitudes: query, key, and one projection's
        saved += 0 if keeps_outputs or widths.experts_per_token else hidden
        saved += 0 if names_linears_apart else query + key
    widens = widths.widens_product and precision.autocast == torch.float16
    if widens:  # up in fp32; and DoRA's output of it in fp16
        saved += (2 if adapter == "dora" else 1) * mlp
    if widens and widths.widens_inputs:  # the same of gate, query and key, and DoRA's output of values
        saved += mlp + query + key + (mlp + query + 2 * key if adapter == "dora" else 0)
    if widths.is_eager or not _takes_grouped_heads(precision, gpu):
        saved += 2 * query - 2 * key  # keys and values, expanded to the query heads
    if widths.experts_per_token:
        saved += (widths.experts_per_token + 1) * hidden  # the result of each expert
        if config.lora_expert_rank:  # x of each expert, and A x of gate and up, and of down
            saved += widths.experts_per_token * (hidden + 2 * config.lora_expert_rank)
            if adapter == "dora":  # outputs, for the gradients of magnitudes
                saved += widths.experts_per_token * hidden + 2 * mlp
    elif not compiled:
        saved += mlp  # the activation function's result
    if not compiled:
        saved += 2 * hidden  # states in the norms
        if adapter == "dora" and not latents:
            saved += (0 if keeps_outputs else hidden) + key
        if is_autocast:  # norms and rotations in fp32; a cast of x for each linear
            saved += 7 * hidden + query + key
    per_token: float = saved * width
    if widths.has_router_loss:  # probabilities of all experts
        per_token += widths.experts * stream
    if not widths.has_one_norm:  # the sum of input and attention
        per_token += hidden * stream
    backward: float = hidden * stream  # the gradient of the layer's result
    if not widths.is_eager:
        per_token += 8 * widths.heads  # the softmax's two numbers
    elif compiled:
        per_token += 2 * width * widths.heads * tokens  # scores
    else:  # also what the cap and the softmax make of them, in fp32, and its gradients
        per_token += 8 * widths.heads * tokens
        backward += (9 if width == 4 else 7) * widths.heads * tokens
    backward += per_token
    if widths.experts_per_token:
        backward += (mlp + 2 * widths.experts_per_token * hidden) * width
        if config.lora_expert_rank:  # results of base and branch, apart: of gate and up
            backward += 2 * mlp * width
            if adapter == "dora":  # outputs times their gradients in fp32, and not compiled both factors
                backward += 2 * mlp * 4 * (1 if compiled else 3)
    else:
        backward += mlp * width * (2 if widths.has_fused_gate or not compiled else 1)
    if adapter and not config.method.quantizer:  # results of base and branch, apart
        backward += (5 * mlp + hidden) * width
    if adapter == "dora" and is_autocast and not compiled:
        backward += 1.5 * mlp * width  # outputs in fp32 beside their gradients
    if widens:  # gradients of the product and of its two factors, in fp32
        backward += 3 * mlp * width
    if config.wrap_policy == "sublayer":
        backward += 2 * mlp * width
    forward = (((2 if compiled else 4) + 2 * widens) * mlp + 3 * hidden) * width
    forward += 2 * widths.experts_per_token * hidden * width  # x and the result of each expert
    # Latent attention puts its keys together from results of two linears.
    projected = query + value + (latents or key) + widths.result
    outputs = hidden + max(widths.experts_per_token, 1) * hidden  # of attention, and of each expert
    kept = outputs + (widths.mlp_tensors - 1) * mlp
    if config.lora_expert_rank:  # and of both matmuls of each branch
        kept += 2 * mlp + widths.experts_per_token * (hidden + 2 * config.lora_expert_rank)
    weight = hidden * mlp * width / max(widths.experts_per_token, 1) if config.method.quantizer else 0
    grouped = widths.experts if _multiplies_grouped(precision, gpu) else min(widths.experts, 1)
    if grouped:  # gate and up of all experts are expanded at once
        weight *= 2 * grouped
    return LayerMemory(
        input=rows * hidden * stream,
        saved=rows * per_token,
        forward=rows * forward + weight,
        backward=rows * backward + (weight / 2 if grouped else 0),  # down, beside the most activations
        last_backward=rows * (hidden * stream + mlp * width),
        matmuls=rows * (projected + kept) * width,
    )


def _multiplies_grouped(precision: Precision, gpu: Gpu | None) -> bool:
    """Return whether grouped matmuls run for experts (quantization/grouped_operators.py)."""
    return gpu is not None and gpu.runs_triton and precision.matmul_dtype.itemsize == 2


def _takes_grouped_heads(precision: Precision, gpu: Gpu | None) -> bool:
    """Return whether a fused kernel takes fewer key heads than query heads (models/attention.py)."""
    return gpu is not None and gpu.runs_triton and precision.matmul_dtype.itemsize == 2


def mask_bytes(
    config: Config,
    precision: Precision,
    widths: LayerWidths,
    gpu: Gpu | None,
    tokens: int,
    has_images: bool = False,
) -> int:
    """Return the bytes of attention's masks [B, 1, T, T]: one of each kind of layer, and one as a bias.

    Only eager attention has them and, where the variable-length kernel does not run, packed rows, windows
    shorter than a sequence, and images whose tokens see each other.

    Args:
        config, precision, widths, gpu: as for `layer_memory`.
        tokens: T.
        has_images: whether a sequence may have images.
    """
    has_window = 0 < widths.window < tokens
    # The kernel runs on the GPUs, and in the dtypes, in which others take grouped heads.
    has_kernel = _takes_grouped_heads(precision, gpu) and not widths.drops_scores
    has_kernel = has_kernel and (widths.passes_row_bounds or not config.packing)
    has_kernel = has_kernel and (widths.passes_window or not widths.window)
    marks_images = has_images and widths.sees_whole_image
    if not widths.is_eager and (has_kernel or not (config.packing or has_window or marks_images)):
        return 0
    # Masks with images are ours (models/image_attention.py): both kinds share one that no window cuts.
    kinds = 2 if has_window or (widths.window and not marks_images) else 1
    return config.batch_size * tokens**2 * (kinds + precision.matmul_dtype.itemsize)
