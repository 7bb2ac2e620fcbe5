"""The parameters that a run is planned to hold, by a planned model and by opened weights."""

from __future__ import annotations

from pathlib import Path

import torch

from launch.precision import Precision
from models.registry import open_weights, read_config
from monitoring.weight_memory import PlannedParameter, plan_parameters
from options.train import parse
from training.planned_model import PlannedModel

PRECISION = Precision(torch.bfloat16, torch.float32)


def plan(model, family, files, options: str) -> list[PlannedParameter]:
    """Return what a run with `options`, of which the first is the train type, holds, ordered by names."""
    config, _ = parse(["--model_name", "any", "--train_type", *options.split()])
    planned = plan_parameters(model, family, config, PRECISION, files)
    return sorted(planned, key=lambda p: (p.name, p.kind, p.shape))


def parameters_of_plan(planned: PlannedModel, options: str) -> list[PlannedParameter]:
    return plan(planned.model, planned.family, planned.files, options)


def parameters_of_run(folder: Path, options: str, images: bool = False) -> list[PlannedParameter]:
    """Return them by the weights that a run opens, whose headers and values are checked."""
    config, family = read_config(folder, images)
    files, model, _ = open_weights(folder, config, family)
    return plan(model, family, files, options)
