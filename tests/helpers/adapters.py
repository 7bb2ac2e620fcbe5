"""Models of a train type: command-line arguments, trained tensors, and the same model under PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

from files.model_folder import CheckpointFiles
from launch.precision import Precision
from models.adapters import apply_method
from models.registry import FAMILIES, build_on_meta, read_config
from options.methods import METHODS
from options.train import parse
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.layers import ALPHA, R
from tests.helpers.runs import set_up, trained_tensors, transformers_model

BARE_MATRIX = "mm_input_projection_weight"  # of Gemma 3's projector, which is no linear


def args_for(model, data, train_type: str, *more) -> list[str]:
    """Return arguments of a training run, with rank R and alpha ALPHA if the train type has adapters."""
    adapters = ["--lora_rank", str(R), "--lora_alpha", str(ALPHA)] if METHODS[train_type].adapter else []
    return ["--model_name", model, "--dataset", data, "--train_type", train_type, *adapters, *more]


def build_peft_model(folder, state: dict, ours: dict, use_dora: bool, alpha: float = ALPHA, **more):
    """Build transformers' model with the weights `state` under PEFT, with the adapters `ours`.

    more: other options of LoraConfig.
    """
    base = transformers_model(folder, state)
    names = sorted({name.rpartition(".")[0] for name in ours})
    bare = [name for name in names if name.endswith("multi_modal_projector")]
    targets = [name for name in names if name not in bare]
    options = {"r": R, "lora_alpha": alpha, "target_modules": targets, "use_dora": use_dora, **more}
    options["target_parameters"] = [f"{name}.{BARE_MATRIX}" for name in bare]
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in ours.items():
            layer, _, last = name.rpartition(".")
            if last == "magnitude_change":
                tensor = state[f"{layer}.weight"].norm(dim=1) + tensor
            params[peft_name(name)].copy_(tensor)
    return model


def peft_name(name: str) -> str:
    """Return the name of PEFT's parameter for one of our adapters' tensors."""
    layer, _, last = name.rpartition(".")
    theirs = {"magnitude_change": "lora_magnitude_vector"}.get(last, last)
    return f"base_model.model.{layer}.{theirs}.default.weight"


def set_up_adapters(rank_info, args) -> dict[str, torch.Tensor]:
    """Set up a run and return its trained tensors."""
    return trained_tensors(set_up(rank_info, args)[1])


def trained_names(rank_info, args) -> set[str]:
    """Set up a run and return the names of its trained tensors."""
    return set(trained_tensors(set_up(rank_info, args)[1]))


def build_meta_model(folder, train_type: str):
    """Build a Llama of a train type on the meta device."""
    config, _ = parse(["--train_type", train_type, "--model_name", str(folder)])
    model_config, family = read_config(folder)
    model = build_on_meta(model_config, family)
    apply_method(model, family, config, Precision(torch.float32, torch.float32), CheckpointFiles(folder))
    assert family is FAMILIES["llama"]
    return model


def save_peft_adapter(base, folder: Path, seed: int = 0, **options) -> Path:
    """Let PEFT save a random adapter over a checkpoint; return its folder.

    options: of LoraConfig; rank R and alpha ALPHA on q_proj and down_proj, unless they say otherwise.
    """
    torch.manual_seed(seed)
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"], **options}
    model = load_transformers_model(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder
