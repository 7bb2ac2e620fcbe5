"""benchmarks.scaling: its runs and their order, going on, the table; a rehearsal on CPU ranks."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.scaling import Row, Work, format_table, list_work
from benchmarks.traces import covered, exposed_seconds
from options.train import parse


def test_the_most_valuable_runs_come_first():
    work = list_work(8, rows=4, all_rows=32)
    assert [(w.name, w.gpus) for w in work[:5]] == [
        *(("qlora, full_shard", n) for n in (8, 4, 2, 1)),
        ("bnb_dora, full_shard", 8),
    ]
    assert [w.rows for w in work if w.name == "qlora, 32 rows in all"] == [4, 8, 16, 32]
    assert [(w.name, w.gpus) for w in work if "groups" in w.name] == [
        ("qlora, groups of 2", 8),
        ("qlora, groups of 4", 8),
    ]
    assert work[-1].is_large and work[-1].gpus == 8
    for each in work:
        config, _ = parse(["--model_name", "any", *each.options.split()])
        assert config.sharding_strategy != "auto"
    assert {w.gpus for w in list_work(1, 4, 32)} == {1}


def test_exposed_communication_is_what_no_kernel_hides(tmp_path):
    """A gather from 0 to 10 ms beside a matmul from 4 to 6, and a copy from 10 to 12 beside one from 11."""
    spans = [
        ("kernel", "ncclDevKernel_AllGather", 0, 10),
        ("kernel", "gemm", 4, 2),
        ("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 10, 2),
        ("gpu_memcpy", "Memcpy HtoD", 11, 3),
        ("cpu_op", "aten::mm", 0, 100),
    ]
    events = [{"cat": c, "name": n, "ts": ts * 1000, "dur": d * 1000} for c, n, ts, d in spans]
    path = tmp_path / "rank0_trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert exposed_seconds(path, steps=3) == pytest.approx((10 - 2 + 1) / 1000 / 3)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events[-1:]}).encode()))
    assert exposed_seconds(path, steps=3) is None
    assert covered([(5, 6), (0, 3), (2, 4), (5.5, 5.6)]) == 5


def argv_for(out: Path, model: Path) -> list[str]:
    options = "--gpus 2 --batch_size 1 --all_rows 2 --context_length 256 --lora_rank 4 --steps 2"
    return [str(model), str(model), "--out", str(out), *options.split()]


def test_a_second_start_makes_what_is_missing(tmp_path, monkeypatch, capsys):
    made = []

    def run(options, work: Work) -> Row:
        made.append(work)
        if len(made) == 2:
            return Row(work, problem="failed: no | luck")
        return Row(work, 1000.0 / work.gpus, 0.5, 0.6, None, 0.2, 3.0, 1.5)

    monkeypatch.setattr(scaling, "run", run)
    scaling.main(argv_for(tmp_path, tmp_path))
    expected = list_work(2, 1, 2)
    assert made == expected
    assert "| qlora, full_shard | 1 | 1 | failed: no \\| luck |" in capsys.readouterr().out
    scaling.main(argv_for(tmp_path, tmp_path))
    assert made == [*expected, expected[1]]  # what failed is tried again
    table = (tmp_path / "scaling.md").read_text()
    assert "| qlora, full_shard | 2 | 1 | 500 | 50.0% | 0.500 s | 0.600 s |  | 0.200 s | 3.00 GiB |" in table
    assert "| qlora, shard_grad_op | 2 | 1 | 500 | 50.0% |" in table and "no | luck" not in table
    assert "| 70B qlora, full_shard | 2 | 1 | 500 |  |" in table
    assert {line.count("|") for line in table.splitlines()} == {12}
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_no_run_starts_after_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "run", lambda options, work: Row(work, problem="x"))
    monkeypatch.setattr(scaling.time, "monotonic", iter(range(0, 1000, 40)).__next__)
    scaling.main([*argv_for(tmp_path, tmp_path), "--stop_after", "100"])
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_run_on_cpu_ranks(tmp_path):
    """Two ranks learn what one does with both rows; their last losses are equal."""
    make_checkpoint(tmp_path / "model", "tiny")
    options = scaling.parse(argv_for(tmp_path / "out", tmp_path / "model"))
    options.out.mkdir()
    two, one = (scaling.run(options, work) for work in list_work(2, 1, 2) if "in all" in work.name)
    assert not two.problem and not one.problem, (two, one)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.tokens_per_second == pytest.approx(256 / two.step_seconds)
    assert two.slowest_seconds >= two.step_seconds > 0 and two.host_seconds > 0 and two.peak_gib > 0.1
    assert two.exposed_seconds is None
    assert format_table([dataclasses.replace(one, problem="")]).count("\n") == 3
