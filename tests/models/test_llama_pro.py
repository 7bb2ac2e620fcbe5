"""Llama-Pro: trained and quantized layers, and the files of a run.

The training itself: test_parity.py, test_reference_training.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, safe_open

from files.model_folder import CheckpointFiles
from files.names import BLOCKS
from models.family import unwrapped_name
from models.llama_pro import NEW_LAYERS, check_can_leave_identity, new_layers
from models.registry import FAMILIES, read_config
from options.errors import UserError
from quantization.layer import Linear4bit
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.expansion import all_tensors, expand, read_config_json
from tests.helpers.finished_runs import save_and_get_logits
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.products import slow
from tests.helpers.runs import outputs, set_up, trained_tensors, transformers_model
from training.saved_result import save


@pytest.mark.parametrize("train_type", ["llama_pro", "bnb_llama_pro"])
def test_exactly_the_new_layers_are_trained(train_type, checkpoints, alpaca_file, one_rank):
    """Before the first step the model is the base, dense or quantized."""
    args = args_for(checkpoints("llama_bias_pro"), alpaca_file, train_type)
    stored = all_tensors(checkpoints("llama_bias_pro"))
    trained, quantized = one_rank(trained_and_quantized, args)[0]
    expected = {n: t for n, t in stored.items() if n.startswith(("model.layers.1.", "model.layers.4."))}
    assert trained.keys() == expected.keys() and len(expected) == 2 * 16
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.items())
    linears = {f"model.layers.{i}.{linear}" for i in (0, 2, 3) for linear in FAMILIES["llama"].linears}
    assert quantized == (linears if train_type == "bnb_llama_pro" else set())


@pytest.mark.parametrize("kind", slow(tiny.OTHERS))
def test_an_expanded_model_is_transformers_own(kind, checkpoints, alpaca_file, one_rank):
    """In each family, with random new blocks, on the dequantized weights of the others."""
    folder = checkpoints(f"{kind}_pro")
    ours, state, _ = one_rank(outputs, args_for(folder, alpaca_file, "bnb_llama_pro"), IDS)[0]
    with torch.no_grad():
        theirs = transformers_model(folder, state)(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - transformers_logits(folder)).abs().max() > 0.1, "nothing was quantized"


def trained_and_quantized(rank_info, args):
    """Return ({name: trained tensor}, names of the quantized linears)."""
    model = set_up(rank_info, args)[1]
    quantized = {unwrapped_name(n) for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return trained_tensors(model), quantized


@pytest.mark.parametrize("option", ["--model_name", "--llama_pro_path"])
def test_the_full_trained_model_is_saved(option, checkpoints, alpaca_file, two_ranks, tmp_path):
    """In the layout of the base's folder; transformers computes the logits of training."""
    base = checkpoints("llama_bias_pro")
    args = args_for(base, alpaca_file, "llama_pro")
    args[0] = option
    ours = two_ranks(save_and_get_logits, args, tmp_path)[0]
    torch.testing.assert_close(transformers_logits(tmp_path), ours, rtol=1e-5, atol=1e-5)
    assert (transformers_logits(base) - ours).abs().max() > 1e-3
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in base.iterdir()}
    assert read_config_json(tmp_path) == read_config_json(base)


def test_quantized_old_blocks_are_saved_unchanged(alpaca_file, two_ranks, tmp_path):
    """New blocks are saved as trained. Saved alone and expanded again, they make the same folder."""
    base = tiny.save_checkpoint("qwen2_pro", tmp_path / "base", torch.bfloat16)
    args = args_for(base, alpaca_file, "bnb_llama_pro")
    for name, more in (("whole", []), ("alone", ["--llama_pro_save", "blocks"])):
        (tmp_path / name).mkdir()
        trained = two_ranks(save_and_return_trained, [*args, *more], tmp_path / name)[0]
    stored, saved = all_tensors(base), all_tensors(tmp_path / "whole")
    assert stored.keys() == saved.keys() and len(trained) == 2 * 12
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, trained[name].bfloat16() if name in trained else stored[name]), name
    assert sum(not torch.equal(stored[name], saved[name]) for name in trained) == len(trained)

    assert [p.name for p in (tmp_path / "alone").iterdir()] == [BLOCKS]
    blocks = tmp_path / "alone" / BLOCKS
    assert load_file(blocks).keys() == trained.keys()
    with safe_open(blocks, framework="pt") as file:
        metadata = file.metadata()
    digests = [metadata.pop(name) for name in ("base_digest", "base_contents", "base_tokenizer")]
    assert [len(digest) for digest in digests] == [64] * 3
    assert metadata == {"format": "pt", "base_model_name_or_path": str(base), NEW_LAYERS: "[1, 4]"}
    folder = expand(base, tmp_path / "together", "--blocks", blocks)
    names = {p.name for p in folder.iterdir()}
    assert names == {p.name for p in (tmp_path / "whole").iterdir()}
    for name in names - {p.name for p in folder.glob("*.safetensors")}:  # their headers name the run's base
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    together = all_tensors(folder)
    assert together.keys() == saved.keys() and all(torch.equal(together[n], saved[n]) for n in saved)


def test_identity_that_updates_cannot_leave(checkpoints, tmp_path, monkeypatch):
    """-1 in bf16 is refused; new layers that were trained, or have zeros before their norms, are accepted.

    An older version wrote the zeros.
    """
    base, bf16 = checkpoints("gemma2"), torch.bfloat16
    folder = expand(base, tmp_path / "new", "--new_blocks", 2)
    config, family = read_config(folder)

    def check(folder, trained, lr):
        check_can_leave_identity(CheckpointFiles(folder), family, new_layers(config), trained, lr)

    for lr in (1e-5, 2e-4, 1.9e-3):
        with pytest.raises(UserError, match=r"layernorm\.weight is -1, .* bfloat16 .*--precision auto"):
            check(folder, bf16, lr)
        check(folder, torch.float32, lr)
    check(folder, bf16, 2e-3)
    check(folder, bf16, 0.0)  # no update is wanted
    check(checkpoints("gemma2_pro"), bf16, 2e-4)
    monkeypatch.setitem(FAMILIES, "gemma2", dataclasses.replace(family, identity_init=()))
    check(expand(base, tmp_path / "old", "--new_blocks", 2), bf16, 2e-4)
    check_can_leave_identity(CheckpointFiles(folder), FAMILIES["llama"], new_layers(config), bf16, 1e-8)


def save_and_return_trained(rank_info, args, folder):
    """Change all trained parameters, save the model, and return them."""
    job, model = set_up(rank_info, args)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.125)  # so that no zero stays zero
    save(job, model, folder)
    return trained_tensors(model)
