"""Writes and shows a run's metrics while it trains: metrics.jsonl, a bar or lines, a logger, loss.png.

The loop makes single calls. Only rank 0 writes; the other ranks have a tracker that does nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from files.atomic_writes import nonfinite_to_null, stage_files
from files.disk_room import append_bytes, warn_on_full_disk
from files.names import METRICS
from files.output_folder import output_folder
from monitoring.loggers import NoLogger, Sample
from monitoring.metrics import Metrics, read_metrics
from monitoring.progress import Progress, make_progress
from monitoring.tensorboard_logger import TensorboardLogger
from monitoring.wandb_logger import WandbLogger
from options.config import Config
from options.errors import FULL_DISK


class NoTracker:
    """The tracker of every rank but the first, and the interface of the others: its methods do nothing.

    Attributes:
        history: the metrics of all steps so far, those before a resumed run was stopped included.
    """

    history: Sequence[Metrics] = ()

    def state_dict(self) -> dict:
        """Return what a checkpoint saves of the tracker besides the length of metrics.jsonl: here nothing."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Do nothing: `roll_back_run` (checkpoints/resume.py) restored the file before it was opened."""

    def log(self, metrics: Metrics) -> None:
        """Do nothing; a Tracker adds the step to its history, writes it and shows it."""

    def print_line(self, text: str) -> None:
        """Do nothing; a Tracker prints the line without damaging its progress bar."""

    def log_facts(self, facts_json: str) -> None:
        """Do nothing; a Tracker gives run.json to its logger."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Do nothing; a Tracker gives the samples after a step to its logger."""

    def finish(self) -> None:
        """Do nothing; a Tracker writes its pending lines, closes metrics.jsonl and draws loss.png."""


class Tracker(NoTracker):
    """Writes metrics.jsonl line by line, shows progress, and draws loss.png when finished.

    Args:
        folder: the RUN.
        history: the steps in its metrics.jsonl.
        progress: shows the steps.
        logger: sends steps and samples to another program. A full disk under it costs a warning.
    """

    history: list[Metrics]

    def __init__(self, folder: Path, history: list[Metrics], progress: Progress, logger: NoLogger):
        self.folder, self.history, self.progress, self.logger = folder, history, progress, logger
        self.file, self.pending = (folder / METRICS).open("ab", buffering=0), b""
        self.best: Metrics | None = None  # the step of the best evaluation
        for m in history:
            self._update_best(m)

    def print_line(self, text: str) -> None:
        self.progress.print_line(text)

    def log(self, m: Metrics) -> None:
        """Add a step to the history and to metrics.jsonl, and show it."""
        self.history.append(m)
        # The gradient norm of a step that fp16 skipped is not a number.
        self.pending += json.dumps(nonfinite_to_null(m.fields())).encode() + b"\n"
        self._flush()
        self.progress.show(m)
        is_best = self._update_best(m)
        with self._warn_of_lost_logs():
            self.logger.log(m)
            if is_best:
                self.logger.log_best(m)

    def _update_best(self, m: Metrics) -> bool:
        """Take a step as the best if its evaluation is better than all before; return whether it is."""
        if m.eval_loss is None or math.isnan(m.eval_loss):
            return False
        if self.best and self.best.eval_loss is not None and m.eval_loss >= self.best.eval_loss:
            return False
        self.best = m
        return True

    def log_facts(self, facts_json: str) -> None:
        with self._warn_of_lost_logs():
            self.logger.log_facts(json.loads(facts_json))
            if self.best:  # of the steps before a resume: the logger may be new
                self.logger.log_best(self.best)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        with self._warn_of_lost_logs():
            self.logger.log_samples(step, samples)

    @contextlib.contextmanager
    def _warn_of_lost_logs(self) -> Iterator[None]:
        """Within the context, turn the OSError of a full disk into a printed warning."""
        try:
            yield
        except OSError as e:
            if e.errno not in FULL_DISK:
                raise
            self.print_line(
                f"WARNING: --log_to {self.logger.name}: {e.strerror}; it lacks this step, training goes on"
            )

    def _flush(self) -> None:
        """Append the pending lines to metrics.jsonl; on a full disk, warn and keep them for the next call."""
        try:
            append_bytes(self.file, self.pending)
            self.pending = b""
        except OSError as e:
            if e.errno not in FULL_DISK:
                raise
            self.print_line(
                f"WARNING: {self.file.name}: {e.strerror}; its lines are held in memory until there is room"
            )

    def state_dict(self) -> dict:
        return {"held": self.pending.decode()} | self.logger.state_dict()

    def finish(self) -> None:
        """Write the pending lines, close metrics.jsonl and draw loss.png."""
        self.progress.close()
        self._flush()
        self.file.close()
        with self._warn_of_lost_logs():
            self.logger.finish()
        if self.history:
            with warn_on_full_disk(self.folder / "loss.png"):
                draw_loss(self.history, self.folder / "loss.png")


def make_tracker(config: Config, rank: int, total_steps: int, state: dict) -> NoTracker:
    """Return what --log_to requests on rank 0, and a NoTracker on every other rank.

    Steps in metrics.jsonl become the history.

    Args:
        config: the run's options.
        rank: this rank among all ranks.
        total_steps: optimizer steps of the run, for the progress bar and the lines.
        state: the `state_dict` of the resumed run's tracker; {} for a new run.
    """
    if rank:
        return NoTracker()
    folder = output_folder(config)
    history = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    logger = NoLogger()
    if config.log_to == "wandb":
        logger = WandbLogger(config, folder, state.get("wandb"))
    if config.log_to == "tensorboard":
        logger = TensorboardLogger(config, folder, steps_done=len(history))
    progress = make_progress(config.log_to, config.log_every, total_steps, steps_done=len(history))
    return Tracker(folder, history, progress, logger)


def draw_loss(history: list[Metrics], path: Path) -> None:
    """Write a PNG of the loss, the evaluation loss and the learning rate over the steps."""
    from matplotlib.figure import Figure  # pyplot, which is for windows, would be slow to import

    steps = [m.step for m in history]
    figure = Figure(figsize=(8, 4.5))
    # A computed layout takes longer than the drawing itself.
    loss_axis = figure.add_axes((0.09, 0.12, 0.77, 0.79))
    loss_axis.plot(steps, [m.loss for m in history], color="#1f5fa8", linewidth=1.5, label="training")
    loss_axis.set(xlabel="optimizer step", ylabel="loss", title="training loss", ylim=(0, None))
    if evaluated := [(m.step, m.eval_loss) for m in history if m.eval_loss is not None]:
        loss_axis.plot(*zip(*evaluated, strict=True), "o-", color="#b0243c", markersize=4, label="validation")
        loss_axis.set_title("training and validation loss")
        loss_axis.legend()
    loss_axis.grid(alpha=0.25)
    lr_axis = loss_axis.twinx()
    lr_axis.plot(steps, [m.lr for m in history], color="#b06a00", linewidth=1, linestyle="--")
    lr_axis.set(ylabel="learning rate (dashed)", ylim=(0, None))
    with stage_files(path.parent) as stage:
        figure.savefig(stage(path.name), dpi=120, format="png")
