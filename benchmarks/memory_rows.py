"""The result of one run of benchmarks.memory, and the tables of all."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from files.names import METRICS
from launch.memory import GIB
from monitoring.run_facts import FACTS

PHASES = ("load", "forward", "backward", "optimizer", "peak", "host")
RAN, OUT_OF_MEMORY = "ran", "out of memory"
WITHIN = {"peak": 0.05, "host": 0.10}  # relative error that a prediction may have


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: the setting's; with a limit also its factor.
        options: of train.py.
        gpus: ranks.
        limit_gib: GiB of each GPU that torch might take; None = all.
        factor: the limit relative to the predicted peak.
        outcome: RAN, OUT_OF_MEMORY, or how it failed.
        seconds: its time, from start to end.
        predicted, measured: GiB by phase (PHASES), of the fullest rank and of the host; {} without a GPU,
            or without a result.
        details: other figures in GiB, and whether the kernel counts page-locked memory.
    """

    name: str
    options: str
    gpus: int
    limit_gib: float | None = None
    factor: float | None = None
    outcome: str = RAN
    seconds: float = 0.0
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    details: dict[str, float | bool] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the run need not be repeated: it ran, or ended for want of memory under a limit.

        Without a limit it was its neighbours that took the memory.
        """
        return self.outcome == RAN or (self.outcome == OUT_OF_MEMORY and self.factor is not None)

    @property
    def verdict(self) -> str:
        """Whether a run with a limit ended as predicted: "right", "wrong", or how it failed."""
        if not self.is_complete:
            return self.outcome
        assert self.factor is not None
        return "right" if (self.outcome == RAN) == (self.factor > 1) else "wrong"


def measured_figures(run: Path, ranks: list[dict]) -> tuple[dict[str, float], dict[str, float]]:
    """Return ({phase: predicted GiB}, {phase: measured GiB}) of a complete RUN, without the host's measured.

    Forward and backward are those of the last step, when the optimizer has its states.

    Args:
        run: the RUN's folder.
        ranks: what each rank wrote (benchmarks/measured_run.py).
    """
    facts = json.loads((run / FACTS).read_text(encoding="utf-8"))["memory"]
    steps = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    predicted = {phase: facts.get(f"predicted_{phase}_gib") for phase in PHASES}
    measured = {
        "load": facts["after_load_gib"],
        "forward": steps[-1]["memory_after_forward_gib"],
        "backward": steps[-1]["memory_after_backward_gib"],
        "peak": max(step["memory_allocated_gib"] for step in steps),
    }
    if all("optimizer" in rank["phases"] for rank in ranks):  # not on a CPU
        measured["optimizer"] = max(rank["phases"]["optimizer"] for rank in ranks) / GIB
    return {phase: gib for phase, gib in predicted.items() if gib is not None}, measured


def read_rows(path: Path) -> list[Row]:
    """Return the complete rows of a file of JSON lines, [] without one; of a name that recurs, the last."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = {row.name: row for row in (Row(**json.loads(line)) for line in lines)}
    return [row for row in rows.values() if row.is_complete]


def append_row(path: Path, row: Row) -> None:
    """Append a row to the file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def ratio(row: Row, phase: str) -> float | None:
    """Return measured / predicted of a phase; None if one of the two is missing or nothing is predicted."""
    if not row.predicted.get(phase) or phase not in row.measured:
        return None
    return row.measured[phase] / row.predicted[phase]


def describe(row: Row) -> str:
    """Return a row as one line: its name, how it ended, and its figures."""
    if row.outcome != RAN or row.factor is not None:
        verdict = f", the verdict is {row.verdict}" if row.factor is not None else ""
        return f"{row.name}: {row.outcome} after {row.seconds:.0f} s{verdict}"
    figures = ", ".join(f"{phase} {_figures(row, phase)}" for phase in PHASES)
    return f"{row.name}: {row.seconds:.0f} s; predicted / measured GiB: {figures}"


def _figures(row: Row, phase: str) -> str:
    """Return "predicted / measured" of a phase in GiB; a dash stands for what is not known."""
    return " / ".join(
        "-" if side.get(phase) is None else f"{side[phase]:.2f}" for side in (row.predicted, row.measured)
    )


def format_tables(rows: list[Row], names: list[str]) -> str:
    """Return the results in Markdown: the settings in the order of `names`, then the runs with a limit."""
    ran = [row for row in rows if row.factor is None]
    ran.sort(key=lambda row: names.index(row.name))
    lines = [
        "| setting | GPUs | load | forward | backward | optimizer | peak | ratio | host | ratio |",
        f"|{'---|' * 10}",
    ]
    for row in ran:
        cells = [row.name, str(row.gpus), *(_figures(row, phase) for phase in PHASES[:-1])]
        cells += [_format_ratio(row, "peak"), _figures(row, "host"), _format_ratio(row, "host")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Predicted / measured GiB; ratio: measured / predicted. The settings:", ""]
    lines += [f"- {row.name}: `{row.options}`" for row in ran]
    limited = sorted((row for row in rows if row.factor is not None), key=lambda row: row.name)
    if limited:
        lines += ["", "| setting | limit | of the prediction | outcome | verdict |", f"|{'---|' * 5}"]
        for row in limited:
            setting, limit = row.name.split()[0], f"{row.limit_gib:.2f} GiB"
            lines.append(f"| {setting} | {limit} | {row.factor} | {row.outcome} | {row.verdict} |")
    return "\n".join(lines) + "\n"


def _format_ratio(row: Row, phase: str) -> str:
    """Return a ratio with two decimals, marked if it is out of WITHIN; "-" without one."""
    value = ratio(row, phase)
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value - 1) <= WITHIN[phase] else f"**{value:.3f}**"
