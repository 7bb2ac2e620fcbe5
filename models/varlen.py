"""PyTorch's variable-length attention: where it can be used, and its use for the tokens of images.

Shapes: N tokens of a flattened batch, H query heads, K key and value heads, D features of a head, R rows,
I images, M tokens of images without the last one of each.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

_PARAMETERS = tuple(inspect.signature(varlen_attn).parameters)
# Newer versions of torch need this for fewer key and value heads than query heads; versions up to 2.11 have
# no flag.
VARLEN_OPTIONS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _PARAMETERS else {}


def has_varlen() -> bool:
    """Return whether PyTorch's variable-length attention can be used: from Ampere and torch 2.11 on."""
    built = torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    return built and varlen_takes_window() and torch.cuda.get_device_capability() >= (8, 0)


def varlen_takes_window() -> bool:
    """Return whether PyTorch's variable-length attention takes a scale and a window: from torch 2.11 on."""
    return {"scale", "window_size"} <= set(_PARAMETERS)


def varlen_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor],
    bounds: Tensor,
    longest: int,
    scale: float,
    before: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value of `varlen_attn` with the window (before, 0).

    The kernel makes each probability anew, as exp(score - lse). So `result` may be that of a softmax over
    more keys than these: then the gradients are the part that goes through these keys.

    torch's own backward is not used, because it takes no gradient of lse.

    Args:
        grad: [N, H, D], of the result.
        inputs: query [N, H, D], key and value [N, K, D].
        result: (result [N, H, D], lse [H, N]).
        bounds, longest, scale, before: as for `attend_images`.
    """
    # Both belong to dropout, which there is none of.
    random_state = torch.zeros(2, dtype=torch.uint64, device=grad.device)
    unused = torch.empty(0, device=grad.device)
    sizes = (bounds, bounds, longest, longest)
    is_causal = before == -1
    return torch.ops.aten._flash_attention_backward(
        *(grad, *inputs, *result, *sizes, 0.0, is_causal, random_state, unused),
        scale=scale,
        window_size_left=before,
        window_size_right=0,
    )


@torch.library.custom_op(
    "fsdp_finetune::attend_images",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor bounds, SymInt longest, Tensor image_queries,"
    " Tensor image_bounds, SymInt longest_image, float scale, SymInt before) -> (Tensor, Tensor)",
)
def attend_images(
    query, key, value, bounds, longest, image_queries, image_bounds, longest_image, scale, before
):
    """Return causal attention within rows, in which a token also sees the later tokens of its image.

    The kernel runs twice. The first call is causal attention. In the second one, each token of an image
    attends to the later tokens of its image alone. These are never among the keys of the first call. So one
    softmax over both sets of keys follows from both results o and both logarithms l of sums of exp(score):

        o = exp(l1 - l) o1 + exp(l2 - l) o2,    l = log(exp l1 + exp l2)

    The tokens of the second call are in reverse order. There the queries are the tokens n - 1, ..., 1 of an
    image, and the keys n, ..., 2, and what a query may see are the keys up to its own index: causal attention
    again. The second call costs as much as the pairs of the images' own tokens.

    Args:
        query: [N, H, D] in 16 bits.
        key, value: [N, K, D].
        bounds: [R + 1] int32; where rows begin and end. Rows without tokens are allowed.
        longest: number of tokens of the longest row.
        image_queries: [M] int64; indices of the tokens of all images, without the last one of each. Each
            image's tokens are consecutive in the batch, and descend here.
        image_bounds: [I + 1] int32; where images begin and end in `image_queries`.
        longest_image: most tokens of an image in `image_queries`.
        scale: of the scores.
        before: number of tokens before a token that it sees; -1 = all.

    Returns:
        (result [N, H, D], lse [H, N]: l in fp32, which has no gradient).
    """
    options = {"scale": scale, "return_aux": AuxRequest(lse=True), **VARLEN_OPTIONS}
    sizes = (bounds, bounds, longest, longest)
    result, lse = varlen_attn(query, key, value, *sizes, window_size=(before, 0), **options)
    inputs = _select_images(image_queries, query, key, value)
    image_sizes = (image_bounds, image_bounds, longest_image, longest_image)
    later, later_lse = varlen_attn(*inputs, *image_sizes, window_size=(-1, 0), **options)
    earlier, earlier_lse = _select_queries(image_queries, result, lse)
    both_lse = torch.logaddexp(earlier_lse, later_lse)
    earlier_share, later_share = ((part - both_lse).exp().T[..., None] for part in (earlier_lse, later_lse))
    both = earlier * earlier_share + later * later_share
    return (
        result.index_copy_(0, image_queries, both.to(result.dtype)),
        lse.index_copy_(1, image_queries, both_lse),
    )


def _select_images(
    image_queries: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of the second call."""
    image_keys = image_queries + 1
    return (
        query.index_select(0, image_queries),
        key.index_select(0, image_keys),
        value.index_select(0, image_keys),
    )


def _select_queries(image_queries: Tensor, result: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the results of the queries of the second call, [M, H, D] and [H, M]."""
    return result.index_select(0, image_queries), lse.index_select(1, image_queries)


@attend_images.register_fake
def _fake_attend_images(query, *others):
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op(
    "fsdp_finetune::attend_images_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor result, Tensor lse, Tensor bounds,"
    " SymInt longest, Tensor image_queries, Tensor image_bounds, SymInt longest_image, float scale,"
    " SymInt before) -> (Tensor, Tensor, Tensor)",
)
def attend_images_backward(
    grad, query, key, value, result, lse, bounds, longest, image_queries, image_bounds, longest_image,
    scale, before,
):  # fmt: skip
    """Return the gradients of query, key and value of `attend_images`, for the gradient of its result."""
    inputs, outputs = (query, key, value), (result, lse)
    gradients = varlen_backward(grad, inputs, outputs, bounds, longest, scale, before)
    later = varlen_backward(
        grad.index_select(0, image_queries),
        _select_images(image_queries, *inputs),
        _select_queries(image_queries, *outputs),
        image_bounds,
        longest_image,
        scale,
        -1,
    )
    image_keys = image_queries + 1
    for gradient, indices, part in zip(
        gradients, (image_queries, image_keys, image_keys), later, strict=True
    ):
        gradient.index_add_(0, indices, part)  # each index comes once, so the sum has one order
    return gradients


@attend_images_backward.register_fake
def _fake_attend_images_backward(grad, query, key, value, *others):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, bounds, longest, image_queries, image_bounds, longest_image, scale, before = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, image_queries, image_bounds)
    ctx.sizes = longest, longest_image, scale, before


def _backward(ctx, grad, _):
    *tensors, bounds, image_queries, image_bounds = ctx.saved_tensors
    longest, longest_image, scale, before = ctx.sizes
    images = (image_queries, image_bounds, longest_image)
    gradients = attend_images_backward(grad.contiguous(), *tensors, bounds, longest, *images, scale, before)
    return *gradients, *[None] * 7


attend_images.register_autograd(_backward, setup_context=_save_for_backward)
