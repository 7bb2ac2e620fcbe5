"""Reads and checks the files of a RUN that report.html is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from files.names import METRICS, OPTIONS, SCORE
from monitoring.run_facts import FACTS, check_facts
from options.config import Config
from options.errors import UserError
from options.train import parse


@dataclass(frozen=True)
class RunFiles:
    """What a RUN's files say. steps: the lines of metrics.jsonl, at least one; samples: those of samples.jsonl
    (step, prompt, text); facts: run.json, {} in a RUN of an earlier version; names: the RUN's files."""

    folder: Path
    config: Config
    steps: list[dict]
    samples: list[dict]
    facts: dict
    names: set[str]


def read_run(folder: Path) -> RunFiles:
    """Raises UserError if the folder is no RUN of train.py, has no step yet, or has a file that is damaged."""
    if not (folder / OPTIONS).is_file():
        raise UserError(f"{folder}: is no run of train.py (no {OPTIONS})")
    config, _ = parse(["--config", str(folder / OPTIONS)])
    steps = sorted(_lines(folder / METRICS, ("step", "loss")), key=lambda s: s["step"])
    if not steps and (folder / SCORE).is_file():
        raise UserError(
            f"{folder}: is the best step of a run; the page is of the whole one: {folder.absolute().parent}"
        )
    if not steps:
        raise UserError(f"{folder}: its metrics.jsonl has no step yet")
    facts = {}
    if (folder / FACTS).is_file():
        facts = _json(_text(folder / FACTS), f"{folder / FACTS}")
        check_facts(facts, f"{folder / FACTS}")
    samples = _lines(folder / "samples.jsonl", ("step", "prompt", "text"))
    return RunFiles(folder, config, steps, samples, facts, {p.name for p in folder.iterdir()})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or 'not a UTF-8 text'}") from None


def _json(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object")
    return value


def _lines(path: Path, needed: tuple[str, ...]) -> list[dict]:
    """The objects of a .jsonl file, which need not be there. A last line without its end is left out: the run is
    writing it, or was stopped as it did."""
    if not path.is_file():
        return []
    *lines, _ = _text(path).split("\n")
    rows = [_json(line, f"{path} line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    for i, row in enumerate(rows, 1):
        for name in needed:
            kind = str if name in ("prompt", "text") else int if name == "step" else (int, float, type(None))
            if name not in row or not isinstance(row[name], kind):
                raise UserError(f"{path} line {i}: has no {name}, or one that is none")
    return rows
