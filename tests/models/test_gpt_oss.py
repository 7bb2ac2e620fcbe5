"""GPT-OSS: its experts, sinks and rounding are transformers' own; runs on MXFP4 files, and what they save.

tests/models/test_sinks.py has the attention, tests/files/test_expert_stacks.py the files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import export
import train
from data.batches import Batch
from data.rows import IGNORE
from files.names import CONFIG
from models.family import FUSED, unwrapped_name
from models.gpt_oss import GptOssExpert
from models.moe import Experts
from models.registry import build_on_meta, read_config
from options.errors import UserError
from parallel.shards import full_tensor
from tests.helpers import tiny
from tests.helpers.adapters import args_for
from tests.helpers.bnb_checkpoints import make_single_rank_job
from tests.helpers.expansion import all_tensors, expand, read_config_json
from tests.helpers.finished_runs import write_random_run
from tests.helpers.logits import (
    IDS,
    bf16_logits_and_buffers,
    loss_and_logits,
    summed_cross_entropy,
    transformers_logits,
)
from tests.helpers.parity import arguments, assert_same
from tests.helpers.planned import parameters_of_plan, parameters_of_run
from tests.helpers.products import slow
from tests.helpers.runs import outputs, set_up, split_members, train_run, transformers_model
from tests.helpers.stacks import EXPERTS, dequantized_tensors, save_dequantized, save_mxfp4, stack_experts
from training.planned_model import open_planned_model


@pytest.fixture
def mxfp4(checkpoints, tmp_path) -> Path:
    """Return a folder like the hub's."""
    return save_mxfp4(checkpoints("gpt_oss"), tmp_path / "tiny-mxfp4")


def stacked(experts: Experts, kind: str) -> dict[str, torch.Tensor]:
    """Return the experts' parameters, or their gradients, by transformers' names."""
    values = {n: getattr(p, kind) for n, p in experts.named_parameters()}
    state = stack_experts({f"x.experts.{n}": t.detach() for n, t in values.items()})
    return {name.removeprefix("x.experts."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("limit", [7.0, 0.5])
def test_experts_are_transformers_own(limit):
    """Results and all gradients, with values on both sides of the limit; in float64, since they are large."""
    config = tiny.CONFIGS["gpt_oss"]()
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    theirs = GptOssExperts(config).double()
    theirs.limit = limit
    ours = Experts(lambda: GptOssExpert(64, 32, theirs.alpha, limit), EXPERTS, 2).double()
    theirs.load_state_dict(stacked(ours, "data"))
    weights, index = torch.rand(40, EXPERTS, generator=generator).topk(2)
    x, results = torch.randn(40, 64, generator=generator) * 3, []
    x, weights = x.double(), weights.double()
    for module in (ours, theirs):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(inputs[0], index, inputs[1])
        y.square().sum().backward()
        results.append([y, *(t.grad for t in inputs)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    gradients = stacked(ours, "grad")
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)


def test_every_gradient_is_transformers_own(checkpoints, alpaca_file, two_ranks):
    """The model is sharded and trained in full: sinks, router and experts included."""
    args = args_for(checkpoints("gpt_oss"), alpaca_file, "full")
    ours, state = two_ranks(gradients, args)[0]
    model = transformers_model(checkpoints("gpt_oss"), state)
    logits = model(input_ids=IDS).logits
    sum_loss(logits).backward()
    ours = stack_experts(ours)
    for name, parameter in model.named_parameters():
        expected, found = parameter.grad, ours.pop(name)
        assert expected.any(), name
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name
    assert not ours


def targets() -> torch.Tensor:
    return IDS.roll(-1, 1).masked_fill(torch.arange(IDS.shape[1]) == IDS.shape[1] - 1, IGNORE)


def sum_loss(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets().flatten(), ignore_index=IGNORE, reduction="sum")


def gradients(rank_info, args):
    """Return ({parameter: full gradient}, weights) for the loss of IDS, with one row on each rank."""
    _, state, _ = outputs(rank_info, args, IDS)
    _, model = set_up(rank_info, args)
    rows = slice(rank_info.rank, None, rank_info.world)
    train.loss_sum(model, Batch(IDS[rows], targets()[rows])).backward()
    grads = {unwrapped_name(n): full_tensor(p.grad) for n, p in model.named_parameters()}
    return split_members(model, grads), state


def test_bf16_is_transformers_own_bf16(checkpoints, alpaca_file, one_rank):
    """Bit for bit: the bias of an expert's linear is added to the rounded product, as transformers does."""
    args = args_for(checkpoints("gpt_oss"), alpaca_file, "lora")
    ours, buffers = one_rank(bf16_logits_and_buffers, args)[0]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints("gpt_oss"), dtype=torch.bfloat16, attn_implementation=FUSED
    )
    expected = dict(model.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffer, expected[name]) for name, buffer in buffers.items())
    with torch.no_grad():
        torch.testing.assert_close(ours, model(input_ids=IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora", "hqq_lora"])
def test_sinks_and_routers_stay_frozen_and_dense(train_type, checkpoints, alpaca_file, one_rank):
    parameters = one_rank(described_parameters, args_for(checkpoints("gpt_oss"), alpaca_file, train_type))[0]
    dense = {name for name in parameters if name.endswith(("sinks", "router.weight", "router.bias"))}
    assert len(dense) == 9 and not any(parameters[name] for name in dense)
    assert sum(name.endswith(".codes") for name in parameters) == 3 * (4 + 2)


def described_parameters(rank_info, args) -> dict[str, bool]:
    """Return {parameter: whether it is trained}."""
    return {unwrapped_name(n): p.requires_grad for n, p in set_up(rank_info, args)[1].named_parameters()}


def test_full_trains_sinks(checkpoints, alpaca_file, one_rank, two_ranks):
    args = [*arguments(checkpoints("gpt_oss"), alpaca_file, "full"), "--optimizer", "sgd", "--lr", "0.1"]
    one = one_rank(train_run, [*args, "--batch_size", "2"])[0]
    assert_same(one, two_ranks(train_run, [*args, "--batch_size", "1"])[0])
    before = all_tensors(checkpoints("gpt_oss"))
    for i in range(3):
        name = f"model.layers.{i}.self_attn.sinks"
        assert not torch.equal(one[1][name], before[name])  # their gradients are small


# MXFP4


def test_mxfp4_files_give_transformers_logits(mxfp4, alpaca_file, one_rank):
    """transformers dequantizes them, where it has no kernels."""
    loss, logits = one_rank(loss_and_logits, args_for(mxfp4, alpaca_file, "full"), False)[0]
    expected = transformers_logits(mxfp4)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert loss == pytest.approx(summed_cross_entropy(expected), rel=1e-5)


@pytest.mark.parametrize("train_type", ["bnb_dora", *slow(["hqq_lora"])])
def test_mxfp4_is_packed_like_its_16_bits(train_type, mxfp4, alpaca_file, one_rank, two_ranks, tmp_path):
    """A run on MXFP4 files learns what it learns from the 16 bits that transformers makes of them."""
    dense = save_dequantized(mxfp4, tmp_path / "dense")
    results = [
        ranks(
            train_run, [*arguments(folder, alpaca_file, train_type), "--batch_size", size, "--max_steps", "3"]
        )[0]
        for ranks, folder, size in ((one_rank, dense, "2"), (one_rank, mxfp4, "2"), (two_ranks, mxfp4, "1"))
    ]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())
    assert_same(results[1], results[2])


def test_a_quantized_cache_of_mxfp4(mxfp4, alpaca_file, one_rank, tmp_path):
    """It is written, used, and refused once a scale has changed."""
    args = [
        *arguments(mxfp4, alpaca_file, "qlora"),
        "--max_steps",
        "2",
        "--quantized_cache",
        tmp_path / "cache",
    ]
    written, used = (one_rank(train_run, args)[0] for _ in range(2))
    assert (tmp_path / "cache").is_dir() and written[0] == used[0]
    change_a_scale(mxfp4)
    with pytest.raises(UserError, match=r"--quantized_cache .*: holds the packed weights of another model"):
        make_single_rank_job(mxfp4, alpaca_file, *args[4:])


def change_a_scale(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.layers.2.mlp.experts.down_proj_scales"][3, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def assert_is_16_bit_model(folder: Path, names: set[str]) -> None:
    """Check names and config of a folder that a run on MXFP4 wrote."""
    assert "quantization_config" not in read_config_json(folder)
    tensors = all_tensors(folder)
    assert tensors.keys() == names
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_saved_model_of_full_is_16_bits(checkpoints, mxfp4, alpaca_file, two_ranks, tmp_path):
    out = tmp_path / "run"
    write_random_run(two_ranks, out, args_for(mxfp4, alpaca_file, "full"))  # multiplies them by 1.01
    assert_is_16_bit_model(out, all_tensors(checkpoints("gpt_oss")).keys())
    saved = all_tensors(out)
    for name, tensor in dequantized_tensors(mxfp4).items():
        assert torch.equal(saved[name], (tensor.float() * 1.01).bfloat16()), name
    transformers_logits(out)  # which fails if a tensor is missing


@pytest.mark.parametrize(("train_type", "base"), [("bnb_dora", "dequantized"), ("lora", "original")])
def test_the_merged_model_is_16_bits(train_type, base, checkpoints, mxfp4, alpaca_file, one_rank, tmp_path):
    run, out = tmp_path / "run", tmp_path / "merged"
    logits = write_random_run(one_rank, run, args_for(mxfp4, alpaca_file, train_type))
    options = ["--to", "merged", "--base", base, "--out", str(out), "--dtype", "float32"]
    assert export.main([str(run), *options]) == 0
    torch.testing.assert_close(transformers_logits(out), logits, rtol=1e-4, atol=1e-4)
    shutil.rmtree(out)
    assert export.main([str(run), *options[:-2]]) == 0
    assert_is_16_bit_model(out, all_tensors(checkpoints("gpt_oss")).keys())


def test_an_adapter_over_mxfp4_is_of_its_weights(mxfp4, alpaca_file, one_rank, tmp_path, capsys):
    """A changed block is another base: digests read the blocks and scales of each expert."""
    run = tmp_path / "run"
    write_random_run(one_rank, run, args_for(mxfp4, alpaca_file, "bnb_dora"))
    change_a_scale(mxfp4)
    assert export.main([str(run), "--to", "merged", "--out", str(tmp_path / "out")]) == 2
    assert "was trained on other weights" in capsys.readouterr().err


def test_new_blocks_of_mxfp4(checkpoints, mxfp4, tmp_path):
    """The expanded model is written in 16 bits, and is the base model."""
    out = expand(mxfp4, tmp_path / "pro", "--after", "0,2")
    assert "quantization_config" not in read_config_json(out)
    per_layer = sum(name.startswith("model.layers.0.") for name in all_tensors(checkpoints("gpt_oss")))
    assert len(all_tensors(out)) == len(all_tensors(checkpoints("gpt_oss"))) + 2 * per_layer
    torch.testing.assert_close(transformers_logits(out), transformers_logits(mxfp4), rtol=1e-4, atol=1e-4)


def test_a_plan_by_the_headers_of_mxfp4(mxfp4):
    planned = open_planned_model(str(mxfp4))
    assert not planned.by_config
    for options in ("full", "qlora", "bnb_dora"):
        assert parameters_of_plan(planned, options) == parameters_of_run(mxfp4, options)
    weight = planned.files.tensors["model.layers.0.mlp.experts.0.gate_proj.weight"]
    assert weight.shape == (32, 64) and weight.nbytes == 64 * (64 // 2 + 64 // 32)  # gate and up are read
    assert planned.files.data_bytes() > 0


def test_experts_per_token_beyond_the_experts(checkpoints, tmp_path):
    config = json.loads((checkpoints("gpt_oss") / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"num_experts_per_tok": 7}))
    with pytest.raises(UserError, match=r"describes no gpt_oss model .*7 experts per token, of 6"):
        build_on_meta(*read_config(tmp_path))
