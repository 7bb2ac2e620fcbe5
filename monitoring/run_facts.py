"""run.json: what no other file of a RUN holds, about its data, model, machine and versions.

`describe_run` makes it when training starts; `check_facts` checks it when the report reads it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.batches import StepSampler
from data.packing import PackSampler
from data.rows import TokenizedRows
from options.errors import UserError

FACTS = "run.json"


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


def check_facts(facts: dict, where: str) -> None:
    """Raises UserError unless what there is of run.json is as `describe_run` writes it."""

    def number(value) -> bool:
        return type(value) in (int, float) and 0 <= value < math.inf

    for part, kinds in DESCRIBED.items():
        found: Any = facts.get(part)
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
                    and value != []
                    and all(type(n) is int and n >= 0 for n in value),
                }[kind]
            )
        if not good:
            raise UserError(f"{where}: {part} is not as a run writes it")
    versions = facts.get("versions") or {}
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise UserError(f"{where}: versions is not as a run writes it")
