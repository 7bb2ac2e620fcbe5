"""Bad steps while a run trains. tests/launch/test_processes.py has ranks that are killed or raise."""

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
from checkpoints.storage import checkpoint_folder
from data.batches import Step, StepSampler
from data.reading import ReadingOptions
from data.tokenizing import tokenize_dataset
from monitoring.metrics import HostEvent, Meter, Metrics, Reading
from monitoring.tracking import NoTracker
from options.errors import UserError
from parallel.optimizers import make_optimizer
from tests.helpers.bad_rows import BAD_ROW
from tests.helpers.resuming import lines, run
from tests.helpers.runs import train_run
from training.bad_steps import BAD_STEPS, BadStepGuard, raise_if_failed, resumed_from
from wrapping import make_mesh

STEP = Step(0.1, [], 1, 1, torch.zeros(0))


def test_a_nan_step_changes_nothing_on_any_rank(poisoned, two_ranks, tmp_path):
    """The second of three steps is NaN. It changes no weight on any rank, and the third step learns."""
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
    assert lines == [expected] * 2, "one line for each of two runs, by rank 0 alone"


def test_a_resumed_run_reports_a_bad_step_once(poisoned, two_ranks, tmp_path):
    """Killed after the bad step, it resumes from a checkpoint after it, and from one before it."""
    argv = [*map(str, poisoned), "--batch_size", "2", "--max_steps", "3", "--save_every", "1", "--keep", "-1"]
    argv += ["--output_dir", str(tmp_path), "--log_to", "stdout"]
    two_ranks(run, argv)
    reported = (tmp_path / BAD_STEPS).read_text()
    assert [json.loads(line)["step"] for line in reported.splitlines()] == [2]
    for step in (2, 1):
        two_ranks(run, [*argv, "--resume", str(checkpoint_folder(tmp_path, step))])
        assert (tmp_path / BAD_STEPS).read_text() == reported
        assert [m.get("bad_steps") for m in lines(tmp_path)] == [None, 1, 1]


def resumed_after_bad_steps(rank_info, argv: list[str], folder: str) -> list[str]:
    """bad_steps of a run's metrics, after it ended again because of --max_bad_steps 0."""
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
    """The numbers of a step's rows, from 1."""
    rows = tokenize_dataset(str(args[3]), ReadingOptions(byte_tokenizer()))
    sampler = StepSampler(rows, 4, 1, 0, 1, seed=3)
    (taken,) = [taken for i, (taken, _) in enumerate(sampler.deal(0), 1) if i == step]
    return sorted(int(i) + 1 for i in taken)


def metrics(loss: float, norm: float) -> Metrics:
    return Metrics(1, 0.1, loss, 1e-3, norm, 10, 5, 1.0, 10.0, 0.1, 0.1)


def make_guard(max_bad_steps: int = 10, scale: float | None = None) -> BadStepGuard:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    scaler.scale(torch.zeros(()))
    options = {"done": 0, "rows": None, "folder": Path(), "rank": 1, "tracker": NoTracker()}
    return BadStepGuard(max_bad_steps=max_bad_steps, scaler=scaler, **options)


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
    guard = make_guard(scale=scale)
    checked = guard.check_step(metrics(loss, norm), None)
    assert (guard.count, checked.bad_steps) == ((0, None) if good else (1, 1))
    assert checked.applied_steps == guard.applied == int(math.isfinite(loss) and math.isfinite(norm))


def test_its_counts_are_saved():
    """An older checkpoint has no count of applied steps: all but the bad ones count as such."""
    guard = make_guard()
    for loss in (1.0, math.nan, math.nan):
        guard.check_step(metrics(loss, 1.0), STEP)
    state = json.loads(json.dumps(guard.state_dict()))
    assert resumed_from(3, state) == (3, 2, 1)
    assert [resumed_from(steps, {"count": 2}).applied for steps in (2, 5)] == [0, 3]
    resumed = make_guard()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


@pytest.mark.parametrize("name", ["sgd", "fused_adamw"])
@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_bad_step_leaves_weights_and_moments_alone(name, loss, norm):
    """Other steps have the same result as without it, whether the host skips it or a fused optimizer does."""

    def weights_after(*readings: tuple[float, float]) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8).view(2, 4))
        optimizer, guard = make_optimizer([parameter], name, 0.1, 0.1), make_guard()
        for loss, norm in readings:
            parameter.grad = torch.full_like(parameter, math.cos(norm) if math.isfinite(norm) else norm)
            guard.step(optimizer, reading(loss, norm))
        return parameter.detach()

    good = [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]
    with_bad = [(loss, norm), *good[:1], (loss, norm), *good[1:], (loss, norm)]
    assert torch.equal(weights_after(*with_bad), weights_after(*good))
    assert not torch.equal(weights_after(*good), weights_after(*good[:2]))


def test_a_fused_step_is_bad_on_all_ranks(two_ranks):
    """With FSDP's shards, as on GPUs, and a bad loss on one rank alone."""
    good = two_ranks(shards_after, [1.0, 1.0])
    with_bad = two_ranks(shards_after, [math.nan, 1.0, math.inf, 1.0, math.nan])
    for got, expected in zip(with_bad, good, strict=True):
        assert got["steps"] == [2.0] and all(map(torch.equal, got["shards"], expected["shards"]))


def shards_after(rank_info, factors: list[float]) -> dict:
    """This rank's shards of a layer, and the optimizer's counts of steps.

    factors: the last rank's loss is multiplied by them, one in each step.
    """
    mesh = make_mesh(rank_info.device.type, rank_info.world, "full_shard", rank_info.world)
    torch.manual_seed(0)
    layer = fully_shard(torch.nn.Linear(5, 3, bias=False).to(rank_info.device), mesh=mesh)
    optimizer = make_optimizer(layer.parameters(), "fused_adamw", 0.1, 0.1)
    meter, guard, x = Meter(rank_info.device, {}), make_guard(), torch.ones(2, 5, device=rank_info.device)
    for factor in factors:
        loss = layer(x).square().sum() * (factor if rank_info.rank == rank_info.world - 1 else 1)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()]).full_tensor()
        guard.step(optimizer, meter.read(1, STEP, 1e-4, loss.detach(), norm))
        optimizer.zero_grad()
    return {
        "shards": [p.to_local().detach().cpu() for p in layer.parameters()],
        "steps": [state["step"].item() for state in optimizer.state.values()],
    }


@pytest.mark.parametrize("loss, steps", [(1.0, 1), (math.nan, 0)])
def test_a_fused_step_on_the_host_waits_for_the_gpus_answer(loss, steps):
    """With --use_cpu_offload, torch would copy `finite` to the host and read it before the copy ends."""
    parameter = torch.nn.Parameter(torch.ones(2, 4))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer([parameter], "fused_adamw", 0.1, 0.1)
    on_gpu = torch.empty((), dtype=torch.bool, device="meta")  # cannot be read either
    make_guard().step(optimizer, dataclasses.replace(reading(loss, 1.0), finite=on_gpu))
    assert len(optimizer.state) == steps and torch.equal(parameter, torch.ones(2, 4)) == (not steps)


def reading(loss: float, norm: float) -> Reading:
    table = torch.tensor([[loss, norm]], dtype=torch.float64)
    return Reading(1, STEP, 1e-4, table, HostEvent(), table.sum().isfinite())


def test_the_next_step_waits_for_metrics_that_the_scaler_needs():
    assert [make_guard(scale=scale).needs_metrics() for scale in (None, 1.0, 2.0**16)] == [False, True, True]


@pytest.mark.parametrize(
    "max_bad_steps, stops", [(-1, [False] * 4), (0, [True] * 4), (2, [False, False, True, True])]
)
def test_too_many_bad_steps_end_a_run(max_bad_steps, stops):
    guard = make_guard(max_bad_steps)
    found = []
    for _ in stops:
        needs_metrics, checked = guard.needs_metrics(), guard.check_step(metrics(math.nan, 1.0), STEP)
        assert needs_metrics == guard.should_stop, "only then the next step has to wait"
        found.append(guard.should_stop)
    assert found == stops and checked.bad_steps == len(stops)
    assert guard.check_step(metrics(1.0, 1.0), None).bad_steps == len(stops), "a good step resets the count"


@pytest.mark.parametrize("losses, resumed_bad, described", [
    ([1.0] + [math.nan] * 11, 0,
     "after step 1, the last good one; the 11 steps after it gave NaN or infinity"),
    ([1.0, math.nan, 1.0, math.inf], 0, "after step 3, the last good one; the step after it gave"),
    ([math.nan] * 2, 7, "after the last good step; the 2 steps after it gave"),  # in a resumed run
    ([], 7, "after the last good step."),
])  # fmt: skip
def test_the_last_weights_are_described(losses, resumed_bad, described, monkeypatch):
    """The last good step made them; the line counts the bad steps after it."""
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    guard = make_guard(max_bad_steps=-1)
    guard.count = resumed_bad
    history = [
        guard.check_step(dataclasses.replace(metrics(loss, 1.0), step=step), STEP)
        for step, loss in enumerate(losses, 1)
    ]
    with pytest.raises(UserError) as e:
        raise_if_failed(history, resumed_bad, 0, Path("run"), "")
    assert f"The weights at the end are those {described}" in str(e.value)


@pytest.mark.parametrize(
    ("loss", "is_scaled", "overflows"), [(math.nan, True, True), (math.nan, False, False), (1.0, True, False)]
)
def test_what_helps_after_some_good_steps(loss, is_scaled, overflows, monkeypatch):
    """In fp16 an infinite loss is an overflow in the layers, which a lower --lr does not prevent."""
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    guard = make_guard(max_bad_steps=-1)
    history = [guard.check_step(metrics(*step), STEP) for step in ((1.0, 1.0), (loss, math.nan))]
    with pytest.raises(UserError) as e:
        raise_if_failed(history, 0, 0, Path("run"), "", is_scaled)
    assert ("--precision fp32, or bf16" in str(e.value)) == overflows
    assert ("--lr" in str(e.value)) != overflows


def test_too_many_bad_steps_end_a_run_which_is_saved(ended):
    out, status, shown, errors = ended
    assert status == 2, errors
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert errors.splitlines()[-1].startswith(
        "error: rank 0: steps with a NaN or infinite loss or gradient: 1, more than --max_bad_steps 0; their"
        f" rows are in {out / BAD_STEPS}. The weights at the end are those after step {steps[-2]['step']},"
        " the last good one; the step after it gave NaN or infinity"
    )
    assert steps[-1]["loss"] is steps[-1]["grad_norm"] is None and steps[-1]["bad_steps"] == 1
    assert "bad_steps" not in steps[0] and "1 skipped as NaN or infinite" in shown
    assert BAD_ROW in json.loads((out / BAD_STEPS).read_text())["rows"]
    assert all(t.isfinite().all() for t in load_file(out / "adapter_model.safetensors").values())
    assert (out / "report.html").is_file() and (out / "loss.png").is_file()
