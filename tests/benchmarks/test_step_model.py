"""The model of a step: its limits, its overlap, and a fit that finds the parameters of made-up steps."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import pytest

from benchmarks import node_tables
from benchmarks.scaling import Row, read_rows
from benchmarks.scaling import Work as ScalingWork
from benchmarks.step_fit import ASSUMED, describe_rows, fit, fit_rows, main, usable, work_of
from benchmarks.step_model import (
    Machines,
    checkpoint_seconds,
    copies_seconds,
    expected_max,
    make_work,
    ring_seconds,
    step_seconds,
)
from models.shapes import SHAPES

FULL = "--train_type qlora --sharding_strategy full_shard"
HYBRID = "--train_type qlora --sharding_strategy hybrid_full_shard --hybrid_shard_size 8"
MACHINES = Machines(8, flops=600e12, overhead=0.01, jitter=0.03, link=200e9, network=50e9)
FAST = replace(MACHINES, jitter=0, link=math.inf, network=math.inf, call=0, link_latency=0, network_latency=0)


def work(ranks: int, options: str = FULL, rows: int = 4, shape: str = "8b"):
    return make_work(shape, rows, 2048, 64, ranks, options)


def test_one_rank_only_computes():
    """6 FLOPs per weight and token, but the last projection is not recomputed; adapters, attention, head."""
    alone, shape = work(1), SHAPES["8b"]
    time = step_seconds(alone, MACHINES)
    assert time.exposed == 0 and alone.vocabulary == alone.vocabulary_calls == 0
    head = shape.vocabulary * shape.hidden
    matrices = shape.parameters() - 2 * head - shape.hidden * (2 * shape.layers + 1)
    adapters = 64 * shape.layers * 81920  # in + out of the seven linears
    flops = 6 * matrices - 2 * shape.layers * shape.hidden * shape.mlp + 4 * head + 8 * adapters
    flops += 4.5 * 2 * 2048 * shape.hidden * shape.layers
    assert time.computation == pytest.approx(alone.tokens * flops / MACHINES.flops + MACHINES.overhead)


@pytest.mark.parametrize("options", [FULL, HYBRID])
def test_without_delays_many_ranks_take_as_long_as_one(options):
    time = step_seconds(work(64, options), FAST)
    assert time.total == pytest.approx(step_seconds(work(1), FAST).total)


def test_one_node_does_not_use_the_network():
    offline = replace(MACHINES, network=1.0, network_latency=1e3)
    for options in (FULL, HYBRID):
        assert step_seconds(work(8, options), offline) == step_seconds(work(8, options), MACHINES)
    assert step_seconds(work(8), MACHINES) == step_seconds(work(8, HYBRID), MACHINES)
    assert step_seconds(work(16), offline).exposed > 1e3


def test_collectives_take_the_time_of_the_slower_links():
    link, network = replace(FAST, link=100.0), replace(FAST, network=100.0)
    assert ring_seconds(150.0, 16, link) == pytest.approx(1.5)
    assert ring_seconds(150.0, 16, network) == pytest.approx(1.5 * 8 / 15)  # what the other node's GPUs have
    assert ring_seconds(150.0, 8, network) == 0
    messages = replace(FAST, call=1000.0, link_latency=10.0, network_latency=1.0)
    assert ring_seconds(150.0, 16, messages, calls=2) == 2 * (1000 + 14 * 10 + 1)
    # All eight GPUs of a node sum their shards with the other node's at the same time.
    assert copies_seconds(50.0, 2, 8, network) == pytest.approx(2 * 1 / 2 * 50 * 8 / 100)
    assert copies_seconds(50.0, 2, 4, link) == pytest.approx(0.5)  # both copies are on one node


def test_computation_hides_communication():
    """Slower links add nothing until a layer's gather takes longer than the layer."""
    two = replace(work(2), vocabulary=0.0, vocabulary_calls=0)
    gathers = [sum(u.gathered for u in two.units) / rate for rate in (50e9, 500e6)]
    exposed = [step_seconds(two, replace(FAST, link=rate)).exposed for rate in (50e9, 500e6)]
    assert exposed[0] < 0.1 * gathers[0] and exposed[1] > gathers[1]


def test_ranks_wait_for_the_slowest():
    assert expected_max(1) == 0 and expected_max(2) == pytest.approx(0.5642, rel=0.05)
    assert expected_max(512) == pytest.approx(3.04, rel=0.01)
    times = [step_seconds(work(n, HYBRID), replace(FAST, jitter=0.03)).computation for n in (8, 16, 512)]
    assert times == sorted(times)


def test_a_checkpoint_waits_for_the_disk_and_for_each_ranks_share():
    many = work(16, HYBRID)
    share = many.checkpoint / 16
    assert checkpoint_seconds(many, replace(FAST, disk=1e9), copy_rate=1e8) == pytest.approx(
        share / 1e8 + many.checkpoint / 1e9
    )
    assert many.checkpoint == pytest.approx(12 * 64 * 32 * 81920, rel=0.01)  # fp32 weights and two moments


def test_the_fit_finds_the_parameters_of_steps():
    true = replace(ASSUMED, flops=450e12, overhead=0.03, jitter=0.06, link=120e9)
    works = [work(n, FULL, rows) for n in (1, 2, 8) for rows in (1, 4, 16)]
    # So little work that nothing hides the gathers.
    works += [make_work("8b", 1, 16, 64, n, FULL) for n in (2, 8)]
    found, left = fit([(each, step_seconds(each, true).total) for each in works])
    for name in left:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.1), name
        assert left[name] < 0.3, name
    alone = work(1)
    found, left = fit([(alone, step_seconds(alone, true).total)])
    assert [left["jitter"], left["link"], found.link] == pytest.approx([1, 1, ASSUMED.link])


def test_rows_of_scaling_are_fitted_and_checked(tmp_path, capsys):
    rows = [
        Row(ScalingWork("qlora, full_shard", 1, 4, FULL), step_seconds=0.65, exposed_seconds=None),
        Row(ScalingWork("qlora, full_shard", 2, 4, FULL), step_seconds=0.67, exposed_seconds=0.004),
        Row(ScalingWork("70B qlora, full_shard", 2, 4, FULL, is_large=True), step_seconds=5.9),
        Row(ScalingWork("bnb_dora, full_shard", 2, 4, FULL.replace("qlora", "bnb_dora")), step_seconds=0.7),
        Row(ScalingWork("qlora, full_shard", 4, 4, FULL), problem="failed"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    main([str(path)])
    out = capsys.readouterr().out
    assert out.count("| fit |") == 2 and out.count("| check |") == 1 and "dora" not in out
    assert "| 0.004 s |" in out and "| 70B qlora, full_shard | 2 | 4 | 5.900 s |" in out
    with pytest.raises(SystemExit):
        main([str(path), "--fit", "other"])


def test_the_measured_steps_that_the_fit_did_not_use():
    """Other machines of the kind, and no recomputation: 3%, by which machines of one kind differ."""
    rows = usable(read_rows(node_tables.STEPS))
    machines, _, fitted = fit_rows(rows, "qlora, full_shard", 2048, 64)
    checked = [row for row in rows if row not in fitted]
    assert len(fitted) == 2 and len(checked) == 6
    for row in checked:
        assert step_seconds(work_of(row, 2048, 64), machines).total == pytest.approx(row.step_seconds, 0.03)
    assert describe_rows(rows, machines, fitted, lambda row: work_of(row, 2048, 64)).count("| check |") == 6


@pytest.mark.slow
def test_the_page_has_what_is_computed():
    page = node_tables.PAGE.read_text(encoding="utf-8")
    tables = node_tables.make_tables(node_tables.fitted_machines())
    assert page == node_tables.replace_tables(page, tables), "run: python -m benchmarks.node_tables"
