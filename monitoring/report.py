"""The page about a run: <output_dir>/report.html.

train.py makes it at the end, report.py again. All that it shows is in the RUN: config.yaml, metrics.jsonl, samples.jsonl where
there is one, and run.json, written when training starts: what no other file holds, about the data, the model,
the machine and the versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data.packing import PackSampler
from data.tokenizing import StepSampler, TokenizedRows
from files.output_folder import SCORE, write_text
from launch.program import report
from monitoring.report_page import page
from options.command_line import parse
from options.config import Config
from options.errors import UserError

FACTS, PAGE = "run.json", "report.html"
MOST_BARS = 40
# What the page shows of run.json, beside versions.
DESCRIBED = {
    "data": dict.fromkeys(("rows_dropped", "rows_cut", "tokens_learned"), "count")
    | dict.fromkeys(("rows_kept", "tokens", "steps_per_epoch", "length_width"), "positive")
    | dict.fromkeys(("length_median", "length_p95", "length_longest"), "positive")
    | {"padding_share": "share", "lengths": "counts"},
    "model": {"parameters_trained": "count"},
    "hardware": {"ranks": "positive", "memory_gib": "positive", "device": "text", "kind": "text"},
}


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


def describe_run(
    rows: TokenizedRows, sampler: StepSampler, model: nn.Module, stages: dict[str, float]
) -> str:
    """run.json, when training starts. stages: GiB of the fullest rank after wrapping and after loading."""
    gpus = torch.cuda.is_available()
    facts = {
        "data": _data(rows, sampler),
        "model": {
            "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "memory": {name: round(gib, 3) for name, gib in stages.items()},
        "hardware": {
            "ranks": sampler.world,
            "device": torch.cuda.get_device_name() if gpus else _processor(),
            "kind": "GPU" if gpus else "CPU",
            "memory_gib": round(torch.cuda.get_device_properties().total_memory / 2**30, 1)
            if gpus
            else round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "processors": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("torch", "transformers", "bitsandbytes", "hqq", "safetensors")}
        | ({"CUDA": torch.version.cuda} if gpus else {}),
    }
    return json.dumps(facts, indent=2) + "\n"


def _data(rows: TokenizedRows, sampler: StepSampler) -> dict:
    lengths = rows.lengths()
    longest = int(lengths.max())
    width = next(
        m * p for p in (1, 10, 100, 1000, 10**4, 10**5) for m in (1, 2, 5) if m * p * MOST_BARS >= longest
    )
    ordered = lengths.sort().values
    return {
        "rows_kept": len(rows),
        "rows_dropped": rows.dropped,
        "rows_cut": rows.cut,
        "tokens": rows.tokens.numel(),
        "tokens_learned": int(rows.targets().sum()),
        "padding_share": round(sampler.padding_share(), 4),
        "steps_per_epoch": sampler.steps_per_epoch(),
        "packs": sampler.count() if isinstance(sampler, PackSampler) else None,
        "length_median": int(ordered[len(ordered) // 2]),
        "length_p95": int(ordered[math.ceil(0.95 * len(ordered)) - 1]),
        "length_longest": longest,
        # lengths[i]: rows of (i * width, (i + 1) * width] tokens
        "length_width": width,
        "lengths": torch.bincount((lengths - 1) // width).tolist(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((n for n in names if n and n != "unknown"), platform.machine())


def read_run(folder: Path) -> RunFiles:
    """Raises UserError if the folder is no RUN of train.py, has no step yet, or has a file that is damaged."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is no run of train.py (no config.yaml)")
    config, _ = parse(["--config", str(folder / "config.yaml")])
    steps = sorted(_lines(folder / "metrics.jsonl", ("step", "loss")), key=lambda s: s["step"])
    if not steps and (folder / SCORE).is_file():
        raise UserError(
            f"{folder}: is the best step of a run; the page is of the whole one: {folder.absolute().parent}"
        )
    if not steps:
        raise UserError(f"{folder}: its metrics.jsonl has no step yet")
    facts = {}
    if (folder / FACTS).is_file():
        facts = _json(_text(folder / FACTS), f"{folder / FACTS}")
        _check_facts(facts, f"{folder / FACTS}")
    samples = _lines(folder / "samples.jsonl", ("step", "prompt", "text"))
    return RunFiles(folder, config, steps, samples, facts, {p.name for p in folder.iterdir()})


def _check_facts(facts: dict, where: str) -> None:
    """Raises UserError unless what there is of run.json is as `describe_run` writes it."""

    def number(value) -> bool:
        return type(value) in (int, float) and 0 <= value < math.inf

    for part, kinds in DESCRIBED.items():
        found = facts.get(part)
        good = not found or (isinstance(found, dict) and kinds.keys() <= found.keys())
        for name, kind in kinds.items() if good and found else ():
            value = found[name]
            good = (
                good
                and {
                    "count": type(value) is int and value >= 0,
                    "positive": number(value) and value > 0,
                    "share": number(value),
                    "text": isinstance(value, str),
                    "counts": isinstance(value, list)
                    and value
                    and all(type(n) is int and n >= 0 for n in value),
                }[kind]
            )
        if not good:
            raise UserError(f"{where}: {part} is not as a run writes it")
    versions = facts.get("versions") or {}
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise UserError(f"{where}: versions is not as a run writes it")


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


def write_report(folder: Path) -> Path:
    """Makes folder/report.html. Raises UserError as `read_run` does."""
    run = read_run(folder)
    # A name may hold bytes that are no text; in the page they are question marks.
    text = page(run).encode("utf-8", "replace").decode("utf-8")
    write_text(folder / PAGE, text)
    return folder / PAGE


def run(folder: Path) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    try:
        print(write_report(folder))
    except UserError as e:
        return report(e, verbose=False)
    except OSError as e:
        return report(UserError(f"{folder / PAGE}: cannot be written ({e.strerror})"), verbose=False)
    return 0
