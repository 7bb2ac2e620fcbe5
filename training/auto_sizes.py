"""--batch_size auto and --context_length auto: numbers that fit on the GPUs, before the run's ranks start.

The model of memory proposes a size, and trials decide (training/trial.py). All ranks and nodes get the same
numbers. config.yaml records them, so that the run repeats and resumes without a trial.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial

from transformers import PreTrainedModel

from data.packing import make_sampler, max_sequence_length
from launch.apart import Launcher
from launch.memory import GIB
from launch.program import is_first_process
from models.registry import build_on_meta
from monitoring.memory_model import estimate_memory
from monitoring.profiling import check_traces
from monitoring.run_sizes import run_sizes
from options.config import Config
from options.declaration import AUTO
from options.errors import UserError
from training.job import Job
from training.machine import RESERVED_GIB
from training.size_search import MAX_TRIALS, SizeSearch
from training.step_sizes import list_batches, with_batch
from training.trial import Trial, TrialResult, run_trial

TRIAL_CONTEXT_STEP = 64  # tokens between the lengths that --context_length auto may take
CPU_BATCH = 8  # most that --batch_size auto tries without a GPU, where a larger batch is hardly faster
FEW_STEPS = 50  # a run with fewer steps is told how to get more


def settle_sizes(try_rank: Callable, check: Callable[[Config], Job], job: Job, launcher: Launcher) -> Job:
    """Return the job with numbers for all options that are AUTO. Collective under torchrun.

    Args:
        try_rank: runs a trial on a rank, as for `run_trial`.
        check: check(config) checks a run again, whose rows another --context_length cuts.
        job: the checked run.
        launcher: starts the ranks of trials.

    Raises UserError, on all ranks or on none, if no size fits.
    """
    room = _measure_room(job, try_rank, launcher) if job.config.unsettled else 0.0
    if job.config.context_length == AUTO:
        context = _find_context(job, try_rank, launcher, room)
        config, started = dataclasses.replace(job.config, context_length=context), job.started
        job = dataclasses.replace(launcher.check(partial(check, config)), started=started)
    if job.config.batch_size == AUTO:
        batch, tried = _find_batch(job, try_rank, launcher, room)
        job = dataclasses.replace(job, config=with_batch(job.config, batch))
        sampler = make_sampler(job.config, job.rows, 0, job.config.world_size)
        items, steps = sampler.items_per_epoch(), job.total_steps(sampler)
        if job.config.profile:
            check_traces(job.config, steps)
        _print(f"--batch_size auto: {batch}{tried}; {_describe_step(job.config, items, steps)}")
    return job


def _measure_room(job: Job, try_rank: Callable, launcher: Launcher) -> float:
    """Return the bytes that tensors may take of the GPU that has least of them; infinity without a GPU.

    Ranks measure it, in processes that end at once: asking here would leave a CUDA context in this process,
    and only the ranks have the limit of benchmarks/limited.py.
    """
    if job.gpu is None:
        return math.inf
    trial = Trial(job.config, job.model_config, job.files, tokens=0, expected=math.inf)
    room = run_trial(trial, try_rank, launcher).room
    return room or (job.gpu.gib - RESERVED_GIB) * GIB


def _find_context(job: Job, try_rank: Callable, launcher: Launcher, room: float) -> int:
    """Return the longest --context_length that fits, at the given batch or, if that is AUTO, at batch 1.

    The rows of the job are cut only to what the model knows. The arguments are those of `_SizeFinder`.
    """
    config = with_batch(job.config, 1) if job.config.batch_size == AUTO else job.config
    longest = int(job.rows.lengths().max())
    candidates = [*range(TRIAL_CONTEXT_STEP, longest, TRIAL_CONTEXT_STEP), longest]
    finder = _SizeFinder(job, try_rank, launcher, "context_length", room)
    context, tried = finder.find(candidates, lambda n: (dataclasses.replace(config, context_length=n), n))
    limit = " tokens, the longest row" if context == longest else " tokens"
    _print(f"--context_length auto: {context}{limit}{tried}")
    return context


def _find_batch(job: Job, try_rank: Callable, launcher: Launcher, room: float) -> tuple[int, str]:
    """Return (the largest --batch_size that fits with the longest rows of the job, what was tried).

    The arguments are those of `_SizeFinder`.
    """
    one = with_batch(job.config, 1)
    items = make_sampler(one, job.rows, 0, one.world_size).items_per_epoch()
    candidates = list_batches(one, items, most=None if job.gpu else CPU_BATCH)
    tokens = max_sequence_length(one, job.rows)
    finder = _SizeFinder(job, try_rank, launcher, "batch_size", room)
    batch, tried = finder.find(candidates, lambda n: (with_batch(one, n), tokens))
    return batch, tried + f", at most {CPU_BATCH} without a GPU" * (job.gpu is None)


class _SizeFinder:
    """Finds one option's largest value that fits.

    Args:
        job, try_rank, launcher: as for `settle_sizes`.
        option: its name.
        room: from `_measure_room`.
    """

    def __init__(self, job: Job, try_rank: Callable, launcher: Launcher, option: str, room: float):
        self.job, self.try_rank, self.launcher, self.option, self.room = job, try_rank, launcher, option, room

    def find(self, candidates: list[int], setting: Callable[[int], tuple[Config, int]]) -> tuple[int, str]:
        """Return (the largest candidate that fits, what was tried). Raises UserError if none does.

        setting: setting(value) returns (the options with it, tokens of the longest sequence).
        """
        search = SizeSearch(
            candidates,
            estimate=lambda value: self._estimate(*setting(value)),
            room=self.room,
        )

        def attempt(value: int) -> TrialResult:
            config, tokens = setting(value)
            _print(f"--{self.option} auto: trying {_describe_rows(config, tokens)}")
            job, expected = self.job, self._estimate(config, tokens)
            rows = job.rows if config.packing else None
            trial = Trial(config, job.model_config, job.files, tokens, rows, expected=expected)
            return run_trial(trial, self.try_rank, self.launcher)

        value = search.run(attempt, agree=lambda index: self.launcher.gather(index)[0])
        if value is None:
            rows = _describe_rows(*setting(candidates[0]))
            where = f"{search.room / GIB:.2f} GiB of GPU memory" if self.job.gpu else "the host's memory"
            raise UserError(
                f"--{self.option} auto: not even {rows} fits into {where}; `python plan.py` with the same"
                " options says what would make it fit"
            )
        return value, _describe_trials(search)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return build_on_meta(self.job.model_config, self.job.family)

    def _estimate(self, config: Config, tokens: int) -> float:
        """Return the estimated bytes of the peak on a GPU; 0 without one, where nothing is estimated."""
        job = self.job
        if job.gpu is None:
            return 0.0
        sizes = run_sizes(self._model, job.family, config, job.precision, job.files, tokens)
        return estimate_memory(config, job.precision, sizes, job.gpu).peak


def _describe_rows(config: Config, tokens: int) -> str:
    """Return what a micro-batch of a trial is."""
    kind = "pack" if config.packing else "row"
    return f"{config.batch_size} {kind}{'s' * (config.batch_size > 1)} of {tokens:,} tokens per process"


def _describe_trials(search: SizeSearch) -> str:
    """Return what a search tried, for the line about its result; "" without a trial."""
    tried = [f"{size} {'fits' if result.fits else 'does not fit'}" for size, result in search.trials]
    fitting = [trial for trial in search.trials if trial[1].fits and trial[1].room]
    peak = ""
    if fitting:
        _, result = max(fitting, key=lambda trial: trial[0])
        peak = f"; peak {result.peak / GIB:.2f} of {result.room / GIB:.2f} GiB"
    more = (
        f"; up to {search.untried} may fit, after the last of {MAX_TRIALS} trials" if search.untried else ""
    )
    return f" (tried: {', '.join(tried)}{peak}{more})" if tried else ""


def _describe_step(config: Config, items: int, steps: int) -> str:
    """Return what the steps are like that follow from --batch_size auto.

    Args:
        config: with the batch.
        items: rows, or packs, of an epoch: no step has more.
        steps: of the run.
    """
    rows = min(config.world_size * config.batch_size * config.gradient_accumulation_steps, items)
    text = (
        f"a step has {rows} {'packs' if config.packing else 'rows'} with --gradient_accumulation_steps"
        f" {config.gradient_accumulation_steps}, the run {steps:,} steps"
    )
    is_short = steps < FEW_STEPS and config.max_steps < 0
    if is_short and config.effective_batch_size is None and config.batch_size > 1:
        text += "; --effective_batch_size N sets the rows of a step, and so the number of steps"
    return text


def _print(line: str) -> None:
    """Print a line, once for all ranks."""
    if is_first_process():
        print(line, flush=True)
