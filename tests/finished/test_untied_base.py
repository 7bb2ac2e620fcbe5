"""RUNs of versions that left out an untied head, over a base that holds one.

Such a version trained what this one trains without the head. So the tests add the head to the files after
training.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import block_expansion
import evaluate
import train
from files.names import ADAPTER, BLOCKS
from finished.finished_run import load_model, open_base, open_run
from options.errors import UserError
from options.train import parse
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.expansion import edit_config, expand
from tests.helpers.finished_runs import edit_base_metadata, write_random_run
from tests.helpers.logits import IDS, transformers_logits
from tests.helpers.resuming import QUIET, run
from tests.helpers.stored import put_tensor, read_stored_tensor

HEAD = "lm_head.weight"
LEFT_OUT = f"an earlier version of this program trained without {HEAD}, which"
REMEDY = "train again, or name a copy of the model without that tensor"
KINDS = ("qwen2", "gemma2", "phi3")


def tied_model(kind: str, folder: Path) -> Path:
    """Save a model with a tied head. Gemma 2's config.json does not say so: the family's default is tied."""
    tiny.save_checkpoint(kind, folder, tie_word_embeddings=True)
    if kind == "gemma2":
        edit_config(folder, tie_word_embeddings=None)
    return folder


def add_head(folder: Path) -> None:
    embedding = read_stored_tensor(folder, "model.embed_tokens.weight")
    put_tensor(
        folder,
        HEAD,
        embedding + 0.1 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_refused(kind, alpaca_file, one_rank, tmp_path):
    folder, run = tied_model(kind, tmp_path / "base"), tmp_path / "run"
    write_random_run(one_rank, run, args_for(folder, alpaca_file, "bnb_dora"))
    without = shutil.copytree(folder, tmp_path / "without")
    add_head(folder)
    with pytest.raises(
        UserError, match="was trained on another model than"
    ):  # by this version, which would use it
        open_run(run)
    edit_base_metadata(run / ADAPTER, base_contents=None)
    with pytest.raises(
        UserError, match=rf"^{re.escape(str(run / ADAPTER))}: {LEFT_OUT} {folder} holds; {REMEDY}"
    ):
        open_run(run)
    assert open_run(run, str(without)).base == without
    edit_config(folder, rms_norm_eps=0.5)
    with pytest.raises(UserError, match="was trained on another model than"):
        open_run(run)


def test_new_blocks_are_refused(alpaca_file, one_rank, tmp_path, capsys):
    expanded = expand(tied_model("qwen2", tmp_path / "base"), tmp_path / "pro", "--after", "1")
    run = tmp_path / "run"
    write_random_run(
        one_rank, run, args_for(expanded, alpaca_file, "llama_pro", "--llama_pro_save", "blocks")
    )
    edit_base_metadata(run / BLOCKS, base_contents=None)
    add_head(expanded)
    with pytest.raises(UserError, match=f"{LEFT_OUT} {expanded} holds; {REMEDY}: --base_model"):
        open_run(run)
    command = ["--model_name", expanded, "--blocks", run / BLOCKS, "--output_dir", tmp_path / "whole"]
    assert block_expansion.main(list(map(str, command))) == 2
    assert f"{LEFT_OUT} {expanded} holds; {REMEDY}: --model_name" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_whole_model_the_base_has_its_head(kind, alpaca_file, one_rank, tmp_path, capsys):
    folder, run = tied_model(kind, tmp_path / "base"), tmp_path / "run"
    trained = write_random_run(one_rank, run, args_for(folder, alpaca_file, "full"))
    for file in run.glob("*.safetensors"):
        edit_base_metadata(file, base_contents=None, base_digest=None)
    add_head(folder)
    capsys.readouterr()
    opened = open_run(run)
    base = open_base(opened)
    remark = f"{run}: {LEFT_OUT} {folder} holds; here the base has it\n"
    assert capsys.readouterr().err == remark and not base.is_base_verified
    for model, expected in ((opened, trained), (base, transformers_logits(folder))):
        with torch.no_grad():
            ours = load_model(model, torch.device("cpu"), torch.float32)(
                input_ids=IDS, use_cache=False
            ).logits
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    asked = ["--dataset", str(alpaca_file), "--samples", "2", "--metrics", "perplexity"]
    assert evaluate.main([str(run), *asked]) == 0 and remark in capsys.readouterr().err


def test_a_checkpoint_is_refused(alpaca_file, one_rank, tmp_path):
    folder = tied_model("qwen2", tmp_path / "base")
    options = [*args_for(str(folder), str(alpaca_file), "qlora"), *QUIET, "--max_steps", "1"]
    options += ["--save_every", "1", "--world_size", "1", "--output_dir", str(tmp_path / "run")]
    one_rank(run, options)
    more = [*options, "--resume", "auto", "--max_steps", "2"]
    assert train.check_run(parse(more)[0]).saved.step == 1
    add_head(folder)
    with pytest.raises(
        UserError, match=f"^--resume auto: {LEFT_OUT} {folder} holds; {REMEDY}: --model_name$"
    ):
        train.check_run(parse(more)[0])
    edit_config(folder, rms_norm_eps=0.5)
    with pytest.raises(UserError, match="is not the model that the run was started with"):
        train.check_run(parse(more)[0])
