"""Attention sinks: a learned logit of each head that takes part in the softmax over the keys (GPT-OSS).

    p_j = exp(score_j) / (exp(sink) + sum over keys k of exp(score_k))        result = sum over j of p_j v_j

Two ways lead to the same numbers, without the scores of all tokens in memory:

- `with_sink_key`: the sink as one more key, whose value is zero, for scaled_dot_product_attention. Queries
  get a further feature that holds sink / scale. It is 1 in that key, and 0 in all others. So the query heads
  of a group still share keys.
- `attend_with_sinks`: the variable-length kernel without the sink, and its log-sum-exp l of the scores:

      result = exp(l - l') o    l' = log(exp(l) + exp(sink))

  Its backward is the kernel's own, with this result and l' (`varlen_backward`). A sink's gradient is that of
  a key with the value zero, summed over the queries:

      d sink = - sum over tokens of exp(sink - l') <d result, result>

Shapes: B sequences, H query heads, K key and value heads, T queries, S keys, D features of a head, N tokens
of a flattened batch, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from models.varlen import VARLEN_OPTIONS, varlen_backward

ALIGNMENT = 8  # fused kernels take heads of a multiple of this many features


def takes_sinks(attend: Callable) -> Callable:
    """Return an attention that also takes transformers' argument `s_aux`, the sinks [H]; None = without."""

    @wraps(attend)
    def attend_with_key(module, query, key, value, attention_mask, s_aux=None, **others):
        if s_aux is None:
            return attend(module, query, key, value, attention_mask, **others)
        mask = mask_rows(query, key, attention_mask, others.get("cu_seq_lens_q"))
        inputs = with_sink_key(query, key, value, mask, s_aux, others["scaling"])
        result, _ = attend(module, *inputs, **others)
        return result[..., : value.shape[-1]], None

    return attend_with_key


def mask_rows(query: Tensor, key: Tensor, mask: Tensor | None, bounds: Tensor | None) -> Tensor | None:
    """Return the mask of attention, in which a token of a packed sequence sees only its own row.

    transformers does not look for packed rows when it makes the masks of GPT-OSS.

    Args:
        query, key: [B, H, T, D] and [B, K, S, D].
        mask: transformers' mask [B or 1, 1, T, S], True where a query sees a key; None = causal, and T = S or
            T = 1.
        bounds: [R + 1] int32, where rows begin and end in the flattened batch; None = rows are not packed.

    Returns None if the only query sees all keys.
    """
    batch, _, queries, _ = query.shape
    if mask is None and queries > 1:
        mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or bounds is None:
        return mask
    tokens = torch.arange(batch * queries, dtype=bounds.dtype, device=query.device)
    rows = torch.bucketize(tokens, bounds, right=True).view(batch, 1, queries)
    return mask & (rows[..., None] == rows[:, :, None])


def with_sink_key(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return query, key, value and mask with the sinks as the last key, padded to aligned features.

    Args:
        query: [B, H, T, D].
        key, value: [B, K, S, D].
        mask: [B or 1, 1, T, S], True where a query sees a key; None = all see all.
        sinks: [H].
        scale: of the scores.
    """
    features = query.shape[3]
    if mask is not None:
        mask = F.pad(mask, (0, 1), value=True)
    more = ALIGNMENT - features % ALIGNMENT  # at least one
    column = (sinks.to(query.dtype) / scale)[:, None, None].expand(*query.shape[:3], 1)
    query = F.pad(torch.cat([query, column], -1), (0, more - 1))
    sink_key = F.pad(key.new_ones(*key.shape[:2], 1, 1), (features, more - 1))
    key = torch.cat([F.pad(key, (0, more)), sink_key], 2)
    return query, key, F.pad(value, (0, more, 0, 1)), mask


@torch.library.custom_op(
    "fsdp_finetune::attend_with_sinks",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor sinks, Tensor bounds, SymInt longest,"
    " float scale, SymInt before) -> (Tensor, Tensor)",
)
def attend_with_sinks(query, key, value, sinks, bounds, longest, scale, before):
    """Return causal attention within rows, with a sink in each softmax.

    Args:
        query: [N, H, D] in 16 bits.
        key, value: [N, K, D].
        sinks: [H].
        bounds: [R + 1] int32; where rows begin and end. Rows without tokens are allowed.
        longest: number of tokens of the longest row.
        scale: of the scores.
        before: number of tokens before a token that it sees; -1 = all.

    Returns:
        (result [N, H, D], l' [H, N] in fp32, which has no gradient).
    """
    sizes = (bounds, bounds, longest, longest)
    options = {"scale": scale, "return_aux": AuxRequest(lse=True), **VARLEN_OPTIONS}
    result, lse = varlen_attn(query, key, value, *sizes, window_size=(before, 0), **options)
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return (result * (lse - total).exp().T[..., None]).to(result.dtype), total


@attend_with_sinks.register_fake
def _fake_attend_with_sinks(query, *others):
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, sinks, bounds, ctx.longest, ctx.scale, ctx.before = inputs
    ctx.save_for_backward(query, key, value, sinks, bounds, *output)


def _backward(ctx, grad, _):
    query, key, value, sinks, bounds, result, total = ctx.saved_tensors
    sizes = (bounds, ctx.longest, ctx.scale, ctx.before)
    gradients = varlen_backward(grad.contiguous(), (query, key, value), (result, total), *sizes)
    of_sinks = None
    if ctx.needs_input_grad[3]:
        shares = (sinks.to(total.dtype)[:, None] - total).exp()  # [H, N]
        products = (grad.to(total.dtype) * result).sum(-1).T
        of_sinks = -(shares * products).sum(1).to(sinks.dtype)
    return *gradients, of_sinks, None, None, None, None


attend_with_sinks.register_autograd(_backward, setup_context=_save_for_backward)
