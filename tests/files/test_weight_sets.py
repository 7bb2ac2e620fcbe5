"""Two sets of weights in one folder: refused where they differ, whichever of them another program reads."""

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
from files.names import INDEX, SINGLE
from models.registry import open_weights, read_config
from options.errors import UserError
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.expansion import all_tensors, edit
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


def as_mistral(tensors: Tensors) -> Tensors:
    """Under names of Mistral's own releases."""
    return {
        name.removeprefix("model.").replace("self_attn", "attention"): t for name, t in tensors.items()
    } | {"tok_embeddings.weight": torch.zeros(3)}


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def changed(name: str) -> Callable[[Tensors], Tensors]:
    """One number of one tensor is its neighbour: what samples would hardly find."""

    def change(tensors: Tensors) -> Tensors:
        tensor = tensors[name].clone()
        tensor.view(-1)[-7] = torch.nextafter(tensor.view(-1)[-7], torch.tensor(9.0))
        return tensors | {name: tensor}

    return change


SHARD = "model-00002-of-00003.safetensors"  # of another save
EMBEDDING = "model.embed_tokens.weight"  # more elements than a first look takes
DIFFERENT = {
    "a number": (SINGLE, changed(EMBEDDING), [EMBEDDING, "another in model-0000", f"than in {SINGLE}"]),
    "rounded to another dtype": (
        SINGLE,
        lambda t: {n: x.bfloat16() for n, x in t.items()},
        ["another in", SINGLE],
    ),
    "a tensor less": (SINGLE, without(LAST), [f"{LAST} is in model-0000", f"not in {SINGLE}"]),
    "a tensor more": (
        SINGLE,
        lambda t: t | {"x": torch.ones(2)},
        [f"x is in {SINGLE}", f"shards of {INDEX}"],
    ),
    "other names": (SINGLE, as_mistral, [f"is in {SINGLE}", f"shards of {INDEX}"]),
    "consolidated": ("consolidated.safetensors", changed(LAST), [LAST, "than in consolidated.safetensors"]),
    "consolidated in shards": (
        "consolidated-00001-of-00002.safetensors",
        lambda t: changed(LAST)({LAST: t[LAST]}),
        [LAST, "than in consolidated-00001"],
    ),
    "a shard of another save": (SHARD, lambda t: changed(LAST)({LAST: t[LAST]}), [LAST, f"than in {SHARD}"]),
}
ALIKE = {
    "a copy": (SINGLE, lambda t: t),
    "consolidated under other names": ("consolidated.safetensors", as_mistral),
    "a consolidated copy of some": ("consolidated.safetensors", without(LAST)),
    "a shard of another save": (SHARD, lambda t: {LAST: t[LAST]}),
    "a variant": ("model.fp16.safetensors", changed(LAST)),
    "a shard of a variant": ("model.fp16-00001-of-00002.safetensors", changed(LAST)),
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


@pytest.mark.parametrize("piece", [64, comparison.PIECE])
@pytest.mark.parametrize("case", ALIKE)
def test_sets_that_do_not_are_one(case, piece, folder, monkeypatch):
    monkeypatch.setattr(comparison, "PIECE", piece)
    file, change = ALIKE[case]
    before = CheckpointFiles(folder).tensors
    put(folder / file, change(all_tensors(folder)))
    assert CheckpointFiles(folder).tensors == before


@pytest.mark.parametrize("file", [SINGLE, "consolidated.safetensors"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)])
def test_sets_of_the_same_numbers_in_two_dtypes(dtypes, file, tmp_path):
    """Refused, as saved files take the dtype of what was read; the line says so unless a number differs."""
    narrow, wide = dtypes
    folder = tiny.save_checkpoint("llama", tmp_path / "model", narrow)
    tensors = {n: t.to(wide) for n, t in all_tensors(folder).items()}
    put(folder / file, tensors)
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    told = rf"the same numbers, but of (\S+) the dtype is in model-\S+ {names[0]}, and in {file} {names[1]};"
    with pytest.raises(UserError, match=told):
        CheckpointFiles(folder)
    tensors[LAST][-1] += 2.0**-20
    put(folder / file, tensors)
    with pytest.raises(UserError, match=f"two sets of weights: {LAST} is another in"):
        CheckpointFiles(folder)


FREQUENCIES = "model.layers.1.self_attn.rotary_emb.inv_freq"
EXTRAS = {
    "a copy of the embedding": ("qwen2", HEAD, lambda t: t[EMBEDDING].clone()),
    "a copy, where the config is silent": ("gemma2", HEAD, lambda t: t[EMBEDDING].clone()),
    "a copy in another dtype": ("phi3", HEAD, lambda t: t[EMBEDDING].double()),
    "frequencies": ("qwen2", FREQUENCIES, lambda t: frequencies(1e4)),
    "frequencies in 16 bits": ("qwen2", FREQUENCIES, lambda t: frequencies(1e4).half()),
}
NOT_EXTRAS = {
    "another head": ("qwen2", HEAD, lambda t: t[EMBEDDING] * 1.5),
    "a head of another size": ("qwen2", HEAD, lambda t: t[EMBEDDING][1:].clone()),
    "other frequencies": ("qwen2", FREQUENCIES, lambda t: frequencies(1e6)),
    "frequencies of another size": ("qwen2", FREQUENCIES, lambda t: frequencies(1e4)[1:].clone()),
    "bytes": ("qwen2", FREQUENCIES, lambda t: torch.ones(8, dtype=torch.uint8)),
    "a copy of another tensor": ("qwen2", "model.layers.9.input_layernorm.weight", lambda t: t[LAST].clone()),
}


def frequencies(theta: float) -> torch.Tensor:
    """Frequencies of RoPE [8] for heads of 16 features (https://arxiv.org/abs/2104.09864, section 3.2.2)."""
    return torch.tensor([theta ** (-2 * i / 16) for i in range(8)])


def two_sets_of(
    kind: str, name: str, make: Callable[[Tensors], torch.Tensor], where: str, folder: Path
) -> Path:
    """A tied model in two sets, of which one has a tensor more."""
    tiny.save_checkpoint(kind, folder, tie_word_embeddings=True)
    if kind == "gemma2":
        edit(folder, tie_word_embeddings=None)
    tensors = all_tensors(folder)
    assert (folder / INDEX).exists() and HEAD not in tensors
    extra = {name: make(tensors)}
    put(folder / SINGLE, tensors | (extra if where == SINGLE else {}))
    if where == INDEX:
        put_tensor(folder, name, extra[name])
    return folder


@pytest.mark.parametrize("where", [SINGLE, INDEX])
@pytest.mark.parametrize("case", EXTRAS)
def test_a_redundant_tensor_makes_no_second_set(case, where, tmp_path):
    """transformers computes the same logits from either, which are those of the model that is read."""
    folder = two_sets_of(*EXTRAS[case], where, tmp_path / "model")
    config, family = read_config(folder)
    files, model, untied = open_weights(folder, config, family)
    assert not untied and config.tie_word_embeddings
    assert files.tensors.keys() == {name for name, _ in model.named_parameters()}
    single = transformers_logits(folder)
    (folder / SINGLE).unlink()
    torch.testing.assert_close(transformers_logits(folder), single, rtol=0, atol=0)


@pytest.mark.parametrize("case, where", [
    *((case, SINGLE) for case in NOT_EXTRAS), *((case, INDEX) for case in NOT_EXTRAS if case != "bytes")
])  # fmt: skip
def test_any_other_tensor_does(case, where, tmp_path):
    folder = two_sets_of(*NOT_EXTRAS[case], where, tmp_path / "model")
    name = re.escape(NOT_EXTRAS[case][1])
    with pytest.raises(UserError, match=f"holds two sets of weights: {name} is in"):
        open_weights(folder, *read_config(folder))


def test_a_copy_of_the_embedding_beside_an_untied_config(tmp_path):
    """Of the set without a head transformers would draw one at random."""
    folder = two_sets_of(*EXTRAS["a copy of the embedding"], INDEX, tmp_path / "model")
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=f"{HEAD} is in model-0000.*, and not in {SINGLE}"):
        open_weights(folder, *read_config(folder))


def test_transformers_reads_the_other_set(folder, alpaca_file, one_rank, capsys):
    """Which is why neither is right: ours would be trained from the shards."""
    shards = transformers_logits(folder)
    ours = one_rank(loss_and_logits, args_for(folder, alpaca_file, "full"))[0][1]
    torch.testing.assert_close(ours, shards, rtol=1e-4, atol=1e-4)
    put(folder / SINGLE, {n: t * 1.5 for n, t in all_tensors(folder).items()})
    assert (transformers_logits(folder) - shards).abs().max() > 0.1
    argv = ["--model_name", str(folder), "--dataset", str(alpaca_file), "--output_dir", str(folder / "out")]
    assert train.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "holds two sets of weights" in lines[0] and not (folder / "out").exists()


@pytest.mark.parametrize("names", ["nothing", SINGLE])
def test_an_index_of_shards_that_are_gone(names, folder, checkpoints, alpaca_file, one_rank):
    """As transformers leaves it where a single file is saved over shards, and one that names the single file."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    assert (folder / INDEX).exists() and [p.name for p in folder.glob("*.safetensors")] == [SINGLE]
    if names == SINGLE:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / SINGLE), SINGLE)}
        (folder / INDEX).write_text(json.dumps(index))
    ours = one_rank(loss_and_logits, args_for(folder, alpaca_file, "full"))[0][1]
    torch.testing.assert_close(ours, transformers_logits(folder), rtol=1e-4, atol=1e-4)


def test_shards_beside_a_single_file(folder):
    """Without an index nobody reads them, but which of the two was meant nobody knows."""
    tensors = all_tensors(folder)
    put(folder / SINGLE, tensors)
    (folder / INDEX).unlink()
    assert {t.file for t in CheckpointFiles(folder).tensors.values()} == {SINGLE}
    first = folder / shard_name(1, 4)
    put(first, {n: t + 1 for n, t in load_file(first).items()})
    with pytest.raises(UserError, match=f"another in {SINGLE} than in {first.name}"):
        CheckpointFiles(folder)


def test_what_is_no_set(folder):
    """A link to a file that is read, and what git leaves in the place of a file that it did not fetch."""
    (folder / "consolidated-00001-of-00004.safetensors").symlink_to(shard_name(1, 4))
    (folder / "consolidated-00002-of-00004.safetensors").hardlink_to(folder / shard_name(2, 4))
    (folder / "consolidated.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    CheckpointFiles(folder)


def test_an_adapter_beside_a_model_is_refused(checkpoints, tmp_path):
    """transformers with PEFT loads it over the model, without being asked."""
    folder = shutil.copytree(checkpoints(), tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model: holds an adapter \(adapter_config.json\) beside the model"):
        find_model(str(folder))
