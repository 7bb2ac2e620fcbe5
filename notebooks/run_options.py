"""Options of train.py, computed from a notebook's values."""

from __future__ import annotations

import runpy
import time

from session import ROOT, SessionError, read_whole_number


def accumulation_steps(rows_per_step: int, world_size: int, batch_size: int) -> int:
    """Return --gradient_accumulation_steps for so many rows per optimizer step, on any number of processes.

    Raises SessionError if the rows cannot be shared equally, or if a value is no number.
    """
    rows_per_step = read_whole_number("ROWS_PER_STEP", rows_per_step, 1)
    batch_size = read_whole_number("BATCH_SIZE", batch_size, 1)
    steps, rest = divmod(rows_per_step, world_size * batch_size)
    if rest or not steps:
        raise SessionError(
            f"ROWS_PER_STEP = {rows_per_step} is no multiple of {world_size} processes x BATCH_SIZE ="
            f" {batch_size}"
        )
    return steps


def minutes_left(started: float, max_minutes: float) -> float:
    """Return --max_minutes of a command that starts now: what is left of max_minutes since `started`.

    started: time.time() when the notebook started. 0 minutes mean no limit, here and in the result. Raises
    SessionError for less.
    """
    if not isinstance(max_minutes, int | float) or not max_minutes >= 0:
        raise SessionError(f"MAX_MINUTES = {max_minutes!r}: has to be a number of minutes; 0: no limit")
    if not max_minutes:
        return 0
    return max(1.0, round(max_minutes - (time.time() - started) / 60, 1))


def method_options(train_type: str, lora_rank: int, quantized_cache: str) -> list:
    """Return --train_type, and those of --lora_rank and --quantized_cache that have an effect with it.

    Raises SessionError for an unknown train type.
    """
    methods = runpy.run_path(str(ROOT / "options" / "methods.py"))["METHODS"]  # imports no torch
    if train_type not in methods:
        raise SessionError(f"TRAIN_TYPE = {train_type!r}: choose one of {', '.join(methods)}")
    method = methods[train_type]
    return [
        *("--train_type", train_type),
        *(("--lora_rank", lora_rank) if method.adapter else ()),
        *(("--quantized_cache", quantized_cache) if method.quantizer else ()),
    ]
