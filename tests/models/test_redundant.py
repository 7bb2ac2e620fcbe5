"""What config.json calls redundant is left out only if it is: a tied head, the rotary frequencies of old files."""

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
from tests.helpers.runs import train_run, transformers_model
from tests.helpers.stored import find_tensor_file, put_tensor, read_stored_tensor

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FREQUENCIES = "model.layers.1.self_attn.rotary_emb.inv_freq"
# Tied in config.json; by the family's default, which config.json need not repeat; where no model of the family is.
TIED = ("qwen2", "gemma2", "phi3")


def tied_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny.save_checkpoint(kind, folder, dtype, tie_word_embeddings=True)
    if kind == "gemma2":
        edit_config(folder, tie_word_embeddings=None)
    assert HEAD not in all_tensors(folder)
    return folder


def other_head(folder: Path) -> torch.Tensor:
    embedding = read_stored_tensor(folder, EMBEDDING)
    generator = torch.Generator().manual_seed(5)
    return embedding + 0.1 * torch.randn(embedding.shape, generator=generator).to(embedding.dtype)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """untied(kind) -> a model with a head of its own that its config.json ties. Made once."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tied_model(kind, tmp_path_factory.mktemp("untied") / kind)
            put_tensor(made[kind], HEAD, other_head(made[kind]))
        return made[kind]

    return get


def difference(shown: str) -> float:
    return float(re.search(r"largest logit difference from the trained model: (\S+),", shown)[1])


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TIED)
def test_a_head_that_differs_is_used_as_transformers_does(kind, untied, alpaca_file, one_rank, tmp_path):
    loss, ours = one_rank(loss_and_logits, args_for(untied(kind), alpaca_file, "full"))[0]
    theirs = transformers_logits(untied(kind))
    close(ours, theirs)
    assert loss == pytest.approx(summed_cross_entropy(theirs), rel=1e-5)
    tied = transformers_logits(tied_model(kind, tmp_path / "tied"))
    assert abs(summed_cross_entropy(tied) / loss - 1) > 0.001, (
        "the head does not matter: nothing was compared"
    )


def test_of_a_model_that_is_packed_too(untied, alpaca_file, one_rank, tmp_path):
    state = pack_like_the_hub(untied("qwen2"), tmp_path / "packed")
    _, ours = one_rank(loss_and_logits, args_for(tmp_path / "packed", alpaca_file, "qlora"), False)[0]
    with torch.no_grad():
        close(ours, transformers_model(untied("qwen2"), state)(input_ids=IDS).logits)


@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
def test_it_trains_the_same_on_two_ranks(train_type, untied, short_rows, one_rank, two_ranks):
    args = arguments(untied("qwen2"), short_rows, train_type)
    plain = one_rank(train_run, [*args, "--batch_size", "4"])[0]
    assert (HEAD in plain[1]) == (train_type == "full")
    assert_same(plain, two_ranks(train_run, [*args, "--batch_size", "2"])[0])


def test_training_and_expansion_tell_of_it(untied, short_rows, tmp_path, capsys):
    told = f"{untied('qwen2')}: {UNTIED}"
    job = train.check(parse(["--model_name", str(untied("qwen2")), "--dataset", str(short_rows)])[0])
    assert told in job.remarks
    expand(untied("qwen2"), tmp_path / "pro", "--after", "1")
    assert f"{told}\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", TIED)
def test_a_saved_model_is_untied(kind, untied, alpaca_file, one_rank, tmp_path):
    trained = write_random_run(one_rank, tmp_path / "run", args_for(untied(kind), alpaca_file, "full"))
    assert read_config_json(tmp_path / "run")["tie_word_embeddings"] is False
    close(transformers_logits(tmp_path / "run"), trained)
    model = load_model(open_run(tmp_path / "run"), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        close(model(input_ids=IDS, use_cache=False).logits, trained)


@pytest.mark.parametrize("kind", TIED)
def test_a_merged_model_is_untied(kind, untied, alpaca_file, one_rank, tmp_path, monkeypatch, capsys):
    trained = write_random_run(one_rank, tmp_path / "run", args_for(untied(kind), alpaca_file, "bnb_dora"))
    arguments = [str(tmp_path / "run"), "--to", "merged", "--out"]
    assert export.main([*arguments, str(tmp_path / "out")]) == 0
    assert difference(capsys.readouterr().out) < 1e-4
    assert read_config_json(tmp_path / "out")["tie_word_embeddings"] is False
    close(transformers_logits(tmp_path / "out"), trained)
    # The check computes with the config.json that was written.
    monkeypatch.setattr(finished.export, "as_loaded", lambda raw, config: raw)
    assert export.main([*arguments, str(tmp_path / "wrong")]) == 0
    assert difference(capsys.readouterr().out) > 0.01


@pytest.mark.parametrize("kind", TIED)
def test_an_expanded_model_is_untied(kind, untied, tmp_path):
    expanded = expand(untied(kind), tmp_path / "pro", "--after", "1")
    assert read_config_json(expanded)["tie_word_embeddings"] is False
    close(transformers_logits(expanded), transformers_logits(untied(kind)))


@pytest.mark.parametrize("kind", TIED)
def test_new_blocks_are_put_into_an_untied_model(kind, untied, alpaca_file, one_rank, tmp_path):
    """Whose config.json an older version of this program left tied."""
    expanded = expand(untied(kind), tmp_path / "pro", "--after", "1")
    edit_config(expanded, tie_word_embeddings=True)
    more = ["--llama_pro_save", "blocks"]
    trained = write_random_run(
        one_rank, tmp_path / "run", args_for(expanded, alpaca_file, "llama_pro", *more)
    )
    whole = expand(expanded, tmp_path / "whole", "--blocks", tmp_path / "run" / "new_blocks.safetensors")
    close(transformers_logits(whole), trained)
    assert read_config_json(whole)["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TIED)
def test_a_copy_of_the_embedding_is_left_out(kind, dtype, tmp_path):
    """In another dtype too; the model's digest, by which its adapters know it, does not change."""
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


def test_what_16_bits_cannot_hold_is_a_difference(tmp_path):
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
    """As RoFormer has it (https://arxiv.org/abs/2104.09864, section 3.2.2)."""
    return torch.tensor([theta ** (-2 * i / features) for i in range(features // 2)])


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PHI3 = inv_freq(1000.0, 12) / torch.tensor(tiny.LONG_ROPE["long_factor"])


@pytest.mark.parametrize(
    "kind, rope, table",
    [
        ("llama", None, inv_freq(10000.0)),
        ("llama", None, inv_freq(10000.0).half()),
        (
            "llama",
            None,
            inv_freq(10000.0).bfloat16().float(),
        ),  # of a model that was converted to 16 bits and back
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, inv_freq(5e5)),
        ("llama", LINEAR, inv_freq(10000.0) / 4),
        ("llama", LINEAR, inv_freq(10000.0)),  # as transformers 4 saved them
        ("phi3", None, PHI3),
    ],
)
def test_frequencies_that_the_config_gives_are_left_out(kind, rope, table, checkpoints, tmp_path):
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
def test_frequencies_that_it_does_not_give_are_refused(kind, table, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(kind), tmp_path / "model")
    path = put_tensor(folder, FREQUENCIES, table)
    with pytest.raises(UserError, match=re.escape(f"{path}: {FREQUENCIES} holds other rotary frequencies")):
        open_weights(folder, *read_config(folder))


def test_a_tied_model_that_holds_the_head_alone(alpaca_file, one_rank, tmp_path):
    """transformers finds the embedding under the head's name."""
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
    close(logits, theirs)
    assert loss == pytest.approx(summed_cross_entropy(theirs), rel=1e-5)
    write_random_run(one_rank, tmp_path / "run", args_for(folder, alpaca_file, "full"))
    assert EMBEDDING in all_tensors(tmp_path / "run") and HEAD not in all_tensors(tmp_path / "run")
