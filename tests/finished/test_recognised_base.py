"""A RUN's base model is verified by its weights: every command that opens the RUN refuses a changed base."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import block_expansion
import evaluate
import export
import generate
from files.names import ADAPTER, BLOCKS
from finished.finished_run import load_model, open_base, open_run
from options.errors import UserError
from options.train import parse
from tests.helpers.adapters import args_for
from tests.helpers.bnb_checkpoints import pack_like_the_hub
from tests.helpers.finished_runs import edit_base_metadata, save_job, write_random_run
from tests.helpers.hub_cache import FIRST, SECOND, add_to_hub_cache
from tests.helpers.logits import IDS
from training.preflight import check_run

OTHER = "was trained on other weights than those in"
BY_SHAPES = "only the config and tensor shapes could be checked"
GENERATE = [generate, "--prompt", "Hi", "--max_new_tokens", "2", "--json"]
EVALUATE = [evaluate, "--metrics", "perplexity", "--samples", "2", "--dataset"]


def change(folder: Path, tensor: str, row: int) -> None:
    """Change one row of one tensor in place: shapes and files stay."""
    path = next(p for p in folder.glob("*.safetensors") if tensor in load_file(p))
    tensors = load_file(path)
    tensors[tensor][row] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def base(checkpoints, tmp_path):
    """base(kind) -> a copy of that checkpoint, to be changed."""
    return lambda kind="llama": shutil.copytree(checkpoints(kind), tmp_path / "base")


def refused(capsys, command, *argv) -> str:
    status, shown = command.main(list(map(str, argv))), capsys.readouterr()
    assert status == 2 and not shown.out and shown.err.count("\n") == 1, shown
    return shown.err


@pytest.mark.parametrize(
    "train_type, tensor, row",
    [
        ("lora", "model.norm.weight", 0),
        ("bnb_dora", "model.layers.1.mlp.up_proj.weight", 80),
        ("qlora", "model.embed_tokens.weight", -1),
    ],
)
def test_an_adapter_over_changed_weights(
    train_type, tensor, row, base, alpaca_file, one_rank, tmp_path, capsys
):
    folder, run, out = base(), tmp_path / "run", tmp_path / "out"
    write_random_run(one_rank, run, args_for(folder, alpaca_file, train_type))
    change(folder, tensor, row)
    for command, *more in (
        GENERATE,
        [*EVALUATE, alpaca_file],
        [export, "--to", "merged", "--out", out],
        [export, "--to", "adapter", "--out", out],
    ):
        line = refused(capsys, command, run, *more)
        assert f"error: {run / ADAPTER}: {OTHER} {folder}" in line
    assert not out.exists()


def test_new_blocks_over_changed_weights(base, alpaca_file, one_rank, tmp_path, capsys):
    """The same for best/, and for putting the blocks back into the expanded model."""
    folder, run, out = base("llama_bias_pro"), tmp_path / "run", tmp_path / "out"
    write_random_run(one_rank, run, args_for(folder, alpaca_file, "llama_pro", "--llama_pro_save", "blocks"))
    best = shutil.copytree(run, run / "best")
    capsys.readouterr()
    assert generate.main([str(best), *GENERATE[1:]]) == 0 and not capsys.readouterr().err
    change(folder, "model.layers.0.self_attn.q_proj.bias", 0)
    for origin in (run, best):
        for command, *more in (
            GENERATE,
            [*EVALUATE, alpaca_file],
            [export, "--to", "merged", "--out", out],
        ):
            assert f"error: {origin / BLOCKS}: {OTHER} {folder}" in refused(capsys, command, origin, *more)
        put_back = ["--model_name", folder, "--output_dir", out, "--blocks", origin / BLOCKS]
        assert f"error: --blocks {origin / BLOCKS}: {OTHER} {folder}" in refused(
            capsys, block_expansion, *put_back
        )
    assert not out.exists()


@pytest.mark.parametrize("train_type, kind", [("full", "llama"), ("llama_pro", "llama_bias_pro")])
def test_a_whole_model_beside_a_changed_base(train_type, kind, base, alpaca_file, one_rank, tmp_path, capsys):
    """The base's answers would be those of another model; the RUN by itself needs no base."""
    folder, run = base(kind), tmp_path / "run"
    write_random_run(one_rank, run, args_for(folder, alpaca_file, train_type))
    assert open_base(open_run(run)).is_base_verified
    change(folder, "model.norm.weight", -1)
    for command, *more in (GENERATE, [*EVALUATE, alpaca_file]):
        assert f"error: {run}: {OTHER} {folder}" in refused(capsys, command, run, *more)
    assert generate.main([str(run), *GENERATE[1:], "--compare", "false"]) == 0


def test_a_packed_base(base, alpaca_file, one_rank, tmp_path, capsys):
    """The codes of a 4-bit base are compared, too.

    Its original model is accepted in its place, with a remark.
    """
    original, packed, run = base(), tmp_path / "4bit", tmp_path / "run"
    pack_like_the_hub(original, packed)
    write_random_run(one_rank, run, args_for(packed, alpaca_file, "qlora"))
    assert (
        open_run(run).is_base_verified
        and open_run(run, str(shutil.copytree(packed, tmp_path / "moved"))).is_base_verified
    )
    capsys.readouterr()
    more = ["--to", "merged", "--out", tmp_path / "out", "--base", "original", "--base_model", original]
    assert export.main([str(run), *map(str, more)]) == 0
    shown = capsys.readouterr()
    assert "was trained on weights stored in 4 bits, not 16 or 32" in shown.err and BY_SHAPES in shown.err
    assert f"largest logit difference from the run over {original}: " in shown.out
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors = load_file(packed / "model.safetensors")
    tensors[name][0] ^= 1
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    assert f"{OTHER} {packed}" in refused(capsys, *(GENERATE[0], run, *GENERATE[1:]))


def test_a_base_saved_again(checkpoints, alpaca_file, one_rank, tmp_path):
    """One file instead of several is the same base; 16 bits instead of 32 is another."""
    write_random_run(one_rank, tmp_path / "run", args_for(checkpoints(), alpaca_file, "bnb_dora"))
    model = AutoModelForCausalLM.from_pretrained(checkpoints())
    model.save_pretrained(tmp_path / "one")
    assert open_run(tmp_path / "run", str(tmp_path / "one")).is_base_verified
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    with pytest.raises(UserError, match=OTHER):
        open_run(tmp_path / "run", str(tmp_path / "bf16"))


@pytest.mark.parametrize("train_type", ["bnb_dora", "full", "llama_pro --llama_pro_save blocks"])
def test_runs_of_earlier_versions(train_type, base, alpaca_file, one_rank, tmp_path, capsys):
    """Without a digest of weights, a remark on stderr says that only shapes were checked.

    The export claims no more either.
    """
    name, *more = train_type.split()
    folder, run = base("llama_bias_pro" if more else "llama"), tmp_path / "run"
    write_random_run(one_rank, run, args_for(folder, alpaca_file, name, *more))
    for file in run.glob("*.safetensors"):
        edit_base_metadata(file, base_contents=None, **({} if name == "bnb_dora" else {"base_digest": None}))
    capsys.readouterr()
    assert generate.main([str(run), *GENERATE[1:]]) == 0
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["answers"]) == 2
    assert shown.err.count("\n") == 1 and f"{folder} {BY_SHAPES}" in shown.err
    assert export.main([str(run), "--to", "merged", "--out", str(tmp_path / "out")]) == 0
    known = "the trained model" if name == "full" else f"the run over {folder}"
    assert f"largest logit difference from {known}: " in capsys.readouterr().out
    if more:
        put_back = ["--model_name", folder, "--output_dir", tmp_path / "whole", "--blocks", run / BLOCKS]
        assert block_expansion.main(list(map(str, put_back))) == 0
        assert f"--blocks {run / BLOCKS}" in (err := capsys.readouterr().err) and BY_SHAPES in err


# On the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of a cache of the hub; the hub itself is not reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def from_hub(checkpoints, alpaca_file, hub, one_rank, tmp_path):
    """(a RUN of someone/tiny, its logits); the repository has a newer commit since."""
    add_to_hub_cache(hub, "someone/tiny", checkpoints(), FIRST, "main", "v1")
    args = args_for(
        "someone/tiny", alpaca_file, "lora", "--world_size", "1", "--output_dir", tmp_path / "run"
    )
    job = check_run(parse(list(map(str, args)))[0])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(job.options_file())
    logits = one_rank(save_job, job, tmp_path / "run")[0]
    change(add_to_hub_cache(hub, "someone/tiny", checkpoints(), SECOND, "main"), "model.norm.weight", 0)
    return tmp_path / "run", logits


def test_a_repository_that_moved_on(from_hub, hub, tmp_path, capsys):
    """The RUN records its commit, so that PEFT and this program load the same base."""
    run, logits = from_hub
    described = json.loads((run / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("someone/tiny", FIRST)
    assert re.search(rf"^model_name: someone/tiny@{FIRST}$", (run / "config.yaml").read_text(), re.MULTILINE)
    opened = open_run(run)
    assert opened.base.name == FIRST and opened.is_base_verified
    loaded = [
        load_model(opened, torch.device("cpu"), torch.float32),
        peft.AutoPeftModelForCausalLM.from_pretrained(run).eval(),
    ]
    for model in loaded:
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert export.main([str(run), "--to", "adapter", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nbase_model: someone/tiny\n" in card
    assert f"- Base model: `someone/tiny`, revision `{FIRST}`\n" in card
    capsys.readouterr()
    for name in ("someone/tiny", "someone/tiny@main", f"someone/tiny@{SECOND}"):
        line = refused(capsys, generate, run, *GENERATE[1:], "--base_model", name)
        assert f"{OTHER} {hub / 'models--someone--tiny' / 'snapshots' / SECOND}" in line
    repeated = check_run(
        parse(["--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "new")])[0]
    )
    assert repeated.files.folder.name == FIRST


def test_a_base_by_its_revision(from_hub, tmp_path, capsys):
    run, _ = from_hub
    for name in ("someone/tiny@v1", f"someone/tiny@{FIRST}"):
        assert open_run(run, name).is_base_verified
        out = tmp_path / name.replace("/", "-")
        assert export.main([str(run), "--to", "adapter", "--out", str(out), "--base_model", name]) == 0
        described = json.loads((out / "adapter_config.json").read_text())
        assert (described["base_model_name_or_path"], described["revision"]) == ("someone/tiny", FIRST)
    with pytest.raises(
        UserError, match=r"^--base_model someone/tiny@v9: no such folder, and the hub cannot be"
    ):
        open_run(run, "someone/tiny@v9")
    with pytest.raises(UserError, match=r"^--base_model someone/tiny@: no such folder, and not a hub id"):
        open_run(run, "someone/tiny@")


@pytest.mark.parametrize("revision, commit", [("", SECOND), ("@v1", FIRST), (f"@{FIRST}", FIRST)])
def test_training_from_a_revision(revision, commit, from_hub, alpaca_file, tmp_path):
    name = f"someone/tiny{revision}"
    args = args_for(name, alpaca_file, "lora", "--world_size", "1", "--output_dir", tmp_path / "new")
    job = check_run(parse(list(map(str, args)))[0])
    assert job.files.folder.name == commit and job.config.model_name == f"someone/tiny@{commit}"
    assert (job.base.name, job.base.revision) == ("someone/tiny", commit)
