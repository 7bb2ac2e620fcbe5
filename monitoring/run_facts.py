"""run.json: facts about a RUN's data, model, machine and versions that no other file of it holds.

train.py writes `run_facts_json` when training starts, and at the end the step of the weights that it saved.
The report checks it with `check_facts`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.batches import StepSampler
from data.packing import PackSampler
from data.row_text import RecordedRow
from data.rows import TokenizedRows, digest_rows
from files.atomic_writes import write_text
from launch.memory import GIB
from monitoring.program_version import find_program_version
from options.errors import UserError

FACTS = "run.json"
SAVED_STEP = "saved_step"  # key of the step whose weights are in the RUN; null until the run's end
# Keys of digests: of the training rows, and of the evaluation set.
TRAINING, EVALUATION = "training_digest", "evaluation_digest"
MAX_BARS = 40  # of the histogram of row lengths
PACKAGES = ("torch", "transformers", "bitsandbytes", "hqq", "safetensors")

# The values of run.json that the report shows, besides versions, and the kind of each.
FACT_KINDS = {
    "data": dict.fromkeys(("rows_dropped", "rows_cut", "tokens_learned"), "count")
    | dict.fromkeys(("rows_kept", "tokens", "steps_per_epoch", "length_width"), "positive")
    | dict.fromkeys(("length_median", "length_p95", "length_longest"), "positive")
    | {"padding_share": "share", "lengths": "counts"},
    "model": {"parameters_trained": "count"},
    "memory": {},
    "hardware": {"ranks": "positive", "memory_gib": "positive", "device": "text", "kind": "text"},
}
# Lists of objects with these fields.
LIST_KINDS = {
    "reasons": {"reason": "text", "rows": "positive", "first": "counts"},
    "rows": {"number": "count", "tokens": "positive", "learned": "count", "omitted": "count"}
    | {"head": "parts", "tail": "parts"},
    "parts": {"text": "text", "is_learned": "flag", "is_special": "flag"},
}
# Those that runs of earlier versions lack; nothing is predicted on a CPU.
NEWER_FACT_KINDS = {
    "data": {"drop_reasons": "reasons", "cut_reasons": "reasons", TRAINING: "text", EVALUATION: "text"},
    "memory": {"predicted_peak_gib": "positive"},
}
NEWER_FIELDS = {"set": "text"}  # of rows


def run_facts_json(
    rows: TokenizedRows,
    sampler: StepSampler,
    model: nn.Module,
    gib: dict[str, float],
    evaluation: TokenizedRows | None = None,
    first_rows: Sequence[RecordedRow] = (),
    adapter: str | None = None,
) -> str:
    """Return run.json as text: data, first rows, model, memory, hardware, versions.

    Args:
        rows: the training rows.
        sampler: of these rows.
        model: the model to train.
        gib: memory of the fullest rank after wrapping and after loading, and what is predicted.
        evaluation: the evaluation set; None = there is none.
        first_rows: the first training rows, as texts.
        adapter: name of the adapter that the run continues; None = there is none.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        memory_bytes = torch.cuda.get_device_properties().total_memory
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "data": _data_facts(rows, sampler) | ({EVALUATION: digest_rows(evaluation)} if evaluation else {}),
        "first_rows": [dataclasses.asdict(row) for row in first_rows],
        "model": {"parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        | ({"adapter": adapter} if adapter else {}),
        "memory": {name: round(value, 3) for name, value in gib.items()},
        "hardware": {
            "ranks": sampler.world,
            "device": torch.cuda.get_device_name() if has_gpu else _processor_name(),
            "kind": "GPU" if has_gpu else "CPU",
            "memory_gib": round(memory_bytes / GIB, 1),
            "processors": os.cpu_count(),
        },
        "versions": find_program_version()
        | {"python": platform.python_version()}
        | {name: _installed_version(name) for name in PACKAGES}
        | ({"CUDA": torch.version.cuda} if has_gpu else {}),
    }
    return json.dumps(facts, indent=2) + "\n"


def record_saved_step(folder: Path, step: int | None) -> None:
    """Write into a RUN's run.json which step's weights the RUN holds. Raises OSError.

    step: None = not known: a run that continues leaves the result of its former end, until its own.
    """
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    write_text(folder / FACTS, json.dumps(facts | {SAVED_STEP: step}, indent=2) + "\n")


def _data_facts(rows: TokenizedRows, sampler: StepSampler) -> dict:
    """Return the section "data" of run.json: counts of rows and tokens, and the histogram of row lengths."""
    lengths = rows.lengths()
    longest = int(lengths.max())
    bar_widths = (m * p for p in (1, 10, 100, 1000, 10**4, 10**5) for m in (1, 2, 5))
    width = next(w for w in bar_widths if w * MAX_BARS >= longest)
    ordered = lengths.sort().values
    return {
        "rows_kept": len(rows),
        "rows_dropped": rows.dropped,
        "rows_cut": rows.cut,
        "drop_reasons": [each.fields() for each in rows.drop_reasons],
        "cut_reasons": [each.fields() for each in rows.cut_reasons],
        TRAINING: digest_rows(rows),
        "rows_per_epoch": sampler.rows_per_epoch(),
        "sets": [dataclasses.asdict(each) for each in rows.sets],
        "tokens": rows.tokens.numel(),
        "tokens_learned": int(rows.targets().sum()),
        "padding_share": round(sampler.padding_share(), 4),
        "steps_per_epoch": sampler.steps_per_epoch(),
        "packs": sampler.items_per_epoch() if isinstance(sampler, PackSampler) else None,
        "length_median": int(ordered[len(ordered) // 2]),
        "length_p95": int(ordered[math.ceil(0.95 * len(ordered)) - 1]),
        "length_longest": longest,
        # lengths[i]: rows of (i * width, (i + 1) * width] tokens
        "length_width": width,
        "lengths": torch.bincount((lengths - 1) // width).tolist(),
    }


def _installed_version(package: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor_name() -> str:
    """Return the processor's name if /proc/cpuinfo has it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((n for n in names if n and n != "unknown"), platform.machine())


def check_facts(facts: dict, origin: str) -> None:
    """Raise UserError if a section of run.json exists but lacks a value, or has one of a wrong kind.

    RUNs of earlier versions lack sections. origin: the file, for the message.
    """
    for section, kinds in FACT_KINDS.items():
        found: Any = facts.get(section)
        if found and not (
            isinstance(found, dict)
            and kinds.keys() <= found.keys()
            and all(_is_kind(found[name], kind) for name, kind in kinds.items())
            and all(
                _is_kind(found[name], kind)
                for name, kind in NEWER_FACT_KINDS.get(section, {}).items()
                if name in found
            )
        ):
            raise UserError(f"{origin}: {section} is damaged: no run writes it so")
    if not _is_kind(facts.get("first_rows", []), "rows"):
        raise UserError(f"{origin}: first_rows is damaged: no run writes it so")
    versions = facts.get("versions") or {}
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise UserError(f"{origin}: versions is damaged: no run writes it so")


def _is_kind(value: Any, kind: str) -> bool:
    """Return whether a value is a text, flag, count, counts, positive, share, or one of LIST_KINDS."""
    if kind == "text":
        return isinstance(value, str)
    if kind == "counts":
        return isinstance(value, list) and value != [] and all(_is_kind(n, "count") for n in value)
    if kind in LIST_KINDS:
        return isinstance(value, list) and all(_has_fields(each, LIST_KINDS[kind]) for each in value)
    if kind == "flag":
        return isinstance(value, bool)
    if type(value) not in ((int,) if kind == "count" else (int, float)):
        return False
    return 0 < value < math.inf if kind == "positive" else 0 <= value < math.inf


def _has_fields(value: Any, kinds: dict[str, str]) -> bool:
    """Return whether a value is an object with fields of these kinds, and NEWER_FIELDS if it has them."""
    return (
        isinstance(value, dict)
        and all(_is_kind(value.get(name), kind) for name, kind in kinds.items())
        and all(_is_kind(value[name], kind) for name, kind in NEWER_FIELDS.items() if name in value)
    )
