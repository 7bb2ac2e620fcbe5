"""Reads and checks the files of a RUN that report.html shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from files.names import METRICS, OPTIONS, SCORE
from monitoring.run_facts import FACTS, check_facts
from options.config import Config
from options.errors import UserError
from options.train import parse

# Types of the values that the report reads from metrics.jsonl and samples.jsonl.
LINE_TYPES: dict[str, type | tuple[type, ...]] = {
    "step": int, "loss": (int, float, type(None)), "prompt": str, "text": str
}  # fmt: skip


@dataclass(frozen=True)
class RunFiles:
    """The contents of a RUN's files.

    Attributes:
        steps: the lines of metrics.jsonl, at least one.
        samples: the lines of samples.jsonl (step, prompt, text, reference or "", images: label and copy).
        facts: run.json; {} in a RUN of an earlier version.
        names: the names of all files of the RUN.
    """

    folder: Path
    config: Config
    steps: list[dict]
    samples: list[dict]
    facts: dict
    names: set[str]


def read_run(folder: Path) -> RunFiles:
    """Read what the report shows of a RUN. Raises UserError if it is no RUN, has no step, or is damaged."""
    if not (folder / OPTIONS).is_file():
        raise UserError(f"{folder}: is no run of train.py (no {OPTIONS})")
    config, _ = parse(["--config", str(folder / OPTIONS)])
    steps = sorted(_read_json_lines(folder / METRICS, ("step", "loss")), key=lambda s: s["step"])
    if not steps and (folder / SCORE).is_file():
        raise UserError(
            f"{folder}: is a run's best/ folder; make the report of the run itself:"
            f" {folder.absolute().parent}"
        )
    if not steps:
        raise UserError(f"{folder}: its metrics.jsonl has no step yet")
    facts = {}
    if (folder / FACTS).is_file():
        facts = _parse_object(_read_text(folder / FACTS), f"{folder / FACTS}")
        check_facts(facts, f"{folder / FACTS}")
    return RunFiles(folder, config, steps, read_samples(folder), facts, {p.name for p in folder.iterdir()})


def read_samples(folder: Path) -> list[dict]:
    """Return the lines of a RUN's samples.jsonl, if it has any. Raises UserError if one is damaged."""
    path = folder / "samples.jsonl"
    samples = [
        {"reference": "", "images": [], **line} for line in _read_json_lines(path, ("step", "prompt", "text"))
    ]
    for sample in samples:
        if not isinstance(sample["reference"], str) or not _are_images(sample["images"]):
            raise UserError(f"{path}: reference or images of step {sample['step']} has the wrong type")
    return samples


def _are_images(images: object) -> bool:
    """Return whether a value is a list of images as samples.jsonl has them."""
    return isinstance(images, list) and all(
        isinstance(image, dict)
        and "label" in image
        and all(isinstance(value, str) for value in image.values())
        for image in images
    )


def _read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises UserError if it is not readable."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or 'not a UTF-8 text'}") from None


def _parse_object(text: str, origin: str) -> dict:
    """Parse a JSON object. Raises UserError, which begins with `origin`, if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{origin}: is not a JSON object")
    return value


def _read_json_lines(path: Path, keys: tuple[str, ...]) -> list[dict]:
    """Read the objects of a .jsonl file, or [] without a file. Raises UserError if one has not all `keys`.

    Each key's value must have its type in LINE_TYPES. Blank lines are skipped, and so is a last line without
    a line end: the run is writing it, or was stopped while it did.
    """
    if not path.is_file():
        return []
    rows = []
    *lines, _ = _read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse_object(line, f"{path} line {number}")
        for key in keys:
            if key not in row or not isinstance(row[key], LINE_TYPES[key]):
                raise UserError(f"{path} line {number}: {key} is missing or has the wrong type")
        rows.append(row)
    return rows
