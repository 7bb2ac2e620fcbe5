"""What the next trial of a sweep tries: the next of a grid, at random, or by Optuna's TPE."""

from __future__ import annotations

import random
import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from options.sweep_space import Combination, Range, Space, Values

MAX_GRID = 10_000  # combinations that are listed to find those that were not tried
DRAWS = 50  # of a sampler, to find a combination that was not tried
Key = tuple[tuple[str, str], ...]  # a combination, hashable


def choose(space: Space, sampler: str, seed: int, count: int, trials: list[FrozenTrial]) -> Combination:
    """Return the values of the next trial; they differ from those of all trials before it.

    Args:
        space: what trials differ in.
        sampler: grid, random or tpe.
        seed: with the trials before, it decides the values; the worker does not.
        count: number of trials of the whole sweep, at most the combinations of the space.
        trials: those before it.
    """
    tried = {_key(t.user_attrs["options"]) for t in trials}
    seed = (seed * 1_000_003 + len(trials)) % 2**32
    if sampler == "tpe" or space.size > MAX_GRID:
        combination = _sample(space, sampler, trials, tried, seed)
        if combination or space.size > MAX_GRID:
            return combination or _sample(space, sampler, trials, set(), seed)
    untried = [each for each in space.combinations() if _key(each) not in tried]
    in_order = sampler == "grid" and count == space.size
    return untried[0] if in_order else random.Random(seed).choice(untried)


def _key(combination: Combination) -> Key:
    """Return a combination as something to look up, whatever the order of its options is."""
    return tuple(sorted(combination.items()))


def _sample(space: Space, sampler: str, trials: list[FrozenTrial], tried: set[Key], seed: int) -> Combination:
    """Return a combination by Optuna's sampler that was not tried; {} if it finds none in DRAWS draws.

    It draws in a copy of the study, which costs no trial.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # constant_liar: keep away from what other workers are trying.
        chosen = (
            optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
            if sampler == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
    copy = optuna.create_study(sampler=chosen, direction="minimize")
    copy.add_trials(trials)
    distributions = make_distributions(space)
    for _ in range(DRAWS):
        params = copy.ask(distributions).params
        combination = {
            d.name: params[d.name] if isinstance(d, Values) else d.text(params[d.name])
            for d in space.dimensions
        }
        if _key(combination) not in tried:
            return combination
    return {}


def make_distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return Optuna's form of each option's values or range. Single values are texts."""
    return {dimension.name: _distribution(dimension) for dimension in space.dimensions}


def to_params(combination: Combination, distributions: dict[str, BaseDistribution]) -> dict[str, Any]:
    """Return a combination as values of the options' distributions."""
    kinds = {IntDistribution: int, FloatDistribution: float, CategoricalDistribution: str}
    return {name: kinds[type(distributions[name])](text) for name, text in combination.items()}


def _distribution(dimension: Values | Range) -> BaseDistribution:
    """Return Optuna's form of an option's values or range."""
    if isinstance(dimension, Values):
        return CategoricalDistribution(dimension.texts)
    if dimension.is_whole:
        return IntDistribution(
            int(dimension.low), int(dimension.high), dimension.is_log, int(dimension.step or 1)
        )
    return FloatDistribution(dimension.low, dimension.high, dimension.is_log, dimension.step)
