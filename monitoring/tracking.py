"""What a run tells while it trains: metrics.jsonl, a progress bar or lines, wandb, loss.png.

Everything here hangs on the loop in single calls. Only rank 0 writes; the other ranks hold a tracker that
drops what it gets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.tokenizing import Step
from files.output_folder import as_json, staged
from launch import memory
from options.config import Config
from options.errors import FULL_DISK, UserError
from options.limits import METRICS_LINE

GIB = 2**30


@dataclass(frozen=True)
class Metrics:
    """One optimizer step, over all ranks. tokens: real ones, padding not counted; trained_tokens: the
    targets among them; memory: of the rank that has most, GPU peak of this step (on CPU, the process's
    largest resident size so far), and what was in use when the last forward and the last backward of the step
    ended. eval_loss: mean over the targets of the evaluation set, after this step, and
    eval_perplexity its exponential, where the step was evaluated. bad_steps: steps skipped so far, if any."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    step_seconds: float
    tokens_per_second: float
    memory_allocated_gib: float
    memory_reserved_gib: float
    memory_after_forward_gib: float | None = None
    memory_after_backward_gib: float | None = None
    eval_loss: float | None = None
    eval_perplexity: float | None = None
    bad_steps: int | None = None

    def fields(self) -> dict[str, int | float]:
        """By name; without those that the step does not have."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


class HostMoment:
    """What a torch.cuda.Event is to a GPU's work, of the host's, which is done when it is there."""

    def __init__(self):
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: HostMoment) -> float:
        """In milliseconds."""
        return (later.at - self.at) * 1000


Moment = torch.cuda.Event | HostMoment


def moment(device: torch.device) -> Moment:
    """When the device is through with what is queued now."""
    if device.type != "cuda":
        return HostMoment()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class Reading:
    """What all ranks read of an optimizer step, the index-th from 1, on its way to the host. table: [ranks, columns] fp64
    on the host, filled at the moment `copied`; finite: whether the loss and the gradient's norm are, a scalar on the
    device."""

    index: int
    step: Step
    lr: float
    table: torch.Tensor
    copied: Moment
    finite: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The table. Waits for the GPU."""
        self.copied.synchronize()
        return self.table

    def loss(self) -> float:
        return self.wait()[:, 0].sum().item()

    def grad_norm(self) -> float:
        return self.wait()[0, 1].item()


@dataclass(frozen=True)
class Lap:
    """From the end of a step, or of what `Meter.restart` leaves out, to the end of the next step."""

    began: Moment
    ended: Moment

    def seconds(self) -> float:
        """Waits for the GPU."""
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1000


class Meter:
    """Measures steps on every rank."""

    def __init__(self, device: torch.device, held: dict[str, int]):
        """held: bytes in use after each phase, kept up to date by a Profiler."""
        self.device, self.held = device, held
        self.restart()

    def read(self, index: int, step: Step, lr: float, loss: torch.Tensor, grad_norm: torch.Tensor) -> Reading:
        """loss: this rank's share of the step's mean loss. Collective. Waits for nothing."""
        # With --use_cpu_offload the norm is on the CPU.
        mine = torch.stack([loss.double(), grad_norm.to(self.device).double(), *self._memory()])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        table = torch.stack(ranks)
        finite = (table[:, 0].sum() + table[0, 1]).isfinite()
        host = table.to("cpu", non_blocking=True)
        return Reading(index, step, lr, host, moment(self.device), finite)

    def lap(self) -> Lap:
        """The step's time, once the optimizer's step is queued. Waits for nothing."""
        began = self.last
        self.restart()
        return Lap(began, self.last)

    def measure(self, reading: Reading, lap: Lap) -> Metrics:
        """The loop's one wait for the GPU. What is queued behind the two goes on meanwhile."""
        table, seconds, step = reading.wait(), lap.seconds(), reading.step
        return Metrics(
            step=reading.index,
            epoch=round(step.epoch, 4),
            loss=reading.loss(),
            lr=reading.lr,
            grad_norm=reading.grad_norm(),
            tokens=step.n_tokens,
            trained_tokens=step.n_targets,
            step_seconds=seconds,
            tokens_per_second=step.n_tokens / seconds,
            memory_allocated_gib=table[:, 2].max().item() / GIB,
            memory_reserved_gib=table[:, 3].max().item() / GIB,
            **{f"memory_after_{p}_gib": table[:, i].max().item() / GIB for i, p in self._phases()},
        )

    def _phases(self) -> list[tuple[int, str]]:
        """(its column, its name) of the phases that were measured."""
        return list(enumerate((p for p in ("forward", "backward") if p in self.held), start=4))

    def restart(self) -> None:
        """Leaves out of the next step's time what was done since the last one; its memory still counts."""
        self.last = moment(self.device)

    def _memory(self) -> list[torch.Tensor]:
        gpu = self.device.type == "cuda"
        sizes = memory.PEAKS.take() if gpu else (memory.largest_resident(),) * 2
        sizes += tuple(self.held[p] for _, p in self._phases())
        # Not torch.tensor, which copies from the host and waits until the GPU has come to it.
        return [torch.full((), size, dtype=torch.float64, device=self.device) for size in sizes]


class Later:
    """A call that waits for a better moment, and what is to follow it. A run that fails before makes none."""

    def __init__(self):
        self.calls: list[Callable[[], None]] = []

    def put(self, call: Callable[[], None]) -> None:
        assert not self.calls
        self.calls.append(call)

    def then(self, call: Callable[[], None]) -> None:
        """Has a call follow the one that waits; makes it at once where none does."""
        if self.calls:
            self.calls.append(call)
        else:
            call()

    def now(self) -> None:
        """Makes the calls, if there are any."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class NoTracker:
    """Of every rank but the first. history: the metrics of the steps so far, also of those before a resumed run was
    stopped."""

    history: Sequence[Metrics] = ()

    def state_dict(self) -> dict:
        """What a checkpoint keeps of it, beside the length of its file."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing: `resume.tidy` has made the file whole before the tracker opened it."""

    def log(self, metrics: Metrics) -> None: ...

    def say(self, text: str) -> None: ...

    def stages(self, gib: dict[str, float]) -> None:
        """What of the memory is known before the first step, by its name in run.json."""

    def finish(self) -> None: ...


class Tracker(NoTracker):
    """Writes metrics.jsonl line by line, shows progress, and draws loss.png when finished."""

    def __init__(self, folder: Path, total_steps: int, quiet: bool):
        self.folder, self.total, self.evaluated = folder, total_steps, ""
        path = folder / "metrics.jsonl"
        self.history = read_metrics(path) if path.exists() else []
        self.file, self.held = path.open("ab", buffering=0), b""
        done = len(self.history)
        self.bar = tqdm(total=total_steps, initial=done, unit="step", disable=quiet, dynamic_ncols=True)

    def say(self, text: str) -> None:
        self.bar.write(text)

    def log(self, m: Metrics) -> None:
        self.history.append(m)
        # A skipped step of fp16 has no number as its gradient norm.
        self.held += json.dumps(as_json(m.fields())).encode() + b"\n"
        self._write()
        if m.eval_loss is not None:
            self.evaluated = f", eval {m.eval_loss:.4f}"
        rest = f"lr {m.lr:.2e}, {m.tokens_per_second:,.0f} tok/s, {m.memory_allocated_gib:.2f} GiB"
        shown = f"loss {m.loss:.4f}{self.evaluated}, {rest}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        if self.bar.disable:
            print(f"step {m.step}/{self.total}: {shown}", flush=True)

    def _write(self) -> None:
        """A disk that is full ends no training: the lines are held until it takes them."""
        try:
            _add(self.file, self.held)
            self.held = b""
        except OSError as e:
            if e.errno not in FULL_DISK:
                raise
            self.say(
                f"WARNING: {self.file.name}: {e.strerror}; its lines are held in memory until there is room"
            )

    def state_dict(self) -> dict:
        return {"held": self.held.decode()}

    def finish(self) -> None:
        self.bar.close()
        self._write()
        self.file.close()
        if self.history:
            with despite_full_disk(self.folder / "loss.png"):
                draw_loss(self.history, self.folder / "loss.png")


@contextlib.contextmanager
def despite_full_disk(path: Path) -> Iterator[None]:
    """Around the writing of something that report.py can make later: without it a run is none the worse."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL_DISK:
            raise
        print(f"WARNING: {path}: {e.strerror}; it is not written", file=sys.stderr, flush=True)


def append(path: Path, text: str, say: Callable[[str], None]) -> None:
    """Adds lines to a file of the RUN, all or, with a warning, if the disk is full, none."""
    try:
        with path.open("ab", buffering=0) as file:
            _add(file, text.encode())
    except OSError as e:
        if e.errno not in FULL_DISK:
            raise
        say(f"WARNING: {path}: {e.strerror}; lines of it are lost, and training goes on")


def _add(file: io.FileIO, data: bytes) -> None:
    """Adds to the end of a file, all, or nothing where an error is raised: what reads it finds whole lines."""
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        file.truncate(end)
        raise


class WandbTracker(Tracker):
    """The same, and every step to Weights & Biases."""

    def __init__(self, folder: Path, total_steps: int, config: Config, run_id: str | None):
        super().__init__(folder, total_steps, quiet=False)
        import wandb

        self.run = wandb.init(
            id=run_id,
            resume="allow",  # of an id that is not there, a new run
            project=config.project_name,
            name=config.name,
            group=config.group,
            entity=config.entity,
            config=dataclasses.asdict(config),
            dir=folder,
        )

    def state_dict(self) -> dict:
        return super().state_dict() | {"wandb": self.run.id}

    def stages(self, gib: dict[str, float]) -> None:
        self.run.summary.update({f"memory_{name}": value for name, value in gib.items()})

    def log(self, m: Metrics) -> None:
        super().log(m)
        self.run.log({k: v for k, v in m.fields().items() if k != "step"}, step=m.step)

    def finish(self) -> None:
        super().finish()
        self.run.finish()


def read_metrics(path: Path, length: int | None = None) -> list[Metrics]:
    """The lines of metrics.jsonl, one for each step so far; length: bytes of it that are read, None = all. Raises
    UserError where it holds anything else."""
    found = []
    with path.open("rb") as file:
        while (length is None or file.tell() < length) and (line := file.readline(METRICS_LINE)):
            number = len(found) + 1
            try:
                values = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
                found.append(Metrics(**values))
                right = found[-1].step == number and all(type(v) in (int, float) for v in values.values())
            except (ValueError, TypeError, AttributeError, RecursionError):
                right = False
            if not right:
                raise UserError(f"{path}: line {number} is not as a run writes it")
    return found


def make_tracker(config: Config, rank: int, total_steps: int, state: dict) -> NoTracker:
    """state: `state_dict` of the tracker of the run that is resumed, or {}; what metrics.jsonl holds was before."""
    if rank:
        return NoTracker()
    folder = Path(config.output_dir)
    if config.log_to == "wandb":
        return WandbTracker(folder, total_steps, config, state.get("wandb"))
    return Tracker(folder, total_steps, quiet=config.log_to == "stdout")


def check_wandb() -> None:
    """Raises UserError if wandb could not log: neither logged in nor told to stay offline."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled"):
        return
    try:
        logged_in = wandb.login(prompt=False)
    except wandb.Error as e:
        raise UserError(f"--log_to wandb: the login was not accepted ({' '.join(str(e).split())})") from None
    if not logged_in:
        raise UserError("--log_to wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline")


def draw_loss(history: list[Metrics], path: Path) -> None:
    """Loss, that of the evaluations, and learning rate over the steps, as a PNG."""
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
        with staged(path.parent) as stage:
            figure.savefig(stage(path.name), dpi=120, format="png")
    finally:
        plt.close(figure)
