"""A run that is opened again computes what training computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from files.names import ADAPTER, BLOCKS
from finished.finished_run import load_model, open_run, read_adapter
from options.errors import UserError
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import damage_adapter, edit_base_metadata, write_random_run
from tests.helpers.logits import IDS
from tests.helpers.parity import biased_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("train_type", "kind"),
    [
        *[
            (t, "llama_bias")
            for t in ("lora", "dora", "qlora", "bnb_dora", "hqq_dora --n_bits 3", "full", "llama_pro")
        ],
        ("llama_pro --llama_pro_save blocks", "llama_bias"),
        ("llama_pro --llama_pro_save blocks", "gemma3_wrapper_pro"),
        pytest.param("llama_pro", "mistral3_pro", marks=pytest.mark.slow),
        pytest.param("full", "gemma3_wrapper", marks=pytest.mark.slow),
        *[("bnb_dora", kind) for kind in ("qwen2", "gemma2", "phi3")],
        ("bnb_dora --lora_expert_rank 3", "qwen3_moe"),
        pytest.param("full", "qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_it_computes_what_training_computed(train_type, kind, checkpoints, alpaca_file, one_rank, tmp_path):
    name, *more = train_type.split()
    folder = checkpoints(biased_checkpoint(name) if kind == "llama_bias" else kind)
    logits = write_random_run(one_rank, tmp_path / "run", args_for(folder, alpaca_file, name, *more))
    model = load_model(open_run(tmp_path / "run"), CPU, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def run(checkpoints, alpaca_file, one_rank, tmp_path):
    write_random_run(one_rank, tmp_path / "run", args_for(checkpoints(), alpaca_file, "bnb_dora"))
    return tmp_path / "run"


def test_folders_that_are_no_run(run, checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        open_run(tmp_path)
    with pytest.raises(UserError, match="trained on another model"):
        open_run(run, base_model=str(checkpoints("mistral")))
    (run / ADAPTER).write_bytes((run / ADAPTER).read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated"):
        open_run(run)
    (run / ADAPTER).unlink()
    with pytest.raises(UserError, match="half written"):
        open_run(run)
    (run / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"holds no result.*false$"):
        open_run(run)
    (run / "best").mkdir()
    shutil.copy(run / "config.yaml", run / "best")
    with pytest.raises(UserError, match=f"false; {run}/best holds the weights of the best evaluation"):
        open_run(run)


def test_a_base_that_was_moved(run, checkpoints, tmp_path):
    moved = shutil.copytree(checkpoints(), tmp_path / "moved")
    assert open_run(run, base_model=str(moved)).base == moved


def test_a_base_that_is_gone_is_told_without_options_of_training(run, checkpoints):
    """generate.py, evaluate.py and export.py do not have those options."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace(f"model_name: {checkpoints()}", "model_name: /gone/model")
    )
    with pytest.raises(UserError, match=r"^base model /gone/model: no such folder.*: --base_model$"):
        open_run(run)
    with pytest.raises(UserError, match=r"^--base_model /gone/too: no such folder"):
        open_run(run, "/gone/too")
    (run / "config.yaml").write_text(config.replace("lora_rank: 8", "lora_rank: 0"))
    with pytest.raises(UserError, match=rf"^{run}/config\.yaml: --lora_rank 0"):
        open_run(run)


def test_a_model_in_a_folder_called_like_the_demo_s(
    checkpoints, alpaca_file, one_rank, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    trained = write_random_run(one_rank, tmp_path / "toy", args_for(checkpoints(), alpaca_file, "full"))
    run = open_run("toy")
    assert run.base == run.files.folder == Path("toy")
    with torch.no_grad():
        ours = load_model(run, CPU, torch.float32)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(ours, trained, rtol=1e-5, atol=1e-5)
    (tmp_path / "toy" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^toy: "):
        open_run("toy")


def test_new_blocks_of_another_model(checkpoints, alpaca_file, one_rank, tmp_path):
    args = args_for(checkpoints("llama_bias_pro"), alpaca_file, "llama_pro", "--llama_pro_save", "blocks")
    write_random_run(one_rank, tmp_path / "run", args)
    other = shutil.copytree(checkpoints("llama_bias_pro"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=f"{BLOCKS}: was trained on another model than {other}"):
        open_run(tmp_path / "run", str(other))
    with pytest.raises(UserError, match="no expanded model"):
        open_run(tmp_path / "run", str(checkpoints("llama_bias")))
    (tmp_path / "run" / BLOCKS).unlink()
    with pytest.raises(UserError, match=rf"holds no result \({BLOCKS}\)"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "surplus"])
def test_an_adapter_that_does_not_fit(change, run):
    damage_adapter(run, change)
    words = {
        "shape": r"has shape \[160, 1\], but",
        "dtype": "is stored as I8; expected",
        "missing": "is missing",
        "surplus": "belongs to no adapter of",
    }
    with pytest.raises(UserError, match=rf"layers\.\d\.mlp\.up_proj.* {words[change]}"):
        open_run(run)


def test_an_adapter_that_does_not_name_its_base(run):
    """Other programs write such adapters; every version of train.py names the base."""
    edit_base_metadata(run / ADAPTER, base_digest=None, base_contents=None)
    with pytest.raises(UserError, match=rf"^{run / ADAPTER}: does not say which model it was trained on"):
        open_run(run)


def test_an_adapter_of_no_numbers(run):
    damage_adapter(run, "nan")
    with pytest.raises(UserError, match=r"up_proj\.lora_B\.weight holds NaN or infinity"):
        read_adapter(open_run(run))
