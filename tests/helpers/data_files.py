"""Small data files of every kind, and reading them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from data.sources import find_recipe, load_rows

# Texts that are difficult for file formats: quotes, line breaks, separators, other line ends.
TRICKY = [
    {"instruction": 'Say "hi", twice', "input": "a\nb\n\nc", "output": "hi;\thi"},
    {"instruction": "é 日本 🙂", "input": "", "output": "line\u2028separator\x0bvertical\x85next"},
    {"instruction": ",", "input": " \\n ", "output": '"'},
]


def read(dataset, samples: int = -1) -> list[dict]:
    return load_rows(*find_recipe(str(dataset)), samples).rows


def to_jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_file(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_csv(path: Path, rows: list[dict], **options) -> Path:
    """Write rows as CSV. options: of csv.DictWriter."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict] | pyarrow.Table) -> Path:
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path)
    return path
