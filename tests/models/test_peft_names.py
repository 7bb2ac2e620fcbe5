"""The names in adapter_config.json: PEFT puts adapters on the linears of the run, and on no other."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from files.model_folder import CheckpointFiles
from launch.precision import Precision
from models.adapters import apply_method
from models.lora import LowRankModule
from models.peft_names import peft_exclusions, peft_target_modules, peft_target_parameters
from models.registry import build_on_meta, read_config
from options.train import parse
from tests.helpers.auto_classes import auto_class
from tests.helpers.image_models import MODELS


@pytest.mark.parametrize("targets", ["all", "default", "layers.1.self_attn.q_proj,mlp.down_proj"])
@pytest.mark.parametrize(
    ("name", "vision"),
    [(name, vision) for name in MODELS for vision in ("none", "projector", "all", None)],
)
def test_peft_adapts_the_same_linears(name, vision, targets, checkpoints):
    """vision: --vision_targets; None = the run is on text, without the vision parts."""
    folder = checkpoints(MODELS[name].kind)
    argv = ["--model_name", str(folder), "--train_type", "lora", "--lora_target_modules", targets]
    config, _ = parse([*argv, *(["--vision_targets", vision] if vision else [])])
    model_config, family = read_config(folder, images=vision is not None)
    model = build_on_meta(model_config, family)
    apply_method(model, family, config, Precision(torch.float32, torch.float32), CheckpointFiles(folder))
    ours = {name for name, module in model.named_modules() if isinstance(module, LowRankModule)}

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=peft_target_modules(model, family, config),
        exclude_modules=peft_exclusions(model, family, config),
        target_parameters=peft_target_parameters(family, config),
    )
    with torch.device("meta"):
        theirs = peft.get_peft_model(auto_class(model_config).from_config(model_config), settings)
    found = {n for n, module in theirs.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert found == ours
    assert any(name.startswith(family.unused) for name in ours) == (vision in ("projector", "all"))
