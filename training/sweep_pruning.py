"""When a trial of a sweep is stopped early: the median rule, on shares of a run."""

from __future__ import annotations

import statistics

STEPS_PER_FOLD = 1000  # a run's evaluations are known by their share of its steps, in thousandths
FIRST_TRIALS = 5  # complete trials before any is pruned, as Optuna's MedianPruner has it


def is_worse_than_median(own: dict[int, float], complete: list[dict[int, float]]) -> bool:
    """Return whether a trial's best evaluation of a fold is above the median of the complete trials'.

    Of each of them the last evaluation counts that it had by the same share of its run: options such as
    --batch_size change the number of steps, so evaluations need not be at the same shares. Where they are,
    this is the rule of Optuna's MedianPruner.

    Args:
        own: {fold * STEPS_PER_FOLD + share of the run in thousandths: loss}; not empty.
        complete: the same of the complete trials.
    """
    now = max(own)
    start = (now - 1) // STEPS_PER_FOLD * STEPS_PER_FOLD
    best = min(loss for step, loss in own.items() if step > start)
    others = [max((step, loss) for step, loss in each.items() if start < step <= now)[1]
              for each in complete if any(start < step <= now for step in each)]  # fmt: skip
    return len(others) >= FIRST_TRIALS and best > statistics.median(others)
