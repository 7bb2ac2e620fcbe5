"""Redundant tensors are skipped only if they are copies: a tied head, rotary frequencies of old files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import finished.export
import train
from checkpoints.block_expansion import expanded_config
from files.model_folder import digest_structure
from files.names import INDEX
from finished.finished_run import load_model, open_run
from models.redundant import UNTIED
from models.registry import open_weights, read_config
from options.errors import UserError
from options.train import parse
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.bnb_checkpoints import pack_like_the_hub
from tests.helpers.expansion import all_tensors, edit_config, expand, read_config_json
from tests.helpers.finished_runs import write_random_run
from tests.helpers.logits import IDS, loss_and_logits, summed_cross_entropy, transformers_logits
from tests.helpers.parity import arguments, assert_same
from tests.helpers.products import slow
from tests.helpers.runs import train_run, transformers_model
from tests.helpers.stored import find_tensor_file, put_tensor, read_stored_tensor

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FREQUENCIES = "model.layers.1.self_attn.rotary_emb.inv_freq"
# Families: tied in config.json; tied by default, which config.json may omit; with no tied published model.
TIED = ("qwen2", "gemma2", "phi3")


def tied_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tied model without a head in its files."""
    tiny.save_checkpoint(kind, folder, dtype, tie_word_embeddings=True)
    if kind == "gemma2":
        edit_config(folder, tie_word_embeddings=None)
    assert HEAD not in all_tensors(folder)
    return folder


def different_head(folder: Path) -> torch.Tensor:
    """Return a head that differs from the folder's embedding."""
    embedding = read_stored_tensor(folder, EMBEDDING)
    generator = torch.Generator().manual_seed(5)
    return embedding + 0.1 * torch.randn(embedding.shape, generator=generator).to(embedding.dtype)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """untied(kind) -> folder of a model whose config.json ties its head, which differs. Made once."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tied_model(kind, tmp_path_factory.mktemp("untied") / kind)
            put_tensor(made[kind], HEAD, different_head(made[kind]))
        return made[kind]

    return get


def logit_difference(output: str) -> float:
    """Return the difference that export.py printed."""
    return float(re.search(r"largest logit difference from the trained model: (\S+),", output)[1])


def assert_close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TIED)
def test_a_head_that_differs_is_used_as_transformers_does(kind, untied, alpaca_file, one_rank, tmp_path):
    loss, ours = one_rank(loss_and_logits, args_for(untied(kind), alpaca_file, "full"))[0]
    theirs = transformers_logits(untied(kind))
    assert_close(ours, theirs)
    assert loss == pytest.approx(summed_cross_entropy(theirs), rel=1e-5)
    tied = transformers_logits(tied_model(kind, tmp_path / "tied"))
    assert abs(summed_cross_entropy(tied) / loss - 1) > 0.001, (
        "the head does not matter: nothing was compared"
    )


def test_a_differing_head_of_a_packed_model_is_used(untied, alpaca_file, one_rank, tmp_path):
    state = pack_like_the_hub(untied("qwen2"), tmp_path / "packed")
    _, ours = one_rank(loss_and_logits, args_for(tmp_path / "packed", alpaca_file, "qlora"), False)[0]
    with torch.no_grad():
        assert_close(ours, transformers_model(untied("qwen2"), state)(input_ids=IDS).logits)


@pytest.mark.parametrize("train_type", [*slow(["full"]), "bnb_dora"])
def test_an_untied_model_trains_the_same_on_two_ranks(train_type, untied, short_rows, one_rank, two_ranks):
    args = arguments(untied("qwen2"), short_rows, train_type)
    plain = one_rank(train_run, [*args, "--batch_size", "4"])[0]
    assert (HEAD in plain[1]) == (train_type == "full")
    assert_same(plain, two_ranks(train_run, [*args, "--batch_size", "2"])[0])


def test_training_and_expansion_report_an_untied_head(untied, short_rows, tmp_path, capsys):
    remark = f"{untied('qwen2')}: {UNTIED}"
    job = train.check_run(parse(["--model_name", str(untied("qwen2")), "--dataset", str(short_rows)])[0])
    assert remark in job.remarks
    expand(untied("qwen2"), tmp_path / "pro", "--after", "1")
    assert f"{remark}\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", TIED)
def test_a_saved_model_is_untied(kind, untied, alpaca_file, one_rank, tmp_path):
    trained = write_random_run(one_rank, tmp_path / "run", args_for(untied(kind), alpaca_file, "full"))
    assert read_config_json(tmp_path / "run")["tie_word_embeddings"] is False
    assert_close(transformers_logits(tmp_path / "run"), trained)
    model = load_model(open_run(tmp_path / "run"), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert_close(model(input_ids=IDS, use_cache=False).logits, trained)


@pytest.mark.parametrize("kind", [TIED[0], *slow(TIED[1:])])
def test_a_merged_model_is_untied(kind, untied, alpaca_file, one_rank, tmp_path, monkeypatch, capsys):
    trained = write_random_run(one_rank, tmp_path / "run", args_for(untied(kind), alpaca_file, "bnb_dora"))
    arguments = [str(tmp_path / "run"), "--to", "merged", "--out"]
    assert export.main([*arguments, str(tmp_path / "out")]) == 0
    assert logit_difference(capsys.readouterr().out) < 1e-4
    assert read_config_json(tmp_path / "out")["tie_word_embeddings"] is False
    assert_close(transformers_logits(tmp_path / "out"), trained)
    # export.py's check computes with the written config.json.
    monkeypatch.setattr(finished.export, "sync_tied_embeddings", lambda raw, config: raw)
    assert export.main([*arguments, str(tmp_path / "wrong")]) == 0
    assert logit_difference(capsys.readouterr().out) > 0.01


@pytest.mark.parametrize("kind", TIED)
def test_an_expanded_model_is_untied(kind, untied, tmp_path):
    expanded = expand(untied(kind), tmp_path / "pro", "--after", "1")
    assert read_config_json(expanded)["tie_word_embeddings"] is False
    assert_close(transformers_logits(expanded), transformers_logits(untied(kind)))


@pytest.mark.parametrize("kind", TIED)
def test_new_blocks_are_put_into_an_untied_model(kind, untied, alpaca_file, one_rank, tmp_path):
    """An older version of this program did not untie its config.json."""
    expanded = expand(untied(kind), tmp_path / "pro", "--after", "1")
    edit_config(expanded, tie_word_embeddings=True)
    more = ["--llama_pro_save", "blocks"]
    trained = write_random_run(
        one_rank, tmp_path / "run", args_for(expanded, alpaca_file, "llama_pro", *more)
    )
    whole = expand(expanded, tmp_path / "whole", "--blocks", tmp_path / "run" / "new_blocks.safetensors")
    assert_close(transformers_logits(whole), trained)
    assert read_config_json(whole)["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TIED)
def test_a_copy_of_the_embedding_is_skipped(kind, dtype, tmp_path):
    """Also in another dtype. The model's digest, which its adapters record, does not change."""
    folder = tied_model(kind, tmp_path / "model", torch.bfloat16)
    config, family = read_config(folder)
    before = digest_structure(config, open_weights(folder, config, family)[0])
    put_tensor(folder, HEAD, read_stored_tensor(folder, EMBEDDING).to(dtype))
    config, family = read_config(folder)
    files, model, untied = open_weights(folder, config, family)
    assert HEAD not in files.tensors and model.config.tie_word_embeddings and not untied
    assert digest_structure(config, files) == before
    assert expanded_config(read_config_json(folder), config, [0, 1, 2, 2]).get("tie_word_embeddings") in (
        None,
        True,
    )


def test_a_difference_below_16_bits_counts(tmp_path):
    folder = tied_model("qwen2", tmp_path / "model", torch.bfloat16)
    head = read_stored_tensor(folder, EMBEDDING).float()
    head[-1, -1] *= 1 + 2**-12
    put_tensor(folder, HEAD, head)
    config, family = read_config(folder)
    files, _, untied = open_weights(folder, config, family)
    assert HEAD in files.tensors and not config.tie_word_embeddings and untied


def test_a_head_of_another_size_is_refused(tmp_path):
    folder = tied_model("qwen2", tmp_path / "model")
    put_tensor(folder, HEAD, torch.zeros(310, 64))
    with pytest.raises(
        UserError, match=r"lm_head\.weight has shape \[310, 64\], but config\.json says \[300, 64\]"
    ):
        open_weights(folder, *read_config(folder))


def inv_freq(theta: float, features: int = 16) -> torch.Tensor:
    """Return the frequencies of RoFormer (https://arxiv.org/abs/2104.09864, section 3.2.2)."""
    return torch.tensor([theta ** (-2 * i / features) for i in range(features // 2)])


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PHI3 = inv_freq(1000.0, 12) / torch.tensor(tiny.LONG_ROPE["long_factor"])


@pytest.mark.parametrize(
    "kind, rope, table",
    [
        ("llama", None, inv_freq(10000.0)),
        ("llama", None, inv_freq(10000.0).half()),
        ("llama", None, inv_freq(10000.0).bfloat16().float()),  # converted to 16 bits and back
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, inv_freq(5e5)),
        ("llama", LINEAR, inv_freq(10000.0) / 4),
        ("llama", LINEAR, inv_freq(10000.0)),  # transformers 4 saved these
        ("phi3", None, PHI3),
    ],
)
def test_frequencies_of_the_config_are_skipped(kind, rope, table, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(kind), tmp_path / "model")
    if rope:
        edit_config(folder, rope_parameters=rope)
    put_tensor(folder, FREQUENCIES, table)
    files, _, _ = open_weights(folder, *read_config(folder))
    assert FREQUENCIES not in files.tensors and len(files.tensors) == len(all_tensors(folder)) - 1


@pytest.mark.parametrize(
    "kind, table",
    [
        ("llama", inv_freq(5e5)),
        ("llama", inv_freq(10000.0) / 4),
        ("llama", inv_freq(10000.0) * 1.001),
        ("llama", torch.ones(8)),
        ("llama", inv_freq(10000.0, 32)),  # of larger heads
        ("llama3", inv_freq(5e5)),  # without its scaling
        ("phi3", inv_freq(1000.0, 12) * 2),
    ],
)
def test_other_frequencies_are_refused(kind, table, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(kind), tmp_path / "model")
    path = put_tensor(folder, FREQUENCIES, table)
    with pytest.raises(UserError, match=re.escape(f"{path}: {FREQUENCIES} holds other rotary frequencies")):
        open_weights(folder, *read_config(folder))


def test_a_tied_model_whose_files_hold_the_head_only(alpaca_file, one_rank, tmp_path):
    """transformers loads the embedding from the head's tensor."""
    folder = tied_model("qwen2", tmp_path / "model")
    path = find_tensor_file(folder, EMBEDDING)
    tensors = load_file(path)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][HEAD] = index["weight_map"].pop(EMBEDDING)
    (folder / INDEX).write_text(json.dumps(index))
    loss, logits = one_rank(loss_and_logits, args_for(folder, alpaca_file, "full"), False)[0]
    theirs = transformers_logits(folder)
    assert_close(logits, theirs)
    assert loss == pytest.approx(summed_cross_entropy(theirs), rel=1e-5)
    write_random_run(one_rank, tmp_path / "run", args_for(folder, alpaca_file, "full"))
    assert EMBEDDING in all_tensors(tmp_path / "run") and HEAD not in all_tensors(tmp_path / "run")
