"""The background thread that saves while training goes on: its plans, and its pauses."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import train
from checkpoints import background
from checkpoints import manager as checkpoints
from checkpoints import planner as checkpoint_plan
from checkpoints.manager import CheckpointManager
from checkpoints.storage import checkpoint_folder, checkpoint_steps, read_checkpoint
from data.packing import make_sampler
from monitoring.tracking import NoTracker
from tests.helpers.adapters import args_for
from tests.helpers.runs import set_up
from tests.helpers.saving import SmallRun
from training import loop_components

LONG = 2.0  # seconds


@contextlib.contextmanager
def pausing(run: SmallRun, seconds: float):
    """Let the background thread pause as with a GPU, for `seconds` at a time."""
    run.checkpoints.throttle.enabled = True
    with (
        mock.patch.object(background, "PAUSE_SECONDS", seconds),
        mock.patch.object(background, "WORK_SECONDS", 0.0),
    ):
        yield


def pause_and_finish(rank_info, folder: str) -> tuple[bool, float]:
    """Return (whether a save pauses while training goes on, its seconds once training waits for it)."""
    run = SmallRun(rank_info, folder, every=1)
    with pausing(run, LONG):
        run.step()
        time.sleep(0.5)
        is_paused, began = not run.checkpoints.write_future.done(), time.perf_counter()
        run.checkpoints.finish()
        return is_paused, time.perf_counter() - began


def test_a_save_pauses_until_training_waits_for_it(one_rank, tmp_path):
    ((is_paused, seconds),) = one_rank(pause_and_finish, str(tmp_path))
    assert is_paused and seconds < LONG / 2


def preparations(rank_info, folder: str, every: int) -> list[tuple[int, int]]:
    """Return (last checkpoint's step, calls of freeze_gc) after each step of a new and a resumed run."""
    seen = []
    run = SmallRun(rank_info, folder, every)
    for is_resumed in (False, True):
        if is_resumed:
            run = SmallRun(rank_info, folder, every)
            run.checkpoints.checkpoint = read_checkpoint(checkpoint_folder(Path(folder), 4))
            run.done = run.checkpoints.restore()
        throttle = run.checkpoints.throttle
        with (
            mock.patch.object(throttle, "freeze_gc") as freeze,
            mock.patch.object(throttle, "unfreeze_gc") as unfreeze,
        ):
            for _ in range(4):
                run.step()
                seen.append((run.checkpoints.last_started, freeze.call_count))
            run.checkpoints.finish()
        assert unfreeze.call_count == 1
    return seen


@pytest.mark.parametrize("every", [1, 4])
def test_garbage_collection_is_frozen_once_before_the_first_save(every, one_rank, tmp_path):
    """In a resumed run too, and even if the first save follows the first step."""
    steps = [step if every == 1 else step // 4 * 4 for step in range(1, 9)]
    assert one_rank(preparations, str(tmp_path), every) == [[(step, 1) for step in steps]]


class Counting:
    """State of the loop that counts steps."""

    step = 0

    def state_dict(self) -> dict:
        return {"step": self.step}


def as_on_a_gpu(manager: CheckpointManager) -> CheckpointManager:
    manager.updates_on_gpu = True
    return manager


def write_after_deferred_calls(rank_info, folder: str) -> tuple[bool, bool, int]:
    """Return (whether a save writes at once, whether after the deferred calls, the step of its state)."""
    run, counting = SmallRun(rank_info, folder, every=1), Counting()
    as_on_a_gpu(run.checkpoints).stateful = {"counting": counting}
    run.checkpoints.deferred.defer(lambda: setattr(counting, "step", 1))
    run.step()
    at_once = run.checkpoints.write_future is not None
    run.checkpoints.deferred.run_all()
    counting.step = 2  # while it is written
    run.checkpoints.finish()
    saved = read_checkpoint(checkpoint_folder(Path(folder), 1))
    return at_once, run.checkpoints.last_written == 1, saved.run["parts"]["counting"]["step"]


def test_a_save_waits_for_the_deferred_calls_of_its_step(one_rank, tmp_path):
    assert one_rank(write_after_deferred_calls, str(tmp_path)) == [(False, True, 1)]


def updates_on_gpu(rank_info, folder: str, on_gpu: bool) -> bool:
    """Return the manager's field for a run with trained parameters on a GPU, or not."""
    local = SimpleNamespace(is_cuda=on_gpu, nbytes=0)
    with mock.patch.object(checkpoints, "local_tensor", lambda _: local):
        run = SmallRun(rank_info, folder, every=0)
    run.checkpoints.finish()
    return run.checkpoints.updates_on_gpu


@pytest.mark.parametrize("on_gpu", [False, True])
def test_updates_on_gpu_follows_the_trained_parameters(on_gpu, one_rank, tmp_path):
    """Not the device that computes: with --use_cpu_offload the parameters are on the host."""
    assert one_rank(updates_on_gpu, str(tmp_path), on_gpu) == [on_gpu]


def order_of_steps(rank_info, argv: list[str], gpu: bool) -> list[str]:
    """Return the loop's forwards and logged steps in order."""
    job, model = set_up(rank_info, argv)
    sampler, seen = make_sampler(job.config, job.rows, rank_info.rank, rank_info.world), []
    loss_sum = train.loss_sum

    def forward(*args):
        seen.append("forward")
        return loss_sum(*args)

    def make(*args, **options):
        made = CheckpointManager(*args, **options)
        return as_on_a_gpu(made) if gpu else made

    class LoggingTracker(NoTracker):
        def log(self, metrics):
            seen.append(f"log {metrics.step}")

    with (
        mock.patch.object(train, "loss_sum", forward),
        mock.patch.object(loop_components, "CheckpointManager", make),
    ):
        train.train(job, model, rank_info, sampler, LoggingTracker())
    return seen


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_gets_the_next_forward_before_a_saved_step_is_logged(
    gpu, one_rank, checkpoints, short_rows, tmp_path
):
    """Logging waits for the GPU, which would be idle meanwhile."""
    if torch.cuda.is_available() and not gpu:
        pytest.skip("runs on a GPU")
    args = args_for(checkpoints(), short_rows, "lora", "--max_steps", "3")
    (seen,) = one_rank(order_of_steps, [*args, "--output_dir", str(tmp_path), "--save_every", "1"], gpu)
    before = ["forward", "forward", "log 1", "forward", "log 2", "log 3"]
    assert seen == (before if gpu else ["forward", "log 1", "forward", "log 2", "forward", "log 3"])
    assert checkpoint_steps(tmp_path) == [3, 2]


def plans(rank_info, folder: str) -> list[int]:
    """Return how often tensors were planned, after each step.

    In the last step another parameter has its first gradient.
    """
    run, seen = SmallRun(rank_info, folder, every=2), []
    weight, bias = run.model.parameters()
    with mock.patch.object(
        checkpoint_plan,
        "create_default_local_save_plan",
        wraps=checkpoint_plan.create_default_local_save_plan,
    ) as plan:
        for step in range(1, 7):
            bias.requires_grad_(step > 4)  # an expert without tokens has no optimizer state yet
            run.step()
            run.buffers()
            seen.append(plan.call_count)
            if step % 2 == 0:
                run.check_saved()
        run.checkpoints.finish()
    assert len(run.optimizer.state[bias]) == len(run.optimizer.state[weight]) > 0
    return seen


def test_tensors_are_planned_before_the_first_checkpoint_and_when_new_ones_appear(one_rank, tmp_path):
    assert one_rank(plans, str(tmp_path)) == [[1, 1, 1, 1, 1, 2]]


def update_during_planning(rank_info, folder: str) -> tuple[bool, float, bool]:
    """Return (whether planning pauses at a save, the next update's seconds, whether it pauses again)."""
    run = SmallRun(rank_info, folder, every=2)
    with pausing(run, LONG):
        run.step()
        time.sleep(0.5)
        is_paused = not run.checkpoints.planner.described
        run.step()
        began = time.perf_counter()
        run.step()
        seconds = time.perf_counter() - began
        again = not run.checkpoints.throttle.hurry.is_set()
        run.checkpoints.finish()
    return is_paused, seconds, again


def test_paused_planning_does_not_delay_the_update_after_a_save(one_rank, tmp_path):
    ((is_paused, seconds, again),) = one_rank(update_during_planning, str(tmp_path))
    assert is_paused and seconds < LONG / 2 and again


def end_during_planning(rank_info, folder: str) -> float:
    run = SmallRun(rank_info, folder, every=100)
    with pausing(run, LONG):
        run.step()
        began = time.perf_counter()
        run.checkpoints.finish()
        return time.perf_counter() - began


def test_paused_planning_does_not_delay_the_end(one_rank, tmp_path):
    """The run ends before its first checkpoint."""
    (seconds,) = one_rank(end_during_planning, str(tmp_path))
    assert seconds < LONG / 2


def cannot_plan(rank_info, folder: str, rank: int, times: int) -> list[str]:
    """Return the errors of the steps if a rank has no memory for its first plans."""
    failures = [MemoryError("no memory for a plan")] * times if rank_info.rank == rank else []
    plan, raised = checkpoint_plan.create_default_local_save_plan, []

    def fails(*args):
        if failures:
            raise failures.pop()
        return plan(*args)

    run = SmallRun(rank_info, folder, every=2)
    with mock.patch.object(checkpoint_plan, "create_default_local_save_plan", fails):
        for step in (run.step, run.step, run.buffers, run.step):
            try:
                step()
            except RuntimeError as e:
                raised.append(str(e))
    run.checkpoints.finish()
    return raised


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_early_plan_failed_plans_at_the_first_checkpoint(rank, two_ranks, tmp_path):
    assert two_ranks(cannot_plan, str(tmp_path), rank, 1) == [[], []]
    saved = read_checkpoint(checkpoint_folder(tmp_path, 2))
    assert saved.tensors.keys() >= {"model.weight", "model.bias"}


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_raise_if_one_cannot_plan(rank, two_ranks, tmp_path):
    """They raise in the step after the first checkpoint, if the next one is not due for long."""
    assert (
        two_ranks(cannot_plan, str(tmp_path), rank, 9)
        == [["checkpoint: MemoryError: no memory for a plan"]] * 2
    )
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()
