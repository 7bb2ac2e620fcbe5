"""Digests of sampled weights: which changes they detect; file names and shards do not matter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from files import digests
from files.digests import digest_weight_rows, digest_weights
from files.model_folder import CheckpointFiles
from tests.helpers.bnb_checkpoints import DENSE, pack_like_the_hub


def find_sampled_rows(folder: Path, extra_rows: int) -> set[int]:
    """Return the rows of a weight of 100 rows whose change changes the digest."""
    weight, found = torch.arange(400.0).view(100, 4), set()

    def digest_now() -> str:
        save_file({"a.weight": weight}, folder / "model.safetensors")
        return digest_weight_rows(CheckpointFiles(folder), ["a.weight"], extra_rows)

    before = digest_now()
    for i in range(len(weight)):
        weight[i] += 0.5
        found |= {i} if digest_now() != before else set()
        weight[i] -= 0.5
    return found


def test_the_rows_of_a_digest(monkeypatch, tmp_path):
    ends = {0, 50, 99}
    assert find_sampled_rows(tmp_path, 16) == set(range(100))
    monkeypatch.setattr(digests, "SMALL_WEIGHT_BYTES", 0)
    drawn = find_sampled_rows(tmp_path, 16)
    assert ends < drawn and 14 <= len(drawn) <= 19 and find_sampled_rows(tmp_path, 16) == drawn
    assert find_sampled_rows(tmp_path, 0) == ends


def test_the_digest_that_checkpoints_hold_stays(tmp_path):
    save_file({"a.weight": torch.arange(400.0).view(100, 4)}, tmp_path / "model.safetensors")
    digest = digest_weight_rows(CheckpointFiles(tmp_path), ["a.weight"])
    assert digest == "ba58e11c58dbd28c6ace1267a54d873ea0f28ab991ab5943046b313c8a94bdce"


def test_shards_and_file_names_do_not_count(checkpoints, tmp_path):
    """A copy that transformers saves in one file is the same base; in another dtype it is another one."""
    before = digest_weights(CheckpointFiles(checkpoints()))
    model = AutoModelForCausalLM.from_pretrained(checkpoints())
    model.save_pretrained(tmp_path / "one")
    before_files, files = (list(folder.glob("*.safetensors")) for folder in (checkpoints(), tmp_path / "one"))
    assert len(before_files) > 1 == len(files)
    assert digest_weights(CheckpointFiles(tmp_path / "one")) == before
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    assert digest_weights(CheckpointFiles(tmp_path / "bf16")) != before


@pytest.mark.parametrize("part", ["", ".absmax", ".nested_absmax"])
def test_packed_weights_are_sampled(part, checkpoints, tmp_path, monkeypatch):
    """Codes of the first, middle and last row and their scales are sampled; small tensors in full."""
    monkeypatch.setattr(digests, "SMALL_PACKED_BYTES", 64)
    pack_like_the_hub(checkpoints(), tmp_path / "4bit")
    name = "model.layers.1.mlp.up_proj.weight"
    assert name != DENSE
    before = digest_weights(CheckpointFiles(tmp_path / "4bit"))
    for where, seen in ((0, True), (-1, True), (0.3, part == ".nested_absmax")):
        other = shutil.copytree(tmp_path / "4bit", tmp_path / f"at{where}")
        tensors = load_file(other / "model.safetensors")
        flat = tensors[name + part].view(-1).view(torch.uint8)
        flat[int(where * len(flat)) if isinstance(where, float) else where] ^= 1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        assert (digest_weights(CheckpointFiles(other)) != before) == seen, where
