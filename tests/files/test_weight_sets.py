"""Two sets of weights in one folder: refused if they differ, whichever of them another program reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train
from checkpoints.model_writer import shard_name
from files import comparison
from files.model_folder import CheckpointFiles, find_model
from files.names import INDEX, SINGLE_FILE
from models.registry import open_weights, read_config
from options.errors import UserError
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.expansion import all_tensors, edit_config
from tests.helpers.logits import loss_and_logits, transformers_logits
from tests.helpers.stored import put_tensor

HEAD, LAST = "lm_head.weight", "model.norm.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """A copy of a model of four shards with an index."""
    return shutil.copytree(checkpoints(), tmp_path / "model")


def put(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def rename_like_mistral(tensors: Tensors) -> Tensors:
    """Rename tensors as in Mistral's own releases."""
    return {
        name.removeprefix("model.").replace("self_attn", "attention"): t for name, t in tensors.items()
    } | {"tok_embeddings.weight": torch.zeros(3)}


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def change_number(name: str) -> Callable[[Tensors], Tensors]:
    """Make a function that replaces one number by its neighbour, which samples would hardly find."""

    def change(tensors: Tensors) -> Tensors:
        tensor = tensors[name].clone()
        tensor.view(-1)[-7] = torch.nextafter(tensor.view(-1)[-7], torch.tensor(9.0))
        return tensors | {name: tensor}

    return change


SHARD = "model-00002-of-00003.safetensors"  # of another save
EMBEDDING = "model.embed_tokens.weight"  # more than START_ELEMENTS of files/weight_sets.py
DIFFERENT = {
    "a number": (
        SINGLE_FILE,
        change_number(EMBEDDING),
        [EMBEDDING, "differs between model-0000", f"and {SINGLE_FILE}"],
    ),
    "rounded to another dtype": (
        SINGLE_FILE,
        lambda t: {n: x.bfloat16() for n, x in t.items()},
        ["differs between", SINGLE_FILE],
    ),
    "a tensor less": (SINGLE_FILE, without(LAST), [f"{LAST} is in model-0000", f"not in {SINGLE_FILE}"]),
    "a tensor more": (
        SINGLE_FILE,
        lambda t: t | {"x": torch.ones(2)},
        [f"x is in {SINGLE_FILE}", f"shards of {INDEX}"],
    ),
    "other names": (SINGLE_FILE, rename_like_mistral, [f"is in {SINGLE_FILE}", f"shards of {INDEX}"]),
    "consolidated": (
        "consolidated.safetensors",
        change_number(LAST),
        [LAST, "and consolidated.safetensors"],
    ),
    "consolidated in shards": (
        "consolidated-00001-of-00002.safetensors",
        lambda t: change_number(LAST)({LAST: t[LAST]}),
        [LAST, "and consolidated-00001"],
    ),
    "a shard of another save": (
        SHARD,
        lambda t: change_number(LAST)({LAST: t[LAST]}),
        [LAST, f"and {SHARD}"],
    ),
}
SAME = {
    "a copy": (SINGLE_FILE, lambda t: t),
    "consolidated under other names": ("consolidated.safetensors", rename_like_mistral),
    "a consolidated copy of some": ("consolidated.safetensors", without(LAST)),
    "a shard of another save": (SHARD, lambda t: {LAST: t[LAST]}),
    "a variant": ("model.fp16.safetensors", change_number(LAST)),
    "a shard of a variant": ("model.fp16-00001-of-00002.safetensors", change_number(LAST)),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_sets_that_differ_are_refused(case, folder):
    file, change, words = DIFFERENT[case]
    put(folder / file, change(all_tensors(folder)))
    with pytest.raises(UserError) as e:
        open_weights(folder, *read_config(folder))
    assert [
        word for word in [f"{folder}: holds two sets of weights", *words] if word not in str(e.value)
    ] == []


@pytest.mark.parametrize("chunk_bytes", [64, comparison.CHUNK_BYTES])
@pytest.mark.parametrize("case", SAME)
def test_sets_that_are_the_same_are_accepted(case, chunk_bytes, folder, monkeypatch):
    monkeypatch.setattr(comparison, "CHUNK_BYTES", chunk_bytes)
    file, change = SAME[case]
    before = CheckpointFiles(folder).tensors
    put(folder / file, change(all_tensors(folder)))
    assert CheckpointFiles(folder).tensors == before


@pytest.mark.parametrize("file", [SINGLE_FILE, "consolidated.safetensors"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)])
def test_sets_of_the_same_numbers_in_two_dtypes(dtypes, file, tmp_path):
    """Refused, since saved files get the dtype of the set that is read. Other numbers are reported first."""
    narrow, wide = dtypes
    folder = tiny.save_checkpoint("llama", tmp_path / "model", narrow)
    tensors = {n: t.to(wide) for n, t in all_tensors(folder).items()}
    put(folder / file, tensors)
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    message = rf"(\S+) has the same numbers in two dtypes: in model-\S+ {names[0]}, in {file} {names[1]};"
    with pytest.raises(UserError, match=message):
        CheckpointFiles(folder)
    tensors[LAST][-1] += 2.0**-20
    put(folder / file, tensors)
    with pytest.raises(UserError, match=f"two sets of weights: {LAST} differs between"):
        CheckpointFiles(folder)


FREQUENCIES = "model.layers.1.self_attn.rotary_emb.inv_freq"
REDUNDANT = {
    "a copy of the embedding": ("qwen2", HEAD, lambda t: t[EMBEDDING].clone()),
    "a copy, where the config is silent": ("gemma2", HEAD, lambda t: t[EMBEDDING].clone()),
    "a copy in another dtype": ("phi3", HEAD, lambda t: t[EMBEDDING].double()),
    "frequencies": ("qwen2", FREQUENCIES, lambda t: frequencies(1e4)),
    "frequencies in 16 bits": ("qwen2", FREQUENCIES, lambda t: frequencies(1e4).half()),
}
NOT_REDUNDANT = {
    "another head": ("qwen2", HEAD, lambda t: t[EMBEDDING] * 1.5),
    "a head of another size": ("qwen2", HEAD, lambda t: t[EMBEDDING][1:].clone()),
    "other frequencies": ("qwen2", FREQUENCIES, lambda t: frequencies(1e6)),
    "frequencies of another size": ("qwen2", FREQUENCIES, lambda t: frequencies(1e4)[1:].clone()),
    "bytes": ("qwen2", FREQUENCIES, lambda t: torch.ones(8, dtype=torch.uint8)),
    "a copy of another tensor": ("qwen2", "model.layers.9.input_layernorm.weight", lambda t: t[LAST].clone()),
}


def frequencies(theta: float) -> torch.Tensor:
    """Return RoPE frequencies [8] for heads of 16 features.

    https://arxiv.org/abs/2104.09864, section 3.2.2
    """
    return torch.tensor([theta ** (-2 * i / 16) for i in range(8)])


def save_two_sets(
    kind: str, name: str, make: Callable[[Tensors], torch.Tensor], where: str, folder: Path
) -> Path:
    """Save a tied model in two sets, of which the set `where` has one more tensor."""
    tiny.save_checkpoint(kind, folder, tie_word_embeddings=True)
    if kind == "gemma2":
        edit_config(folder, tie_word_embeddings=None)
    tensors = all_tensors(folder)
    assert (folder / INDEX).exists() and HEAD not in tensors
    extra = {name: make(tensors)}
    put(folder / SINGLE_FILE, tensors | (extra if where == SINGLE_FILE else {}))
    if where == INDEX:
        put_tensor(folder, name, extra[name])
    return folder


@pytest.mark.parametrize("where", [SINGLE_FILE, INDEX])
@pytest.mark.parametrize("case", REDUNDANT)
def test_a_redundant_tensor_makes_no_second_set(case, where, tmp_path):
    """transformers computes the same logits from either set."""
    folder = save_two_sets(*REDUNDANT[case], where, tmp_path / "model")
    config, family = read_config(folder)
    files, model, untied = open_weights(folder, config, family)
    assert not untied and config.tie_word_embeddings
    assert files.tensors.keys() == {name for name, _ in model.named_parameters()}
    single = transformers_logits(folder)
    (folder / SINGLE_FILE).unlink()
    torch.testing.assert_close(transformers_logits(folder), single, rtol=0, atol=0)


@pytest.mark.parametrize("case, where", [
    *((case, SINGLE_FILE) for case in NOT_REDUNDANT),
    *((case, INDEX) for case in NOT_REDUNDANT if case != "bytes"),
])  # fmt: skip
def test_any_other_tensor_makes_a_second_set(case, where, tmp_path):
    folder = save_two_sets(*NOT_REDUNDANT[case], where, tmp_path / "model")
    name = re.escape(NOT_REDUNDANT[case][1])
    with pytest.raises(UserError, match=f"holds two sets of weights: {name} is in"):
        open_weights(folder, *read_config(folder))


def test_a_copy_of_the_embedding_beside_an_untied_config(tmp_path):
    """From the set without a head transformers would initialize one at random."""
    folder = save_two_sets(*REDUNDANT["a copy of the embedding"], INDEX, tmp_path / "model")
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=f"{HEAD} is in model-0000.*, and not in {SINGLE_FILE}"):
        open_weights(folder, *read_config(folder))


def test_transformers_reads_the_other_set(folder, alpaca_file, one_rank, capsys):
    """This is why two sets are refused: this program would train from the shards."""
    shards = transformers_logits(folder)
    ours = one_rank(loss_and_logits, args_for(folder, alpaca_file, "full"))[0][1]
    torch.testing.assert_close(ours, shards, rtol=1e-4, atol=1e-4)
    put(folder / SINGLE_FILE, {n: t * 1.5 for n, t in all_tensors(folder).items()})
    assert (transformers_logits(folder) - shards).abs().max() > 0.1
    argv = ["--model_name", str(folder), "--dataset", str(alpaca_file), "--output_dir", str(folder / "out")]
    assert train.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "holds two sets of weights" in lines[0] and not (folder / "out").exists()


@pytest.mark.parametrize("names", ["nothing", SINGLE_FILE])
def test_an_index_of_shards_that_are_gone(names, folder, checkpoints, alpaca_file, one_rank):
    """transformers leaves such an index if it saves one file over shards; another names the single file."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    assert (folder / INDEX).exists() and [p.name for p in folder.glob("*.safetensors")] == [SINGLE_FILE]
    if names == SINGLE_FILE:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / SINGLE_FILE), SINGLE_FILE)}
        (folder / INDEX).write_text(json.dumps(index))
    ours = one_rank(loss_and_logits, args_for(folder, alpaca_file, "full"))[0][1]
    torch.testing.assert_close(ours, transformers_logits(folder), rtol=1e-4, atol=1e-4)


def test_shards_beside_a_single_file(folder):
    """Without an index no program reads the shards, but nobody knows which of the two was meant."""
    tensors = all_tensors(folder)
    put(folder / SINGLE_FILE, tensors)
    (folder / INDEX).unlink()
    assert {t.file for t in CheckpointFiles(folder).tensors.values()} == {SINGLE_FILE}
    first = folder / shard_name(1, 4)
    put(first, {n: t + 1 for n, t in load_file(first).items()})
    with pytest.raises(UserError, match=f"differs between {SINGLE_FILE} and {first.name}"):
        CheckpointFiles(folder)


def test_files_that_are_no_second_set(folder):
    """Links to a file that is read, and the text that git leaves for a file that it did not fetch."""
    (folder / "consolidated-00001-of-00004.safetensors").symlink_to(shard_name(1, 4))
    (folder / "consolidated-00002-of-00004.safetensors").hardlink_to(folder / shard_name(2, 4))
    (folder / "consolidated.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    CheckpointFiles(folder)


def test_an_adapter_beside_a_model_is_refused(checkpoints, tmp_path):
    """transformers with PEFT loads the adapter over the model, without being asked."""
    folder = shutil.copytree(checkpoints(), tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model: holds an adapter \(adapter_config.json\) beside the model"):
        find_model(str(folder))
