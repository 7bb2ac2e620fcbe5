"""The error line when CUDA is out of memory: the peak of each phase, and the options that would help most.

The effect of an option is the difference of two estimates of monitoring/memory_model.py, with and without it
(docs/memory.md has the arithmetic). They need not be exact for that: they omit the allocator's rounding,
NCCL's buffers and kernels' workspaces, which are much the same in both.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

from data.fullest_images import max_sequence_pixels
from data.packing import max_sequence_length
from launch.memory import PEAK_MEMORY, format_bytes, is_out_of_memory
from launch.ranks import RankInfo
from models.registry import build_on_meta
from monitoring.memory_model import estimate_memory
from monitoring.run_sizes import run_sizes
from monitoring.sizes import RunSizes
from options.config import Config
from options.errors import UserError
from options.methods import METHODS
from training.job import Job
from training.memory_changes import CHANGES, Situation, as_arguments

MAX_SUGGESTIONS = 3


def list_changes(job: Job) -> list[dict]:
    """Return a list of {option: value}: option changes that could save memory, each alone.

    Those of training/memory_changes.py, as strong as they can be, but as mild where they change what is
    learned; and half of the context.
    """
    tokens = max_sequence_length(job.config, job.rows)
    situation = Situation(job.config, tokens, job.files.prequantized)
    found = []
    for change in CHANGES:
        values = list(change.find_values(situation))
        found += values[:1] if change.alters else values[-1:]
    return [*found, {"context_length": max(tokens // 2, 2)}]


def estimate_savings(job: Job) -> list[tuple[dict, float]]:
    """Return [({option: value}, bytes saved on the fullest GPU)], the largest first, only those that save."""
    now = estimate_job_peak(job, job.config)
    found = []
    for change in list_changes(job):
        config = dataclasses.replace(job.config, **change)
        if METHODS[config.train_type].adapter and config.lora_rank is None:  # from full, without adapters
            config = dataclasses.replace(
                config, lora_rank=64, lora_alpha=16.0, lora_dropout=0.0, lora_target_modules="all"
            )
        found.append((change, now - estimate_job_peak(job, config)))
    return sorted((f for f in found if f[1] > 0), key=lambda f: -f[1])


def measure_job_sizes(job: Job, config: Config) -> RunSizes:
    """Return the sizes of the job's model and data that its memory depends on, under other options."""
    tokens = max_sequence_length(config, job.rows)
    model = build_on_meta(job.model_config, job.family)
    pixels = max_sequence_pixels(config, job.rows, tokens)
    return run_sizes(model, job.family, config, job.precision, job.files, tokens, pixels)


def estimate_job_peak(job: Job, config: Config) -> float:
    """Return an estimate of the bytes that a GPU holds at the peak of a step with these options."""
    return estimate_memory(config, job.precision, measure_job_sizes(job, config), job.gpu).peak


def describe_out_of_memory(error: str, job: Job) -> str:
    """Return the error line for CUDA out of memory: phase, peaks, and the options that would help most.

    error: torch's message, whose numbers the line repeats.
    """
    numbers = re.findall(
        r"Tried to allocate [\d.]+ \w+|total capacity of [\d.]+ \w+|[\d.]+ \w+ is free", error
    )
    details = f" ({'; '.join(numbers)})" if numbers else ""
    peaks = (
        ", ".join(f"{phase} {format_bytes(peak)}" for phase, peak in PEAK_MEMORY.by_phase.items())
        or "none measured"
    )
    savings = estimate_savings(job)[:MAX_SUGGESTIONS]
    helps = "; ".join(
        f"{as_arguments(change)} (about {format_bytes(saved)} less)" for change, saved in savings
    )
    return (
        f"CUDA out of memory in the phase: {PEAK_MEMORY.phase}{details}. Peak by phase: {peaks}."
        f" Would help most: {helps}"
    )


def explain_out_of_memory(run: Callable[[RankInfo, Job], None]) -> Callable[[RankInfo, Job], None]:
    """Decorate `run` to raise a UserError with `describe_out_of_memory` when the GPU is out of memory."""

    @functools.wraps(run)
    def explaining(rank_info: RankInfo, job: Job) -> None:
        PEAK_MEMORY.reset()
        try:
            run(rank_info, job)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            PEAK_MEMORY.enter_phase(PEAK_MEMORY.phase)
            raise UserError(describe_out_of_memory(str(e), job)) from None

    return explaining
