"""Hold rows of the training data back, to evaluate on (--eval_share, --eval_fold)."""

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
    return _divide(sets, chosen)


def split_fold(
    sets: list[list[Rendered]], names: list[str], fold: str, seed: int
) -> tuple[list[list[Rendered]], list[list[Rendered]]]:
    """Return (rows to train on, rows to evaluate on) of each set, all in their order.

    The N folds share no row and no image, and have all rows together. Each set is split by itself: its parts
    of the folds differ by at most 1 row, or by the rows that share an image. Raises UserError for a set of
    fewer than N groups of rows, and for one that is in a single fold with all of its rows.

    Args:
        sets, names: the rows of each set, and what errors call it.
        fold: K/N, the K-th of N folds.
        seed: with the groups of rows that share images, it decides which fold a row is in.
    """
    number, count = map(int, fold.split("/"))
    groups = _group_by_images(sets)
    for i, (rendered, name) in enumerate(zip(sets, names, strict=True)):
        most = sum(any(of == i for of, _ in group) for group in groups)
        if most < count:
            of_name = f" of {name}" if len(sets) > 1 else ""
            shared = ", some of which share images," if most < len(rendered) else ""
            raise UserError(
                f"--eval_fold {fold}: {len(rendered)} rows{of_name}{shared} make at most {most} folds"
            )
    held = _deal_folds(sets, groups, count, seed)[number - 1]
    for rows, rendered, name in zip(held, sets, names, strict=True):
        if len(rows) == len(rendered):
            raise UserError(f"--eval_fold {fold}: it has all rows of {name}, and leaves none to train on")
    return _divide(sets, held)


def _deal_folds(
    sets: Sequence[list[Rendered]], groups: list[Group], count: int, seed: int
) -> list[list[set[int]]]:
    """Return `count` folds: the indices of the rows of each set in it.

    The groups of a set, in random order, go to the fold that has the fewest rows of this set.
    """
    folds = [[set[int]() for _ in sets] for _ in range(count)]
    left = groups
    for number in range(len(sets)):
        own = [group for group in left if any(of == number for of, _ in group)]
        left = [group for group in left if all(of != number for of, _ in group)]
        for i in torch.randperm(len(own), generator=_make_generator(seed)).tolist():
            fold = min(folds, key=lambda fold: len(fold[number]))
            for of, row in own[i]:
                fold[of].add(row)
    return folds


def _divide(
    sets: Sequence[list[Rendered]], held: Sequence[set[int]]
) -> tuple[list[list[Rendered]], list[list[Rendered]]]:
    """Return (rows to train on, rows to evaluate on) of each set. held: the indices of the latter."""
    pairs = list(zip(sets, held, strict=True))
    training = [[row for i, row in enumerate(rendered) if i not in rows] for rendered, rows in pairs]
    return training, [[rendered[i] for i in sorted(rows)] for rendered, rows in pairs]


def _make_generator(seed: int) -> torch.Generator:
    """Return the random stream of splits. Those of the data order are seeded from (seed, epoch)."""
    return torch.Generator().manual_seed((seed * 1_000_003 - 1) % 2**63)


def _choose_rows(sets: Sequence[list[Rendered]], counts: Sequence[int], seed: int) -> list[set[int]]:
    """Return the indices of the rows of each set to evaluate on: about as many as its count.

    They are so many, or more if a chosen row shares an image with others, also of another set. The choice
    depends only on the seed, the rows that share images, the numbers of rows and the counts.
    """
    groups, chosen = _group_by_images(sets), [set[int]() for _ in sets]
    for number, count in enumerate(counts):
        own = [group for group in groups if any(of == number for of, _ in group)]
        for i in torch.randperm(len(own), generator=_make_generator(seed)).tolist():
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
