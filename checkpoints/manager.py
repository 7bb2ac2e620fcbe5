"""Saves checkpoints while a run trains: decides when one is due, and writes it in a background thread.

The loop calls `restore` once, `save_if_due` after each step and `finish` at the end, on every rank. A
checkpoint's contents are in checkpoints/training_state.py, their copies in host memory in
checkpoints/host_copy.py, the files in checkpoints/storage.py.
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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from checkpoints.background import BackgroundThrottle
from checkpoints.host_copy import HostCopy
from checkpoints.planner import CheckpointPlanner
from checkpoints.storage import (
    GROWING_FILES,
    Checkpoint,
    CheckpointWriter,
    checkpoint_folder,
    prune_checkpoints,
    sync,
)
from checkpoints.training_state import (
    Tensors,
    collect_tensors,
    local_tensor,
    restore_tensors,
    trained_parameters,
)
from files.atomic_writes import remove_folder
from files.finite import find_nonfinite
from launch.devices import set_current_device
from launch.memory import MIB
from launch.ranks import RankInfo, gather_from_ranks
from launch.signals import NoStopRequests
from monitoring.deferred import DeferredCalls
from options.errors import UserError, describe

# Bytes per second. The speed of a slow disk, assumed until the first checkpoint is written.
SLOW_DISK_SPEED = 250 * MIB


class CheckpointNotWritten(RuntimeError):
    """A checkpoint could not be written, for another reason than its disk. All ranks raise it."""


class CheckpointManager:
    """Saves checkpoints of a run, and restores the one that it resumes from.

    Args:
        stateful: The loop's other state, by name: objects whose state_dict is a few numbers that JSON can
            hold.
        folder: The RUN.
        save_every: Optimizer steps between checkpoints; 0: save only when `stopping` asks.
        save_at_end: Save after the last step too.
        keep: Number of checkpoints to keep; -1: all.
        describe_run: Returns what the manifest says of options, model and data. Called once, on rank 0, at
            the first checkpoint.
        deferred: Calls that bring `stateful` up to date with the last step.
        stopping: Says when to save and when to stop.
        print_line: Prints a line for the user.
        checkpoint: The checkpoint to resume from.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stateful: dict[str, Stateful],
        rank_info: RankInfo,
        *,
        folder: Path,
        save_every: int,
        save_at_end: bool,
        keep: int,
        describe_run: Callable[[], dict],
        deferred: DeferredCalls,
        stopping: NoStopRequests,
        print_line: Callable[[str], None],
        checkpoint: Checkpoint | None,
    ):
        # The parameters are looked up once: during a forward FSDP replaces the sharded ones.
        self.folder, self.trained, self.optimizer = folder, trained_parameters(model), optimizer
        self.stateful, self.rank_info, self.checkpoint = stateful, rank_info, checkpoint
        # If so, the host runs ahead: a step's update may still be queued on the GPU when the step ends.
        self.updates_on_gpu = any(local_tensor(p).is_cuda for p in self.trained.values())
        self.save_every, self.save_at_end, self.keep, self.stopping = save_every, save_at_end, keep, stopping
        self.describe_run, self.deferred, self.print_line = cache(describe_run), deferred, print_line
        # A group of its own, on the CPU: two threads must not run collectives in one group. The launcher
        # reports dead ranks, so the timeout only covers slow disks.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.pool = ThreadPoolExecutor(
            1, "checkpoint", initializer=set_current_device, initargs=(rank_info.device,)
        )
        # On a CPU training launches few kernels a second, so the thread need not pause for it.
        self.throttle = BackgroundThrottle(enabled=rank_info.device.type == "cuda")
        self.planner = CheckpointPlanner(self.throttle)
        # Caused by `no_dist`. Set here, not in the thread that saves: filters apply to the whole process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self.host_copy = HostCopy(rank_info.device)
        optimizer.register_step_pre_hook(lambda *_: self._before_update())
        self.copy_future: Future[Tensors] | None = None
        self.write_future: Future[bool] | None = None
        self.has_optimizer_state = False
        self.is_prepared = False  # buffers and plan for the first checkpoint are requested
        self.last_started = self.last_written = 0  # steps of checkpoints
        self.elapsed: Callable[[], float] = lambda: 0.0  # seconds of the current write, without pauses
        self.write_seconds = 0.0  # of the last complete write, without pauses
        state_bytes = 3 * sum(local_tensor(p).nbytes for p in self.trained.values())  # with Adam's moments
        stopping.expect_save(state_bytes / SLOW_DISK_SPEED)
        self.stalls: list[float] = []  # seconds that each checkpoint blocked training

    def restore(self) -> int:
        """Load the checkpoint to resume from. Return its step; 0 if there is none. Collective.

        Raises UserError if the checkpoint cannot be loaded.
        """
        if self.checkpoint is None:
            return 0
        restore_tensors(self.checkpoint, self.trained, self.optimizer, self.rank_info.rank, self.group)
        for name, stateful in self.stateful.items():
            try:
                stateful.load_state_dict(self.checkpoint.run["parts"][name])
            except (RuntimeError, LookupError, TypeError, ValueError) as e:
                message = f"{self.checkpoint.folder}: cannot be loaded ({name}: {describe(e)})"
                raise UserError(message) from None
        self.last_started = self.last_written = self.checkpoint.step
        return self.checkpoint.step

    def save_if_due(self, step: int, last: bool) -> bool:
        """Start a checkpoint if one is due or requested. Return whether the run must stop now. Collective.

        Raises CheckpointNotWritten if the one before failed.

        Args:
            step: Optimizer steps that are completed.
            last: The run ends with this step anyway; then it is never asked to stop.
        """
        if self.write_future and self.write_future.done():
            self._wait_for_write()
        elif self.write_future:
            self.stopping.record_save(self.elapsed(), complete=False)
        must_stop, is_requested = self.stopping.poll_all_ranks(last)
        is_due = (self.save_every and step % self.save_every == 0) or (last and self.save_at_end)
        if must_stop or is_requested or is_due:
            self.save(step)
        elif (self.save_every or self.save_at_end) and not self.is_prepared and self.has_optimizer_state:
            self._prepare()
        return must_stop

    def _prepare(self) -> None:
        """Allocate host buffers and plan the first checkpoint, in the background thread. Collective.

        Allocation takes a second for 2 GiB. Called once the optimizer has state; a skipped step does not
        create it.
        """
        layout, local = collect_tensors(self.trained, self.optimizer, self.rank_info.rank)
        self.throttle.freeze_gc()
        # Errors here resurface when the first checkpoint retries.
        self.pool.submit(self.host_copy.allocate, local)
        self.pool.submit(self._plan, layout, local)
        self.is_prepared = True

    def _plan(self, layout: Tensors, local: Tensors) -> None:
        self.planner.set_tensors(layout, local)
        self.planner.exchange_plans(self.group)

    def save(self, step: int) -> None:
        """Start the checkpoint of `step` after the previous one is written; do nothing if it has started.

        Collective. Raises CheckpointNotWritten if the previous one failed.
        """
        if step == self.last_started:
            return
        began = time.perf_counter()
        self._wait_for_write()
        if not self.is_prepared:
            self.throttle.freeze_gc()
            self.is_prepared = True
        layout, local = collect_tensors(self.trained, self.optimizer, self.rank_info.rank)
        self.host_copy.mark_ready()
        self.last_started = step
        self.copy_future = copy_future = self.pool.submit(self.host_copy.start, local)
        self.stalls.append(time.perf_counter() - began)
        self.deferred.run_after(lambda: self._start_write(step, layout, copy_future))
        # On a GPU the deferred calls wait for the next forward; otherwise the GPU would idle between steps.
        # On a CPU the update is complete now, and the next forward may take long: a run killed in it should
        # have its checkpoint.
        if not self.updates_on_gpu:
            self.deferred.run_all()

    def _start_write(self, step: int, layout: Tensors, copy_future: Future[Tensors]) -> None:
        """Let the background thread write the checkpoint. Call when `stateful` is up to date with `step`."""
        began = time.perf_counter()
        self.elapsed = self._start_timer()
        run_state = self._collect_state() if self.rank_info.rank == 0 else {}
        self.write_future = self.pool.submit(self._write, step, layout, copy_future, run_state)
        self.stalls[-1] += time.perf_counter() - began

    def _before_update(self) -> None:
        """Let the optimizer's update wait until its tensors are copied. Raises the copying's error."""
        self.has_optimizer_state = True
        if self.copy_future:
            began = time.perf_counter()
            self.throttle.hurry.set()  # the thread may still be planning, before it copies
            self.copy_future.result()
            self.throttle.hurry.clear()
            self.copy_future = None
            self.host_copy.hold_gpu_until_copied()
            self.stalls[-1] += time.perf_counter() - began

    def _collect_state(self) -> dict:
        """Return {"parts": {name: state of `stateful`}, "files": {name in GROWING_FILES: bytes}}."""
        growing = [self.folder / name for name in GROWING_FILES]
        return {
            "parts": {name: stateful.state_dict() for name, stateful in self.stateful.items()},
            "files": {path.name: path.stat().st_size for path in growing if path.is_file()},
        }

    def _write(self, step: int, layout: Tensors, copy_future: Future[Tensors], run_state: dict) -> bool:
        """Write a checkpoint, in the background thread. Return whether it is complete. Collective.

        A disk error, or NaN in the weights, is only printed: the run goes on with the previous checkpoint.
        Raises CheckpointNotWritten for any other error.
        """
        copies = copy_future.result()
        self.host_copy.wait()
        if not self._all_finite(copies):
            if self.rank_info.rank == 0:
                self._warn(step, "a trained weight is NaN or infinite", "training goes on")
            return False

        def describe_with_state() -> dict:
            for name in run_state["files"]:  # on disk up to this length, before the checkpoint is
                sync(self.folder / name)
            return self.describe_run() | run_state

        writer = CheckpointWriter(checkpoint_folder(self.folder, step), step, describe_with_state)
        try:
            no_dist = self.rank_info.world == 1  # then plans need not be pickled and sent
            self.planner.set_tensors(layout, copies)
            # An empty state_dict, not the layout: torch would ask each tensor whether it is a Stateful.
            dcp.save(
                {}, storage_writer=writer, planner=self.planner, process_group=self.group, no_dist=no_dist
            )
        except dcp.CheckpointException as e:
            failures = [error for error, _ in e.failures.values()]
            if self.rank_info.rank == 0:
                remove_folder(writer.staging_folder)
            if not all(isinstance(error, OSError) for error in failures):
                # Converted, since CheckpointException is no Exception and handlers would miss it.
                raise CheckpointNotWritten(f"checkpoint: {describe(failures[0])}") from e
            if self.rank_info.rank == 0:
                self._warn(step, describe(failures[0]), "training goes on")
            return False
        self.write_seconds = self.elapsed()
        if self.rank_info.rank == 0 and self.keep > 0:
            prune_checkpoints(self.folder, self.keep)
        return True

    def _all_finite(self, copies: Tensors) -> bool:
        """Return, on every rank, whether the trained weights of all ranks are finite. Collective.

        A checkpoint with NaN is useless, and must not replace a good one.
        """
        weights = {name: copy for name, copy in copies.items() if name.startswith("model.")}
        # One call, during which the training thread can run. The sum of finite numbers may overflow too.
        sum_is_finite = nn.utils.get_total_norm(list(weights.values()), 1.0).isfinite()
        found = [] if sum_is_finite else find_nonfinite(weights)
        return not any(gather_from_ranks(found, self.rank_info.world, self.group))

    def _start_timer(self) -> Callable[[], float]:
        """Return a function that returns the seconds since this call, without the throttle's pauses."""
        began, paused = time.perf_counter(), self.throttle.paused_seconds
        return lambda: time.perf_counter() - began - (self.throttle.paused_seconds - paused)

    def _warn(self, step: int, reason: str, consequence: str) -> None:
        """Print to stderr why a checkpoint could not be written, which one remains, and what happens next."""
        if self.last_written:
            remaining = f"the checkpoint of step {self.last_written} stays"
        else:
            remaining = "there is no other one"
        message = (
            f"the checkpoint of step {step} could not be written ({reason}); {remaining}, and {consequence}"
        )
        print(f"\nWARNING: {message}", file=sys.stderr, flush=True)

    def _wait_for_write(self) -> None:
        """Wait for the write in progress, if any, and record how it ended. Raises CheckpointNotWritten."""
        if self.write_future:
            self.throttle.hurry.set()
            if is_complete := self.write_future.result():
                self.last_written = self.last_started
            self.throttle.hurry.clear()
            self.stopping.record_save(self.write_seconds, is_complete)
            self.write_future = None

    def finish(self) -> None:
        """Wait for the last write, end the background thread, and print how long training paused.

        The process must not end before.

        Raises RuntimeError if the run was asked to stop and its last step could not be saved. A run that ends
        by itself only prints the error, so that its result is still saved.
        """
        try:
            self._wait_for_write()
        except CheckpointNotWritten as e:
            if self.stopping.reason:
                raise
            if self.rank_info.rank == 0:
                self._warn(self.last_started, str(e), "the result is saved")
        finally:
            self.throttle.hurry.set()
            self.pool.shutdown()
            self.throttle.unfreeze_gc()
        dist.destroy_process_group(self.group)
        if self.stalls:
            mean, longest = sum(self.stalls) / len(self.stalls), max(self.stalls)
            self.print_line(
                f"checkpoints: {len(self.stalls)}; training paused for {mean:.3f} s for each,"
                f" {longest:.3f} s at most"
            )
        if self.stopping.reason and self.last_written != self.last_started:
            raise RuntimeError(
                f"stopped at step {self.last_started}, which is not saved; --resume continues from"
                f" {self.last_written}"
            )
