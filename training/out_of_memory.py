"""CUDA out of memory, told so that one knows what to do: where the memory went, phase by phase, and the
options that would help most, with what each would save.

What an option saves is the difference of two estimates of monitoring/memory_model.py, with it and without it
(the arithmetic of docs/memory.md). They need not be exact for that: what is left out - the allocator's
rounding, NCCL's buffers, kernels' workspaces - is much the same in both.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import torch

from data.packing import longest_line
from launch.memory import PEAK_MEMORY, format_bytes
from launch.ranks import RankInfo
from monitoring.memory_model import Shape, estimate, measure
from options.config import Config
from options.declaration import format_value
from options.errors import UserError
from options.methods import METHODS
from training.job import Job

SHOWN = 3


def changes(job: Job) -> list[dict]:
    """Options that could save memory where they are not as here, each with what has to change beside it."""
    config = job.config
    found: list[dict] = []
    if config.batch_size > 1:  # the same rows in each step, in more micro-batches: the very same training
        rows = config.batch_size * config.gradient_accumulation_steps
        found.append({"batch_size": 1, "gradient_accumulation_steps": rows})
    wanted: list[dict] = [
        {"use_gradient_checkpointing": True}, {"use_activation_cpu_offload": True}, {"use_cpu_offload": True},
        {"wrap_policy": "sublayer"}, {"sharding_strategy": "full_shard"}, {"no_sync": False},
        {"optimizer": "adamw_8bit"},
    ]  # fmt: skip
    found += [change for change in wanted if any(getattr(config, k) != v for k, v in change.items())]
    if not config.use_gradient_checkpointing:
        found = [change for change in found if "use_activation_cpu_offload" not in change]
    if config.method.quantized_alternative and not job.files.prequantized:
        found.append({"train_type": config.method.quantized_alternative})
    return [*found, {"context_length": max(longest_line(config, job.rows) // 2, 2)}]


def savings(job: Job) -> list[tuple[dict, float]]:
    """[(change, bytes less on the fullest GPU)], the largest first, without those that save nothing."""
    now = estimated(job, job.config)
    found = []
    for change in changes(job):
        config = dataclasses.replace(job.config, **change)
        if METHODS[config.train_type].adapter and config.lora_rank is None:  # of full, which has no adapters
            config = dataclasses.replace(
                config, lora_rank=64, lora_alpha=16.0, lora_dropout=0.0, lora_target_modules="all"
            )
        found.append((change, now - estimated(job, config)))
    return sorted((f for f in found if f[1] > 0), key=lambda f: -f[1])


def shape_of(job: Job, config: Config) -> Shape:
    """The Shape of a job's model and data under other options."""
    tokens = longest_line(config, job.rows)
    return measure(job.model_config, job.family, config, job.precision, job.files, tokens)


def estimated(job: Job, config: Config) -> float:
    """Bytes that a GPU would hold at the peak of a step with these options."""
    return estimate(config, job.precision, shape_of(job, config))


def message(error: str, job: Job) -> str:
    """What to tell the user. error: torch's words."""
    numbers = re.findall(
        r"Tried to allocate [\d.]+ \w+|total capacity of [\d.]+ \w+|[\d.]+ \w+ is free", error
    )
    peaks = (
        ", ".join(f"{phase} {format_bytes(peak)}" for phase, peak in PEAK_MEMORY.by_phase.items())
        or "none measured"
    )
    helps = "; ".join(
        f"{_typed(change)} (about {format_bytes(gain)} less)" for change, gain in savings(job)[:SHOWN]
    )
    told = f" ({'; '.join(numbers)})" if numbers else ""
    return f"CUDA out of memory in the phase: {PEAK_MEMORY.phase}{told}. Peak by phase: {peaks}. Would help most: {helps}"


def _typed(change: dict) -> str:
    return " ".join(f"--{name} {format_value(value)}" for name, value in change.items())


def explained(run: Callable[[RankInfo, Job], None]) -> Callable[[RankInfo, Job], None]:
    """run, with `message` as a UserError where the GPU's memory does not suffice."""

    @functools.wraps(run)
    def explaining(rank_info: RankInfo, job: Job) -> None:
        PEAK_MEMORY.reset()
        try:
            run(rank_info, job)
        except RuntimeError as e:  # OutOfMemoryError of the allocator; others of the libraries beside it
            if not isinstance(e, torch.OutOfMemoryError) and not re.search(
                "CUDA.*out of memory|CUBLAS_STATUS_ALLOC", str(e)
            ):
                raise
            PEAK_MEMORY.enter_phase(PEAK_MEMORY.phase)
            raise UserError(message(str(e), job)) from None

    return explaining
