"""Compute the tables of docs/hardware.md: the longest rows that fit on each hardware.

python -m tools.make_hardware_table

The numbers are those of plan.py (training/planner.py). No GPU and no weights are needed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from launch.gpus import GPUS
from options import train
from training.machine import Machine, find_largest, fits
from training.planned_model import PlannedModel, open_planned_model
from training.planner import estimate, resolve_on

PAGE = Path(__file__).parent.parent / "docs" / "hardware.md"
BEGIN, END = "<!-- computed: python -m tools.make_hardware_table -->", "<!-- end of the computed part -->"
LENGTHS = [2**i for i in range(9, 18)]  # tokens of a row
RANKS = 16, 64
OFFLOAD = ["--use_cpu_offload", "true", "--use_activation_cpu_offload", "true"]
# Name in the tables: (key of GPUS, number of them).
MACHINES = {
    "1 x T4": ("t4", 1),
    "2 x T4": ("t4", 2),
    "1 x L4": ("l4", 1),
    "1 x 3090 or 4090": ("4090", 1),
    "2 x 3090 or 4090": ("4090", 2),
    "1 x A100, 40 GB": ("a100-40gb", 1),
    "8 x H100": ("h100", 8),
    "8 x H200": ("h200", 8),
}
MODELS = "8b", "14b", "32b", "70b"


@cache
def open_model(name: str) -> PlannedModel:
    """Return a model of models/shapes.py, made once."""
    return open_planned_model(name)


def find_longest(machine: Machine, model: str, rank: int, more: list[str]) -> int:
    """Return the most tokens of one row of QDoRA that fit, of LENGTHS; 0 if none does.

    Args:
        machine: the GPUs.
        model: a name of models/shapes.py.
        rank: of the adapters.
        more: further options of train.py.
    """
    planned, options = open_model(model), ["--model_name", model, "--lora_rank", str(rank), *more]
    config = resolve_on(machine, train.parse(options)[0], planned)
    n = find_largest(
        1, len(LENGTHS), lambda n: fits(estimate(config, planned, machine.gpu, LENGTHS[n - 1]), machine)
    )
    return LENGTHS[n - 1] if n else 0


def make_tables() -> str:
    """Return both tables in Markdown."""
    lines = []
    for title, more in (("Everything on the GPUs", []), (f"`{' '.join(OFFLOAD)}`", OFFLOAD)):
        lines += [f"\n{title}:\n", f"| hardware | {' | '.join(m.upper() for m in MODELS)} |"]
        lines += ["|---" * (len(MODELS) + 1) + "|"]
        for name, (kind, gpus) in MACHINES.items():
            machine, cells = Machine(GPUS[kind], gpus, GPUS[kind].gib), []
            for model in MODELS:
                longest = [find_longest(machine, model, rank, more) for rank in RANKS]
                cells.append(" / ".join(f"{tokens:,}" if tokens else "-" for tokens in longest))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def replace_tables(page: str, tables: str) -> str:
    """Return the page with `tables` between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(replace_tables(PAGE.read_text("utf-8"), make_tables()), "utf-8")
