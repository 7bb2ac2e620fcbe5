"""The differences of each model family from Llama: caps, scales, tables, fused linears.

Routed experts have tests/models/test_moe.py. tests/models/test_adapters.py compares all families with PEFT,
and at step zero with transformers.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from models import gemma2
from models.adapters import target_linears
from models.registry import FAMILIES, build_on_meta, read_config
from options.errors import UserError
from tests.helpers import tiny
from tests.helpers.adapters import args_for, trained_names
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.expansion import edit_config
from tests.helpers.logits import (
    IDS,
    bf16_logits_and_buffers,
    loss_and_logits,
    summed_cross_entropy,
    transformers_logits,
)
from tests.helpers.packing import packed_batch
from tests.helpers.parity import arguments, assert_same
from tests.helpers.products import slow
from tests.helpers.runs import set_up, train_run
from tests.helpers.spellings import is_of_a_tower

ATTENTION = {f"self_attn.{x}_proj" for x in "qkvo"}
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma3", {"final_logit_softcapping": None}),
        ("gemma3", {"query_pre_attn_scalar": 32}),
        ("gemma3", {"sliding_window": 64}),
        (
            "gemma3",
            {"rope_parameters": dict.fromkeys(tiny.GEMMA3_ROPE, tiny.GEMMA3_ROPE["full_attention"])},
        ),
        ("phi3", {"rope_parameters": tiny.LONG_ROPE | {"long_factor": tiny.LONG_ROPE["short_factor"]}}),
        ("starcoder2", {"sliding_window": 64}),
        ("glm4", {"rope_parameters": tiny.FULL_ROPE}),
        ("cohere2", {"layer_types": ["sliding_attention"] * 3}),  # which also rotates in all layers
        ("cohere2", {"sliding_window": 64}),
        ("cohere2", {"logit_scale": 1.0}),
        ("nemotron", {"hidden_act": "relu"}),
        ("nemotron", {"rope_parameters": tiny.FULL_ROPE}),
        ("phi", {"rope_parameters": tiny.FULL_ROPE}),
        ("phi_head_norms", {"qk_layernorm": False}),
        ("mixtral", {"num_experts_per_tok": 3}),
        ("hunyuan_v1_dense", {"rope_parameters": tiny.FULL_ROPE}),
        ("olmo", {"clip_qkv": None}),
        ("stablelm", {"rope_parameters": tiny.FULL_ROPE}),
        ("cohere", {"logit_scale": 1.0}),
        ("qwen2_moe", {"norm_topk_prob": False}),
        ("qwen2_moe_window", {"sliding_window": 64}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 3}),
        ("glm4_moe_lite", {"num_experts_per_tok": 3}),
        ("glm4_moe_lite", {"norm_topk_prob": False}),
        ("glm4_moe_lite", {"routed_scaling_factor": 1.0}),
        ("glm4_moe_lite", {"topk_group": 4}),
        ("glm4_moe_lite", {"rope_interleave": False}),
        ("glm4_moe_lite_wide_values", {"norm_topk_prob": True}),
        ("exaone4", {"sliding_window": 64}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),  # with RoPE
        *(("granite", {name: 1.0}) for name in tiny.MULTIPLIERS),
        ("ministral3", {"rope_parameters": tiny.SCALED_QUERIES | {"llama_4_scaling_beta": 0.0}}),
        ("olmo3", {"sliding_window": 64}),
        ("olmo3", {"rope_parameters": dict.fromkeys(tiny.OLMO3_ROPE, tiny.YARN)}),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ("gpt_oss", {"sliding_window": 64}),
        ("gpt_oss", {"num_experts_per_tok": 3}),
        ("gpt_oss", {"rope_parameters": tiny.YARN | {"truncate": False, "factor": 1.0}}),
    ],
)
def test_tiny_models_depend_on_what_their_family_adds(kind, changed, checkpoints):
    """Otherwise the comparisons with transformers' forward would pass without it."""
    load = AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        true, other = (
            load(checkpoints(kind), attn_implementation="eager", **options)(input_ids=IDS).logits
            for options in ({}, changed)
        )
    assert (true - other).abs().max() > 0.05


# tests/models/test_gpt_oss.py has GPT-OSS.
@pytest.mark.parametrize(
    "kind",
    ["gemma2", "gemma3", "phi3", "qwen3_moe", *slow(kind for kind in tiny.OTHERS if kind != "gpt_oss")],
)
def test_bf16_is_transformers_own_bf16(kind, checkpoints, alpaca_file, one_rank):
    """Compare the logits, and the dtype and contents of each buffer, as on a GPU.

    Scale and tables are rounded, or stay fp32, exactly where transformers does it. Fixed parameters are
    buffers there.
    """
    args = args_for(checkpoints(kind), alpaca_file, "lora")
    ours, buffers = one_rank(bf16_logits_and_buffers, args)[0]
    attention = FAMILIES[read_config(checkpoints(kind))[0].model_type].attention
    model = load_transformers_model(checkpoints(kind), dtype=torch.bfloat16, attn_implementation=attention)
    expected = {name: buffer for name, buffer in model.named_buffers() if not is_of_a_tower(name)}
    assert buffers.keys() == expected.keys()
    for name, content in buffers.items():
        torch.testing.assert_close(content, expected[name], rtol=0, atol=0)
    with torch.no_grad():
        theirs = model.eval()(input_ids=IDS).logits
    # The experts' sum has another order; everything else is exact.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 if kind == "qwen3_moe" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual_dropout", "attention_dropout"])
def test_dropout_of_seed_oss_acts_in_training_only(name, checkpoints, alpaca_file, one_rank, tmp_path):
    folder = tiny.save_checkpoint("seed_oss", tmp_path / "model", **{name: 0.5})
    trained, evaluated = one_rank(losses_of_two_forwards, args_for(folder, alpaca_file, "qlora"))[0]
    without = one_rank(losses_of_two_forwards, args_for(checkpoints("seed_oss"), alpaca_file, "qlora"))[0]
    assert len({*trained, *evaluated}) == 3
    assert without == (evaluated, evaluated)


def losses_of_two_forwards(rank_info, args) -> tuple[list[float], list[float]]:
    """Return the loss sums of the same packed rows, twice in training and twice in evaluation."""
    job, model = set_up(rank_info, args)
    model.set_attn_implementation(job.family.attention)
    batch = packed_batch()
    with torch.no_grad():
        return tuple(
            [train.loss_sum(model.train(training), batch).item() for _ in range(2)]
            for training in (True, False)
        )


FOREIGN_KEYS = {  # what classes of other families read
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 1.0,
    "logit_scale": 7.0,
    "logits_scaling": 7.0,
    "sliding_window": 8,
    "query_pre_attn_scalar": 3,
    "embedding_multiplier": 5.0,
    "residual_multiplier": 5.0,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("kind", ["llama", "qwen3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_keys_of_other_families_mean_nothing(kind, checkpoints, alpaca_file, one_rank, tmp_path):
    """The loss and the logits are transformers' on the same folder."""
    folder = shutil.copytree(checkpoints(kind), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(FOREIGN_KEYS | config))
    loss, logits = one_rank(loss_and_logits, args_for(folder, alpaca_file, "full"), False)[0]
    expected = transformers_logits(folder)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(summed_cross_entropy(expected), rel=1e-5)


def test_a_buffer_that_nothing_fills_is_an_error(checkpoints, alpaca_file, one_rank):
    args = args_for(checkpoints("gemma2"), alpaca_file, "qlora")
    error = one_rank(error_without_constant_buffers, args)[0]
    assert error == "buffers that nothing fills: ['model.embed_tokens.embed_scale']"


def error_without_constant_buffers(rank_info, args) -> str:
    """Return the message of the load of a Gemma 2 family without constant_buffers."""
    FAMILIES["gemma2"] = dataclasses.replace(gemma2.FAMILY, constant_buffers=lambda config: {})
    try:
        set_up(rank_info, args)
    except AssertionError as e:
        return str(e)
    finally:
        FAMILIES["gemma2"] = gemma2.FAMILY
    return ""


def test_gemma3_with_the_keys_of_the_hub(checkpoints, tmp_path):
    """google/gemma-3-1b-it uses transformers 4's keys for its tables and its pattern of layers."""
    new = json.loads((checkpoints("gemma3") / "config.json").read_text())
    old = {
        k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types", "_sliding_window_pattern")
    }
    old |= {"rope_theta": 10000.0, "rope_local_base_freq": 100.0, "sliding_window_pattern": 3}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_config(tmp_path)[0].layer_types == ["sliding_attention"] * 2 + ["full_attention"]
    assert_same_tables(tmp_path, checkpoints("gemma3"))


def test_olmo3_with_the_keys_of_the_hub(checkpoints, tmp_path):
    """allenai/Olmo-3-1025-7B uses transformers 4's keys: rope_scaling is for layers of full attention."""
    scaling = {name: value for name, value in tiny.YARN.items() if name != "rope_theta"}
    new = json.loads((checkpoints("olmo3") / "config.json").read_text())
    for name, keys in (
        ("old", {"rope_theta": 500000.0, "rope_scaling": scaling}),
        ("new", {"rope_parameters": {of: r | {"rope_theta": 500000.0} for of, r in tiny.OLMO3_ROPE.items()}}),
    ):
        (tmp_path / name).mkdir()
        config = {key: value for key, value in new.items() if key != "rope_parameters"} | keys
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert_same_tables(tmp_path / "old", tmp_path / "new")


def assert_same_tables(*folders) -> None:
    """Compare the rotary tables of two configurations with two kinds of layers."""
    read = [read_config(folder) for folder in folders]
    old, new = (dict(family.rotary_class(config=config).named_buffers()) for config, family in read)
    assert old.keys() == new.keys() and len(old) == 4
    assert all(torch.equal(table, new[name]) for name, table in old.items())


@pytest.mark.parametrize(
    ("kind", "linears"),
    [
        ("phi3", {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
        ("qwen3_moe", ATTENTION),
        ("glm4", ATTENTION | {"mlp.gate_up_proj", "mlp.down_proj"}),
        ("nemotron", ATTENTION | {"mlp.up_proj", "mlp.down_proj"}),
        ("phi", {f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "dense")} | {"mlp.fc1", "mlp.fc2"}),
        ("mixtral", ATTENTION),
        ("qwen2_moe", ATTENTION),
        ("glm4_moe_lite", {f"self_attn.{x}" for x in LATENT}),
        ("gpt_oss", ATTENTION),
        ("starcoder2", ATTENTION | {"mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_exact_set_of_trained_names(kind, linears, checkpoints, alpaca_file, one_rank):
    names = one_rank(trained_names, args_for(checkpoints(kind), alpaca_file, "bnb_dora"))[0]
    parts = ("lora_A", "lora_B", "magnitude_change")
    assert names == {f"model.layers.{i}.{linear}.{p}" for i in range(3) for linear in linears for p in parts}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        ("starcoder2", "residual_dropout"),
        ("starcoder2", "embedding_dropout"),
        ("phi", "resid_pdrop"),
        ("mixtral", "router_jitter_noise"),
    ],
)
def test_noise_of_the_config_acts_in_training(kind, noise, checkpoints, short_rows, one_rank, tmp_path):
    """A layer that backward recomputes draws the same numbers as in forward."""
    folder = shutil.copytree(checkpoints(kind), tmp_path / "model")
    edit_config(folder, **{noise: 0.1})
    options = ["--batch_size", "4", "--use_gradient_checkpointing"]
    recomputed, saved = (
        one_rank(train_run, [*arguments(folder, short_rows, "lora"), *options, checkpointing])[0]
        for checkpointing in ("true", "false")
    )
    assert_same(recomputed, saved)
    without = one_rank(train_run, [*arguments(checkpoints(kind), short_rows, "lora"), *options, "true"])[0]
    assert recomputed[0][0] != pytest.approx(without[0][0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["full", "qlora --train_embeddings"])
def test_a_heads_bias_is_trained_in_two_ranks_as_in_one(
    options, checkpoints, short_rows, one_rank, two_ranks
):
    # SGD: keys' biases hardly change attention. AdamW would make steps of the rounding of their gradients.
    options += " --optimizer sgd --lr 0.1 --batch_size"
    args = arguments(checkpoints("phi"), short_rows, *options.split())
    one, two = one_rank(train_run, [*args, "4"])[0], two_ranks(train_run, [*args, "2"])[0]
    assert_same(one, two)
    before = AutoModelForCausalLM.from_pretrained(checkpoints("phi")).lm_head.bias
    assert (one[1]["lm_head.bias"] - before).abs().max() > 1e-3


# Bad input


@pytest.mark.parametrize(
    ("kind", "edit", "words"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, "describes no qwen3_moe model .*9 experts per token, of 8"),
        ("glm4_moe_lite", {"q_lora_rank": None}, "q_lora_rank null: queries without a latent"),
        ("glm4_moe_lite", {"num_key_value_heads": 2}, "num_key_value_heads 2: .* num_attention_heads, 4"),
        ("glm4_moe_lite", {"n_shared_experts": 0}, "n_shared_experts 0: must be positive"),
        ("glm4_moe_lite", {"n_group": 3}, "n_group 3: must divide the 8 experts into groups"),
        ("glm4_moe_lite", {"n_group": 8}, "n_group 8: .* groups of two or more"),
        ("glm4_moe_lite", {"topk_group": 5}, "topk_group 5, of 4 groups"),
        ("glm4_moe_lite", {"num_experts_per_tok": 5}, "5 experts per token, of 4 in topk_group 2"),
        ("ministral3", {"rope_parameters": tiny.YARN}, "describes no ministral3 .*no llama_4_scaling_beta"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional attention.*only causal models"),
        ("llama", {"is_causal": False}, "bidirectional attention.*is_causal.*only causal models"),
        ("qwen2", {"is_causal": False}, "bidirectional attention.*is_causal.*only causal models"),
        ("gemma3", {"model_type": "gemma4"}, "'gemma4' is unknown; known: .*gemma3_text"),
        (
            "gemma3_wrapper",
            {"text_config": {"model_type": "gemma3_text", "use_bidirectional_attention": True}},
            "bidirectional attention.*only causal models",
        ),
        (
            "mistral3",
            {"text_config": {"model_type": "ministral3", "rope_parameters": tiny.YARN}},
            "describes no mistral3 .*no llama_4_scaling_beta",
        ),
        ("mistral3", {"text_config": {"num_hidden_layers": 0}}, "num_hidden_layers 0: must be positive"),
        (
            "exaone4",
            {"layer_types": None, "sliding_window_pattern": "LLLG"},
            "has no layer_types: the kind of each layer, .* from this config \\(unsupported operand",
        ),
        ("exaone4_small", {"layer_types": None}, "has no layer_types.* from this config .integer modulo"),
        (
            "exaone4",
            {"layer_types": None, "sliding_window_pattern": "LLLG", "hidden_size": "x"},
            "not readable",
        ),
    ],
)
def test_configurations_that_cannot_be_trained(kind, edit, words, checkpoints, tmp_path):
    config = json.loads((checkpoints(kind) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(UserError, match=words):
        build_on_meta(*read_config(tmp_path))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("q_proj,gate_proj", "'gate_proj' names linears of experts.*known: q_proj, k_proj, v_proj, o_proj$"),
        ("mlp.experts.3.up_proj", "names linears of experts"),
        ("gate", "'gate' matches no linear"),  # the router
    ],
)
def test_targets_that_get_no_adapter(targets, words, checkpoints):
    model, family = build_meta_model(checkpoints("qwen3_moe"))
    with pytest.raises(UserError, match=words):
        target_linears(model, family, targets)


def test_a_shared_expert_may_be_named(checkpoints):
    model, family = build_meta_model(checkpoints("qwen2_moe"))
    names = [f"model.layers.{i}.mlp.shared_expert.down_proj" for i in (1, 2)]
    assert target_linears(model, family, "shared_expert.down_proj") == names
    assert set(names) < {name for name, _ in family.layer_linears(model)}, "it is not quantized"


def test_plain_mlps_among_routed_layers_may_be_named(checkpoints):
    model, family = build_meta_model(checkpoints("qwen3_moe"))
    assert target_linears(model, family, "mlp.up_proj") == ["model.layers.0.mlp.up_proj"]


def build_meta_model(folder):
    config, family = read_config(folder)
    return build_on_meta(config, family), family


def test_a_misspelt_linear_is_an_error(checkpoints):
    model, family = build_meta_model(checkpoints("qwen3_moe"))
    for wrong in (
        {"linears": ("mlp.gate_prj",), "select_linears": None},
        {"select_linears": lambda layer: ("mlp.gate_prj",)},
    ):
        with pytest.raises(AttributeError, match="gate_prj"):
            list(dataclasses.replace(family, **wrong).layer_linears(model))
