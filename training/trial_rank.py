"""What a trial (training/trial.py) runs on a rank: a job of the longest rows, and a record of its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from data.evaluation_data import EvaluationData
from data.fullest_images import fit_images
from data.image_format import ImageFormat
from data.images import ImageRef, RowImages
from data.rows import TokenizedRows
from files.base_model import BaseModel
from files.config_parts import text_config
from files.digests import WeightsDigest
from files.model_folder import CheckpointFiles
from launch.memory import PEAK_MEMORY, is_out_of_memory, peak_resident_bytes
from launch.precision import detect_precision
from launch.ranks import RankInfo, smallest_gpu_room
from monitoring.metrics import Metrics
from monitoring.profiling import Profiler
from options.errors import UserError
from parallel.layer_graphs import CALLS_BEFORE
from training.job import Job
from training.step_clock import make_step_clock
from training.trial import MAX_MICRO_BATCHES, Trial

# More steps with fp16, whose loss scaler may skip the first ones: a skipped step makes no optimizer states.
SCALER_STEPS = 4
# An expected peak beyond the room by this factor is not tried.
HOPELESS = 1.25
# Options that a trial does without: they take no memory in a step, or write files.
OFF: dict[str, Any] = {
    "eval_every": 0, "sample_every": 0, "early_stopping_patience": 0, "save_every": 0, "save_minutes": 0.0,
    "max_minutes": 0.0, "profile": False, "profile_memory": False, "quantized_cache": None, "resume": None,
    "adapter": None, "max_bad_steps": -1, "log_to": "stdout",
}  # fmt: skip


def make_job(trial: Trial) -> Job:
    """Return a run of a trial's steps, which reads and writes no file."""
    is_fp16 = detect_precision(trial.config.precision).autocast == torch.float16
    steps = trial.steps + SCALER_STEPS * is_fp16
    # `auto` records only into memory that is free, as `activation_budget -1` takes only that.
    records = trial.config.cuda_graphs == "true"
    steps = max(steps, CALLS_BEFORE + 1) if records else steps
    accumulation = min(trial.config.gradient_accumulation_steps, MAX_MICRO_BATCHES)
    config = dataclasses.replace(
        trial.config,
        **OFF,
        context_length=trial.tokens,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        num_epochs=steps,  # each has at least one step
        activation_budget=max(trial.config.activation_budget, 0.0),
        cuda_graphs="true" if records else "false",
    )
    count = config.world_size * config.batch_size * accumulation
    if config.packing and trial.rows:
        rows = _learn_everything(_cut_rows(trial.rows, trial.tokens))
    else:
        vocabulary = text_config(trial.model_config).vocab_size
        rows = make_rows(count, trial.tokens, vocabulary, trial.images, trial.image_format)
    return Job(
        config=config,
        model_config=trial.model_config,
        files=cast(CheckpointFiles, trial.files),  # nothing is read from them
        base=BaseModel("", None, "", WeightsDigest(""), ""),  # nothing is saved
        rows=rows,
        evaluation=EvaluationData(None, []),
        cache=None,
        saved=None,
        adapter=None,
        started=time.time(),
    )


def make_rows(
    count: int,
    tokens: int,
    vocabulary: int,
    images: tuple[ImageRef, ...] = (),
    image_format: ImageFormat | None = None,
) -> TokenizedRows:
    """Return rows of random tokens, all learned but the first, which has no context, and those of images.

    Args:
        count: number of rows.
        tokens: of each row.
        vocabulary: ids are below it.
        images: of each row, which begins with their tokens.
        image_format: how the model takes them; None without images.
    """
    ids = torch.randint(vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0)).int()
    starts, numbers = torch.arange(count + 1) * tokens, torch.arange(1, count + 1)
    if image_format and images:
        ids[ids == image_format.token_id] = 0
        ids[:, : sum(image_format.count_tokens(ref.width, ref.height) for ref in images)] = (
            image_format.token_id
        )
    learned = torch.ones(count * tokens, dtype=torch.bool)
    shown = RowImages.from_rows([images] * count)
    rows = TokenizedRows(ids.flatten(), learned, starts, (), (), numbers, (), shown, image_format)
    return _learn_everything(rows)


def _cut_rows(rows: TokenizedRows, tokens: int) -> TokenizedRows:
    """Return as many rows, none of which has more tokens. One is cut within no image, but before it."""
    lengths = rows.lengths().clamp(max=tokens)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    if rows.image_format is None or not rows.images.refs:  # which tokens they are does not matter
        total = int(starts[-1])
        return dataclasses.replace(
            rows, tokens=rows.tokens[:total], learned=rows.learned[:total], starts=starts
        )
    kept, parts = [], []
    for row, length in enumerate(lengths.tolist()):
        images = fit_images(rows.images.of_row(row), rows.image_format, length)
        n_tokens = sum(rows.image_format.count_tokens(ref.width, ref.height) for ref in images)
        part = torch.zeros(length, dtype=rows.tokens.dtype)  # text of one token, after the images
        part[:n_tokens] = rows.image_format.token_id
        parts.append(part)
        kept.append(images)
    return dataclasses.replace(
        rows,
        tokens=torch.cat(parts),
        learned=torch.ones(int(starts[-1]), dtype=torch.bool),
        starts=starts,
        images=RowImages.from_rows(kept),
    )


def _learn_everything(rows: TokenizedRows) -> TokenizedRows:
    """Return the rows with all tokens learned but their first, and those of images."""
    learned = rows.tokens != rows.image_id
    learned[rows.starts[:-1]] = False
    return dataclasses.replace(rows, learned=learned)


class TimingProfiler(Profiler):
    """Measures the time of each phase as well."""

    def __init__(self, device: torch.device):
        super().__init__(device, [])
        self.clock = make_step_clock(device)

    def start_phase(self, name: str) -> None:
        super().start_phase(name)
        self.clock.mark(name)


@contextlib.contextmanager
def record_trial(
    trial: Trial, rank_info: RankInfo, folder: str
) -> Iterator[tuple[Job, Profiler, list[Metrics]]]:
    """Context in which a rank runs a trial: yields (its job, its profiler, a list to add its metrics to).

    Collective. Writes the record of this rank into `folder` at the end. Raises UserError if the GPU is out of
    memory.
    """
    profiler, history = TimingProfiler(rank_info.device), list[Metrics]()
    PEAK_MEMORY.reset()
    room = smallest_gpu_room(rank_info) if rank_info.device.type == "cuda" else 0

    def write(fits: bool) -> None:
        PEAK_MEMORY.enter_phase(PEAK_MEMORY.phase)
        times = profiler.clock.last_step() if fits else None
        record = {
            "fits": fits,
            "peak": max(PEAK_MEMORY.by_phase.values(), default=peak_resident_bytes()),
            "phases": PEAK_MEMORY.by_phase or profiler.phase_bytes,
            "after": profiler.phase_bytes,
            "step_seconds": [metrics.step_seconds for metrics in history],
            "times": times and dataclasses.astuple(times),
            "room": room,
        }
        path = Path(folder) / f"{rank_info.rank}.json"
        path.with_suffix(".tmp").write_text(json.dumps(record))
        path.with_suffix(".tmp").rename(path)

    if room and trial.expected > HOPELESS * room:  # others use the GPU, or torch's memory is limited
        write(fits=False)
        raise UserError("out of memory by the estimate")
    try:
        yield make_job(trial), profiler, history
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        write(fits=False)
        raise UserError(f"out of memory in the phase {PEAK_MEMORY.phase}") from None
    write(fits=True)
