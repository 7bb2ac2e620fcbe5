"""--profile_memory and --profile on a run of two ranks: they write their files and change nothing."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from monitoring.deferred import LOGGING
from monitoring.host_time import AUTOGRAD, BUSY, HOOKS, OPERATORS, PARTS, PYTHON
from monitoring.memory_history import BETWEEN_STEPS
from monitoring.profiling import (
    HISTORY_STEPS,
    MemoryRecorder,
    Profiler,
    TraceRecorder,
    check_traces,
    cycle_steps,
    make_profiler,
)
from options.errors import UserError
from options.train import parse
from tests.helpers.here import SINGLE_RANK
from tests.helpers.report_pages import Page
from tests.helpers.runs import full_run

STEPS = HISTORY_STEPS + 1


def profile_config(*argv: str):
    return parse(["--profile", *argv])[0]


@pytest.fixture(scope="module")
def runs(checkpoints, alpaca_file, two_ranks, tmp_path_factory):
    """Run the same training with and without profiles; return the root folder and the printed lines by run.

    Two micro-batches. The rows are so long that the tensors' operations are most of a step.
    """
    root = tmp_path_factory.mktemp("profiled")
    options = ["--profile_memory", "--profile", "--repeat", "1", "--active_steps", "1", "--with_shapes",
               "--profiling_output", root / "traces"]  # fmt: skip
    printed = {}
    for name, more in (("plain", []), ("profiled", options)):
        argv = ["--model_name", checkpoints(), "--dataset", alpaca_file, "--output_dir", root / name, *more,
                "--max_steps", STEPS, "--gradient_accumulation_steps", "2", "--lora_rank", "8",
                "--world_size", "2"]  # fmt: skip
        printed[name] = two_ranks(full_run, train.check_run(parse(list(map(str, argv)))[0]))[0]
    return SimpleNamespace(root=root, printed=printed)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_profiling_changes_nothing(runs):
    plain, with_profiles = (lines(runs.root / name) for name in ("plain", "profiled"))
    assert [m["loss"] for m in plain] == [m["loss"] for m in with_profiles] and len(plain) == STEPS
    assert not list((runs.root / "plain").glob("memory*"))


def test_memory_after_each_stage_is_reported(runs):
    """In metrics.jsonl, in run.json and in the lines at the end, without any profile too."""
    metrics = lines(runs.root / "plain")
    stages = json.loads((runs.root / "plain" / "run.json").read_text())["memory"]
    after = {p: max(m[f"memory_after_{p}_gib"] for m in metrics) for p in ("forward", "backward")}
    peak = max(m["memory_allocated_gib"] for m in metrics)
    assert 0.05 < stages["after_wrap_gib"] <= stages["after_load_gib"] <= peak * 1.05
    assert stages["after_load_gib"] * 0.5 < min(after.values()) and max(after.values()) <= peak * 1.05
    line = re.search(
        r"memory of the fullest rank: ([\d.]+) GiB after wrap, ([\d.]+) GiB after load, ([\d.]+) GiB after"
        r" forward, ([\d.]+) GiB after backward, peak ([\d.]+) GiB\n", runs.printed["plain"])  # fmt: skip
    expected = [stages["after_wrap_gib"], stages["after_load_gib"], after["forward"], after["backward"], peak]
    assert [float(v) for v in line.groups()] == pytest.approx(expected, abs=0.006)


def test_one_page_shows_all_ranks(runs):
    """A CPU run prints that it is host memory, and has no snapshot. The fourth step is not recorded."""
    folder, printed = runs.root / "profiled", runs.printed["profiled"]
    if not torch.cuda.is_available():
        assert printed.count("--profile_memory: there is no GPU: the resident size") == 1
        assert {p.name for p in folder.glob("memory*")} == {"memory.html", "memory.png"}
    assert "memory.html, memory.png" in printed
    shown = Page((folder / "memory.html").read_text(encoding="utf-8"))
    assert [c["group"] for c in shown.charts] == ["start", "step 1", "step 2", "step 3"] * 2
    names = [a["class"].split()[1] for tag, a in shown.tags if tag == "rect" and "x" in a]
    step = ["forward", "backward"] * 2 + ["optimizer"]
    assert names == (["wrap", "load"] + step * HISTORY_STEPS) * 2


def test_each_rank_writes_a_trace_of_the_recorded_steps(runs):
    """One cycle: the first step is waited, the second warms up, the third is recorded."""
    assert {p.name for p in (runs.root / "traces").iterdir()} == {"iteration_3"}
    files = {p.name for p in (runs.root / "traces" / "iteration_3").iterdir()}
    kinds = "trace.json.gz", "key_averages.txt", "host_time.txt"
    assert files == {f"rank{r}_{n}" for r in (0, 1) for n in kinds}
    for rank in (0, 1):
        path = runs.root / "traces" / "iteration_3" / f"rank{rank}_trace.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
        assert [names.count(p) for p in ("forward", "backward", "optimizer")] == [2, 2, 1]
        assert [n for n in names if n.startswith("ProfilerStep")] == ["ProfilerStep#2"]
        assert any("Input Dims" in e.get("args", {}) for e in events)
        table = path.with_name(f"rank{rank}_key_averages.txt").read_text()
        assert "aten::" in table and "Input Shapes" in table
        lines = path.with_name(f"rank{rank}_host_time.txt").read_text().splitlines()
        seconds = {line[:26].strip(): float(line[26:35]) for line in lines[2:]}
        assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds[BUSY], abs=1e-3)
        assert all(seconds[part] > 0 for part in (OPERATORS, HOOKS, AUTOGRAD, LOGGING, PYTHON))
        (step_ms,) = (e["dur"] / 1000 for e in events if e["name"] == "ProfilerStep#2")
        assert seconds[BUSY] < 1.5 * step_ms / 1000


# The recorders without a run


def work(profiler: Profiler, steps: int) -> None:
    """Run steps with the phases of train.train."""
    for _ in range(steps):
        for phase in ("forward", "backward", "optimizer", BETWEEN_STEPS):
            profiler.start_phase(phase)
            torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.step()


def test_cycles_stacks_and_timelines(tmp_path):
    """Every third step is recorded, its memory too; the files of an earlier run are replaced."""
    old = tmp_path / "iteration_99" / "rank1_trace.json.gz"
    old.parent.mkdir()
    old.write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    argv = ["--profiling_output", str(tmp_path), "--profiling_frequency", "3", "--active_steps", "1"]
    config = profile_config(*argv, "--with_stack", "--export_trace", "false", "--export_memory_timeline")
    profiler = Profiler(SINGLE_RANK.device, [TraceRecorder(config, SINGLE_RANK, "a model")])
    assert not old.exists() and (tmp_path / "notes.txt").exists()
    work(profiler, 7)
    profiler.finish()
    kinds = (
        "key_averages.txt",
        "host_time.txt",
        "stacks.txt",
        "memory_timeline.html",
        "memory_timeline.json",
        "memory_timeline.png",
    )
    for done in (3, 6):
        folder = tmp_path / f"iteration_{done}"
        assert {p.name for p in folder.iterdir()} == {f"rank0_{kind}" for kind in kinds}
        assert "tests/monitoring/test_profiling.py" in (folder / "rank0_stacks.txt").read_text()
        recorded = json.loads((folder / "rank0_memory_timeline.json").read_text())
        assert [part["step"] for part in recorded["parts"]] == [done]
        assert [s["name"] for s in recorded["parts"][0]["spans"]] == ["forward", "backward", "optimizer"]
    assert {p.name for p in tmp_path.glob("iteration_*")} == {"iteration_3", "iteration_6", "iteration_99"}


def test_a_step_that_wrote_files_returns_true(tmp_path):
    """So the time of writing does not count as the next step's."""
    argv = ["--profiling_output", str(tmp_path), "--profiling_frequency", "2", "--active_steps", "1"]
    config = profile_config(*argv, "--export_trace", "false")
    profiler, wrote = Profiler(SINGLE_RANK.device, [TraceRecorder(config, SINGLE_RANK, "a model")]), []
    for _ in range(4):
        profiler.start_phase("forward")
        wrote.append(profiler.step())
    profiler.finish()
    assert wrote == [False, True, False, True]


def test_a_run_that_fails_writes_its_memory(tmp_path):
    """Each rank writes its own page, up to the failure, for example for lack of memory."""
    with (
        pytest.raises(MemoryError),
        Profiler(SINGLE_RANK.device, [MemoryRecorder(SINGLE_RANK, tmp_path / "run", "m")]) as p,
    ):
        p.start_phase("load")
        time.sleep(0.05)
        p.start_phase("forward")
        time.sleep(0.05)
        raise MemoryError
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"memory_rank0.html", "memory_rank0.png"}
    shown = Page((tmp_path / "run" / "memory_rank0.html").read_text(encoding="utf-8"))
    assert [c["group"] for c in shown.charts] == ["start", "step 1"]


def test_a_failure_is_raised_even_if_its_memory_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(MemoryError),
        Profiler(SINGLE_RANK.device, [MemoryRecorder(SINGLE_RANK, tmp_path / "file", "m")]),
    ):
        raise MemoryError
    assert "cannot be written" in capsys.readouterr().out


def test_memory_is_measured_at_the_end_of_a_phase():
    profiler = Profiler(SINGLE_RANK.device, [])
    profiler.start_phase("forward")
    tensor = torch.ones(64 * 2**20, dtype=torch.uint8)
    profiler.start_phase("backward")
    before = profiler.phase_bytes["forward"]
    del tensor
    profiler.start_phase("optimizer")
    assert before - profiler.phase_bytes["backward"] == pytest.approx(64 * 2**20, rel=0.05)
    assert make_profiler(parse([])[0], SINGLE_RANK).recorders == []


# Options


def test_the_schedule_is_fsdp_qloras():
    """With --repeat 0 the waited steps fill up --profiling_frequency; else they are --wait_steps."""
    assert cycle_steps(profile_config()) == (7, 1, 2)
    assert cycle_steps(
        profile_config("--warmup_steps", "4", "--active_steps", "1", "--profiling_frequency", "5")
    ) == (
        0,
        4,
        1,
    )
    assert cycle_steps(profile_config("--repeat", "2", "--active_steps", "5")) == (1, 1, 5)
    for argv, words in (
        (["--wait_steps", "3"], "--wait_steps: not read; with --repeat 0 the waited steps follow from"),
        (["--repeat", "1", "--profiling_frequency", "3"], "--profiling_frequency: not read; with --repeat 1"),
    ):
        (remark,) = parse(["--profile", *argv])[1]
        assert remark.startswith(words)
    assert parse(["--profile", "--repeat", "1", "--wait_steps", "3"])[1] == []


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--with_stack"], "--with_stack: has no effect without --profile"),
        (["--profile_memory", "--repeat", "2"], "--repeat: has no effect without --profile"),
        (["--profile", "--active_steps", "0"], "--active_steps 0: must be positive"),
        (["--profile", "--warmup_steps", "-1"], "--warmup_steps -1: must be 0 or more"),
        (["--profile", "--profiling_frequency", "2"], "--profiling_frequency 2: a cycle has 3 steps already"),
        (["--profile", "--profile_memory", "--export_memory_timeline"],
         "--export_memory_timeline: torch keeps one"),
    ],
)  # fmt: skip
def test_invalid_options(argv, words):
    with pytest.raises(UserError) as error:
        parse(argv)
    assert str(error.value).startswith(words)


def test_traces_are_not_overwritten_on_request(tmp_path):
    argv = ["--profiling_output", str(tmp_path), "--overwrite_profiling_output", "false"]
    (tmp_path / "notes.txt").write_text("")
    check_traces(profile_config(*argv), 10)
    (tmp_path / "iteration_10").mkdir()
    (tmp_path / "iteration_10" / "rank0_key_averages.txt").write_text("")
    check_traces(profile_config(*argv[:2]), 10)
    with pytest.raises(UserError, match="holds traces already"):
        check_traces(profile_config(*argv), 10)


def test_a_run_shorter_than_a_cycle_is_refused(checkpoints, short_rows, tmp_path):
    """The check writes nothing."""
    argv = ["--model_name", checkpoints(), "--dataset", short_rows, "--output_dir", tmp_path / "out",
            "--profiling_output", tmp_path / "traces", "--world_size", "1"]  # fmt: skip
    long_cycle = (["--max_steps", "9"], "10 steps, and the run has 9; lower --profiling_frequency")
    many_waits = (["--max_steps", "3", "--repeat", "1"], "4 steps, and the run has 3; give fewer --wait")
    for more, words in (long_cycle, many_waits):
        with pytest.raises(UserError, match=words):
            train.check_run(profile_config(*map(str, [*argv, *more])))
    with pytest.raises(UserError, match=r"--profiling_output .*cannot be written"):
        train.check_run(profile_config(*map(str, [*argv, "--profiling_output", short_rows / "x"])))
    assert not list(tmp_path.iterdir())
