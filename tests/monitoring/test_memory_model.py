"""The model of memory: its parts by arithmetic here, the whole by what was measured on GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen3MoeConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Model

from launch.gpus import GPUS
from launch.precision import choose_precision
from models.registry import FAMILIES, build_on_meta
from monitoring.layer_memory import layer_memory, layer_widths
from monitoring.memory_model import estimate_memory
from monitoring.run_sizes import run_sizes
from options.train import parse
from training.planned_model import open_planned_model

H, M, V, KEY, LAYERS, R = 256, 512, 1024, 128, 8, 8
LAYER = 2 * H * (H + KEY) + 3 * H * M + 2 * H  # weights of a layer
ALL = LAYERS * LAYER + 2 * V * H + H
ADAPTERS = LAYERS * R * (2 * (H + H) + 2 * (H + KEY) + 3 * (H + M))
WORKSPACE = 2 * 32 * 2**20


def estimate(given: str, gpu: str | None = "h200", tokens: int = 512):
    """The estimate for a Llama of the sizes above."""
    config = LlamaConfig(
        hidden_size=H, intermediate_size=M, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=V, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    family = FAMILIES["llama"]
    model = build_on_meta(config, family)
    shapes = {
        n: SimpleNamespace(shape=tuple(p.shape), torch_dtype=torch.bfloat16, nbytes=2 * p.numel())
        for n, p in model.named_parameters()
    }
    files = SimpleNamespace(tensors=shapes, packed={}, prequantized=False)
    fixed = "--world_size 1 --sharding_strategy full_shard --use_gradient_checkpointing true --model_name x"
    rank = "" if "full" in given.split()[0] else f" --lora_rank {R}"
    options, _ = parse(f"{fixed} --train_type {given}{rank}".split())
    kind = GPUS[gpu] if gpu else None
    precision = choose_precision(options.precision, has_gpu=True, has_bf16_gpu=bool(kind) and kind.has_bf16)
    sizes = run_sizes(model, family, options, precision, files, tokens)
    return estimate_memory(options, precision, sizes, kind)


def test_weights_gradients_and_states_are_shared_by_the_ranks():
    """LoRA in bf16 with fp32 adapters; the embedding, which is not tied, is in host memory."""
    for ranks in (1, 2):
        memory = estimate(f"lora --world_size {ranks}", gpu="4090")
        weights = 2 * (ALL - V * H) + 4 * ADAPTERS
        assert memory.load == pytest.approx(weights / ranks)
        workspace = 2 * 8 * 2**20
        assert memory.backward - workspace == pytest.approx((weights + 12 * ADAPTERS) / ranks)


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 8), ("sgd", 0), ("adamw_8bit", 2.03),
                                                    ("paged_adamw_32bit", 0), ("adadelta", 8)])  # fmt: skip
def test_optimizer_states(optimizer, states):
    memory = estimate(f"full --optimizer {optimizer}")
    assert memory.load == 4 * ALL
    assert memory.backward - WORKSPACE == pytest.approx((8 + states) * ALL)


def test_with_offload_no_weight_is_on_the_gpu():
    memory = estimate("full --use_cpu_offload")
    assert memory.load == 0 and memory.backward == WORKSPACE


def test_checkpointing_saves_the_input_of_each_layer():
    """And two more tensors of that size: the last norm's input, and the gradient of the hidden states."""
    for batch in (1, 4):
        memory = estimate(f"qlora --batch_size {batch}")
        resident = estimate("qlora").backward - 4 * ADAPTERS
        assert memory.forward - resident == pytest.approx((LAYERS + 2) * batch * 512 * H * 2)


def test_without_checkpointing_layers_save_what_backward_reads():
    """Input, two norms, their sum, query, key and value, attention, the MLP's three, A x and the softmax."""
    memory, checkpointed = (
        estimate(f"qlora --use_gradient_checkpointing {on}", tokens=4096) for on in ("false", "true")
    )
    per_token = 2 * (3 * H + 2 * H + 2 * KEY + 3 * M + 7 * R) + 8 * 4
    casts = 2 * ADAPTERS / LAYERS  # of A and B, once for all tokens
    assert memory.forward - checkpointed.forward == pytest.approx(LAYERS * (4096 * per_token + casts))


def test_the_peak_grows_by_a_layer_and_what_is_saved():
    """The slope per token: the layers' inputs, and all activations and gradients of one layer."""
    few, many = (estimate("qlora", tokens=tokens).peak for tokens in (2**18, 2**19))
    one_layer = 2 * (4 * H + 2 * H + 2 * KEY + 4 * M + 7 * R) + 8 * 4
    assert (many - few) / 2**18 == pytest.approx(LAYERS * H * 2 + one_layer)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("qlora --use_activation_cpu_offload", "qlora"),
        ("qlora --wrap_policy sublayer --world_size 2", "qlora --world_size 2"),
        ("full --world_size 2", "full --world_size 2 --sharding_strategy ddp"),
        ("full --world_size 2", "full --world_size 2 --sharding_strategy shard_grad_op"),
        ("lora --gradient_accumulation_steps 2 --world_size 2",
         "lora --gradient_accumulation_steps 2 --world_size 2 --no_sync"),
        ("qlora", "qlora --train_embeddings"),
        ("qlora", "bnb_dora"),
        ("qlora", "lora"),
        ("qlora", "qlora --gradient_accumulation_steps 2"),
        ("qlora --activation_budget 0", "qlora --activation_budget 1"),
        ("qlora --compile true", "qlora --compile false"),
    ],
)  # fmt: skip
def test_options_save_memory(less, more):
    assert estimate(less, tokens=2**14).peak < estimate(more, tokens=2**14).peak


def test_the_loss_does_not_grow_with_the_ranks():
    """Ranks that share a frozen head gather their hidden states one block at a time."""
    few, many = (estimate(f"qlora --world_size {n}", tokens=2**14) for n in (32, 64))
    assert many.peak < few.peak


def test_a_cpu_run_is_in_host_memory():
    assert estimate("full", gpu=None).host > estimate("full", gpu=None).peak


def test_the_activation_budget_ends_where_nothing_more_can_be_saved():
    base, little, much = (estimate(f"qlora --activation_budget {gib}").peak for gib in ("0", "0.001", "100"))
    results = 2 * (2 * H + 2 * KEY + 2 * H + 2 * M)  # of all matmuls and attention, of each token
    assert little - base == pytest.approx(0.001 * 2**30)
    assert much - base == pytest.approx(LAYERS * 512 * results)


@pytest.mark.parametrize(
    ("options", "ratio"), [("adadelta", 2), ("sgd --wd 0.1", 1), ("sgd", 0), ("adamw", 0)]
)
def test_the_update_of_all_parameters_at_a_time_takes_memory(options, ratio):
    memory = estimate(f"full --optimizer {options}")
    assert memory.optimizer - memory.backward == pytest.approx(ratio * 4 * ALL)


def test_gradients_that_are_not_reduced_yet_exist_only_where_something_is_reduced():
    one = "lora --gradient_accumulation_steps 2"
    assert estimate(one).peak == estimate(f"{one} --no_sync").peak
    two = "lora --gradient_accumulation_steps 2 --world_size 2"
    assert estimate(two).peak < estimate(f"{two} --no_sync").peak


@pytest.mark.parametrize(
    ("strategy", "shards"),
    [("full_shard", 2), ("shard_grad_op", 2), ("hybrid_shard_grad_op --hybrid_shard_size 1", 1), ("ddp", 1)],
)
def test_gradients_are_held_between_micro_batches_once(strategy, shards):
    """In fp32: each rank's shard of them or, with --no_sync, all that are not reduced yet."""
    run = f"lora --world_size 2 --sharding_strategy {strategy}"
    two = f"{run} --gradient_accumulation_steps 2"
    single, reduced, held = (estimate(run).forward for run in (run, two, f"{two} --no_sync"))
    assert reduced - single == pytest.approx(4 * ADAPTERS / shards)
    assert held - single == pytest.approx(4 * ADAPTERS)


def test_checkpoints_are_written_from_copies_in_host_memory():
    for more, copies in (("", 3), (" --optimizer sgd", 1), (" --use_cpu_offload", 2)):
        without, saving = (estimate(f"full{more}{save}").host for save in ("", " --save_every 10"))
        assert saving - without == pytest.approx(copies * 4 * ALL), more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_eager_attention_saves_eight_bytes_of_each_score(dtype):
    """Gemma 2's layer in transformers, not compiled, against the slope of the model of memory."""
    config = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, attn_implementation="eager",
    )  # fmt: skip
    tokens = 256
    layer = Gemma2Model(config).to(dtype)
    sizes: dict[int, int] = {}

    def pack(tensor):
        if tensor.numel() >= 4 * tokens**2 and tensor.is_floating_point():
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    widths = layer_widths(build_on_meta(config, FAMILIES["gemma2"]), FAMILIES["gemma2"])
    options, _ = parse("--model_name x --train_type full --compile false".split())
    precision = choose_precision("bf16" if dtype == torch.bfloat16 else "fp32", True, True)
    memory = [
        layer_memory(options, precision, widths, GPUS["h200"], tokens=t, branches=0).saved / t
        for t in (tokens, 2 * tokens)
    ]
    scores = 4 * tokens
    assert (memory[1] - memory[0]) / scores == pytest.approx(8)
    assert sum(sizes.values()) / (scores * tokens) == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize("dense", [[], [0], [1]])
def test_layers_without_experts_do_not_change_the_widths(dense):
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        mlp_only_layers=dense,
    )  # fmt: skip
    family = FAMILIES["qwen3_moe"]
    widths = layer_widths(build_on_meta(config, family), family)
    assert (widths.experts_per_token, widths.mlp) == (2, 32)


@pytest.mark.parametrize(
    ("train_type", "with_graphs", "without"), [("qlora", 11.26, 9.57), ("bnb_dora", 11.58, 9.74)]
)
def test_graphs_beside_plain_calls_take_what_was_measured(train_type, with_graphs, without):
    """Peaks on an H200 of the 8B shape with fp8 matmuls (docs/fp8.md), in a step that had both."""
    options = (
        f"--train_type {train_type} --batch_size 4 --context_length 2048 --lora_rank 64 --base_matmul fp8"
    )
    config, _ = parse(f"--model_name any --world_size 1 --sharding_strategy full_shard {options}".split())
    planned, gpu = open_planned_model("8b", images=False), GPUS["h200"]
    precision = choose_precision(config.precision, has_gpu=True, has_bf16_gpu=True)
    sizes = run_sizes(planned.model, planned.family, config, precision, planned.files, 2048)
    expected = estimate_memory(config, precision, sizes, gpu).graphs / 2**30
    assert expected == pytest.approx(with_graphs - without, rel=0.1)
