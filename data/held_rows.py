"""Hold rows of the training data back, to evaluate on (--eval_share)."""

from __future__ import annotations

import torch

from data.formats import Rendered
from options.errors import UserError


def split_sets(
    sets: list[list[Rendered]], names: list[str], share: float, seed: int
) -> tuple[list[list[Rendered]], list[list[Rendered]]]:
    """Return (rows to train on, rows to evaluate on) of each set, all in their order.

    Each set is split by itself, so that no row that a mixture repeats is on both sides. No image of a set is
    on both sides either. Raises UserError if there would be nothing to evaluate on, or a set would have
    nothing to train on.
    """
    counts = [round(share * len(rendered)) for rendered in sets]
    of_names = [f" of {name}" if len(sets) > 1 else "" for name in names]
    for of_name, count, rendered in zip(of_names, counts, sets, strict=True):
        if count == len(rendered):
            raise UserError(
                f"--eval_share {share}: of {len(rendered)} rows{of_name} it leaves none to train on"
            )
    if not any(counts):
        raise UserError(f"--eval_share {share}: of {sum(map(len, sets))} rows it leaves none to evaluate on")
    halves = [_split_rows(rendered, count, seed) for rendered, count in zip(sets, counts, strict=True)]
    for of_name, (training, _), count in zip(of_names, halves, counts, strict=True):
        if count and not training:
            raise UserError(
                f"--eval_share {share}: all rows{of_name} show the same images, so it leaves none to train on"
            )
    return [training for training, _ in halves], [held for _, held in halves]


def _split_rows(rendered: list[Rendered], count: int, seed: int) -> tuple[list[Rendered], list[Rendered]]:
    """Return (rows to train on, about `count` rows to evaluate on), both in their order.

    They are `count`, or more if the last chosen one shares an image with others. The choice depends only on
    the seed, the rows that share images, the number of rows and the count.
    """
    # This random stream differs from those of the data order, which are seeded from (seed, epoch).
    generator = torch.Generator().manual_seed((seed * 1_000_003 - 1) % 2**63)
    groups, chosen = _group_by_images(rendered), set[int]()
    for i in torch.randperm(len(groups), generator=generator).tolist():
        if len(chosen) >= count:
            break
        chosen.update(groups[i])
    return [r for i, r in enumerate(rendered) if i not in chosen], [rendered[i] for i in sorted(chosen)]


def _group_by_images(rendered: list[Rendered]) -> list[list[int]]:
    """Return the indices of rows, those that share images together, in the order of their first rows."""
    group_of: dict[int, list[int]] = {}
    first_row: dict[bytes, int] = {}  # by image
    for i, row in enumerate(rendered):
        group_of[i] = [i]
        for ref in row.images:
            known = group_of[first_row.setdefault(ref.digest, i)]
            own = group_of[i]
            if known is not own:
                known += own
                group_of |= dict.fromkeys(own, known)
    return list({id(group): group for group in group_of.values()}.values())
