"""Read --dataset: one set, or a mixture of sets that a run trains on together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from data.dataset_names import Share, split_mixture
from data.examples import Examples, read_examples
from data.formats import FORMATS, Rendered
from data.reading import ReadingOptions
from options.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """The sets of --dataset as texts, all of one format; most often there is one.

    Attributes:
        shares: the names of the sets, hub sets with their commits, and their weights.
        sets: the sets, in the same order.
    """

    shares: list[Share]
    sets: list[Examples]

    @property
    def name(self) -> str:
        """--dataset as config.yaml records it, with commits."""
        return ",".join(map(str, self.shares))

    @property
    def format(self) -> str:
        """The name of the format of all sets."""
        return self.sets[0].format

    @property
    def empty_thinking(self) -> str:
        """What --empty_thinking is for the run: "prompt" if an answer of any set has an empty thought."""
        found = {examples.context.empty_thinking for examples in self.sets}
        return "prompt" if "prompt" in found else self.sets[0].context.empty_thinking

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines to print at start; those of a mixture name their set."""
        if len(self.sets) == 1:
            return self.sets[0].remarks
        named = (
            f"data: {share.name}: {remark.removeprefix('data: ')}"
            for share, examples in zip(self.shares, self.sets, strict=True)
            for remark in examples.remarks
        )
        return tuple(named)


def read_mixture(dataset: str, options: ReadingOptions) -> Mixture:
    """Read the sets of --dataset, and render each row as a text of one format.

    Raises UserError for anything wrong with a set or a weight, and if the sets do not fit one format.
    options: how each set is read; samples: number of rows of each set.
    """
    shares = split_mixture(dataset)
    if len(shares) > 1:
        columns = dataclasses.replace(options.columns, is_of_mixture=True)
        options = dataclasses.replace(options, columns=columns)
    sets = [read_examples(share.name, options) for share in shares]
    _check_one_template(dataset, shares, sets)
    named = zip(shares, sets, strict=True)
    return Mixture([dataclasses.replace(share, name=examples.name) for share, examples in named], sets)


def read_each_row_once(dataset: str, options: ReadingOptions) -> Examples:
    """Read the rows of a value of --dataset to evaluate or to ask with; of several sets, all rows together.

    Raises UserError as `read_mixture` does, and for weights, which have no effect. options: how each set is
    read; samples: of several sets, the number of rows of all of them, each in proportion to its size.
    """
    mixture, samples = read_mixture(dataset, options), options.samples
    if len(mixture.sets) == 1:
        return mixture.sets[0]
    if any(share.number for share in mixture.shares):
        names = ",".join(share.name for share in mixture.shares)
        raise UserError(
            f"--dataset {dataset}: weights have no effect here, where each row comes once; leave them out:"
            f" {names}"
        )
    set_names = [share.name for share in mixture.shares]
    rendered = join_evenly([examples.rendered for examples in mixture.sets], set_names)
    rendered = rendered[:samples] if samples > 0 else rendered
    return dataclasses.replace(mixture.sets[0], rendered=rendered, remarks=mixture.remarks, name=mixture.name)


def _check_one_template(dataset: str, shares: Sequence[Share], sets: Sequence[Examples]) -> None:
    """Raise UserError if the sets have different formats, or dialogues with different markers.

    A run has one prompt template, which it records, and with which generate.py asks.
    """
    templates = [_describe_template(examples) for examples in sets]
    if len({*templates}) > 1:
        kinds = ", ".join(f"{share.name} is {kind}" for share, kind in zip(shares, templates, strict=True))
        raise UserError(
            f"--dataset {dataset}: its sets do not fit one prompt template: {kinds}; --dataset_format names"
            " one for all, or write the rows in one form"
        )


def _describe_template(examples: Examples) -> str:
    """Return a format's name, with the markers of a dialogue."""
    markers = examples.context.markers if FORMATS[examples.format].has_markers else ()
    return " ".join([examples.format, *map(repr, markers)])


def join_evenly(sets: Sequence[list[Rendered]], names: Sequence[str] = ()) -> list[Rendered]:
    """Return all rows, so that the first ones, however many, are of all sets in proportion to their sizes.

    names: of the sets, which the rows of several ones get; () = they get none.
    """
    if len(sets) == 1:
        return sets[0]
    if names:
        sets = [
            [dataclasses.replace(row, set_name=name) for row in rows]
            for rows, name in zip(sets, names, strict=True)
        ]
    places = [
        ((i + 0.5) / len(rows), number, i) for number, rows in enumerate(sets) for i in range(len(rows))
    ]
    return [sets[number][i] for _, number, i in sorted(places)]
