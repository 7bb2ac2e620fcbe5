"""What goes wrong while a run trains. Ranks that are killed or raise: tests/launch/test_processes.py."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from benchmarks.make_checkpoint import byte_tokenizer
from checkpoints.storage import folder_of
from data.batches import Step, StepSampler
from data.tokenizing import prepare
from monitoring.metrics import HostMoment, Meter, Metrics, Reading
from monitoring.tracking import NoTracker
from options.errors import UserError
from parallel.optimizers import make_optimizer
from tests.helpers.bad_rows import BAD_ROW
from tests.helpers.resuming import lines, run
from tests.helpers.runs import train_run
from training.bad_steps import BAD_STEPS, BadSteps, conclude, resumed_from
from wrapping import make_mesh

STEP = Step(0.1, [], 1, 1, torch.zeros(0))


def test_a_nan_step_changes_nothing_on_any_rank(poisoned, two_ranks, tmp_path):
    """Of three steps the second is NaN. After it every weight is what it was, on both ranks, and the third learns."""
    args = [*poisoned, "--batch_size", "2", "--output_dir", tmp_path]
    runs = {n: two_ranks(train_run, [*args, "--max_steps", str(n)]) for n in (1, 2, 3)}
    for losses, _, norms in runs[3]:
        assert [math.isfinite(x) for x in losses] == [math.isfinite(x) for x in norms] == [True, False, True]
    for rank in range(2):
        weights = {n: run[rank][1] for n, run in runs.items()}
        assert all(torch.equal(weights[2][k], v) and v.isfinite().all() for k, v in weights[1].items())
        assert any(not torch.equal(weights[3][k], v) for k, v in weights[2].items())
        assert all(torch.equal(runs[3][0][1][k], v) for k, v in weights[3].items())
    lines = [json.loads(line) for line in (tmp_path / BAD_STEPS).read_text().splitlines()]
    rows = sampled_rows(poisoned, step=2)
    assert BAD_ROW in rows
    expected = {"step": 2, "epoch": 0.6667, "loss": "nan", "grad_norm": "nan", "rows": rows}
    assert lines == [expected] * 2, "of two runs, by rank 0 alone"


def test_a_resumed_run_tells_of_a_bad_step_once(poisoned, two_ranks, tmp_path):
    """Killed after the bad step, it goes on from before it, when there was no such line, and from after it."""
    argv = [*map(str, poisoned), "--batch_size", "2", "--max_steps", "3", "--save_every", "1", "--keep", "-1"]
    argv += ["--output_dir", str(tmp_path), "--log_to", "stdout"]
    two_ranks(run, argv)
    told = (tmp_path / BAD_STEPS).read_text()
    assert [json.loads(line)["step"] for line in told.splitlines()] == [2]
    for step in (2, 1):
        two_ranks(run, [*argv, "--resume", str(folder_of(tmp_path, step))])
        assert (tmp_path / BAD_STEPS).read_text() == told
        assert [m.get("bad_steps") for m in lines(tmp_path)] == [None, 1, 1]


def resumed_after_bad_steps(rank_info, argv: list[str], folder: str) -> list[str]:
    """How a run ends that --max_bad_steps 0 has ended before, and what is in the lines of its steps."""
    with pytest.raises(UserError, match="1, more than --max_bad_steps 0"):
        run(rank_info, argv)
    return [line.get("bad_steps") for line in lines(Path(folder))]


def test_a_run_that_bad_steps_ended_stays_ended(poisoned, two_ranks, tmp_path):
    argv = [*map(str, poisoned), "--batch_size", "2", "--max_steps", "3", "--save_every", "1"]
    argv += ["--output_dir", str(tmp_path), "--log_to", "stdout", "--max_bad_steps", "0"]
    for more in ([], ["--resume", "auto"]):
        ended = two_ranks(resumed_after_bad_steps, [*argv, *more], str(tmp_path))
        assert ended == [[None, 1]] * 2
    two_ranks(run, [*argv, "--resume", "auto", "--max_bad_steps", "1"])
    assert [line.get("bad_steps") for line in lines(tmp_path)] == [None, 1, 1]


def sampled_rows(args, step: int) -> list[int]:
    rows = prepare(str(args[3]), "auto", -1, 512, byte_tokenizer())
    sampler = StepSampler(rows, 4, 1, 0, 1, seed=3)
    (taken,) = [taken for i, (taken, _) in enumerate(sampler.deal(0), 1) if i == step]
    return sorted(int(i) + 1 for i in taken)


def metrics(loss: float, norm: float) -> Metrics:
    return Metrics(1, 0.1, loss, 1e-3, norm, 10, 5, 1.0, 10.0, 0.1, 0.1)


def guard(most: int = 10, scale: float | None = None) -> BadSteps:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    scaler.scale(torch.zeros(()))
    return BadSteps(done=0, most=most, rows=None, folder=Path(), scaler=scaler, rank=1, tracker=NoTracker())


@pytest.mark.parametrize(
    "loss, norm, scale, good",
    [
        (1.0, 2.0, None, True),
        (math.nan, 2.0, None, False),
        (math.inf, 2.0, None, False),
        (1.0, math.nan, None, False),
        (1.0, math.inf, None, False),
        (1.0, math.inf, 2.0**16, True),  # fp16's scaler skips the step itself, and halves the scale
        (1.0, math.inf, 1.0, False),  # nothing was scaled: the gradient is infinite itself
        (math.nan, math.nan, 2.0**16, False),  # the loss is not scaled when it is measured
    ],
)
def test_what_is_a_bad_step(loss, norm, scale, good):
    judge = guard(scale=scale)
    judged = judge.judge(metrics(loss, norm), None)
    assert (judge.count, judged.bad_steps) == ((0, None) if good else (1, 1))
    assert judged.applied_steps == judge.applied == int(math.isfinite(loss) and math.isfinite(norm))


def test_its_counts_are_saved():
    """An older checkpoint has no count of the steps that changed the weights: all but the bad ones are taken for such."""
    judge = guard()
    for loss in (1.0, math.nan, math.nan):
        judge.judge(metrics(loss, 1.0), STEP)
    state = json.loads(json.dumps(judge.state_dict()))
    assert resumed_from(3, state) == (3, 2, 1)
    assert [resumed_from(steps, {"count": 2}).applied for steps in (2, 5)] == [0, 3]
    again = guard()
    again.load_state_dict(state)
    assert again.state_dict() == state


@pytest.mark.parametrize("name", ["sgd", "fused_adamw"])
@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_bad_step_leaves_weights_and_moments_alone(name, loss, norm):
    """Whether the host decides or, without asking it, a fused optimizer: the steps around it are as without it."""

    def weights_after(*readings: tuple[float, float]) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8).view(2, 4))
        optimizer, judge = make_optimizer([parameter], name, 0.1, 0.1), guard()
        for loss, norm in readings:
            parameter.grad = torch.full_like(parameter, math.cos(norm) if math.isfinite(norm) else norm)
            judge.step(optimizer, reading(loss, norm))
        return parameter.detach()

    good = [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]
    with_bad = [(loss, norm), *good[:1], (loss, norm), *good[1:], (loss, norm)]
    assert torch.equal(weights_after(*with_bad), weights_after(*good))
    assert not torch.equal(weights_after(*good), weights_after(*good[:2]))


def test_a_fused_step_is_bad_on_all_ranks(two_ranks):
    """As on GPUs, over FSDP's shards, where one rank's loss alone is bad."""
    undisturbed = two_ranks(shards_after, [1.0, 1.0])
    for ours, theirs in zip(
        two_ranks(shards_after, [math.nan, 1.0, math.inf, 1.0, math.nan]), undisturbed, strict=True
    ):
        assert ours["steps"] == [2.0] and all(map(torch.equal, ours["shards"], theirs["shards"]))


def shards_after(rank_info, factors: list[float]) -> dict:
    """This rank's rows of a layer after steps in which the last rank's loss is multiplied by these factors, and the
    optimizer's count of steps."""
    mesh = make_mesh(rank_info.device.type, rank_info.world, "full_shard", rank_info.world)
    torch.manual_seed(0)
    layer = fully_shard(torch.nn.Linear(5, 3, bias=False).to(rank_info.device), mesh=mesh)
    optimizer = make_optimizer(layer.parameters(), "fused_adamw", 0.1, 0.1)
    meter, judge, x = Meter(rank_info.device, {}), guard(), torch.ones(2, 5, device=rank_info.device)
    for factor in factors:
        loss = layer(x).square().sum() * (factor if rank_info.rank == rank_info.world - 1 else 1)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()]).full_tensor()
        judge.step(optimizer, meter.read(1, STEP, 1e-4, loss.detach(), norm))
        optimizer.zero_grad()
    return {
        "shards": [p.to_local().detach().cpu() for p in layer.parameters()],
        "steps": [state["step"].item() for state in optimizer.state.values()],
    }


@pytest.mark.parametrize("loss, steps", [(1.0, 1), (math.nan, 0)])
def test_a_fused_step_on_the_host_waits_for_the_gpus_answer(loss, steps):
    """With --use_cpu_offload. torch would copy `finite` to the host, and read it before it is there."""
    parameter = torch.nn.Parameter(torch.ones(2, 4))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer([parameter], "fused_adamw", 0.1, 0.1)
    on_gpu = torch.empty((), dtype=torch.bool, device="meta")  # as little to be had without waiting
    guard().step(optimizer, dataclasses.replace(reading(loss, 1.0), finite=on_gpu))
    assert len(optimizer.state) == steps and torch.equal(parameter, torch.ones(2, 4)) == (not steps)


def reading(loss: float, norm: float) -> Reading:
    table = torch.tensor([[loss, norm]], dtype=torch.float64)
    return Reading(1, STEP, 1e-4, table, HostMoment(), table.sum().isfinite())


def test_the_next_step_waits_for_what_the_scaler_goes_by():
    assert [guard(scale=scale).decides() for scale in (None, 1.0, 2.0**16)] == [False, True, True]


@pytest.mark.parametrize("most, stops", [(-1, [False] * 4), (0, [True] * 4), (2, [False, False, True, True])])
def test_how_many_bad_steps_end_a_run(most, stops):
    judge = guard(most)
    found = []
    for _ in stops:
        decides, counted = judge.decides(), judge.judge(metrics(math.nan, 1.0), STEP)
        assert decides == judge.stop, "only then the next step has to wait"
        found.append(judge.stop)
    assert found == stops and counted.bad_steps == len(stops)
    assert judge.judge(metrics(1.0, 1.0), None).bad_steps == len(stops), "a good step does not forget the bad"


@pytest.mark.parametrize("losses, before, told", [
    ([1.0] + [math.nan] * 11, 0, "after step 1, the last good one; with them 11 more steps gave NaN or infinity"),
    ([1.0, math.nan, 1.0, math.inf], 0, "after step 3, the last good one; with them 1 more step gave"),
    ([math.nan] * 2, 7, "after the last good step; with them 2 more steps gave"),  # resumed: of this session
    ([], 7, "after the last good step."),
])  # fmt: skip
def test_what_the_last_weights_are(losses, before, told, monkeypatch):
    """Those of a diverged run gave one good loss before they were made, and none since."""
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    judge = guard(most=-1)
    judge.count = before
    history = [
        judge.judge(dataclasses.replace(metrics(loss, 1.0), step=step), STEP)
        for step, loss in enumerate(losses, 1)
    ]
    with pytest.raises(UserError) as e:
        conclude(history, before, 0, Path("run"), "")
    assert f"The weights at the end are those {told}" in str(e.value)


def test_too_many_bad_steps_end_a_run_which_is_saved(ended):
    out, status, shown, errors = ended
    assert status == 2, errors
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert errors.splitlines()[-1].startswith(
        "error: rank 0: steps with a NaN or infinite loss or gradient: 1, more than --max_bad_steps 0; their rows"
        f" are in {out / BAD_STEPS}. The weights at the end are those after step {steps[-2]['step']}, the last good one;"
        " with them 1 more step gave NaN or infinity"
    )
    assert steps[-1]["loss"] is steps[-1]["grad_norm"] is None and steps[-1]["bad_steps"] == 1
    assert "bad_steps" not in steps[0] and "1 skipped as NaN or infinite" in shown
    assert BAD_ROW in json.loads((out / BAD_STEPS).read_text())["rows"]
    assert all(t.isfinite().all() for t in load_file(out / "adapter_model.safetensors").values())
    assert (out / "report.html").is_file() and (out / "loss.png").is_file()
