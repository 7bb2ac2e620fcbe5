"""Compute the tables of docs/nodes.md: full_shard beside hybrid_full_shard on many nodes, and checkpoints.

    python -m benchmarks.node_tables        writes them into docs/nodes.md

The machines are those that benchmarks/step_fit.py fits to benchmarks/h200_steps.jsonl, and what ASSUMED and
the constants here say.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.scaling import read_rows
from benchmarks.step_fit import fit_rows
from benchmarks.step_model import GIGABIT, Machines, Work, checkpoint_seconds, make_work, step_seconds

PAGE = Path(__file__).parent.parent / "docs" / "nodes.md"
STEPS = Path(__file__).parent / "h200_steps.jsonl"
BEGIN, END = "<!-- computed: python -m benchmarks.node_tables -->", "<!-- end of the computed part -->"
NODES = 2, 4, 8, 16, 32, 64
GPUS = 8  # of a node
NETWORKS = 100, 200, 400, 800, 1600, 3200  # Gbit/s of a node
NETWORK_SHARE = 0.8  # of it that a collective reaches, assumed
DISKS = 1e9, 10e9  # bytes/s of the disk that all nodes share
ROWS, CONTEXT = 4, 2048  # of a GPU and a step
SHAPES = {"8b": 64, "70b": 16}  # {shape: rank of the adapters}
FULL, HYBRID = "full_shard", f"hybrid_full_shard --hybrid_shard_size {GPUS}"
GIB = 2**30


def work_on(shape: str, nodes: int, strategy: str) -> Work:
    """Return the work of a qlora step on so many nodes."""
    options = f"--train_type qlora --sharding_strategy {strategy}"
    return make_work(shape, ROWS, CONTEXT, SHAPES[shape], nodes * GPUS, options)


def fitted_machines() -> Machines:
    """Return the machines of the tables."""
    machines, _, _ = fit_rows(read_rows(STEPS), "qlora, full_shard", CONTEXT, SHAPES["8b"])
    return replace(machines, gpus=GPUS)


def tokens_per_second(work: Work, machines: Machines, network: float) -> float:
    """Return the speed of a GPU. network: in Gbit/s, nominal."""
    reached = replace(machines, network=network * GIGABIT * NETWORK_SHARE)
    return work.tokens / step_seconds(work, reached).total


def make_tables(machines: Machines) -> str:
    """Return all tables in Markdown."""
    parts = [_parameters(machines)]
    for shape in SHAPES:
        parts.append(f"{shape.upper()}, tokens/s per GPU, `full_shard` / `hybrid_full_shard`:\n")
        parts.append(_speeds(shape, machines))
    parts += ["Weights and checkpoints:\n", _sizes(machines)]
    return "\n" + "\n".join(parts) + "\n"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(line)} |\n" for line in (header, *lines)]
    return "".join([rows[0], "|---" * len(header), "|\n", *rows[1:]])


def _parameters(machines: Machines) -> str:
    """Return the table of the parameters and where they come from."""
    fitted = "fitted to the steps in benchmarks/h200_steps.jsonl"
    latencies = machines.call, machines.link_latency, machines.network_latency
    lines = [
        ["computation", f"{machines.flops / 1e12:.0f} TFLOP/s", fitted],
        ["spread of a rank's computation", f"{machines.jitter:.1%}", fitted],
        [
            "links within a node",
            f"{machines.link / 1e9:.0f} GB/s",
            "measured on two H100s; the steps say no more",
        ],
        ["network of a node", f"{NETWORK_SHARE:.0%} of the nominal rate", "assumed"],
        [
            "latency of a collective; of its messages within a node; between nodes",
            "; ".join(f"{1e6 * t:.1f}" for t in latencies) + " us",
            "NCCL's own model, src/graph/tuning.cc",
        ],
    ]
    return _table(["input", "value", "source"], lines)


def _speeds(shape: str, machines: Machines) -> str:
    """Return the table of a shape's speeds."""
    lines = []
    for nodes in NODES:
        works = [work_on(shape, nodes, strategy) for strategy in (FULL, HYBRID)]
        speeds = [[tokens_per_second(work, machines, n) for work in works] for n in NETWORKS]
        lines.append([str(nodes), *(" / ".join(f"{speed:,.0f}" for speed in pair) for pair in speeds)])
    return _table(["nodes", *(f"{n:,} Gbit/s" for n in NETWORKS)], lines)


def _sizes(machines: Machines) -> str:
    """Return the table of weights and checkpoints."""
    lines = []
    for shape in SHAPES:
        for nodes in (NODES[0], NODES[2], NODES[-1]):
            works = [work_on(shape, nodes, strategy) for strategy in (FULL, HYBRID)]
            cells = [f"{work.weights / GIB:.2f}" for work in works]
            cells += [f"{work.checkpoint / GIB:.2f}" for work in works]
            cells += [f"{works[1].checkpoint / works[1].ranks / 2**20:.1f}"]
            for disk in DISKS:
                cells += [f"{checkpoint_seconds(works[1], replace(machines, disk=disk)):.2f} s"]
            lines.append([shape.upper(), str(nodes), *cells])
    header = [
        *("model", "nodes", "weights per GPU, full: GiB", "hybrid", "checkpoint, full: GiB", "hybrid"),
        *("a rank writes, hybrid: MiB", *(f"disk of {disk / 1e9:.0f} GB/s" for disk in DISKS)),
    ]
    return _table(header, lines)


def replace_tables(page: str, tables: str) -> str:
    """Return the page with `tables` between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(replace_tables(PAGE.read_text("utf-8"), make_tables(fitted_machines())), "utf-8")
