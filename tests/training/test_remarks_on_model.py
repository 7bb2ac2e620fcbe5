"""Settings of config.json that training ignores, and noise that it applies, are reported at start."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from models.registry import read_config
from options.train import parse
from tests.helpers.adapters import args_for
from tests.helpers.expansion import edit_config
from tests.helpers.logits import IDS, loss_and_logits, summed_cross_entropy
from training.preflight import remarks_on_model

NOISES = {
    (
        "seed_oss",
        "attention_dropout",
    ): "attention_dropout 0.1: acts in training; packed rows need masks for it",
    ("seed_oss", "residual_dropout"): "residual_dropout 0.1: acts in training",
    ("mixtral", "router_jitter_noise"): "router_jitter_noise 0.1: acts in training",
    ("phi", "resid_pdrop"): "resid_pdrop 0.1: acts in training",
    ("starcoder2", "embedding_dropout"): "embedding_dropout 0.1: acts in training",
    ("llama", "residual_dropout"): None,  # a key of other families
}
ROUTER = "config.json: output_router_logits: the auxiliary loss of the routers, times 0.5, is added"


@pytest.mark.parametrize(
    "kind, train_type",
    [("qwen3_moe", "full"), ("qwen3_moe", "lora"), ("qwen3_moe_pro", "llama_pro"), ("llama", "full")],
)
def test_the_auxiliary_loss_of_a_router(kind, train_type, checkpoints, alpaca_file, one_rank, tmp_path):
    folder = shutil.copytree(checkpoints(kind), tmp_path / "model")
    args = args_for(folder, alpaca_file, train_type)

    def router_remarks() -> list[str]:
        job = train.check_run(parse([*map(str, args), "--output_dir", str(tmp_path / "out")])[0])
        return [remark for remark in job.remarks if "output_router_logits" in remark]

    assert router_remarks() == []
    edit_config(folder, output_router_logits=True, router_aux_loss_coef=0.5)
    lines = router_remarks()
    assert len(lines) == kind.startswith("qwen3_moe")  # in dense models it has no effect anywhere
    assert all(line.startswith(f"{folder}/{ROUTER}") for line in lines)
    loss, _ = one_rank(loss_and_logits, args, False)[0]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=IDS, labels=IDS)
    assert loss == pytest.approx(summed_cross_entropy(theirs.logits), rel=1e-5)
    auxiliary = theirs.loss.item() - loss / IDS[:, 1:].numel()
    assert (auxiliary > 0.1) == kind.startswith("qwen3_moe"), "evaluation leaves out what transformers adds"


def test_a_family_without_an_auxiliary_loss(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("glm4_moe_lite"), tmp_path / "model")
    edit_config(folder, output_router_logits=True, router_aux_loss_coef=0.5)
    (line,) = remarks_on_model(read_config(folder)[0], folder, was_untied=False)
    assert line.startswith(f"{folder}/config.json: output_router_logits has no effect: transformers has no")


@pytest.mark.parametrize(("kind", "name"), NOISES)
def test_noise_of_the_config(kind, name, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(kind), tmp_path / "model")
    edit_config(folder, **{name: 0.1})
    remark = NOISES[kind, name]
    expected = [f"{folder}/config.json: {remark}"] if remark else []
    assert remarks_on_model(read_config(folder)[0], folder, was_untied=False) == expected
