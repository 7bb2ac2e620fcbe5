"""--profile_memory and --profile on a run of two ranks: what they write, and that they change nothing."""

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
from monitoring.memory_history import BETWEEN
from monitoring.profiling import (
    HISTORY_STEPS,
    MemoryRecorder,
    Profiler,
    TraceRecorder,
    check_traces,
    cycle,
    make_profiler,
)
from options.errors import UserError
from options.train import parse
from tests.helpers.here import SINGLE_RANK
from tests.helpers.report_pages import Page
from tests.helpers.runs import full_run

STEPS = HISTORY_STEPS + 1


def profiled(*argv: str):
    return parse(["--profile", *argv])[0]


@pytest.fixture(scope="module")
def runs(checkpoints, alpaca_file, two_ranks, tmp_path_factory):
    """The same run twice, watched and not, with two micro-batches: their folders, what was printed, the traces. Of rows
    long enough that the tensors' operations are most of a step."""
    root = tmp_path_factory.mktemp("profiled")
    watched = ["--profile_memory", "--profile", "--repeat", "1", "--active_steps", "1", "--with_shapes",
               "--profiling_output", root / "traces"]  # fmt: skip
    made = {}
    for name, more in (("plain", []), ("watched", watched)):
        argv = ["--model_name", checkpoints(), "--dataset", alpaca_file, "--output_dir", root / name, *more,
                "--max_steps", STEPS, "--gradient_accumulation_steps", "2", "--lora_rank", "8",
                "--world_size", "2"]  # fmt: skip
        made[name] = two_ranks(full_run, train.check_run(parse(list(map(str, argv)))[0]))[0]
    return SimpleNamespace(root=root, printed=made)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_watching_changes_nothing(runs):
    plain, watched = (lines(runs.root / name) for name in ("plain", "watched"))
    assert [m["loss"] for m in plain] == [m["loss"] for m in watched] and len(plain) == STEPS
    assert not list((runs.root / "plain").glob("memory*"))


def test_memory_at_each_stage_is_told(runs):
    """In metrics.jsonl, in run.json and in the summary, of a run that records nothing as well."""
    metrics = lines(runs.root / "plain")
    stages = json.loads((runs.root / "plain" / "run.json").read_text())["memory"]
    after = {p: max(m[f"memory_after_{p}_gib"] for m in metrics) for p in ("forward", "backward")}
    peak = max(m["memory_allocated_gib"] for m in metrics)
    assert 0.05 < stages["after_wrap_gib"] <= stages["after_load_gib"] <= peak * 1.05
    assert stages["after_load_gib"] * 0.5 < min(after.values()) and max(after.values()) <= peak * 1.05
    told = re.search(
        r"memory of the fullest rank: ([\d.]+) GiB after wrap, ([\d.]+) GiB after load, ([\d.]+) GiB after"
        r" forward, ([\d.]+) GiB after backward, peak ([\d.]+) GiB\n", runs.printed["plain"])  # fmt: skip
    expected = [stages["after_wrap_gib"], stages["after_load_gib"], after["forward"], after["backward"], peak]
    assert [float(v) for v in told.groups()] == pytest.approx(expected, abs=0.006)


def test_one_page_shows_all_ranks(runs):
    """On a CPU a line tells that it is host memory, and there is no snapshot. The fourth step is not in it."""
    folder, printed = runs.root / "watched", runs.printed["watched"]
    if not torch.cuda.is_available():
        assert printed.count("--profile_memory: there is no GPU: the resident size") == 1
        assert {p.name for p in folder.glob("memory*")} == {"memory.html", "memory.png"}
    assert "memory.html, memory.png" in printed
    shown = Page((folder / "memory.html").read_text(encoding="utf-8"))
    assert [c["group"] for c in shown.charts] == ["start", "step 1", "step 2", "step 3"] * 2
    names = [a["class"].split()[1] for tag, a in shown.tags if tag == "rect" and "x" in a]
    step = ["forward", "backward"] * 2 + ["optimizer"]
    assert names == (["wrap", "load"] + step * HISTORY_STEPS) * 2


def test_each_rank_leaves_a_trace_of_the_asked_steps(runs):
    """One cycle: a step waited, one warmed up, the third recorded."""
    assert {p.name for p in (runs.root / "traces").iterdir()} == {"iteration_3"}
    files = {p.name for p in (runs.root / "traces" / "iteration_3").iterdir()}
    assert files == {f"rank{r}_{n}" for r in (0, 1) for n in ("trace.json.gz", "key_averages.txt")}
    for rank in (0, 1):
        path = runs.root / "traces" / "iteration_3" / f"rank{rank}_trace.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
        assert [names.count(p) for p in ("forward", "backward", "optimizer")] == [2, 2, 1]
        assert [n for n in names if n.startswith("ProfilerStep")] == ["ProfilerStep#2"]
        assert any("Input Dims" in e.get("args", {}) for e in events)
        table = path.with_name(f"rank{rank}_key_averages.txt").read_text()
        assert "aten::" in table and "Input Shapes" in table


# The recorders by themselves


def work(profiler: Profiler, steps: int) -> None:
    """Steps as train.train marks them."""
    for _ in range(steps):
        for phase in ("forward", "backward", "optimizer", BETWEEN):
            profiler.phase(phase)
            torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.step()


def test_cycles_stacks_and_timelines(tmp_path):
    """Every third step until the end, over what an earlier run left. A record of the memory is of these steps."""
    old = tmp_path / "iteration_99" / "rank1_trace.json.gz"
    old.parent.mkdir()
    old.write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    config = profiled("--profiling_output", str(tmp_path), "--profiling_frequency", "3", "--active_steps", "1",
                      "--with_stack", "--export_trace", "false", "--export_memory_timeline")  # fmt: skip
    profiler = Profiler(SINGLE_RANK.device, [TraceRecorder(config, SINGLE_RANK, "a model")])
    assert not old.exists() and (tmp_path / "notes.txt").exists()
    work(profiler, 7)
    profiler.finish()
    kinds = (
        "key_averages.txt",
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


def test_a_step_that_wrote_files_says_so(tmp_path):
    """So that their time is not the next step's."""
    config = profiled("--profiling_output", str(tmp_path), "--profiling_frequency", "2", "--active_steps", "1",
                      "--export_trace", "false")  # fmt: skip
    profiler, wrote = Profiler(SINGLE_RANK.device, [TraceRecorder(config, SINGLE_RANK, "a model")]), []
    for _ in range(4):
        profiler.phase("forward")
        wrote.append(profiler.step())
    profiler.finish()
    assert wrote == [False, True, False, True]


def test_a_run_that_fails_leaves_its_memory(tmp_path):
    """As one that runs out of it: each rank's own page, up to the failure."""
    with (
        pytest.raises(MemoryError),
        Profiler(SINGLE_RANK.device, [MemoryRecorder(SINGLE_RANK, tmp_path / "run", "m")]) as p,
    ):
        p.phase("load")
        time.sleep(0.05)
        p.phase("forward")
        time.sleep(0.05)
        raise MemoryError
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"memory_rank0.html", "memory_rank0.png"}
    shown = Page((tmp_path / "run" / "memory_rank0.html").read_text(encoding="utf-8"))
    assert [c["group"] for c in shown.charts] == ["start", "step 1"]


def test_a_failure_is_told_even_if_its_memory_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(MemoryError),
        Profiler(SINGLE_RANK.device, [MemoryRecorder(SINGLE_RANK, tmp_path / "file", "m")]),
    ):
        raise MemoryError
    assert "cannot be written" in capsys.readouterr().out


def test_phases_say_what_was_held_at_their_end():
    profiler = Profiler(SINGLE_RANK.device, [])
    profiler.phase("forward")
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    profiler.phase("backward")
    before = profiler.held["forward"]
    del held
    profiler.phase("optimizer")
    assert before - profiler.held["backward"] == pytest.approx(64 * 2**20, rel=0.05)
    assert make_profiler(parse([])[0], SINGLE_RANK).recorders == []


# Options


def test_the_schedule_is_fsdp_qloras():
    """With repeat 0 the waited steps fill up profiling_frequency; else they are wait_steps."""
    assert cycle(profiled()) == (7, 1, 2)
    assert cycle(profiled("--warmup_steps", "4", "--active_steps", "1", "--profiling_frequency", "5")) == (
        0,
        4,
        1,
    )
    assert cycle(profiled("--repeat", "2", "--active_steps", "5")) == (1, 1, 5)
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
        (["--profile", "--profile_memory", "--export_memory_timeline"], "--export_memory_timeline: torch keeps one"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(argv, words):
    with pytest.raises(UserError) as error:
        parse(argv)
    assert str(error.value).startswith(words)


def test_traces_are_kept_if_asked(tmp_path):
    argv = ["--profiling_output", str(tmp_path), "--overwrite_profiling_output", "false"]
    (tmp_path / "notes.txt").write_text("")
    check_traces(profiled(*argv), 10)
    (tmp_path / "iteration_10").mkdir()
    (tmp_path / "iteration_10" / "rank0_key_averages.txt").write_text("")
    check_traces(profiled(*argv[:2]), 10)
    with pytest.raises(UserError, match="holds traces already"):
        check_traces(profiled(*argv), 10)


def test_a_run_without_a_cycle_is_refused(checkpoints, short_rows, tmp_path):
    """Before anything is written."""
    argv = ["--model_name", checkpoints(), "--dataset", short_rows, "--output_dir", tmp_path / "out",
            "--profiling_output", tmp_path / "traces", "--world_size", "1"]  # fmt: skip
    for more, how in ((["--max_steps", "9"], "10 steps, and the run has 9; lower --profiling_frequency"),
                      (["--max_steps", "3", "--repeat", "1"], "4 steps, and the run has 3; give fewer --wait")):  # fmt: skip
        with pytest.raises(UserError, match=how):
            train.check_run(profiled(*map(str, [*argv, *more])))
    with pytest.raises(UserError, match=r"--profiling_output .*cannot be written"):
        train.check_run(profiled(*map(str, [*argv, "--profiling_output", short_rows / "x"])))
    assert not list(tmp_path.iterdir())
