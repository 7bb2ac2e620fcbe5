"""The runs of benchmarks.fp8_accuracy, the results of its parts, and their table."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paired_losses import Losses, compare, format_tables

DEFAULT_WAY = "16bit"  # of train.py's --base_matmul
PRETRAINING = "pretraining"


@dataclass(frozen=True)
class Series:
    """Fine-tuning runs, or evaluations of these, that differ only in their seed.

    Attributes:
        name: in tables.
        train_type: of train.py.
        way: how the base's matmuls are computed in training.
        evaluates: name of the series whose RUNs evaluate.py reads; "" = train.py trains and evaluates.
    """

    name: str
    train_type: str
    way: str = DEFAULT_WAY
    evaluates: str = ""

    def options(self) -> list[str]:
        """Return the options of train.py."""
        way = [] if self.way == DEFAULT_WAY else ["--base_matmul", self.way]
        return ["--train_type", self.train_type, *way]


@dataclass(frozen=True)
class Run:
    """One run of a series."""

    series: Series
    seed: int

    @property
    def name(self) -> str:
        return f"{self.series.name}, seed {self.seed}"

    @property
    def evaluates(self) -> str:
        """Return the name of the run that it evaluates."""
        return f"{self.series.evaluates}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """The result of a part.

    Attributes:
        name: of the part.
        seconds: that it took.
        loss: on the held-out text, of the trained model.
        base_loss: the same of the model that training began with, where evaluate.py gave both.
        tokens_per_second: median over the steps of a run, beside other runs.
        problem: why there is no result, or "".
    """

    name: str
    seconds: float
    loss: float | None = None
    base_loss: float | None = None
    tokens_per_second: float | None = None
    problem: str = ""

    def describe(self) -> str:
        """Return the row as one line."""
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        speed = f", {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
        return f"{self.name}: {self.seconds:.0f} s{loss}{speed}{self.problem and f', {self.problem}'}"


def list_series(ways: list[str]) -> list[Series]:
    """Return the series: 16-bit weights, 4-bit weights with each way, and evaluations of these as trained.

    Training itself evaluates in 16 bits. An evaluation as trained has the rounded matmuls of its way.
    """
    names = [f"qlora {way}" + " again" * ways[:i].count(way) for i, way in enumerate(ways)]
    return [
        Series("lora", "lora"),
        *(Series(name, "qlora", way) for name, way in zip(names, ways, strict=True)),
        *(
            Series(f"{name}, evaluated as trained", "qlora", way, evaluates=name)
            for name, way in zip(names, ways, strict=True)
        ),
    ]


def list_pairs(series: list[Series]) -> list[tuple[str, str]]:
    """Return (series, series to subtract): each way and its evaluations beside the first's, and NF4's."""
    trained = [each.name for each in series if each.train_type == "qlora" and not each.evaluates]
    evaluated = [each.name for each in series if each.evaluates]
    ways = [(name, names[0]) for names in (trained, evaluated) for name in names[1:]]
    return [*ways, (trained[0], series[0].name)]


def read_rows(path: Path) -> dict[str, Row]:
    """Return {name: row} of the parts that have a result."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {row.name: row for row in rows if not row.problem}


def append_row(path: Path, row: Row) -> None:
    """Append a row to the file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def summarize(runs: list[Run], rows: dict[str, Row]) -> tuple[str, dict]:
    """Return the results as text with Markdown tables, and as values for JSON.

    Args:
        runs: in the order of the tables.
        rows: of the parts that have a result, among them the pretraining.
    """
    series = list(dict.fromkeys(run.series for run in runs))
    losses: Losses = {each.name: {} for each in series}
    for run in runs:
        if run.name in rows and (loss := rows[run.name].loss) is not None:
            losses[run.series.name][run.seed] = loss
    pairs = list_pairs(series)
    differences = compare(losses, pairs, baseline=pairs[-1][0])
    before = rows[PRETRAINING].loss
    in_16_bits = [run.name for run in runs if run.series.evaluates and run.series.way == DEFAULT_WAY]
    packed = next((rows[name].base_loss for name in in_16_bits if name in rows), None)
    text = f"Held-out loss before fine-tuning: {before:.5f} in 16 bits"
    text += ".\n\n" if packed is None else f", {packed:.5f} in NF4.\n\n"
    values = {
        "loss_before": before,
        "nf4_loss_before": packed,
        "losses": losses,
        "differences": [dataclasses.asdict(each) for each in differences],
        "rows": [dataclasses.asdict(row) for row in rows.values()],
    }
    return text + format_tables(losses, differences), values
