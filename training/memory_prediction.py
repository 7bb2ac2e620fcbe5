"""The memory that a run should take: predicted before the load, and compared with what it took at the end.

monitoring/messages.py has the comparison, in the line about memory.
"""

from __future__ import annotations

import dataclasses
import os

from data.fullest_images import max_sequence_pixels
from data.packing import max_sequence_length
from launch.memory import GIB, format_bytes
from models.registry import build_on_meta
from monitoring.memory_model import MemoryEstimate, estimate_memory
from monitoring.run_sizes import run_sizes
from options.config import Config
from training.job import Job


def predict_memory(job: Job, cpus: int) -> MemoryEstimate | None:
    """Return what the run should take by its longest row, its precision and this process's GPU.

    It loads no weights, and takes 0.03 s for an 8B model. Returns None without a GPU: the figures that a run
    on a CPU prints count its libraries, too. cpus: those of this rank.
    """
    if job.gpu is None:
        return None
    model, tokens = build_on_meta(job.model_config, job.family), max_sequence_length(job.config, job.rows)
    pixels = max_sequence_pixels(job.config, job.rows, tokens)
    sizes = run_sizes(model, job.family, job.config, job.precision, job.files, tokens, pixels)
    threads = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "")
    compilers = int(threads) if threads.isdecimal() else cpus
    return estimate_memory(job.config, job.precision, sizes, job.gpu, compilers)


def describe_prediction(predicted: MemoryEstimate, room: float, config: Config) -> str:
    """Return the line about the predicted memory; it says so if a GPU has less room.

    room: bytes that tensors may take of the GPU that has least, from `smallest_gpu_room`.
    """
    more = " before --activation_budget -1 takes what is free" if config.activation_budget == -1 else ""
    line = (
        f"memory: about {format_bytes(predicted.peak)} per GPU at the peak{more},"
        f" {format_bytes(predicted.host)} of host memory in all"
    )
    if predicted.peak <= room:
        return line
    return (
        f"{line}; the fullest GPU has room for {format_bytes(room)}: the run goes on, and may run out of"
        " memory; plan.py names options that fit"
    )


def prediction_facts(predicted: MemoryEstimate | None, config: Config) -> dict[str, float]:
    """Return {predicted_<phase>_gib: GiB} for run.json; {} if nothing is predicted of the whole run."""
    if predicted is None or config.activation_budget == -1:
        return {}
    figures = dataclasses.asdict(predicted)
    del figures["graphs"]  # of no phase
    return {f"predicted_{name}_gib": n / GIB for name, n in figures.items()}
