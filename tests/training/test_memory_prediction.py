"""The predicted memory: a line at the start, the comparison at the end, run.json and the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

import train
from launch.gpus import GPUS
from launch.memory import format_bytes, gpu_room
from launch.ranks import smallest_gpu_room
from models.registry import build_on_meta
from monitoring.memory_model import MemoryEstimate, estimate_memory
from monitoring.messages import describe_end, describe_training
from monitoring.metrics import Metrics
from monitoring.run_sizes import run_sizes
from options.config import Config
from options.train import parse
from tests.helpers.here import SINGLE_RANK
from tests.helpers.report_pages import Page
from tests.helpers.runs import full_run, make_job
from training.memory_prediction import describe_prediction, predict_memory, prediction_facts

GIB = 2**30
T4 = GPUS["t4"]


def run_as_on_a_t4(rank_info, job: train.Job, room: int) -> str:
    """Run a rank whose process believes to have a T4 with so many free bytes; return what it printed."""
    job.__dict__["gpu"] = T4
    with mock.patch("launch.memory.gpu_room", lambda device: room):
        return full_run(rank_info, job)


@pytest.mark.parametrize("room", [64 * GIB, 2**20])
def test_a_run_predicts_and_compares(room, checkpoints, short_rows, one_rank, tmp_path):
    argv = ["--model_name", checkpoints(), "--dataset", short_rows, "--output_dir", tmp_path / "run",
            "--max_steps", "2", "--world_size", "1", "--context_length", "512"]  # fmt: skip
    job = train.check_run(parse(list(map(str, argv)))[0])
    printed = one_rank(run_as_on_a_t4, job, room)[0]
    # By the longest row, not by --context_length.
    longest = int(job.rows.lengths().max())
    assert longest < 512
    model = build_on_meta(job.model_config, job.family)
    sizes = run_sizes(model, job.family, job.config, job.precision, job.files, longest)
    expected = estimate_memory(job.config, job.precision, sizes, T4, cpus=1)
    line = re.search(r"^memory: .*$", printed, re.MULTILINE)[0]
    host = f"{format_bytes(expected.host)} of host memory in all"
    start = f"memory: about {format_bytes(expected.peak)} per GPU at the peak, {host}"
    end = f"; the fullest GPU has room for {format_bytes(room)}: the run goes on, and may run out of memory"
    end += "; plan.py names options that fit"
    assert line.startswith(start) and line.endswith(end) == (expected.peak > room)
    assert printed.index(line) < printed.index("model: ")  # before the load
    # At the end, in run.json, and on the report's page.
    steps = Path(job.output_dir, "metrics.jsonl").read_text().splitlines()
    peak = max(json.loads(step)["memory_allocated_gib"] for step in steps)
    predicted = json.loads(Path(job.output_dir, "run.json").read_text())["memory"]["predicted_peak_gib"]
    assert predicted == pytest.approx(expected.peak / GIB, abs=0.0006)
    compared = re.search(r"peak ([\d.]+) GiB, ([\d.]+) times the predicted ([\d.]+) GiB\n", printed)
    measured = [peak, peak / (expected.peak / GIB), expected.peak / GIB]
    assert [float(v) for v in compared.groups()] == pytest.approx(measured, abs=0.006)
    page = Page(Path(job.output_dir, "report.html").read_text(encoding="utf-8"))
    assert f"Peak memory {peak:.2f} GiB on the fullest rank; predicted {predicted:.2f} GiB" in page.text


@pytest.mark.parametrize(("threads", "cpus"), [("7", 7), ("many", 2), ("", 2)])
def test_the_compilers_processes_follow_the_environment(threads, cpus, source, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", threads)
    monkeypatch.setattr("training.memory_prediction.run_sizes", lambda *_: None)
    monkeypatch.setattr("training.memory_prediction.estimate_memory", lambda *arguments: arguments[-1])
    monkeypatch.setattr(train.Job, "gpu", T4)
    assert predict_memory(make_job(SINGLE_RANK, source), 2) == cpus


def test_an_automatic_budget_is_not_predicted():
    """What is free after the second step is known only then: the peak is no fault of the prediction."""
    predicted = MemoryEstimate(GIB, 2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB, 6 * GIB)
    config = Config(output_dir="run", activation_budget=-1.0)
    line = "memory: about 5.00 GiB per GPU at the peak{}, 6.00 GiB of host memory in all"
    more = " before --activation_budget -1 takes what is free"
    assert describe_prediction(predicted, 5 * GIB, config) == line.format(more)
    assert prediction_facts(predicted, config) == {}
    config = Config(output_dir="run", activation_budget=1.0)
    assert describe_prediction(predicted, 5 * GIB, config) == line.format("")
    assert prediction_facts(predicted, config)["predicted_peak_gib"] == 5.0


def test_nothing_is_predicted_on_a_cpu(checkpoints, short_rows, one_rank):
    assert one_rank(predict_here, ["--model_name", checkpoints(), "--dataset", short_rows]) == [None]


def predict_here(rank_info, argv) -> MemoryEstimate | None:
    job = make_job(rank_info, argv)
    job.__dict__["gpu"] = None  # where the tests run on GPUs, too
    return predict_memory(job, 1)


def test_the_gpu_with_the_least_room_counts(two_ranks):
    assert two_ranks(room_here) == [GIB, GIB]


def room_here(rank_info) -> float:
    with mock.patch("launch.memory.gpu_room", lambda device: GIB * (2 - rank_info.rank)):
        return smallest_gpu_room(rank_info)


def test_a_resumed_run_compares_its_own_steps():
    """Before it was stopped, it may have run on other GPUs."""
    gib = {"after_wrap_gib": 0.0, "after_load_gib": 1.0, "predicted_peak_gib": 4.0, "predicted_host_gib": 9.0}
    steps = [
        Metrics(i, 0.1, 2.0, 1e-4, 1.0, 100, 50, 0.5, 200.0, peak, peak, 2.0, 3.0)
        for i, peak in ((1, 8.0), (2, 4.2), (3, 4.4))
    ]
    phases = "0.00 GiB after wrap, 1.00 GiB after load, 2.00 GiB after forward, 3.00 GiB after backward"
    for before, end in ((0, "peak 8.00 GiB, 2.00"), (1, "peak 4.40 GiB, 1.10")):
        line = describe_training(steps, 9.0, gib, before).splitlines()[1]
        assert line == f"memory of the fullest rank: {phases}, {end} times the predicted 4.00 GiB"
        # A run that was stopped compares, too.
        stopped = describe_end(Config(output_dir="run"), steps, 9, before, 9.0, gib, "SIGTERM", False, False)
        assert stopped.startswith(f"{line}\nstopped at step 3 of 9 (SIGTERM)")


@pytest.mark.parametrize(("limit", "room"), [(1.0, 15), (0.1, 10)])
def test_the_room_of_a_gpu(limit, room, monkeypatch):
    """Other programs have 85 of 100 bytes, and torch's cache 5; a limit may be lower."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: limit)
    assert gpu_room(torch.device("cuda")) == room
