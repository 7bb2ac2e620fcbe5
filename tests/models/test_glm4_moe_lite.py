"""GLM-4.7-Flash: the routers' fixed biases, heads of two sizes, and a layer behind the last.

The tests of all families compare losses, gradients and results; tests/models/test_moe.py the experts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import export
import plan
from files.names import INDEX
from models import attention
from models.attention import attend_causally, attend_within_rows
from models.family import CAUSAL, FUSED, VARLEN, unwrapped_name
from models.registry import read_config
from options.errors import UserError
from tests.helpers.adapters import args_for
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.expansion import all_tensors, edit_config, expand
from tests.helpers.finished_runs import write_random_run
from tests.helpers.logits import IDS, fixed_parameters, set_up_in_bf16
from tests.helpers.packing import reference_attention
from tests.helpers.resuming import run
from tests.helpers.runs import set_up, trained_tensors
from tests.helpers.tiny import save_checkpoint
from training.planned_model import open_planned_model

KIND = "glm4_moe_lite"
BIASES = [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]


def test_the_bias_chooses_experts(checkpoints):
    """Otherwise the comparisons with transformers' forward would pass without it."""
    model = load_transformers_model(checkpoints(KIND), dtype=torch.float32)
    with torch.no_grad():
        true = model(input_ids=IDS).logits
        for name in BIASES:
            model.get_buffer(name).zero_()
        assert (model(input_ids=IDS).logits - true).abs().max() > 0.05


@pytest.fixture
def bf16_checkpoint(tmp_path) -> Path:
    """Return a checkpoint like the released one: bf16, but for the routers' biases in fp32."""
    folder = save_checkpoint(KIND, tmp_path / "bf16", torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in all_tensors(folder).items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {*BIASES}
    return folder


@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
def test_biases_are_fp32_and_fixed_in_a_model_in_bf16(train_type, bf16_checkpoint, alpaca_file, two_ranks):
    """Whole on both ranks, also while `full` gathers fp32 weights in bf16; the logits are transformers'."""
    args = args_for(bf16_checkpoint, alpaca_file, train_type, "--precision", "auto")
    stored = all_tensors(bf16_checkpoint)
    for held, inside, trained, logits in two_ranks(bf16_biases_and_logits, args):
        assert held.keys() == {*BIASES} and not {*BIASES} & trained
        for name, bias in held.items():
            assert bias.dtype == torch.float32 and torch.equal(bias, stored[name])
        assert inside == {(torch.float32, torch.bfloat16)}  # of a router's bias and its weight
        if train_type == "full":
            model = load_transformers_model(bf16_checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa")
            with torch.no_grad():
                torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=0, atol=0.05)


def bf16_biases_and_logits(rank_info, args):
    """Return (the biases, dtypes in a router's forward, names of what is trained, logits) as on a GPU."""
    job, model = set_up_in_bf16(rank_info, args)
    inside = set()
    for name, module in model.named_modules():
        if unwrapped_name(name).endswith("mlp.gate"):
            module.register_forward_pre_hook(
                lambda m, _: inside.add((m.e_score_correction_bias.dtype, m.weight.dtype))
            )
    held = fixed_parameters(job, model)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, use_cache=False).logits.clone()
    return held, inside, set(trained_tensors(model)), logits


def test_fixed_parameters_of_a_wrapped_model_can_be_replaced(checkpoints, alpaca_file, one_rank):
    """The load moves them to the GPU when parameters are offloaded, below the wrappers of the layers."""
    args = args_for(checkpoints(KIND), alpaca_file, "qlora", "--use_cpu_offload", "true")
    stored = all_tensors(checkpoints(KIND))
    found = one_rank(doubled_parameters, args)[0]
    assert found.keys() == {*BIASES}
    assert all(torch.equal(found[name], 2 * stored[name]) for name in BIASES)


def doubled_parameters(rank_info, args) -> dict[str, torch.Tensor]:
    """Return {name: contents} of the parameters that change if the fixed ones are doubled."""
    job, model = set_up(rank_info, args)
    before = dict(model.named_parameters())
    job.family.set_fixed_parameters(model, lambda fixed: 2 * fixed)
    after = {unwrapped_name(n): p.detach() for n, p in model.named_parameters() if p is not before[n]}
    return {name: contents.clone() for name, contents in after.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_model_keeps_the_biases(dtype, bf16_checkpoint, alpaca_file, one_rank, tmp_path):
    write_random_run(one_rank, tmp_path / "run", args_for(bf16_checkpoint, alpaca_file, "lora"))
    options = ["--to", "merged", "--out", str(tmp_path / "out"), "--dtype", dtype]
    assert export.main([str(tmp_path / "run"), *options]) == 0
    stored, merged = all_tensors(bf16_checkpoint), all_tensors(tmp_path / "out")
    assert merged.keys() == stored.keys()
    for name in stored:
        assert merged[name].dtype == (torch.float32 if name in BIASES else getattr(torch, dtype)), name
    assert all(torch.equal(merged[name], stored[name]) for name in BIASES)


# The layer behind the last


@pytest.fixture
def with_extra_layer(checkpoints, tmp_path):
    """Return (a checkpoint with a layer behind the last, as the released one has it; its tensors)."""
    folder = shutil.copytree(checkpoints(KIND), tmp_path / "extra")
    sizes = {"eh_proj.weight": (64, 128), "mlp.experts.0.up_proj.weight": (48, 64), "enorm.weight": (64,)}
    sizes |= {"mlp.gate.e_score_correction_bias": (8,), "input_layernorm.weight": (64,)}
    extra = {f"model.layers.3.{name}": torch.randn(size) for name, size in sizes.items()}
    save_file(extra, folder / "extra.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    edit_config(folder, num_nextn_predict_layers=1)
    return folder, extra


def test_a_layer_behind_the_last_is_not_trained_and_is_saved(
    with_extra_layer, alpaca_file, one_rank, tmp_path
):
    folder, extra = with_extra_layer
    options = ["--max_steps", "1", "--output_dir", tmp_path / "run"]
    one_rank(run, [*map(str, args_for(folder, alpaca_file, "full", *options))])
    saved = all_tensors(tmp_path / "run")
    assert saved.keys() == all_tensors(folder).keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in extra.items())
    assert all(torch.equal(saved[name], all_tensors(folder)[name]) for name in BIASES)


def test_a_layer_behind_the_last_stays_there_in_an_expanded_model(with_extra_layer, tmp_path):
    folder, extra = with_extra_layer
    out = expand(folder, tmp_path / "out", "--new_blocks", 2)
    expanded = all_tensors(out)
    for name, tensor in extra.items():
        assert torch.equal(expanded[name.replace(".3.", ".5.", 1)], tensor)
    assert "model.layers.3.eh_proj.weight" not in expanded
    before, after = (load_transformers_model(each, dtype=torch.float32).eval() for each in (folder, out))
    with torch.no_grad():
        assert torch.equal(after(input_ids=IDS).logits, before(input_ids=IDS).logits)


def test_a_layer_that_the_config_does_not_know_is_an_error(with_extra_layer):
    folder, _ = with_extra_layer
    edit_config(folder, num_nextn_predict_layers=None)
    with pytest.raises(UserError, match=r"model\.layers\.3\.\S+ belongs to no parameter"):
        open_planned_model(str(folder))


# Heads of two sizes


@pytest.mark.parametrize(("features", "value_features"), [(24, 16), (16, 32), (16, 16)])
def test_attention_within_rows_takes_values_of_another_size(features, value_features, monkeypatch):
    """Result and gradients against the definition; torch's kernel takes heads of one size."""

    def kernel(q, k, v, *others, **options):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == max(features, value_features)
        return reference_attention(q, k, v, *others, **options)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    sizes = (features, features, value_features)
    inputs = [torch.randn(2, 4, 30, size, dtype=torch.float64).requires_grad_() for size in sizes]
    bounds = torch.tensor([0, 12, 30, 60], dtype=torch.int32)
    module = torch.nn.Module()
    got, _ = attend_within_rows(module, *inputs, None, scaling=0.3, cu_seq_lens_q=bounds, max_length_q=30)
    rows = torch.tensor([0] * 12 + [1] * 18), torch.tensor([2] * 30)
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    mask = torch.stack([(row[:, None] == row) & causal for row in rows])[:, None]
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (got, expected))
    torch.testing.assert_close(mine, theirs)
    module.num_key_value_groups = 1
    whole, _ = attend_causally(module, *inputs, None, scaling=0.3)
    torch.testing.assert_close(whole[1], expected[1])  # the second sequence is one row


def test_the_kernel_is_chosen_by_the_larger_head(checkpoints, monkeypatch):
    monkeypatch.setattr(attention, "has_varlen", lambda: True)

    def chosen(dtype=torch.bfloat16, packing=True, **sizes) -> str:
        config, family = read_config(checkpoints(KIND))
        for name, value in sizes.items():
            setattr(config, name, value)
        return attention.choose_attention(config, family, dtype, packing, 512)

    released = {"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256}
    assert chosen(**released) == chosen() == VARLEN
    assert chosen(**released, packing=False) == CAUSAL
    assert chosen(**released, dtype=torch.float32) == FUSED
    assert chosen(qk_nope_head_dim=192, v_head_dim=200) == FUSED  # 200: no backward on every GPU
    assert chosen(v_head_dim=257) == FUSED


def test_the_plan_of_a_model(checkpoints, capsys):
    assert plan.main(["--model_name", str(checkpoints(KIND)), "--train_type", "qlora"]) == 0
    assert "GiB" in capsys.readouterr().out
