"""Fit the model of a step to measured steps, and compare it with steps that the fit did not use.

    python -m benchmarks.step_fit scaling/rows.jsonl
    python -m benchmarks.step_fit benchmarks/h200_steps.jsonl --fit "qlora, full_shard"

The file has rows as benchmarks/scaling.py writes them. Rows of the series --fit are used for the fit, all
other qlora rows for the comparison. The fit is a maximum a posteriori estimate: the errors of log(step)
have a standard deviation of NOISE, and each parameter's log one of its own around an assumed value. So a
parameter that the rows say nothing about stays at its assumption: the last column of the table says so.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.scaling import Row, read_rows
from benchmarks.step_model import Machines, Work, make_work, step_seconds

NOISE = 0.01  # of a step: single H200s of one kind differed by 1 to 2% (docs/benchmarks_history.md)
# Assumed before any row is seen. link is measured: a layer's all-gather, of which a rank receives 66.8 MB,
# took 0.34 ms alone on two H100s (2026-11-28, docs/benchmarks_history.md).
ASSUMED = Machines(gpus=8, flops=600e12, overhead=0.005, jitter=0.03, link=196e9)
# Standard deviations of the parameters' logarithms around ASSUMED.
SPREAD = {"flops": 0.5, "overhead": 1.0, "jitter": 1.0, "link": 0.3}
STEPS = 50  # of the search, which ends earlier when it stands still


def work_of(row: Row, context: int, lora_rank: int) -> Work:
    """Return the work of a row's step. lora_rank: of the 8B shape; the 70B shape has 16."""
    shape, rank = ("70b", 16) if row.work.is_large else ("8b", lora_rank)
    return make_work(shape, row.work.rows, context, rank, row.work.gpus, row.work.options)


def fit(steps: list[tuple[Work, float]], assumed: Machines = ASSUMED) -> tuple[Machines, dict[str, float]]:
    """Return the fitted machines, and how much of each parameter's spread is left: 1 = no row informs it.

    Levenberg and Marquardt's search over the logarithms.

    Args:
        steps: works and their measured seconds.
        assumed: the values to start from, which the fit is drawn to.
    """
    names = list(SPREAD)
    start = np.log([getattr(assumed, name) for name in names])
    spread = np.array([SPREAD[name] for name in names])

    def machines_at(point: np.ndarray) -> Machines:
        return replace(assumed, **dict(zip(names, np.exp(point).tolist(), strict=True)))

    def errors(point: np.ndarray) -> np.ndarray:
        machines = machines_at(point)
        of_steps = [math.log(step_seconds(work, machines).total / seconds) / NOISE for work, seconds in steps]
        return np.array([*of_steps, *((point - start) / spread)])

    point, damping = start, 1.0
    for _ in range(STEPS):
        found, slopes = errors(point), _slopes(errors, point)
        matrix = slopes.T @ slopes
        move = np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), -slopes.T @ found)
        if (errors(point + move) ** 2).sum() < (found**2).sum():
            point, damping = point + move, damping / 3
        else:
            damping *= 3
        if np.abs(move).max() < 1e-9:
            break
    slopes = _slopes(errors, point)
    left = np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes))) / spread
    return machines_at(point), dict(zip(names, left.tolist(), strict=True))


def _slopes(errors: Callable[[np.ndarray], np.ndarray], point: np.ndarray) -> np.ndarray:
    """Return the derivatives of the errors by each parameter, [errors, parameters]."""
    size = 1e-5
    columns = [(errors(point + d) - errors(point - d)) / (2 * size) for d in size * np.eye(len(point))]
    return np.stack(columns, 1)


def describe_fit(machines: Machines, left: dict[str, float], assumed: Machines = ASSUMED) -> str:
    """Return a table of the parameters."""
    lines = ["| parameter | assumed | fitted | spread left |", "|---|---|---|---|"]
    for name, share in left.items():
        values = getattr(assumed, name), getattr(machines, name)
        cells = [name, *(f"{value:.4g}" for value in values), f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_rows(
    rows: list[Row], machines: Machines, fitted: list[Row], work_of_row: Callable[[Row], Work]
) -> str:
    """Return a table of measured and modelled steps, those of the fit first."""
    lines = [
        "| series | GPUs | rows per GPU | measured | model | error | exposed: measured | model | use |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row not in fitted):
        time, measured = step_seconds(work_of_row(row), machines), row.step_seconds
        assert measured is not None
        cells = [row.work.name, str(row.work.gpus), str(row.work.rows), f"{measured:.3f} s"]
        cells += [f"{time.total:.3f} s", f"{time.total / measured - 1:+.1%}"]
        cells += ["" if row.exposed_seconds is None else f"{row.exposed_seconds:.3f} s"]
        cells += [f"{time.exposed:.3f} s", "fit" if row in fitted else "check"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def usable(rows: list[Row]) -> list[Row]:
    """Return the rows that the model is about: measured steps of qlora."""
    return [row for row in rows if row.step_seconds and "--train_type qlora" in row.work.options]


def fit_rows(
    rows: list[Row], series: str, context: int, lora_rank: int
) -> tuple[Machines, dict[str, float], list[Row]]:
    """Return (fitted machines, spread left, rows of the fit). Raises ValueError if the series has no rows."""
    fitted = [row for row in rows if row.work.name == series]
    if not fitted:
        names = sorted({row.work.name for row in rows})
        raise ValueError(f"--fit {series}: no such rows; there are {'; '.join(names)}")
    steps = [(work_of(row, context, lora_rank), row.step_seconds) for row in fitted if row.step_seconds]
    return *fit(steps), fitted


def main(argv: list[str]) -> None:
    """Fit, and print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_fit")
    parser.add_argument("rows", type=Path, help="rows.jsonl of benchmarks.scaling")
    parser.add_argument("--fit", default="qlora, full_shard", help="series of the rows to fit")
    parser.add_argument("--context_length", type=int, default=2048, help="of the measured runs")
    parser.add_argument("--lora_rank", type=int, default=64, help="of the measured runs of the 8B shape")
    options = parser.parse_args(argv)
    rows = usable(read_rows(options.rows))
    try:
        machines, left, fitted = fit_rows(rows, options.fit, options.context_length, options.lora_rank)
    except ValueError as e:
        parser.error(str(e))
    print(describe_fit(machines, left))
    print()
    print(
        describe_rows(
            rows, machines, fitted, lambda row: work_of(row, options.context_length, options.lora_rank)
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
