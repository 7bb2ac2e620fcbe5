"""Checkpoints in every spelling of their tensors' names: what fills which parameter; what fills none."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM

from finished.layerwise import LogitInputs, plain_logits
from models.checkpoint_names import ParameterNames
from models.registry import open_weights, read_config
from options.errors import UserError
from tests.helpers.expansion import all_tensors
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.spellings import SPELLINGS, respell


def logits_of(folder) -> torch.Tensor:
    """Return the logits of a checkpoint as this program reads it."""
    config, family = read_config(folder)
    files, _, _ = open_weights(folder, config, family)
    return plain_logits(
        config, family, files, LogitInputs(IDS, None, torch.arange(IDS.shape[1])), torch.device("cpu")
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["gemma3_wrapper", pytest.param("mistral3", marks=pytest.mark.slow)])
def test_wrappers_in_every_spelling(kind, spelling, checkpoints, tmp_path):
    """The logits are transformers' on the same files, which it loads without a missing tensor."""
    folder = respell(checkpoints(kind), tmp_path / "model", SPELLINGS[spelling])
    assert all_tensors(folder).keys() != all_tensors(checkpoints(kind)).keys() or spelling == "hub"
    expected = transformers_logits(checkpoints(kind))
    torch.testing.assert_close(transformers_logits(folder), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits_of(folder), expected, rtol=1e-5, atol=1e-5)


# A tied head; experts; renamed ones; stacked ones.
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "mixtral", "gpt_oss"])
def test_names_without_the_base_models_prefix(kind, checkpoints, tmp_path):
    folder = respell(checkpoints(kind), tmp_path / "model", lambda name: name.removeprefix("model."))
    torch.testing.assert_close(logits_of(folder), transformers_logits(folder), rtol=1e-5, atol=1e-5)


def test_the_tower_is_kept_apart(checkpoints):
    """It fills no parameter, keeps its names, and is everything that is not the text model's."""
    folder = checkpoints("gemma3_wrapper")
    files, model, _ = open_weights(folder, *read_config(folder))
    assert files.tensors.keys() == dict(model.named_parameters()).keys()
    assert all(name.startswith("model.language_model.") for name in files.tensors)
    apart = {n for n in all_tensors(folder) if n.startswith(("vision_tower.", "multi_modal_projector."))}
    assert files.apart.tensors.keys() == apart and len(apart) > 20
    assert {files.stored_name(n) for n in files.tensors} | apart == all_tensors(folder).keys()


def test_mixtrals_experts():
    """Its files have w1, w2 and w3; transformers stacks them, and models/moe.py has each for itself."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    names, files, ours = ParameterNames(model), "model.layers.0.block_sparse_moe.", "model.layers.0.mlp."
    expected = {
        f"{files}experts.3.w1.weight": f"{ours}experts.3.gate_proj.weight",
        f"{files}experts.3.w3.weight": f"{ours}experts.3.up_proj.weight",
        f"{files}experts.12.w2.weight": f"{ours}experts.12.down_proj.weight",
        f"{files}experts.3.w1.weight.absmax": f"{ours}experts.3.gate_proj.weight.absmax",
        f"{files}gate.weight": f"{ours}gate.weight",
        "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
        "model.nothing.weight": "model.nothing.weight",
    }
    assert {name: names.parameter_name(name) for name in expected} == expected


def test_names_of_any_length(checkpoints):
    """Rules with a wildcard would take hours for this one."""
    _, model, _ = open_weights(checkpoints("qwen3_moe"), *read_config(checkpoints("qwen3_moe")))
    name = "model.layers.0." + "mlp.experts.3." * 200_000
    assert ParameterNames(model).parameter_name(name) == name


def test_two_tensors_for_one_parameter(checkpoints, tmp_path):
    """Two spellings in one folder, as when a model was saved over another one."""
    old, new = "language_model.model.norm.weight", "model.language_model.norm.weight"
    tensors = all_tensors(checkpoints("mistral3"))
    save_file(tensors | {new: tensors[old].clone()}, tmp_path / "model.safetensors")
    shutil.copy(checkpoints("mistral3") / "config.json", tmp_path)
    words = f"model.safetensors: {new} and {old} are both the model's {new}; leave one"
    with pytest.raises(UserError, match=words):
        open_weights(tmp_path, *read_config(tmp_path))
