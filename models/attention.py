"""Choose the attention of a training run, and register four kinds with transformers.

`attend_fused`: PyTorch's scaled_dot_product_attention with transformers' masks, by a fused kernel on any GPU.
`attend_causally`: the same without masks, for sequences that hold one row each. `attend_within_rows`:
PyTorch's variable-length kernel, which computes no scores between packed rows, and none beyond a sliding
window. `attend_causally` has two names: they say how the images of a micro-batch reach it, as masks or as
arguments for the kernel (models/image_attention.py).

All other cases use the family's own attention, `attend_fused` in most, with transformers' masks: packed rows
or a sliding window on a GPU before Ampere, on a CPU or in fp32; a cap on scores; dropout of scores; packed
rows of a family whose layers do not hand on the rows' bounds (Nemotron, StableLM); a window that layers do
not hand on (Qwen2-MoE). The masks are [B, 1, T, T] booleans, made once per micro-batch and kind of layer, and
shared by the layers. To decide whether a mask must separate rows, transformers looks for positions that start
again (masking_utils.find_packed_sequence_indices, packed rows or not): the host waits for the GPU once per
kind, before the first layer. transformers skips this for an implementation that has no mask function, such as
the last three here. All of them take sinks (models/sinks.py).

Shapes: B sequences of a batch, T tokens of a sequence, H query heads, K key and value heads, D features of a
head, N rows. In GLM-4.7-Flash's family a head's value may have another number of features, V; elsewhere V is
D.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from files.config_parts import text_config
from models.family import CAUSAL, CAUSAL_VARLEN, FUSED, VARLEN, Family
from models.sinks import attend_with_sinks, takes_sinks
from models.varlen import VARLEN_OPTIONS, attend_images, has_varlen
from models.wide_linears import power_of_two_below
from quantization.operator_registry import compute_dtype

# What transformers' attention reads of a module whose keys and values have as many heads as its queries.
_UNGROUPED = nn.Module()


def choose_attention(
    config: PretrainedConfig, family: Family, dtype: torch.dtype, packing: bool, max_sequence_length: int
) -> str:
    """Return the attention for this hardware, by its name in transformers: one of ours or the family's.

    Args:
        config: the model's configuration.
        family: the model's family.
        dtype: of the matmuls.
        packing: whether a sequence may hold several rows.
        max_sequence_length: most tokens of a sequence in training.
    """
    if family.attention != FUSED:
        return family.attention
    takes_images = family.vision is not None and family.vision.sees_whole_image
    config = text_config(config)
    window = getattr(config, "sliding_window", None) or None  # 0 in Qwen2-MoE's configs without a window
    if window is not None and not family.passes_window:
        return family.attention  # also for short sequences: those of an evaluation may be longer
    is_causal = not packing and (window is None or max_sequence_length <= window)
    if is_causal and not takes_images:
        return CAUSAL
    head_dim = max(family.head_sizes(config))  # the kernel's: `attend_within_rows` pads the smaller one
    suits = (
        (family.passes_row_bounds or not (packing or takes_images))
        and not getattr(config, "attention_dropout", 0)  # ERNIE 4.5 has none
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and (head_dim <= 192 or head_dim == 256)  # between them its backward does not run on every GPU
    )
    if suits and has_varlen():
        return CAUSAL_VARLEN if is_causal else VARLEN
    return CAUSAL if is_causal else family.attention


@cache
def takes_grouped_heads(device_type: str, dtype: torch.dtype, features: int) -> bool:
    """Return whether a fused kernel of PyTorch takes fewer key and value heads than query heads.

    On a GPU the memory-efficient kernel does not. It is the only fused one before Ampere, and in fp32.

    Args:
        device_type: "cuda" for this process's GPU, or another type, whose kernels are not asked.
        dtype: of queries, keys and values.
        features: of a head.
    """
    if device_type != "cuda":
        return True
    # With gradients: flash attention of some head sizes has a forward only, on some GPUs.
    options: dict[str, Any] = {"dtype": dtype, "device": "cuda", "requires_grad": True}
    query, key = (torch.empty(1, heads, 16, features, **options) for heads in (2, 1))
    params = SDPAParams(query, key, key, None, 0.0, True, True)  # no mask, no dropout, causal, grouped
    return can_use_flash_attention(params) or can_use_cudnn_attention(params)


@torch.compiler.assume_constant_result
def _takes_grouped_heads(device_type: str, dtype: torch.dtype, features: int) -> bool:
    """Call `takes_grouped_heads`, which the compiler cannot trace, while it compiles a layer."""
    return takes_grouped_heads(device_type, dtype, features)


def _with_wide_values(attend: Callable) -> Callable:
    """Return an attention that also takes values in fp32 under autocast to fp16 (models/wide_linears.py).

    The attention is computed in fp16, whose largest number is 65,504. A sequence's values are divided by a
    power of two that makes them smaller than 2^15, and the result, in fp32, is multiplied by it: attention is
    linear in the values. Values 2^29 times smaller than the largest lose precision; no others do.
    """

    @wraps(attend)
    def attend_wide(module, query, key, value, attention_mask, **others):
        if value.dtype != torch.float32 or compute_dtype(value) == torch.float32:
            return attend(module, query, key, value, attention_mask, **others)
        dtype = compute_dtype(value)
        scale = power_of_two_below(value.detach().abs().amax((1, 2, 3), keepdim=True) / 2**14)
        result, _ = attend(module, query, key, (value / scale).to(dtype), attention_mask, **others)
        return result.float() * scale, None

    return attend_wide


@takes_sinks
@_with_wide_values
def attend_fused(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Return (attention, None): transformers' "sdpa", without scores of all tokens in memory.

    Where no fused kernel takes grouped heads, keys and values are expanded to the number of query heads.
    PyTorch's choice there is a kernel that writes the scores of all tokens, [B, H, T, T]. transformers itself
    expands them where there is a mask.

    Args:
        module: the attention module, for its number of query heads per key head.
        query: [B, H, T, D].
        key: [B, K, S, D], of S tokens.
        value: [B, K, S, V].
        attention_mask: of transformers; None = causal, and T = S or T = 1.
        others: further arguments of transformers' implementation.

    Returns:
        (result [B, T, H, V], None).
    """
    batch, heads, length, features = query.shape
    groups = heads // key.shape[1]
    fits = groups == 1 or attention_mask is not None
    if fits or _takes_grouped_heads(query.device.type, value.dtype, features):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    # Under autocast, fp32 rotary tables make queries and keys fp32; values have the linears' dtype.
    key = key.to(value.dtype)
    if length > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        others = {"is_causal": getattr(module, "is_causal", True), **others}
        return sdpa_attention_forward(_UNGROUPED, query, key, value, None, **others)
    # One token asks, so the queries of a group can stand for as many tokens, and nothing is expanded.
    queries = query.reshape(batch, heads // groups, groups, features)
    result, _ = sdpa_attention_forward(
        _UNGROUPED, queries, key, value, None, **{**others, "is_causal": False}
    )
    return result.transpose(1, 2).reshape(batch, 1, heads, value.shape[-1]), None


def attend_causally(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Return (causal attention over whole sequences, None), without left padding and without a cache.

    The arguments are transformers' (AttentionInterface).

    Args:
        query: [B, H, T, D].
        key: [B, K, T, D].
        value: [B, K, T, V].
        attention_mask: None, or in micro-batches with images one of `attention_masks`.
        sliding_window: number of last tokens that a token sees, itself included.
        others: arguments of `attend_within_rows` in micro-batches with images, or for other implementations.

    Returns:
        (result [B, T, H, V], None).
    """
    if others.get("image_queries") is not None:
        options = {"sliding_window": sliding_window, **others}
        return attend_within_rows(module, query, key, value, attention_mask, **options)
    length = query.shape[2]
    if attention_mask is None and sliding_window is not None and length > sliding_window:
        # Rare: such sequences are longer than those of training.
        positions = torch.arange(length, device=query.device)
        age = positions[:, None] - positions
        attention_mask = ((age >= 0) & (age < sliding_window))[None, None]
    return attend_fused(module, query, key, value, attention_mask, **others)


@_with_wide_values
def attend_within_rows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    image_queries: torch.Tensor | None = None,
    image_bounds: torch.Tensor | None = None,
    longest_image: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Return (causal attention, None), in which a token of a packed sequence sees only its own row.

    With `image_queries` it also sees the later tokens of its image.

    The kernel takes heads of one size. Zeros fill those of the smaller one: as features of queries and keys
    they leave the scores as they are, and as features of values they give results that are cut off.

    The arguments are transformers' (AttentionInterface).

    Args:
        query: [B, H, T, D].
        key: [B, K, T, D].
        value: [B, K, T, V].
        attention_mask, softcap: must be None.
        dropout: must be 0.
        sliding_window: number of last tokens that a token sees, itself included.
        cu_seq_lens_q: [N + 1] int32, bounds of the rows in the flattened batch of B * T tokens; the last is
            B * T. Rows without tokens are allowed. None: each sequence is a row.
        max_length_q: tokens of the longest row.
        image_queries, image_bounds, longest_image: as for `attend_images`.
        s_aux: [H], sinks; not with images.
        others: arguments for other implementations; not used.

    Returns:
        (result [B, T, H, V], None).
    """
    # transformers makes no masks for an implementation that has no mask function.
    assert attention_mask is None and not dropout and softcap is None
    batch, heads, length, _ = query.shape
    features = value.shape[-1]
    query, key, value = _with_heads_of_one_size(query, key, value)
    if cu_seq_lens_q is None:
        end = (batch + 1) * length
        cu_seq_lens_q = torch.arange(0, end, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    # Under autocast, fp32 rotary tables make queries and keys fp32; values have the linears' dtype.
    q, k, v = (x.to(value.dtype).transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
    before = -1 if sliding_window is None else sliding_window - 1  # tokens that a token sees before it
    if image_queries is not None:
        rows, images = (cu_seq_lens_q, max_length_q), (image_queries, image_bounds, longest_image)
        result, _ = attend_images(q, k, v, *rows, *images, scaling, before)
    elif s_aux is not None:
        result, _ = attend_with_sinks(q, k, v, s_aux, cu_seq_lens_q, max_length_q, scaling, before)
    else:
        assert max_length_q is not None
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        result = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=(before, 0), **VARLEN_OPTIONS)
    return result.view(batch, length, heads, -1)[..., :features], None


def _with_heads_of_one_size(*states: torch.Tensor) -> list[torch.Tensor]:
    """Return queries, keys and values with zeros appended to the heads of those that are not the widest."""
    widest = max(x.shape[-1] for x in states)
    return [F.pad(x, (0, widest - x.shape[-1])) if x.shape[-1] < widest else x for x in states]


AttentionInterface.register(FUSED, attend_fused)
AttentionMaskInterface.register(FUSED, sdpa_mask)
AttentionInterface.register(CAUSAL, attend_causally)
AttentionInterface.register(CAUSAL_VARLEN, attend_causally)
AttentionInterface.register(VARLEN, attend_within_rows)
