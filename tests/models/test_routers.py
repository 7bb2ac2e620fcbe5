"""--train_router: the routers of experts are trained in full beside an adapter, and saved as PEFT has it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import export
import train
from data.batches import Batch
from files.names import ADAPTER, ADAPTER_CONFIG
from finished.finished_run import load_model, open_run
from models.family import unwrapped_name
from models.lora import adapters_off
from models.routers import find_routers
from options import config as options
from options.errors import UserError
from options.train import parse
from parallel.shards import fill_shard, full_tensor, gather_to_cpu
from tests.helpers.adapters import args_for
from tests.helpers.bnb_checkpoints import make_single_rank_job
from tests.helpers.compiled import CHECKPOINTED, compiled_run
from tests.helpers.logits import IDS, set_up_in_bf16, transformers_logits
from tests.helpers.parity import PLAIN, arguments, assert_same
from tests.helpers.runs import make_job, set_up, train_run
from training.saved_result import save

TRAINED = ["--train_router", "true"]
SLOW_KINDS = ("mixtral", "glm4_moe_lite", "gpt_oss")
KINDS = ["qwen3_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_KINDS)]


def router_gradients(rank_info, args, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Return {parameter: gradient} of the routers, for the loss of IDS; adapters are as at the start."""
    _, model = set_up_in_bf16(rank_info, args) if bf16 else set_up(rank_info, args, random_adapters=False)
    train.loss_sum(model, Batch(IDS, IDS.roll(-1, 1))).backward()
    return {
        unwrapped_name(name): full_tensor(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None and ".lora_" not in name and ("mlp.gate." in name or "mlp.router." in name)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_full(kind, checkpoints, alpaca_file, one_rank):
    """At the start, where the adapters add nothing. GLM's bias, which has no gradient, stays fixed."""
    base = args_for(checkpoints(kind), alpaca_file, "full")
    expected = one_rank(router_gradients, base)[0]
    found = one_rank(router_gradients, args_for(checkpoints(kind), alpaca_file, "lora", *TRAINED))[0]
    assert found.keys() == expected.keys() and len(found) >= 2
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_weights_stay_fp32_in_bf16(checkpoints, alpaca_file, one_rank):
    args = args_for(checkpoints("qwen3_moe"), alpaca_file, "qlora", *TRAINED)
    gradients = one_rank(router_gradients, args, True)[0]
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def save_with_moved_routers(rank_info, args, folder) -> torch.Tensor:
    """Write a RUN whose routers differ from the base's; return the logits of the training model."""
    (folder / "config.yaml").write_text(options.dump_yaml(make_job(rank_info, args).config))
    job, model = set_up(rank_info, args)
    generator = torch.Generator().manual_seed(3)
    for router in find_routers(model).values():
        for parameter in router.parameters():
            if parameter.requires_grad:
                full = gather_to_cpu(parameter)
                fill_shard(parameter, full + torch.randn(full.shape, generator=generator) * 0.1)
    save(job, model, folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.clone()


@pytest.fixture
def run(checkpoints, alpaca_file, one_rank, tmp_path):
    """Return (a RUN with trained routers and adapters on experts, its logits)."""
    (tmp_path / "run").mkdir()
    args = args_for(checkpoints("qwen3_moe"), alpaca_file, "lora", *TRAINED, "--lora_expert_rank", "4")
    return tmp_path / "run", one_rank(save_with_moved_routers, args, tmp_path / "run")[0]


def test_a_run_is_loaded_by_peft_and_merged(run, checkpoints, alpaca_file, one_rank, tmp_path):
    """PEFT, generate.py's model and the merged folder have its logits; without the adapter, the base's."""
    folder, logits = run
    assert json.loads((folder / ADAPTER_CONFIG).read_text())["modules_to_save"] == ["mlp.gate"]
    assert sum(name.endswith("mlp.gate.weight") for name in load_file(folder / ADAPTER)) == 2
    base = AutoModelForCausalLM.from_pretrained(checkpoints("qwen3_moe"), dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        theirs = peft.PeftModel.from_pretrained(base, folder)(input_ids=IDS).logits
        ours = load_model(open_run(folder), torch.device("cpu"), torch.float32)
        torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(input_ids=IDS, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)
        with adapters_off(ours):
            found = ours(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    options = ["--to", "merged", "--base", "original", "--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert export.main([str(folder), *options]) == 0
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), logits, rtol=1e-4, atol=1e-4)


def test_it_is_trained_further(run, checkpoints, alpaca_file, one_rank):
    folder, logits = run
    more = ["--model_name", checkpoints("qwen3_moe"), "--dataset", alpaca_file, "--train_type", "lora"]
    found = one_rank(logits_of, [*more, "--adapter", folder])[0]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def logits_of(rank_info, args) -> torch.Tensor:
    job, model = set_up(rank_info, args)
    assert job.config.train_router
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.clone()


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["qlora", "dora"])
def test_ranks_and_compilation_change_nothing(train_type, checkpoints, even_rows, one_rank, two_ranks):
    # SGD: AdamW's first steps would have full size where a gradient is near zero.
    args = arguments(checkpoints("qwen3_moe"), even_rows, train_type, *TRAINED)
    args += ["--optimizer", "sgd", "--lr", "0.1"]
    one = one_rank(train_run, [*args, *PLAIN])[0]
    assert any(name.endswith("mlp.gate.weight") for name in one[1])
    assert_same(one, two_ranks(train_run, [*args, "--batch_size", "2"])[0])
    assert_same(one, one_rank(compiled_run, [*args, *CHECKPOINTED])[0][0])


def test_bad_options(checkpoints, alpaca_file):
    with pytest.raises(UserError, match="--train_router: the model has no routed experts"):
        make_single_rank_job(checkpoints("llama"), alpaca_file, "--train_type", "qlora", *TRAINED)
    with pytest.raises(UserError, match="--train_router has no effect with --train_type full"):
        parse(["--train_type", "full", *TRAINED])
