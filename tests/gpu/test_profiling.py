"""--profile_memory and --profile on a GPU: torch's record of its allocations, and kernels in the traces.

Tests without a GPU: tests/monitoring/test_memory_history.py and tests/monitoring/test_profiling.py.
"""

from __future__ import annotations

import gc
import gzip
import json
import pickle
import time
from pathlib import Path

import pytest
import torch

from launch.ranks import RankInfo
from monitoring.memory_history import BETWEEN_STEPS, GpuEvents
from monitoring.profiling import HISTORY_STEPS, MemoryRecorder, Profiler
from tests.helpers import tiny
from tests.helpers.programs import run_and_read
from tests.helpers.report_pages import Page

GIB, MIB = 2**30, 2**20
STEPS = 5


@pytest.fixture
def here() -> RankInfo:
    torch.zeros(1, device="cuda:0")  # the allocator must be there
    gc.collect()  # nothing of other tests may be freed meanwhile
    return RankInfo(0, 1, 0, 1, torch.device("cuda", 0))


def take(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda:0")


@pytest.mark.gpu
def test_the_curves_are_the_allocators(here, tmp_path):
    before, began = torch.cuda.memory_allocated(), time.time()
    torch.cuda.reset_peak_memory_stats()
    history = GpuEvents(here.device)
    first, second = take(300), take(100)
    del first
    third = take(50)
    peak, allocated, reserved = (f() for f in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated,
                                               torch.cuda.memory_reserved))  # fmt: skip
    curves = history.stop(tmp_path / "memory_snapshot.pickle")
    del second, third
    times, values = zip(*curves["allocated"], strict=True)
    assert [v - values[0] for v in values] == [n * MIB for n in (0, 300, 400, 100, 150)]
    assert began <= times[0] and list(times) == sorted(times) and times[-1] <= time.time()
    # torch's counters are of blocks, which may be a little larger than what was asked for.
    for counted, curve in ((before, values[0]), (peak, max(values)), (allocated, values[-1])):
        assert 0 <= counted - curve < 8 * MIB
    assert curves["reserved"][-1][1] == reserved
    assert {p.name for p in tmp_path.iterdir()} == {"memory_snapshot.pickle"}
    with (tmp_path / "memory_snapshot.pickle").open("rb") as file:
        snapshot = pickle.load(file)
    own = [e for e in snapshot["device_traces"][0] if e["action"] == "alloc" and e["size"] == 300 * MIB]
    assert len(own) == 1 and any(f["name"] == "take" for f in own[0]["frames"])


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(here, tmp_path):
    """Phases are marked while an earlier kernel is running."""
    profiler = Profiler(here.device, [MemoryRecorder(here, tmp_path, "a model")])
    profiler.start_phase("load")
    done = torch.cuda.Event()
    torch.cuda._sleep(4 * 10**9)  # cycles: seconds
    done.record()
    for name in ("forward", "backward", "optimizer", BETWEEN_STEPS):
        profiler.start_phase(name)
    profiler.step()
    assert not done.query()
    done.synchronize()
    profiler.recorders[0].fail()  # ends the record


@pytest.mark.gpu
def test_running_out_of_memory_leaves_the_record(here, tmp_path):
    recorders = [MemoryRecorder(here, tmp_path, "a model")]
    with pytest.raises(torch.OutOfMemoryError), Profiler(here.device, recorders) as profiler:
        profiler.start_phase("load")
        held = take(64)
        profiler.start_phase("forward")
        take(2**25)
    del held
    files = {"memory_rank0.html", "memory_rank0.png", "memory_snapshot.pickle"}
    assert {p.name for p in tmp_path.iterdir()} == files
    shown = Page((tmp_path / "memory_rank0.html").read_text(encoding="utf-8"))
    assert [c["group"] for c in shown.charts] == ["start", "step 1"]
    line = shown.charts[0]["series"][0]["points"]
    assert line[-1][1] - line[0][1] == pytest.approx(64 / 1024, rel=1e-2)


def profiled_run(tmp_path: Path, world: int) -> tuple[list[dict], Path]:
    model = tiny.save_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    data = tiny.write_alpaca(tmp_path / "data.jsonl")
    args = ["--model_name", model, "--dataset", data, "--world_size", world, "--max_steps", STEPS]
    args += "--batch_size 4 --log_to stdout --save_model false --profile_memory --profile --repeat 1".split()
    args += ["--wait_steps", STEPS - 2, "--active_steps", 1, "--profiling_output", tmp_path / "traces"]
    return run_and_read(args, tmp_path / "out"), tmp_path / "out"


@pytest.mark.gpu
def test_a_run_leaves_page_snapshot_and_trace(tmp_path):
    """A step's peak on the page equals the allocator's in metrics.jsonl, up to rounding."""
    metrics, folder = profiled_run(tmp_path, 1)
    names = {p.name for p in folder.glob("memory*")}
    assert names == {"memory.html", "memory.png", "memory_snapshot.pickle"}
    shown = Page((folder / "memory.html").read_text(encoding="utf-8"))
    assert [c["group"] for c in shown.charts] == ["start"] + [
        f"step {i}" for i in range(1, HISTORY_STEPS + 1)
    ]
    for step in (2, 3):  # the first one's counter has the start as well
        allocated, reserved = (max(p[1] for p in series["points"]) for series in shown.charts[step]["series"])
        assert -0.001 < metrics[step - 1]["memory_allocated_gib"] - allocated < 8 / 1024
        assert reserved == pytest.approx(metrics[step - 1]["memory_reserved_gib"], rel=1e-3)
        assert allocated <= reserved * 1.0001
    for m in metrics:
        after = m["memory_after_forward_gib"], m["memory_after_backward_gib"]
        assert 0 < min(after) <= max(after) <= m["memory_allocated_gib"]
        # The activations are freed; the first backward allocates its thread's cuBLAS workspace, 32 MiB on
        # Hopper.
        assert after[0] > after[1] or m["step"] == 1
    stages = json.loads((folder / "run.json").read_text())["memory"]
    assert stages["after_wrap_gib"] < 0.001 <= stages["after_load_gib"] + 0.001
    path = tmp_path / "traces" / f"iteration_{STEPS}" / "rank0_trace.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(e.get("cat") == "kernel" for e in events)
    assert "CUDA" in path.with_name("rank0_key_averages.txt").read_text()


@pytest.mark.two_gpus
def test_each_rank_leaves_a_snapshot(tmp_path):
    _, folder = profiled_run(tmp_path, 2)
    names = {"memory.html", "memory.png", "memory_snapshot.pickle", "memory_snapshot_rank1.pickle"}
    assert {p.name for p in folder.glob("memory*")} == names
    shown = Page((folder / "memory.html").read_text(encoding="utf-8"))
    assert len(shown.charts) == 2 * (1 + HISTORY_STEPS)
    assert len(list((tmp_path / "traces" / f"iteration_{STEPS}").glob("rank[01]_trace.json.gz"))) == 2
