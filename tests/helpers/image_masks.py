"""Rows with images, padded and packed, and references of their attention by its definition."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import torch

Row = tuple[int, ...]  # the numbers of tokens of its parts; of an image a negative one

# With windows of 16 tokens: images longer than it, at a row's begin and end, of one token, side by side; and
# rows without images.
ROWS: list[Row] = [(3, -6, 2, -20, 4), (9,), (-18, 5), (2, -1, 3, -4, -5, 6), (20, -3), (4, -5)]
PACKS = [[ROWS[0], ROWS[1]], [ROWS[2], ROWS[3]], [ROWS[4], ROWS[5]]]  # 44, 44 and 32 tokens


def row_length(row: Row) -> int:
    return sum(map(abs, row))


def image_batch(
    packs: list[list[Row]], length: int | None = None
) -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    """Return (images, bounds of rows, positions in rows) of packs of rows, which padding follows.

    The images have the attributes of an ImageBatch, without pixels. Bounds end with one empty row.
    length: T; by default of the longest pack.
    """
    length = length or max(sum(map(row_length, pack)) for pack in packs)
    owners, positions = torch.zeros(2, len(packs), length, dtype=torch.int32)
    spans, bounds = [], [0]
    for index, pack in enumerate(packs):
        at = index * length
        for row in pack:
            start = at
            for part in row:
                if part < 0:
                    spans.append((start, at, at - part))
                    owners.flatten()[at : at - part] = len(spans)
                at += abs(part)
            positions.flatten()[start:at] = torch.arange(at - start)
            bounds.append(at)
        bounds.append((index + 1) * length)
    found = [torch.arange(first, end) for _, first, end in spans]
    images = SimpleNamespace(
        positions=torch.cat([torch.zeros(0, dtype=torch.int64), *found]), owners=owners, bounds=tuple(spans)
    )
    return images, torch.tensor([*bounds, bounds[-1]], dtype=torch.int32), positions.long()


def expected_mask(packs: list[list[Row]], length: int, window: int | None) -> torch.Tensor:
    """Return which tokens see which, [B, T, T], by the definition, pair by pair. Padding is one more row."""
    mask = torch.zeros(len(packs), length, length, dtype=torch.bool)
    for index, pack in enumerate(packs):
        tokens: list[tuple[int, int]] = []  # (row, image or -1) of each token
        for number, row in enumerate([*pack, (length - sum(map(row_length, pack)),)]):
            for part_number, part in enumerate(row):
                tokens += [(number, part_number if part < 0 else -1)] * abs(part)
        for q in range(length):
            for k in range(length):
                same_image = tokens[q] == tokens[k] and tokens[q][1] >= 0
                in_window = window is None or q - k < window
                mask[index, q, k] = tokens[q][0] == tokens[k][0] and in_window and (k <= q or same_image)
    return mask


def dense_attention(q, k, v, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Return attention [B, T, H, D] of q, k, v [B, heads, T, D] with a mask [B, T, T]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    probabilities = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", probabilities, v)


def reference_backward(grad, inputs, result, bounds, longest, scale, before):
    """Compute `varlen_backward` row by row, from the result and the lse that it gets."""
    query, key, value = inputs
    out, lse = result
    groups = query.shape[1] // key.shape[1]
    gradients = [torch.zeros_like(x) for x in inputs]
    for start, end in pairwise(bounds.tolist()):
        assert end - start <= longest
        own = slice(start, end)
        q, k, v = query[own], *(x[own].repeat_interleave(groups, 1) for x in (key, value))
        age = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (age < 0) | ((age > before) & (before >= 0))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        p = (scores - lse[:, own, None]).exp().masked_fill(hidden, 0)
        delta = (grad[own] * out[own]).sum(-1).T[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", grad[own], v) - delta) * scale
        gradients[0][own] = torch.einsum("hqk,khd->qhd", ds, k)
        for index, spread in (
            (1, torch.einsum("hqk,qhd->khd", ds, q)),
            (2, torch.einsum("hqk,qhd->khd", p, grad[own])),
        ):
            gradients[index][own] = spread.unflatten(1, (-1, groups)).sum(2)
    return tuple(gradients)
