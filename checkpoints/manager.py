"""Checkpoints while a run trains: what is due, and the write behind the training's back.

The loop calls `load` once, `after` once per step, `finish` at the end; every rank does. What a checkpoint
holds is in checkpoints/training_state.py, its copies in host memory in checkpoints/host_copy.py, its files in
checkpoints/storage.py.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from checkpoints.background import Background
from checkpoints.host_copy import HostCopy
from checkpoints.planner import CopyPlanner
from checkpoints.storage import GROWING_FILES, Saved, Writer, folder_of, prune, sync
from checkpoints.training_state import Tensors, collect, local_part, restore, trained_parameters
from files.atomic_writes import remove_folder
from files.finite import find_nonfinite
from launch.devices import set_current_device
from launch.memory import MIB
from launch.ranks import RankInfo, gather_from_ranks
from launch.signals import NoStopRequests
from monitoring.deferred import DeferredCalls
from options.errors import UserError, describe


class Part(Protocol):
    """Something of the loop whose state is a few numbers, as JSON holds them."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


SLOW = 250 * MIB  # in a second, for a disk of which nothing is known yet


class Unwritten(RuntimeError):
    """A checkpoint that could not be written, for another reason than its disk. All ranks raise it."""


class Checkpoints:
    """What hangs on the loop.

    Args:
        parts: the loop's other state, by name.
        folder: the RUN.
        every: optimizer steps between checkpoints; 0 = only those that `stopping` asks for.
        at_end: whether there is to be one at the end.
        keep: how many stay; -1 = all.
        describe_run: describe_run(), what the manifest says of options, model and data, asked of rank 0 at the first
            checkpoint.
        untold: what brings the parts up to the step that is to be saved.
        stopping: says when to save and stop.
        say: shows a line.
        saved: what the run is resumed from.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: dict[str, Part],
        rank_info: RankInfo,
        *,
        folder: Path,
        every: int,
        at_end: bool,
        keep: int,
        describe_run: Callable[[], dict],
        deferred: DeferredCalls,
        stopping: NoStopRequests,
        say: Callable[[str], None],
        saved: Saved | None,
    ):
        # Taken once: within a forward FSDP has others in the place of the sharded parameters.
        self.folder, self.trained, self.optimizer = folder, trained_parameters(model), optimizer
        self.parts, self.rank_info = parts, rank_info
        # Whether the loop is ahead of a GPU that has the update still before it.
        self.ahead = any(local_part(p).is_cuda for p in self.trained.values())
        self.every, self.at_end, self.keep, self.stopping, self.saved = every, at_end, keep, stopping, saved
        self.describe_run, self.deferred, self.say = cache(describe_run), deferred, say
        # Of its own, and of host memory: collectives of two threads must not meet in one group.
        # Of a rank that is gone others hear from who started them, and one whose disk is slow is to be waited for.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.pool = ThreadPoolExecutor(
            1, "checkpoint", initializer=set_current_device, initargs=(rank_info.device,)
        )
        self.background = Background(
            rank_info.device.type == "cuda"
        )  # on a CPU little is launched in a second
        self.planner = CopyPlanner(self.background)
        # Of `no_dist`. Not within the thread that saves: filters are the whole process's.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self.copy = HostCopy(rank_info.device)
        optimizer.register_step_pre_hook(lambda *_: self._before_update())
        self.copying: Future[Tensors] | None = None
        self.writing: Future[bool] | None = None
        # Whether the optimizer has its states; whether what checkpoints need is ready.
        self.updated = self.prepared = False
        self.step = self.newest = 0  # of the last checkpoint that was begun; of the last that is whole
        self.taken: Callable[[], float] = lambda: 0.0  # how long the write that is going on has taken
        self.seconds = 0.0  # that the last whole one took to write, without rests
        states = 3 * sum(local_part(p).nbytes for p in self.trained.values())  # with Adam's moments
        stopping.expect_save(states / SLOW)
        self.waits: list[float] = []  # seconds that training stood still for a checkpoint

    def load(self) -> int:
        """Restores what the run is resumed from. Returns the number of steps that were done."""
        if self.saved is None:
            return 0
        restore(self.saved, self.trained, self.optimizer, self.rank_info.rank, self.group)
        for name, part in self.parts.items():
            try:
                part.load_state_dict(self.saved.run["parts"][name])
            except (RuntimeError, LookupError, TypeError, ValueError) as e:
                raise UserError(f"{self.saved.folder}: cannot be loaded ({name}: {describe(e)})") from None
        self.step = self.newest = self.saved.step
        return self.step

    def after(self, step: int, last: bool) -> bool:
        """After each step: saves if it is due. last: the run ends with this step. Returns whether it is to stop
        before its end."""
        if self.writing and self.writing.done():
            self._await()
        elif self.writing:
            self.stopping.record_save(self.taken(), complete=False)
        stop, wanted = self.stopping.agree(last)
        due = (self.every and step % self.every == 0) or (last and self.at_end)
        if stop or wanted or due:
            self.save(step)
        elif (self.every or self.at_end) and not self.prepared and self.updated:
            self._prepare()
        return stop

    def _prepare(self) -> None:
        """Has the copies' memory allocated, which takes a second for 2 GiB, and the plan made, while the steps before the
        first checkpoint run; once the optimizer has its states, which a step that is left out does not give it."""
        layout, local = collect(self.trained, self.optimizer, self.rank_info.rank)
        self.background.prepare()
        # What these raise the first checkpoint does, which tries again.
        self.pool.submit(self.copy.allocate, local)
        self.pool.submit(self._plan, layout, local)
        self.prepared = True

    def _plan(self, layout: Tensors, local: Tensors) -> None:
        self.planner.hold(layout, local)
        self.planner.agree(self.group)

    def save(self, step: int) -> None:
        """Begins a checkpoint, once the one before it is written."""
        if step == self.step:
            return
        began = time.perf_counter()
        self._await()
        if not self.prepared:
            self.background.prepare()
            self.prepared = True
        layout, local = collect(self.trained, self.optimizer, self.rank_info.rank)
        self.copy.mark()
        self.step = step
        self.copying = copying = self.pool.submit(self.copy.take, local)
        self.waits.append(time.perf_counter() - began)
        self.deferred.then(lambda: self._begin_write(step, layout, copying))
        # A GPU would have nothing to do from the end of this step to the beginning of the next one. Where a CPU has updated
        # the parameters the step is at its end; the next one's forward may take long, and the run may be killed in it.
        if not self.ahead:
            self.deferred.now()

    def _begin_write(self, step: int, layout: Tensors, copying: Future[Tensors]) -> None:
        began = time.perf_counter()
        self.taken = self._watch()
        run = self._run() if self.rank_info.rank == 0 else {}
        self.writing = self.pool.submit(self._write, step, layout, copying, run)
        self.waits[-1] += time.perf_counter() - began

    def _before_update(self) -> None:
        """Before each step of the optimizer, which changes what is copied. Raises what the copying raised."""
        self.updated = True
        if self.copying:
            began = time.perf_counter()
            self.background.hurry.set()  # the plan may still be in its way
            self.copying.result()
            self.background.hurry.clear()
            self.copying = None
            self.copy.originals_may_change()
            self.waits[-1] += time.perf_counter() - began

    def _run(self) -> dict:
        """The state that is no tensor; on rank 0, which writes it."""
        growing = [self.folder / name for name in GROWING_FILES]
        return {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "files": {path.name: path.stat().st_size for path in growing if path.is_file()},
        }

    def _write(self, step: int, layout: Tensors, copying: Future[Tensors], run: dict) -> bool:
        """In the thread, after the copying. Returns whether the checkpoint is whole; a disk that takes no more is told,
        and the run goes on with the checkpoint before."""
        copies = copying.result()
        self.copy.wait()
        if not self._all_finite(copies):
            if self.rank_info.rank == 0:
                self._warn(step, "a trained weight is NaN or infinite", "training goes on")
            return False

        def described() -> dict:
            for name in run["files"]:  # they are on the disk up to here before the checkpoint is
                sync(self.folder / name)
            return self.describe_run() | run

        writer = Writer(folder_of(self.folder, step), step, described)
        try:
            alone = self.rank_info.world == 1  # nothing is pickled, to be sent to nobody
            self.planner.hold(layout, copies)
            # Not the layout: torch would ask each tensor whether it has a state of its own.
            dcp.save({}, storage_writer=writer, planner=self.planner, process_group=self.group, no_dist=alone)
        except dcp.CheckpointException as e:
            failures = [error for error, _ in e.failures.values()]
            if self.rank_info.rank == 0:
                remove_folder(writer.temporary)
            if not all(isinstance(error, OSError) for error in failures):
                raise Unwritten(f"checkpoint: {describe(failures[0])}") from e  # e is no Exception
            if self.rank_info.rank == 0:
                self._warn(step, describe(failures[0]), "training goes on")
            return False
        self.seconds = self.taken()
        if self.rank_info.rank == 0 and self.keep > 0:
            prune(self.folder, self.keep)
        return True

    def _all_finite(self, copies: Tensors) -> bool:
        """Whether the trained weights are finite on all ranks. Otherwise the checkpoint is useless, and would
        take the place of one that is not. In the thread. Collective."""
        weights = {name: copy for name, copy in copies.items() if name.startswith("model.")}
        # In one call, which lets the thread that trains run. It is infinite as well where the sum overflows.
        likely = nn.utils.get_total_norm(list(weights.values()), 1.0).isfinite()
        found = [] if likely else find_nonfinite(weights)
        return not any(gather_from_ranks(found, self.rank_info.world, self.group))

    def _watch(self) -> Callable[[], float]:
        """Seconds from here on, without rests."""
        began, rested = time.perf_counter(), self.background.rested
        return lambda: time.perf_counter() - began - (self.background.rested - rested)

    def _warn(self, step: int, reason: str, then: str) -> None:
        stays = f"the checkpoint of step {self.newest} stays" if self.newest else "there is no other one"
        told = f"the checkpoint of step {step} could not be written ({reason}); {stays}, and {then}"
        print(f"\nWARNING: {told}", file=sys.stderr, flush=True)

    def _await(self) -> None:
        """Until the write that is going on has ended. Raises what it raised."""
        if self.writing:
            self.background.hurry.set()
            if whole := self.writing.result():
                self.newest = self.step
            self.background.hurry.clear()
            self.stopping.record_save(self.seconds, whole)
            self.writing = None

    def finish(self) -> None:
        """Waits for the last write: a process must not end before. Raises RuntimeError if the run is to stop and its
        last step could not be saved. One that ends by itself is told, and goes on to save its result."""
        try:
            self._await()
        except Unwritten as e:
            if self.stopping.reason:
                raise
            if self.rank_info.rank == 0:
                self._warn(self.step, str(e), "the result is saved")
        finally:
            self.background.hurry.set()
            self.pool.shutdown()
            self.background.finish()
        dist.destroy_process_group(self.group)
        if self.waits:
            mean, longest = sum(self.waits) / len(self.waits), max(self.waits)
            self.say(
                f"checkpoints: {len(self.waits)}; training stood still for {mean:.3f} s for each, {longest:.3f} s at most"
            )
        if self.stopping.reason and self.newest != self.step:
            raise RuntimeError(
                f"stopped at step {self.step}, which is not saved; --resume goes on from {self.newest}"
            )
