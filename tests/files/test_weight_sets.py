"""Two sets of weights in one folder: refused where they differ, whichever of them another program reads."""

from __future__ import annotations

import json
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
from files.model_folder import CheckpointFiles
from files.names import INDEX, SINGLE
from options.errors import UserError
from tests.helpers.adapters import args_for
from tests.helpers.expansion import all_tensors
from tests.helpers.logits import loss_and_logits, transformers_logits

LAST = "model.norm.weight"
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
    "another dtype": (SINGLE, lambda t: {n: x.bfloat16() for n, x in t.items()}, ["another in", SINGLE]),
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
        CheckpointFiles(folder)
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
