"""The plan and the rests of the thread that saves beside training."""

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
from checkpoints.manager import Checkpoints
from checkpoints.storage import folder_of, read_checkpoint, steps_in
from data.packing import make_sampler
from monitoring.tracking import NoTracker
from tests.helpers.adapters import args_for
from tests.helpers.runs import set_up
from tests.helpers.saving import SmallRun
from training import loop_components

LONG = 2.0  # seconds


@contextlib.contextmanager
def resting(run: SmallRun, seconds: float):
    """The thread rests as beside a GPU, and long."""
    run.checkpoints.background.rests = True
    with mock.patch.object(background, "REST", seconds), mock.patch.object(background, "TURN", 0.0):
        yield


def rest_and_finish(place, folder: str) -> tuple[bool, float]:
    """Whether a save beside which training goes on is at rest, and how long it takes once it is waited for."""
    run = SmallRun(place, folder, every=1)
    with resting(run, LONG):
        run.step()
        time.sleep(0.5)
        at_rest, began = not run.checkpoints.writing.done(), time.perf_counter()
        run.checkpoints.finish()
        return at_rest, time.perf_counter() - began


def test_a_save_rests_beside_training_and_not_when_it_is_waited_for(one_rank, tmp_path):
    ((at_rest, seconds),) = one_rank(rest_and_finish, str(tmp_path))
    assert at_rest and seconds < LONG / 2


def preparations(place, folder: str, every: int) -> list[tuple[int, int]]:
    """(step of the last checkpoint, calls to prepare for them) after each step of a run that begins, and of one that goes on."""
    seen = []
    run = SmallRun(place, folder, every)
    for goes_on in (False, True):
        if goes_on:
            run = SmallRun(place, folder, every)
            run.checkpoints.saved = read_checkpoint(folder_of(Path(folder), 4))
            run.done = run.checkpoints.load()
        told = run.checkpoints.background
        with mock.patch.object(told, "prepare") as prepare, mock.patch.object(told, "finish") as finish:
            for _ in range(4):
                run.step()
                seen.append((run.checkpoints.step, prepare.call_count))
            run.checkpoints.finish()
        assert finish.call_count == 1
    return seen


@pytest.mark.parametrize("every", [1, 4])
def test_the_collector_is_told_once_before_the_first_save(every, one_rank, tmp_path):
    """Of a run that goes on as well, and with nothing before the first step's."""
    steps = [step if every == 1 else step // 4 * 4 for step in range(1, 9)]
    assert one_rank(preparations, str(tmp_path), every) == [[(step, 1) for step in steps]]


class Counting:
    """A part of the loop, which has come to a step."""

    step = 0

    def state_dict(self) -> dict:
        return {"step": self.step}


def as_on_a_gpu(saving: Checkpoints) -> Checkpoints:
    saving.ahead = True
    return saving


def told_late(place, folder: str) -> tuple[bool, bool, int]:
    """Whether a save begins to write at once, whether it does once its step is told, and which step's state its parts then
    have."""
    run, part = SmallRun(place, folder, every=1), Counting()
    as_on_a_gpu(run.checkpoints).parts = {"counting": part}
    run.checkpoints.deferred.put(lambda: setattr(part, "step", 1))
    run.step()
    at_once = run.checkpoints.writing is not None
    run.checkpoints.deferred.now()
    part.step = 2  # while it is written
    run.checkpoints.finish()
    saved = read_checkpoint(folder_of(Path(folder), 1))
    return at_once, run.checkpoints.newest == 1, saved.run["parts"]["counting"]["step"]


def test_a_save_waits_until_its_step_is_told(one_rank, tmp_path):
    assert one_rank(told_late, str(tmp_path)) == [(False, True, 1)]


def ahead(place, folder: str, on_gpu: bool) -> bool:
    """Of a run whose trained parameters are on a GPU, or not."""
    local = SimpleNamespace(is_cuda=on_gpu, nbytes=0)
    with mock.patch.object(checkpoints, "local_part", lambda _: local):
        run = SmallRun(place, folder, every=0)
    run.checkpoints.finish()
    return run.checkpoints.ahead


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_loop_is_ahead_where_a_gpu_updates(on_gpu, one_rank, tmp_path):
    """Whatever computes: with --use_cpu_offload the parameters are on the host."""
    assert one_rank(ahead, str(tmp_path), on_gpu) == [on_gpu]


def order_of_steps(place, argv: list[str], gpu: bool) -> list[str]:
    """In which order the loop comes to forwards and to what is told of their steps."""
    job, model = set_up(place, argv)
    sampler, seen = make_sampler(job.config, job.rows, place.rank, place.world), []
    loss_sum = train.loss_sum

    def forward(*args):
        seen.append("forward")
        return loss_sum(*args)

    def make(*args, **options):
        made = Checkpoints(*args, **options)
        return as_on_a_gpu(made) if gpu else made

    class Told(NoTracker):
        def log(self, metrics):
            seen.append(f"told {metrics.step}")

    with (
        mock.patch.object(train, "loss_sum", forward),
        mock.patch.object(loop_components, "Checkpoints", make),
    ):
        train.train(job, model, place, sampler, Told())
    return seen


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_given_the_next_step_before_one_that_is_saved_is_told(
    gpu, one_rank, checkpoints, short_rows, tmp_path
):
    """What is told has to be waited for, and it would have nothing to do meanwhile."""
    if torch.cuda.is_available() and not gpu:
        pytest.skip("runs on a GPU")
    args = args_for(checkpoints(), short_rows, "lora", "--max_steps", "3")
    (seen,) = one_rank(order_of_steps, [*args, "--output_dir", str(tmp_path), "--save_every", "1"], gpu)
    before = ["forward", "forward", "told 1", "forward", "told 2", "told 3"]
    assert seen == (before if gpu else ["forward", "told 1", "forward", "told 2", "forward", "told 3"])
    assert steps_in(tmp_path) == [3, 2]


def plans(place, folder: str) -> list[int]:
    """How often tensors have been described to the other ranks after each of some steps, in the last of which another
    parameter has its first gradient."""
    run, seen = SmallRun(place, folder, every=2), []
    weight, bias = run.model.parameters()
    with mock.patch.object(
        checkpoint_plan,
        "create_default_local_save_plan",
        wraps=checkpoint_plan.create_default_local_save_plan,
    ) as described:
        for step in range(1, 7):
            bias.requires_grad_(step > 4)  # as an expert's that no token is sent to: it has no state yet
            run.step()
            run.buffers()
            seen.append(described.call_count)
            if step % 2 == 0:
                run.check_saved()
        run.checkpoints.finish()
    assert len(run.optimizer.state[bias]) == len(run.optimizer.state[weight]) > 0
    return seen


def test_a_plan_is_made_before_the_first_checkpoint_and_again_for_what_is_new(one_rank, tmp_path):
    assert one_rank(plans, str(tmp_path)) == [[1, 1, 1, 1, 1, 2]]


def update_beside_a_plan(place, folder: str) -> tuple[bool, float, bool]:
    """Whether a plan is at rest when a checkpoint is begun, how long the next update then waits, and whether the save
    rests again after it."""
    run = SmallRun(place, folder, every=2)
    with resting(run, LONG):
        run.step()
        time.sleep(0.5)
        at_rest = not run.checkpoints.planner.described
        run.step()
        began = time.perf_counter()
        run.step()
        seconds = time.perf_counter() - began
        again = not run.checkpoints.background.hurry.is_set()
        run.checkpoints.finish()
    return at_rest, seconds, again


def test_a_plan_that_rests_does_not_hold_up_the_update_after_a_save(one_rank, tmp_path):
    ((at_rest, seconds, again),) = one_rank(update_beside_a_plan, str(tmp_path))
    assert at_rest and seconds < LONG / 2 and again


def end_beside_a_plan(place, folder: str) -> float:
    run = SmallRun(place, folder, every=100)
    with resting(run, LONG):
        run.step()
        began = time.perf_counter()
        run.checkpoints.finish()
        return time.perf_counter() - began


def test_a_plan_that_rests_does_not_hold_up_the_end(one_rank, tmp_path):
    """Of a run that ends before its first checkpoint."""
    (seconds,) = one_rank(end_beside_a_plan, str(tmp_path))
    assert seconds < LONG / 2


def cannot_plan(place, folder: str, rank: int, times: int) -> list[str]:
    """What the steps raise where a rank has no memory for its first plans."""
    failures = [MemoryError("no memory for a plan")] * times if place.rank == rank else []
    plan, raised = checkpoint_plan.create_default_local_save_plan, []

    def fails(*args):
        if failures:
            raise failures.pop()
        return plan(*args)

    run = SmallRun(place, folder, every=2)
    with mock.patch.object(checkpoint_plan, "create_default_local_save_plan", fails):
        for step in (run.step, run.step, run.buffers, run.step):
            try:
                step()
            except RuntimeError as e:
                raised.append(str(e))
    run.checkpoints.finish()
    return raised


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_could_not_plan_ahead_plans_at_the_first_checkpoint(rank, two_ranks, tmp_path):
    assert two_ranks(cannot_plan, str(tmp_path), rank, 1) == [[], []]
    saved = read_checkpoint(folder_of(tmp_path, 2))
    assert saved.tensors.keys() >= {"model.weight", "model.bias"}


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_hears_of_one_that_cannot_plan(rank, two_ranks, tmp_path):
    """At the first checkpoint, in the step after it if another one is not due for long."""
    assert (
        two_ranks(cannot_plan, str(tmp_path), rank, 9)
        == [["checkpoint: MemoryError: no memory for a plan"]] * 2
    )
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()
