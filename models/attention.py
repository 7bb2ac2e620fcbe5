"""Which attention a training run computes with, and the two kinds that need no mask.

`attend_causally`: PyTorch's causal attention, of lines that are one row each. `attend_within_rows`: its
variable-length kernel, which never computes scores between packed rows, and none beyond a sliding window.

Everything else - packed rows or a sliding window on a GPU before Ampere, on a CPU or in fp32, a cap on scores,
dropout of scores - goes by the family's own attention, with transformers' masks: [B, 1, T, T] booleans, made once per
micro-batch and kind of layer, and shared by the layers. To know whether a mask must keep rows apart transformers
looks for positions that begin again, and a GPU is waited for, once per kind, before the first layer
(masking_utils.find_packed_sequence_indices, packed rows or not). It does none of that for an implementation that it
has no mask function for, as ours.

Shapes: B lines of a batch, T tokens of a line, H query heads, K key and value heads, D features of a head, N rows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models.family import Family

# The names that transformers knows ours by.
CAUSAL, VARLEN = "causal_lines", "varlen_rows"
# Up to 2.11 torch takes fewer key and value heads than query heads without being told.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def choose_attention(
    config: PretrainedConfig, family: Family, dtype: torch.dtype, packing: bool, longest: int
) -> str:
    """By transformers' name, what computes attention on this hardware. dtype: of the matmuls; longest: tokens that
    a line of training has at most."""
    if family.attention != "sdpa":
        return family.attention
    window = getattr(config, "sliding_window", None)
    if not packing and (window is None or longest <= window):
        return CAUSAL
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    suits = (
        not config.attention_dropout
        and dtype in (torch.float16, torch.bfloat16)
        and head % 8 == 0
        and (head <= 192 or head == 256)  # between them its backward does not run on every GPU
    )
    return VARLEN if suits and has_varlen() else family.attention


def has_varlen() -> bool:
    """Whether this process computes on GPUs that the kernel runs on: Ampere and newer."""
    built = torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability() >= (8, 0)


def attend_causally(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Causal attention of whole lines, no padding on their left and no cache: (result [B, T, H, D], None). query:
    [B, H, T, D], key and value: [B, K, T, D]; the arguments are transformers' (AttentionInterface)."""
    assert attention_mask is None
    length = query.shape[2]
    if sliding_window is not None and length > sliding_window:  # longer than training's, so rare
        at = torch.arange(length, device=query.device)
        attention_mask = ((at <= at[:, None]) & (at > at[:, None] - sliding_window))[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **others)


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
    **others,
) -> tuple[torch.Tensor, None]:
    """Causal attention within rows: (result [B, T, H, D], None). query: [B, H, T, D], key and value: [B, K, T, D].

    The arguments are transformers' (AttentionInterface), `others` those of other implementations. cu_seq_lens_q
    [N + 1] int32: where rows begin and end in the batch as one line of B * T tokens, to the last of them;
    max_length_q: of the longest. Rows of no tokens are allowed. Without them each line is a row. sliding_window:
    the last tokens that a token sees, itself included.
    """
    # transformers makes no masks for an implementation that it has no mask function for.
    assert attention_mask is None and not dropout and softcap is None
    batch, heads, length, features = query.shape
    if cu_seq_lens_q is None:
        ends = (batch + 1) * length
        cu_seq_lens_q = torch.arange(0, ends, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    # Under autocast rotary tables in fp32 make queries and keys fp32; values are as the linears computed them.
    q, k, v = (x.to(value.dtype).transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before and after its own
    assert max_length_q is not None
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    result = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=window, **_GROUPED)
    return result.view(batch, length, heads, features), None  # type: ignore[union-attr] # a tensor: no aux


AttentionInterface.register(CAUSAL, attend_causally)
AttentionInterface.register(VARLEN, attend_within_rows)
