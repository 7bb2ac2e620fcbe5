"""A trial: two steps of the real code with random weights and the longest rows, in processes of their own.

It shows whether a setting fits on the GPUs of this machine, and what a step takes, without reading a weight.
The processes are gone before the run's own start, so no memory, state or random number of a trial reaches the
run. training/trial_rank.py is what runs in them.

T tokens of the longest sequence.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from data.image_format import ImageFormat
from data.images import ImageRef
from data.rows import TokenizedRows
from files.weight_headers import WeightHeaders
from launch.apart import Launcher
from launch.failures import Failure
from launch.program import is_first_process
from options.config import Config
from options.errors import REFUSED, UserError
from training.step_clock import StepTimes

# A step of a trial has at most so many micro-batches: the first, and one that adds to its gradients.
MAX_MICRO_BATCHES = 2


@dataclass(frozen=True)
class Trial:
    """A setting to try.

    Attributes:
        config: the run's options, with numbers for the sizes to try, and with the final world_size and
            sharding.
        model_config: the model's config.
        files: names, shapes and dtypes of its tensors; nothing else of them is read.
        tokens: T. Every sequence has so many, and all of them are learned: the most that a step can take.
        rows: the run's rows, whose lengths decide how many share a pack; None = each pack is one row.
        images: those of every sequence without `rows`.
        image_format: how the model takes them; None = it takes none.
        steps: optimizer steps. The second is the first with the optimizer's states in memory. fp16 takes some
            more.
        expected: bytes of the peak by the model of memory; 0 = unknown. If they are far more than a GPU has,
            the trial ends before it begins, as one that does not fit. Infinity: it only measures the room.
    """

    config: Config
    model_config: PretrainedConfig
    files: WeightHeaders
    tokens: int
    rows: TokenizedRows | None = None
    images: tuple[ImageRef, ...] = ()
    image_format: ImageFormat | None = None
    steps: int = 2
    expected: float = 0


@dataclass(frozen=True)
class TrialResult:
    """What a trial took on the fullest rank. Of one that does not fit: until it ran out of memory.

    Attributes:
        fits: whether all steps ended.
        peak: bytes of tensors on the GPU at most; on a CPU, of the process.
        phases: the same by phase.
        after: bytes in use on the GPU after a phase ended last, by phase; only if it fits.
        step_seconds: of each step, which has at most MAX_MICRO_BATCHES.
        times: of the parts of the last step; None if it does not fit.
        room: bytes that tensors could take on the GPU that had least of them; 0 without a GPU.
    """

    fits: bool
    peak: int = 0
    phases: dict[str, int] = dataclasses.field(default_factory=dict)
    after: dict[str, int] = dataclasses.field(default_factory=dict)
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    times: StepTimes | None = None
    room: float = 0


def run_trial(trial: Trial, try_rank: Callable, launcher: Launcher) -> TrialResult:
    """Run a trial in new processes, and return the same result on all ranks. Collective under torchrun.

    Out of memory, on a GPU or on the host, is a result. Raises UserError for any other error of the user's,
    and exits for a failure that is none, after its traceback.

    Args:
        trial: the setting.
        try_rank: try_rank(rank_info, trial, folder) runs it on a rank, within `record_trial` (train.py).
        launcher: starts the ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        failures = launcher.run_apart(try_rank, trial, folder)
        records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
        nodes = launcher.gather(records)
    found = [record for records in nodes for record in records]
    is_full = any(failure.is_killed for failure in failures) or any(not each["fits"] for each in found)
    if failures and not is_full:
        _fail(failures)
    return _combine(found, fits=not failures)


def _fail(failures: Sequence[Failure]) -> None:
    """Report a trial's failure that is not for want of memory."""
    first = failures[0]
    if first.status == REFUSED:
        raise UserError(first.message.removeprefix("error: "))
    raise SystemExit(first.print() if is_first_process() else first.status)


def _combine(records: Sequence[dict], fits: bool) -> TrialResult:
    """Return the result of a trial from the records of its ranks; some are missing if it failed."""
    times = records[0]["times"] if records and fits else None
    return TrialResult(
        fits=fits,
        peak=max((record["peak"] for record in records), default=0),
        phases=_largest(records, "phases"),
        after=_largest(records, "after") if fits else {},
        step_seconds=records[0]["step_seconds"] if records else [],
        times=StepTimes(*times) if times else None,
        room=min((record["room"] for record in records), default=0),
    )


def _largest(records: Sequence[dict], name: str) -> dict[str, int]:
    """Return {phase: the most of all ranks} of a field of the records."""
    phases: dict[str, int] = {}
    for record in records:
        for phase, size in record[name].items():
            phases[phase] = max(size, phases.get(phase, 0))
    return phases
