"""A space as a sweep of Weights & Biases: the file that `wandb sweep FILE` reads.

Its agents run the commands that sweep.py runs, without what keeps the trials of sweep.py in one folder. The
keys are documented at https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from options.errors import UserError
from options.sweep import Request
from options.sweep_space import Range, Values

METHODS = {"grid": "grid", "random": "random", "tpe": "bayes"}


def write_wandb_sweep(request: Request, path: Path) -> None:
    """Write the space of a sweep for wandb. Raises UserError if the file cannot be written."""
    try:
        path.write_text(yaml.safe_dump(make_wandb_sweep(request), sort_keys=False), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--wandb_sweep {path}: cannot be written ({e.strerror})") from None


def make_wandb_sweep(request: Request) -> dict[str, Any]:
    """Return the contents of the file."""
    log = [] if request.config.log_to == "wandb" else ["--log_to=wandb"]
    sweep = {
        "program": "train.py",
        "project": request.config.project_name,
        "method": METHODS[request.sweep.sampler],
        "metric": {"name": "eval_loss", "goal": "minimize"},
        "parameters": {
            each.name: _describe_parameter(each, request.sweep.sampler) for each in request.space.dimensions
        },
        "command": ["${env}", "${interpreter}", "${program}", *request.base, *log, "${args}"],
    }
    return sweep if request.trials == request.space.size else {"run_cap": request.trials} | sweep


def _describe_parameter(dimension: Values | Range, sampler: str) -> dict[str, Any]:
    """Return an option's values or range as wandb writes them."""
    if isinstance(dimension, Values) or sampler == "grid":
        return {"values": [_typed(text) for text in dimension.grid]}
    ends: dict[str, Any] = {"min": dimension.low, "max": dimension.high}
    step = dimension.step or 1 if dimension.is_whole else dimension.step
    if dimension.is_log:
        kind = {"distribution": "q_log_uniform_values", "q": 1} if dimension.is_whole else None
        return (kind or {"distribution": "log_uniform_values"}) | ends
    if step is None:
        return {"distribution": "uniform"} | ends
    if dimension.is_whole and step == 1:
        return {"distribution": "int_uniform"} | ends
    return {"values": [_typed(text) for text in dimension.grid]}  # q_uniform rounds to multiples of q


def _typed(text: str) -> str | int | float:
    """Return a number that wandb writes back as this text, or else the text itself."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if str(value) == text and value == value and abs(value) != float("inf"):
            return value
    return text
