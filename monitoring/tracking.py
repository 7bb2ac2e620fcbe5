"""Writes and shows a run's metrics while it trains: metrics.jsonl, a bar or lines, wandb, loss.png.

The loop makes single calls. Only rank 0 writes; the other ranks have a tracker that does nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path

from files.atomic_writes import nonfinite_to_null, stage_files
from files.disk_room import append_bytes, warn_on_full_disk
from files.names import METRICS
from files.output_folder import output_folder
from monitoring.metrics import Metrics, read_metrics
from monitoring.progress import make_progress
from options.config import Config
from options.errors import FULL_DISK, UserError


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

    def log_stages(self, gib: dict[str, float]) -> None:
        """Do nothing; a WandbTracker logs the memory before the first step. gib: {name in run.json: GiB}."""

    def finish(self) -> None:
        """Do nothing; a Tracker writes its pending lines, closes metrics.jsonl and draws loss.png."""


class Tracker(NoTracker):
    """Writes metrics.jsonl line by line, shows progress, and draws loss.png when finished."""

    history: list[Metrics]

    def __init__(self, folder: Path, total_steps: int, log_to: str, log_every: int | None):
        """Read metrics.jsonl, if it exists, and open it to append.

        Args:
            folder: the RUN.
            total_steps: optimizer steps of the run.
            log_to, log_every: the options.
        """
        self.folder = folder
        path = folder / METRICS
        self.history = read_metrics(path) if path.exists() else []
        self.file, self.pending = path.open("ab", buffering=0), b""
        self.progress = make_progress(log_to, log_every, total_steps, len(self.history))

    def print_line(self, text: str) -> None:
        self.progress.print_line(text)

    def log(self, m: Metrics) -> None:
        """Add a step to the history and to metrics.jsonl, and show it."""
        self.history.append(m)
        # The gradient norm of a step that fp16 skipped is not a number.
        self.pending += json.dumps(nonfinite_to_null(m.fields())).encode() + b"\n"
        self._flush()
        self.progress.show(m)

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
        return {"held": self.pending.decode()}

    def finish(self) -> None:
        """Write the pending lines, close metrics.jsonl and draw loss.png."""
        self.progress.close()
        self._flush()
        self.file.close()
        if self.history:
            with warn_on_full_disk(self.folder / "loss.png"):
                draw_loss(self.history, self.folder / "loss.png")


class WandbTracker(Tracker):
    """A Tracker that also logs every step to Weights & Biases."""

    def __init__(self, folder: Path, total_steps: int, config: Config, run_id: str | None):
        """Start a run at wandb, or continue the one with `run_id`.

        Args:
            folder: the RUN, which holds metrics.jsonl; wandb writes its own files there too.
            total_steps: optimizer steps of the run, for the progress bar.
            config: the run's options: wandb's project, name, group and entity, and all of them as its config.
            run_id: wandb's id of the resumed run; None = a new run.
        """
        super().__init__(folder, total_steps, config.log_to, config.log_every)
        import wandb

        self.run = wandb.init(
            id=run_id,
            resume="allow",  # an unknown id starts a new run
            project=config.project_name,
            name=config.name,
            group=config.group,
            entity=config.entity,
            config=dataclasses.asdict(config),
            dir=str(folder),
        )

    def state_dict(self) -> dict:
        return super().state_dict() | {"wandb": self.run.id}

    def log_stages(self, gib: dict[str, float]) -> None:
        self.run.summary.update({f"memory_{name}": value for name, value in gib.items()})

    def log(self, m: Metrics) -> None:
        super().log(m)
        self.run.log({k: v for k, v in m.fields().items() if k != "step"}, step=m.step)

    def finish(self) -> None:
        super().finish()
        self.run.finish()


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
    if config.log_to == "wandb":
        return WandbTracker(folder, total_steps, config, state.get("wandb"))
    return Tracker(folder, total_steps, config.log_to, config.log_every)


def check_wandb() -> None:
    """Raise UserError if wandb is neither logged in nor set to offline or disabled by WANDB_MODE."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled"):
        return
    try:
        if "prompt" in inspect.signature(wandb.login).parameters:
            logged_in = wandb.login(prompt=False)
        else:  # before 0.30 it asks at the terminal if there is no key
            logged_in = bool(wandb.api.api_key) and wandb.login()
    except wandb.Error as e:
        raise UserError(f"--log_to wandb: the login was not accepted ({' '.join(str(e).split())})") from None
    if not logged_in:
        raise UserError("--log_to wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline")


def draw_loss(history: list[Metrics], path: Path) -> None:
    """Write a PNG of the loss, the evaluation loss and the learning rate over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [m.step for m in history]
    figure, loss_axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
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
    try:
        with stage_files(path.parent) as stage:
            figure.savefig(stage(path.name), dpi=120, format="png")
    finally:
        plt.close(figure)
