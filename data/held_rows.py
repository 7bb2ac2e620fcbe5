"""Hold rows of the training data back, to evaluate on (--eval_share)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data.formats import Rendered
from data.image_digests import digest_whole_images
from options.errors import UserError

Group = list[tuple[int, int]]  # (set, row) of rows that share images


def split_sets(
    sets: list[list[Rendered]], names: list[str], share: float, seed: int
) -> tuple[list[list[Rendered]], list[list[Rendered]]]:
    """Return (rows to train on, rows to evaluate on) of each set, all in their order.

    Each set is split by itself, so that no row that a mixture repeats is on both sides. No image is on both
    sides either, of one set or of two. Raises UserError if there would be nothing to evaluate on, or a set
    would have nothing to train on.
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
    chosen = _choose_rows(sets, counts, seed)
    for of_name, held, rendered in zip(of_names, chosen, sets, strict=True):
        if len(held) == len(rendered):
            raise UserError(
                f"--eval_share {share}: all rows{of_name} show the same images, so it leaves none to train on"
            )
    training = [
        [row for i, row in enumerate(rendered) if i not in held]
        for rendered, held in zip(sets, chosen, strict=True)
    ]
    return training, [
        [rendered[i] for i in sorted(held)] for rendered, held in zip(sets, chosen, strict=True)
    ]


def _choose_rows(sets: Sequence[list[Rendered]], counts: Sequence[int], seed: int) -> list[set[int]]:
    """Return the indices of the rows of each set to evaluate on: about as many as its count.

    They are so many, or more if a chosen row shares an image with others, also of another set. The choice
    depends only on the seed, the rows that share images, the numbers of rows and the counts.
    """
    groups, chosen = _group_by_images(sets), [set[int]() for _ in sets]
    for number, count in enumerate(counts):
        own = [group for group in groups if any(of == number for of, _ in group)]
        # This random stream differs from those of the data order, which are seeded from (seed, epoch).
        generator = torch.Generator().manual_seed((seed * 1_000_003 - 1) % 2**63)
        for i in torch.randperm(len(own), generator=generator).tolist():
            if len(chosen[number]) >= count:
                break
            for of, row in own[i]:
                chosen[of].add(row)
    return chosen


def _group_by_images(sets: Sequence[list[Rendered]]) -> list[Group]:
    """Return the rows of all sets, those that share images together, in the order of their first rows."""
    digests = digest_whole_images(ref for rendered in sets for row in rendered for ref in row.images)
    group_of: dict[tuple[int, int], Group] = {}
    first_row: dict[bytes, tuple[int, int]] = {}  # by image
    for number, rendered in enumerate(sets):
        for i, row in enumerate(rendered):
            own = group_of[number, i] = [(number, i)]
            for ref in row.images:
                known = group_of[first_row.setdefault(digests[ref.path, ref.start], (number, i))]
                if known is not own:
                    known += own
                    group_of |= dict.fromkeys(own, known)
                    own = known
    return list({id(group): group for group in group_of.values()}.values())
