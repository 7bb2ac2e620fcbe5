"""plan.py --probe: predicted beside measured memory, and the time of a step, an epoch and the run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import plan
from data.packing import make_sampler
from launch.gpus import GPUS, Gpu
from monitoring.memory_history import BETWEEN_STEPS
from monitoring.memory_model import MemoryEstimate
from options.train import parse
from tests.helpers.trials import MOST_TOKENS, try_with_limit
from training import probe
from training.planned_model import open_planned_model
from training.probe import Epoch, Probe
from training.step_clock import StepClock, StepTimes
from training.trial import TrialResult

GIB = 2**30
RESULT = TrialResult(
    fits=True,
    peak=12 * GIB,
    phases={"load": 6 * GIB, "forward": 10 * GIB, "backward": 12 * GIB, "optimizer": 9 * GIB},
    after={"load": 5 * GIB, "forward": 8 * GIB, "backward": 7 * GIB, "optimizer": 6 * GIB},
    step_seconds=[20.0, 0.5],
    times=StepTimes(0.2, 0.25, 0.05),
    room=22 * GIB,
)
# Two of four micro-batches were probed, on two ranks; an epoch's last step has three.
PROBED = Probe(RESULT, 2, 4, 512, 4096, Epoch(120, 479, 300, 400, 360), StepTimes(0.15, 0.2, 0.05), "")
PREDICTED = MemoryEstimate(5 * GIB, 8.8 * GIB, 7 * GIB, 9 * GIB, peak=10 * GIB, host=0)


def run_plan(capfd, *argv) -> str:
    assert plan.main([*map(str, argv)]) == 0
    return capfd.readouterr().out


@pytest.fixture
def on_this_cpu(monkeypatch, processes):
    """CPU ranks stand in for the GPUs of a machine."""
    if torch.cuda.is_available():
        pytest.skip("the ranks would be on GPUs")
    monkeypatch.setattr(probe, "check_gpus", lambda options: None)


def test_two_steps_beside_the_plan(on_this_cpu, checkpoints, short_rows, capfd):
    """The real trial, in processes of its own."""
    argv = ["--model_name", checkpoints(), "--dataset", short_rows, "--gpu", "h200", "--gpus", "2",
            "--context_length", "128", "--batch_size", "2", "--num_epochs", "3", "--probe", "true",
            "--gradient_accumulation_steps", "4", "--compile", "false"]  # fmt: skip
    fields = json.loads(run_plan(capfd, *argv, "--json", "true"))
    measured = fields["measured"]
    assert measured["fits"] and measured["peak_gib"] > 0.05
    assert measured["phases"].keys() >= {"load", "forward", "backward", "peak"}
    assert measured["steps_per_epoch"] == 3  # 40 rows, 16 a step
    assert measured["run_seconds"] == pytest.approx(3 * measured["epoch_seconds"])
    assert measured["epoch_seconds"] > 0 and measured["step_seconds"] > 0


def test_a_probe_that_does_not_fit(on_this_cpu, monkeypatch, capfd):
    """The plan comes first, and a probe that is out of memory is a result."""
    monkeypatch.setenv(MOST_TOKENS, "100")
    monkeypatch.setattr("launch.apart.RankFunction", lambda *_: try_with_limit)
    argv = "--model_name tiny --train_type lora --gpu t4 --context_length 128 --probe true"
    lines = run_plan(capfd, *argv.split()).splitlines()
    assert lines[0].startswith("model: tiny") and lines[-1].startswith("it does not fit: the probe ran out")


@pytest.mark.parametrize(("packing", "tokens"), [(False, 512), (True, 8000)])
def test_an_epoch_is_timed_at_its_mean_length(packing, tokens, source, monkeypatch):
    """A second trial has rows of that length; packs all have the length that the first one has."""
    tried: list[int] = []

    def take(trial, *_) -> TrialResult:
        tried.append(trial.tokens)
        return dataclasses.replace(RESULT, times=StepTimes(1e-3 * trial.tokens, 0.5, 7.0))

    monkeypatch.setattr(probe, "run_trial", take)
    argv = [*source, "--packing", packing, "--world_size", 2, "--batch_size", 3]
    config, _ = parse([*map(str, argv), "--gradient_accumulation_steps", "2"])
    planned = open_planned_model(config.model_name)
    found = probe.run_probe(config, planned, tokens, True, None)
    config, rows = probe.read_rows(dataclasses.replace(config, context_length=tokens), planned)
    sampler = make_sampler(config, rows, 0, 2)
    batches = [batch.ids for step in sampler.steps(1) for batch in step.batches]
    assert (found.epoch.steps, found.epoch.micro_batches) == (sampler.steps_per_epoch(), len(batches))
    if packing:
        width = batches[0].shape[1]
        assert tried == [tokens] and width < tokens  # the rows fill no pack
        assert found.epoch.tokens == width and found.positions == 3 * 2 * 2 * width
    else:
        mean = found.epoch.tokens
        assert tried == [512, mean] and found.positions == 3 * 2 * 2 * 512
        assert mean == -(-sampler.count_positions() // (6 * len(batches)))
    inner = 1e-3 * tried[-1]
    expected = sum((len(step.batches) - 1) * inner + 7.5 for step in sampler.steps(1))
    assert found.epoch_seconds == pytest.approx(expected)


@pytest.mark.parametrize("phases", [
    # The first step compiles; then an inner micro-batch, the last one, and the optimizer.
    [("forward", 90), ("backward", 95), ("optimizer", 99), (BETWEEN_STEPS, 2),
     ("forward", 0.3), ("backward", 0.7), ("forward", 0.4), ("backward", 0.8), ("optimizer", 0.25)],
    [("forward", 90), ("forward", 95), ("optimizer", 99), (BETWEEN_STEPS, 2),
     ("forward", 1.0), ("forward", 1.2), ("optimizer", 0.25)],
])  # fmt: skip
def test_the_optimizer_is_not_scaled_by_the_accumulation(phases):
    time = 0.0
    clock = StepClock(lambda: time, lambda begin, end: end - begin)
    for phase, seconds in [("wrap", 5), (BETWEEN_STEPS, 1), *phases, (BETWEEN_STEPS, 3)]:
        clock.mark(phase)
        time += seconds
    times = clock.last_step()
    assert times.total(2) == pytest.approx(2.45) and times.total(16) == pytest.approx(15 * 1.0 + 1.2 + 0.25)
    assert times.total(1) == pytest.approx(1.45)


@pytest.mark.parametrize(
    ("more", "why"),
    [([], "it needs rows: give --dataset"), (["--dataset", "dummy"], "tiny is a named shape, without a tok")],
)
def test_an_epoch_whose_rows_are_unknown(more, why, on_this_cpu, monkeypatch, capfd):
    monkeypatch.setattr(probe, "run_trial", lambda *_: RESULT)
    argv = "--model_name tiny --train_type lora --gpu t4 --context_length 128 --probe true"
    last = run_plan(capfd, *argv.split(), *more).splitlines()[-1]
    assert last.startswith(f"the time of an epoch is unknown: {why}")


def test_the_lines_of_a_probe():
    lines = probe.describe(PROBED, PREDICTED)
    table = [line.split() for line in lines[2:7]]
    assert table == [
        ["load", "5.00", "5.00", "1.00"],
        ["forward", "8.80", "8.00", "0.91"],
        ["backward", "7.00", "7.00", "1.00"],
        ["optimizer", "9.00", "9.00", "1.00"],
        ["peak", "10.00", "12.00", "1.20"],
    ]
    assert lines[7:] == [
        "a step of 4 micro-batches takes 0.90 s (4,551 tokens/s on all GPUs); the first one of the probe, of"
        " 2 micro-batches, took 20.0 s, with what is compiled",
        # 359 x 0.15 s + 120 x 0.25 s
        "an epoch takes about 1 min 24 s: 120 steps, of 300 tokens a sequence on average; the run about"
        " 4 min 12 s: 360 steps",
        "no row of --dataset has more than 400 tokens: a run takes less memory",
    ]
    assert probe.as_json(PROBED)["run_seconds"] == pytest.approx(251.55)
    unknown = dataclasses.replace(
        PROBED, epoch=None, mean_times=None, unknown="it needs rows: give --dataset"
    )
    assert probe.describe(unknown, PREDICTED)[8:] == [
        "the time of an epoch is unknown: it needs rows: give --dataset"
    ]
    assert probe.as_json(unknown)["epoch_seconds"] is None
    full = dataclasses.replace(unknown, result=dataclasses.replace(RESULT, fits=False, times=None))
    assert probe.describe(full, PREDICTED)[7:] == [
        "it does not fit: the probe ran out of memory; the GPU had room for 22.00 GiB"
    ]


@pytest.mark.parametrize(
    ("gpus", "argv", "words"),
    [
        (0, [], "--probe: this machine has no GPU; without --probe the plan needs none"),
        (1, ["--gpus", "2"], "--gpus 2: --probe runs on this machine's GPUs, and it has 1"),
        (2, ["--gpu", "t4"], "--gpu t4: --probe runs on this machine's NVIDIA H200; leave the option out"),
    ],
)
def test_a_machine_without_these_gpus(gpus, argv, words, monkeypatch, capsys):
    """One line, before the model is opened."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(probe, "detect_gpu", lambda device: Gpu("NVIDIA H200", 139.8, (9, 0)))
    assert plan.main(["--model_name", "no/model", "--probe", "true", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {words}\n" and captured.out == ""


@pytest.mark.parametrize(
    ("name", "kind", "capability"),
    [("NVIDIA H200", "h200", (9, 0)), ("NVIDIA GeForce RTX 4090", "4090", (8, 9)), ("Tesla T4", "t4", (7, 5)),
     ("NVIDIA A100-SXM4-80GB", "a100", (8, 0)), ("NVIDIA H100 80GB HBM3", "h100", (9, 0))],
)  # fmt: skip
def test_a_gpu_may_be_named(name, kind, capability):
    found = Gpu(name, 1.0, capability)
    same = [key for key, gpu in GPUS.items() if probe.is_kind(found, gpu)]
    assert kind in same and all(GPUS[key].name.split()[0] == GPUS[kind].name.split()[0] for key in same)
