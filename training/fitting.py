"""Finds the cheapest changes of options with which a run fits a machine.

The changes and their order are those of training/memory_changes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from launch.memory import GIB
from monitoring.memory_model import MemoryEstimate
from options.config import Config
from options.errors import UserError
from training.machine import Machine, find_largest, fits
from training.memory_changes import CHANGES, SHORTER_CONTEXT, SHORTEST_CONTEXT, Change, Situation

ORDER = (*CHANGES, SHORTER_CONTEXT)  # from the cheapest
MAX_COMBINATIONS = 3
MOST_GPUS = 64  # that are tried


@dataclass(frozen=True)
class Proposal:
    """Changes with which a run fits.

    Attributes:
        options: {option: new value}.
        costs: {option that a change is named by: what it costs, in words}, from the cheapest.
        estimate: the memory of the run with them.
    """

    options: dict
    costs: dict[str, str]
    estimate: MemoryEstimate


@dataclass(frozen=True)
class Search:
    """The search for changes of one run.

    Attributes:
        machine: the GPUs.
        tokens: of the longest row or, with --packing, of a pack.
        prequantized: whether the files hold packed weights.
        resolve: resolve(machine, {option: new value}) returns the options of the run on a machine. Raises
            UserError if they do not go together, or not with the model.
        estimate: estimate(options, tokens) returns the memory that a run takes.
        shortest: tokens of the shortest context to propose.
        known: estimates so far, by their changes: one takes milliseconds for a large model.
    """

    machine: Machine
    tokens: int
    prequantized: bool
    resolve: Callable[[Machine, dict], Config]
    estimate: Callable[[Config, int], MemoryEstimate]
    shortest: int = SHORTEST_CONTEXT
    known: dict = field(default_factory=dict)

    def find(self) -> list[Proposal]:
        """Return the proposals, the cheapest first: single changes, and combinations of cheaper ones."""
        singles = [change for change in ORDER if self._suffice([change])]
        cheaper = ORDER[: ORDER.index(singles[0])] if singles else ORDER
        return [*self._combine(list(cheaper)), *(self._propose([change]) for change in singles)]

    def strongest(self) -> Proposal:
        """Return all changes together, as strong as they can be. The run need not fit with them."""
        used = self._accumulate(ORDER)
        return self._describe(used, self._apply(used))

    def least_gpus(self) -> int:
        """Return how many GPUs of this kind fit the run with all changes; 0 if not even MOST_GPUS do.

        More GPUs help where the weights stay on them, so this is also tried.
        """
        on_gpus = [change for change in ORDER if not change.on_host]
        # Other ranks may not divide --effective_batch_size.
        free = {"world_size": -1, "effective_batch_size": None}
        tried = [self._apply(changes) | free for changes in (ORDER, on_gpus)]

        def suffice(gpus: int) -> bool:
            machine = dataclasses.replace(self.machine, gpus=gpus)
            search = dataclasses.replace(self, machine=machine, known={})
            return any(fits(search.measure(options), machine) for options in tried)

        if not suffice(MOST_GPUS):
            return 0
        return MOST_GPUS - find_largest(0, MOST_GPUS - 1, lambda fewer: suffice(MOST_GPUS - fewer))

    def measure(self, options: dict) -> MemoryEstimate:
        """Return the memory of the run with these options changed."""
        key = tuple(sorted(options.items()))
        if key not in self.known:
            tokens = options.get("context_length", self.tokens)
            self.known[key] = self.estimate(self.resolve(self.machine, options), tokens)
        return self.known[key]

    def _suffice(self, changes: Sequence[Change], picks: dict[Change, int] | None = None) -> bool:
        """Return whether the run fits with these changes. At least one of them must be possible."""
        options = self._apply(changes, picks)
        return bool(options) and fits(self.measure(options), self.machine)

    def _combine(self, allowed: list[Change]) -> list[Proposal]:
        """Return combinations, the cheapest first. Each lacks the costliest change of those before it."""
        found: list[Proposal] = []
        while len(found) < MAX_COMBINATIONS and (used := self._cheapest(allowed)):
            found.append(self._propose(used))
            allowed = [change for change in allowed if change is not used[-1]]
        return found

    def _cheapest(self, allowed: Sequence[Change]) -> list[Change]:
        """Return changes that suffice together, none of which can be left out; [] if all together do not.

        The costliest of them is as cheap as it can be.
        """
        used = self._accumulate(allowed)
        if not self._suffice(used):
            return []
        for change in reversed(used[:-1]):
            fewer = [each for each in used if each is not change]
            if self._suffice(fewer):
                used = fewer
        return used

    def _accumulate(self, allowed: Sequence[Change]) -> list[Change]:
        """Return changes, up to where they suffice, without those that the host cannot hold."""
        used: list[Change] = []
        host = float("inf") if self.machine.host_gib is None else self.machine.host_gib * GIB
        for change in allowed:
            if self.measure(self._apply([*used, change])).host <= host:
                used.append(change)
            if self._suffice(used):
                break
        return used

    def _propose(self, changes: Sequence[Change]) -> Proposal:
        """Return the proposal of changes that suffice. Each is as mild as it can be, the costliest first."""
        picks: dict[Change, int] = {}
        for i, change in reversed(list(enumerate(changes))):
            milder_values = len(self._values(change, self._apply(changes[:i]))) - 1

            def suffice(milder: int, change: Change = change) -> bool:
                return self._suffice(changes, picks | {change: -1 - milder})

            picks[change] = -1 - find_largest(0, milder_values, suffice)
        return self._describe(changes, self._apply(changes, picks))

    def _apply(self, changes: Sequence[Change], picks: dict[Change, int] | None = None) -> dict:
        """Return {option: value} of these changes, made one after the other; those not possible do nothing.

        picks: for some changes the index of the value to take; of the others the strongest is taken.
        """
        options: dict = {}
        for change in changes:
            if values := self._values(change, options):
                options |= values[(picks or {}).get(change, -1)]
        return options

    def _values(self, change: Change, options: dict) -> list[dict]:
        """Return the values of a change beside `options`, from the mildest; [] if it is not possible."""
        tokens = options.get("context_length", self.tokens)
        config = self.resolve(self.machine, options)
        situation = Situation(config, tokens, self.prequantized, self.shortest)
        values = list(change.find_values(situation))
        try:
            for value in values[-1:]:  # milder ones are possible if the strongest is
                self.resolve(self.machine, options | value)
        except UserError:
            return []
        return values

    def _describe(self, changes: Sequence[Change], options: dict) -> Proposal:
        """Return a Proposal."""
        return Proposal(options, {each.option: each.costs for each in changes}, self.measure(options))
