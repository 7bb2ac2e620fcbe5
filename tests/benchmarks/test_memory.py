"""benchmarks.memory: settings side by side, resumed and limited; host memory; copies without weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import memory, memory_settings, side_by_side
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.memory_rows import Row, format_tables, read_rows
from benchmarks.memory_settings import SETTINGS, Setting, parse
from benchmarks.process_memory import list_process_tree, read_host_memory
from benchmarks.side_by_side import Benchmark, Task
from benchmarks.sparse_models import write_sparse_copy
from files.model_folder import CheckpointFiles
from launch.gpus import GPUS
from monitoring.memory_model import MemoryEstimate
from tests.helpers import tiny
from tests.helpers.expansion import expand
from tests.helpers.fake_measured_run import PEAK_GIB

GIB, MIB = 2**30, 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An empty checkpoint of the tiny shape, in place of both."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(folder, "tiny", empty=True)
    return [str(folder), str(folder)]


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two H200s on which every run takes the same, without running."""
    monkeypatch.setattr(memory, "find_gpus", lambda options: (["0", "1"], GPUS["h200"]))
    monkeypatch.setattr(side_by_side, "PROGRAM", "tests.helpers.fake_measured_run")
    estimate = MemoryEstimate(*[2 * GIB] * 5, host=0)
    monkeypatch.setattr(memory, "predict", lambda *_: estimate)


def started(capsys) -> list[str]:
    """Return the names in the lines that were printed as runs ended."""
    lines = capsys.readouterr().out.partition("\n| setting")[0].splitlines()
    return sorted(line.partition(":")[0] for line in lines if " s" in line)


def test_what_is_missing_is_run(two_gpus, folders, tmp_path, capsys):
    argv = [*folders, "--out", str(tmp_path / "out"), "--only", "qlora,full-1b-2-ranks,bnb_llama_pro"]
    assert memory.main(argv) == 0
    assert started(capsys) == ["bnb_llama_pro", "full-1b-2-ranks", "qlora"]
    rows = {row.name: row for row in read_rows(tmp_path / "out" / "rows.jsonl")}
    measured = rows["qlora"].measured
    assert measured["peak"] == PEAK_GIB and rows["qlora"].predicted["peak"] == 2.0
    assert [measured[p] for p in ("load", "forward", "backward", "optimizer")] == [1.0, 1.5, 1.25, 1.0]
    # What the process has itself, and the page-locked GiB, which this kernel does not count for it.
    assert 1.001 < measured["host"] < 1.1
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines(keepends=True)
    failed = json.loads(lines[0]) | {"outcome": "took longer than 170 s"}
    (tmp_path / "out" / "rows.jsonl").write_text(json.dumps(failed) + "\n" + "".join(lines[1:]))
    assert memory.main(argv) == 0
    assert started(capsys) == [failed["name"]]
    table = (tmp_path / "out" / "memory.md").read_text()
    assert "| qlora | 1 | - / 1.00 | - / 1.50 | - / 1.25 | - / 1.00 | 2.00 / 2.05 | 1.025 | 0.01 / " in table
    assert table.index("| qlora |") < table.index("| bnb_llama_pro |") < table.index("| full-1b-2-ranks |")


def test_verdicts_near_the_edge(two_gpus, folders, tmp_path, monkeypatch, capsys):
    """Runs that take 1.025 of the predicted memory run with 1.06 of it, and do not with 0.9."""
    monkeypatch.setenv("FAKE_PEAK", str(PEAK_GIB))
    argv = [*folders, "--out", str(tmp_path / "out"), "--edges", "true"]
    assert memory.main([*argv, "--only", "hqq_lora,qlora-16k"]) == 0
    limited = {row.name: row for row in read_rows(tmp_path / "out" / "rows.jsonl") if row.factor}
    assert {name: (row.outcome, row.verdict, row.limit_gib) for name, row in limited.items()} == {
        "hqq_lora x1.06": ("ran", "right", pytest.approx(2.12)),
        "hqq_lora x0.9": ("out of memory", "right", pytest.approx(1.8)),
    }
    assert "| hqq_lora | 1.80 GiB | 0.9 | out of memory | right |" in capsys.readouterr().out
    assert sum(setting.is_edge for setting in SETTINGS) == 6
    assert not Row("a", "", 1, outcome="out of memory").is_complete  # a neighbour took the memory
    for outcome, factor, verdict in (
        ("ran", 0.9, "wrong"),
        ("out of memory", 1.06, "wrong"),
        ("x", 0.9, "x"),
    ):
        assert Row("a", "", 1, 2.0, factor, outcome).verdict == verdict


def test_the_time_limit_ends_what_runs(two_gpus, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "SECONDS_TO_START", 0)
    monkeypatch.setenv("FAKE_SECONDS", "60")
    argv = [*folders, "--out", str(tmp_path / "out"), "--only", "qlora,lora", "--parallel", "1"]
    began = time.monotonic()
    assert memory.main([*argv, "--gpus", "-1", "--time_limit", "1"]) == 0
    assert time.monotonic() - began < 20
    assert "--time_limit 1: not run: qlora, lora" in capsys.readouterr().out
    assert read_rows(tmp_path / "out" / "rows.jsonl") == []
    mine = list_process_tree(os.getpid())
    commands = [Path(f"/proc/{each}/cmdline").read_bytes() for each in mine]
    assert not any(b"fake_measured_run" in command for command in commands)


def task(gib: float, gpus: int = 1) -> Task:
    estimate = MemoryEstimate(0, 0, 0, 0, gib * GIB, 0)
    return Task(Setting("some", "8b", "", gpus), Path("model"), estimate)


def test_runs_share_a_gpu_as_far_as_it_has_room(folders, tmp_path):
    benchmark = Benchmark(parse([*folders, "--parallel", "3", "--out", str(tmp_path)]), ["0", "1"], 80.0)

    def place(*args) -> list[str] | None:
        found = benchmark._find_devices(task(*args))
        if found is not None:
            benchmark.running.append(side_by_side.Running(task(*args), None, found, tmp_path, 0.0))
        return found

    placed = [place(50), place(10), place(30), place(30), place(1, 2), place(5), place(5), place(5)]
    # 30 GiB fit beside 10, not beside 50; one run beside the others on each GPU; then both have three.
    assert placed == [["0"], ["1"], ["1"], None, ["1", "0"], ["0"], None, None]
    benchmark.running.clear()
    assert place(100) == ["0"]  # alone, though it is predicted not to fit


def test_host_memory_counts_a_shared_page_once():
    """A parent with 64 MiB of its own and 32 MiB that it shares with its child, which has 16 of its own."""
    script = (
        "import mmap, os, time; own = bytearray(os.urandom(2**20)) * 64; shared = mmap.mmap(-1, 2**25);"
        "shared.write(bytes(2**25));"
        "child = os.fork();"
        "more = bytearray(b'1') * 2**24 if not child else 0;"
        "n = shared[::4096] if not child else 0;"
        "print(child, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = {process.stdout.readline().strip() for _ in range(2)}
            tree = list_process_tree(process.pid)
            assert {*map(str, tree)} == (lines - {"0"}) | {str(process.pid)}
            found = read_host_memory(tree)
        finally:
            os.kill(tree[1], 9)
            process.kill()
    assert 112 * MIB < found.own < 125 * MIB and 2 * MIB < found.files < 30 * MIB
    deadline = time.monotonic() + 10  # the kernel may take a moment to end the child
    while read_host_memory(tree).own and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read_host_memory(tree).own == 0


@pytest.mark.parametrize("new_blocks", [0, 2])
def test_a_sparse_copy_has_the_shapes_of_the_real_model(new_blocks, tmp_path):
    base = tiny.save_checkpoint("llama", tmp_path / "base", torch.bfloat16)
    write_sparse_copy(base, tmp_path / "copy", new_blocks)
    real = expand(base, tmp_path / "real", "--new_blocks", new_blocks) if new_blocks else base
    described = [
        {name: (t.shape, t.dtype) for name, t in CheckpointFiles(folder).tensors.items()}
        for folder in (real, tmp_path / "copy")
    ]
    assert described[0] == described[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (real, tmp_path / "copy")]
    assert configs[0] == configs[1]
    assert (tmp_path / "copy" / "model.safetensors").stat().st_blocks * 512 < 2**15


def test_figures_out_of_tolerance_are_marked():
    rows = [
        Row("qlora", "", 1, predicted={"peak": 10.0, "host": 10.0}, measured={"peak": p, "host": h})
        for p, h in ((10.4, 10.9), (9.4, 11.1))
    ]
    for row, expected in zip(rows, (("1.040", "1.090"), ("**0.940**", "**1.110**")), strict=True):
        cells = format_tables([row], ["qlora"]).splitlines()[2].split(" | ")
        assert (cells[7], cells[9].removesuffix(" |")) == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only", "qlora,none"], "--only: 'none': must be one of qlora, "),
        (["--gpus", "9"], "--gpus 9: this machine has "),
        (["--edges", "true"], "--edges: needs a GPU"),
        (["--out", "/dev/null/x"], "--out"),
    ],
)
def test_bad_input(argv, words, folders, tmp_path, capsys):
    if "--edges" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert memory.main([*folders, "--out", str(tmp_path / "out"), *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}") and not (tmp_path / "out").exists()


def test_a_folder_that_is_no_checkpoint(folders, tmp_path, capsys):
    assert memory.main([folders[0], str(tmp_path)]) == 2
    assert "is no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(folders, tmp_path, monkeypatch):
    """Real runs of the tiny shape, of empty checkpoints: an expanded one, packed rows, two ranks."""
    small = "--context_length 256 --batch_size 1"
    settings = (
        Setting("pro", "8b-pro", f"--train_type bnb_llama_pro {small}"),
        Setting("packed", "8b", f"--train_type qlora --packing true {small}", dataset="alpaca"),
        Setting("two", "1b", f"--train_type full {small}", gpus=2),
    )
    monkeypatch.setattr(memory, "SETTINGS", settings)
    monkeypatch.setattr(memory_settings, "SETTINGS", settings)
    assert memory.main([*folders, "--out", str(tmp_path / "out"), "--parallel", "2"]) == 0
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert {row.name: row.outcome for row in rows} == {"pro": "ran", "packed": "ran", "two": "ran"}
    for row in rows:
        assert not row.predicted and 0.1 < row.measured["host"] < 8
        assert 0.1 < row.measured["load"] <= row.measured["peak"] and "optimizer" not in row.measured
    assert not list((tmp_path / "out").rglob("*/model"))  # the copies are deleted
