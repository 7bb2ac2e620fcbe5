"""The widths of each family's decoder layers, which the planner counts activations by."""

from __future__ import annotations

from dataclasses import asdict
from unittest import mock

import pytest
import torch

import train
from data.batches import Batch
from launch.gpus import find_gpu
from launch.precision import Precision
from models.registry import build_on_meta, read_config
from monitoring.layer_memory import LayerWidths, layer_memory, layer_widths, mask_bytes
from options.train import parse
from parallel.activation_checkpointing import compile_run_layer
from tests.helpers.adapters import args_for
from tests.helpers.runs import set_up
from tests.helpers.tiny import save_checkpoint

# A Llama of 64 hidden features, 4 heads of 16, 2 of them for keys, and an MLP of 160.
LLAMA = asdict(LayerWidths(hidden=64, query=64, key=32, value=32, result=64, mlp=160, heads=4))
WIDE = {"query": 128, "key": 64, "value": 64, "result": 128}  # heads of 32
ROUTED = {"mlp": 96, "experts": 8, "experts_per_token": 2}
# 4 heads of 24 features, of which 16 are in one tensor with the values' 16; 48 and 40 + 8 in the latents.
LATENT = {"query": 96, "key": 96, "value": 128, "result": 64, "latents": 96}
NORMS = {"norms_read_outputs": True}
OLMO = NORMS | {"has_head_norms": True, "widens_product": True, "widens_inputs": True}


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("llama", {}),
        *((kind, {}) for kind in ("granite", "helium", "olmo", "smollm3")),
        *((kind, WIDE) for kind in ("ernie4_5", "ministral3", "seed_oss")),
        *((kind, OLMO) for kind in ("exaone4_small", "olmo2")),
        *((kind, OLMO | {"window": 16}) for kind in ("exaone4", "olmo3")),
        (
            "gemma2",
            NORMS
            | WIDE
            | {"hidden": 96, "has_four_norms": True, "is_eager": True, "window": 16, "widens_product": True},
        ),
        *((kind, WIDE | {"has_head_norms": True}) for kind in ("hunyuan_v1_dense", "qwen3")),
        ("phi3", {"has_fused_qkv": True, "has_fused_gate": True}),
        ("starcoder2", {"mlp_tensors": 2, "window": 16}),
        ("glm4", NORMS | WIDE | {"has_four_norms": True, "has_fused_gate": True}),
        ("cohere2", {"has_one_norm": True, "window": 16}),
        ("nemotron", WIDE | {"mlp": 32, "mlp_tensors": 2, "passes_row_bounds": False}),
        ("phi", {"has_one_norm": True}),
        ("cohere", {"has_one_norm": True, "has_head_norms": True}),
        ("stablelm", {"has_one_norm": True, "has_head_norms": True, "passes_row_bounds": False}),
        # Two experts of 48 for each token and, in Qwen2-MoE and GLM-4.7-Flash, a shared one of 96.
        ("qwen3_moe", WIDE | ROUTED | {"has_head_norms": True}),
        ("gpt_oss", ROUTED | {"experts": 6, "mlp": 64, "window": 16}),
        ("mixtral", ROUTED | {"experts": 6}),
        ("qwen2_moe", ROUTED | {"mlp": 192, "passes_window": False}),
        ("glm4_moe_lite", ROUTED | LATENT | {"mlp": 192}),
    ],
)
def test_layer_widths(kind, others, checkpoints):
    assert asdict(layer_widths_of(checkpoints(kind))) == LLAMA | others


@pytest.mark.parametrize(("window", "expected"), [(0, 0), (16, 2 * 100**2 * (2 + 2))])
def test_a_window_that_attention_does_not_get_has_masks(window, expected, checkpoints):
    """The two kinds of layers have a mask each: a boolean one, and one in bf16 that is added to scores."""
    widths = layer_widths_of(checkpoints("qwen2_moe"), sliding_window=window)
    config, _ = parse(["--model_name", "any", "--batch_size", "2"])
    precision = Precision(torch.bfloat16, torch.float32)
    assert mask_bytes(config, precision, widths, find_gpu("H200"), 100) == expected


def test_an_auxiliary_loss_keeps_the_probabilities_of_routers(checkpoints):
    config, _ = parse(["--model_name", "any", "--batch_size", "2"])
    precision = Precision(torch.bfloat16, torch.float32)
    saved = []
    for asks in (False, True):
        widths = layer_widths_of(checkpoints("qwen3_moe"), output_router_logits=asks)
        saved.append(layer_memory(config, precision, widths, find_gpu("H200"), tokens=100, branches=4).saved)
    assert saved[1] - saved[0] == 2 * 100 * 8 * 2  # of eight experts, in bf16


def layer_widths_of(folder, **changes) -> LayerWidths:
    """Return the widths of a checkpoint's layers, with changes to its config."""
    config, family = read_config(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return layer_widths(build_on_meta(config, family), family)


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 0), (0.1, 2 * 100**2 * (1 + 2))])
def test_packed_rows_have_masks_where_scores_are_dropped(dropout, expected, checkpoints):
    """Elsewhere the variable-length kernel needs none."""
    widths = layer_widths_of(checkpoints("seed_oss"), attention_dropout=dropout)
    config, _ = parse(["--model_name", "any", "--packing", "--batch_size", "2"])
    assert (
        mask_bytes(config, Precision(torch.bfloat16, torch.float32), widths, find_gpu("H200"), 100)
        == expected
    )


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        ("llama", False),
        ("gemma3", False),
        ("glm4_moe_lite", False),
        ("qwen3_moe --lora_expert_rank 8", False),
        pytest.param("qwen3_moe", False, marks=pytest.mark.slow),
        pytest.param("qwen3_moe --lora_expert_rank 8", True, marks=pytest.mark.slow),
        *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in ("olmo2", "glm4", "exaone4")),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("llama", "gemma3", "olmo2")),
    ],
)
def test_dora_saves_the_outputs_that_nothing_else_does(kind, compiled, one_rank, alpaca_file, tmp_path):
    """What DoRA saves more than LoRA: the plan against autograd's tensors, to less than one of them.

    Compiled, in bf16 and by AOTAutograd alone, whose partitioner decides what is saved.
    """
    kind, *more = kind.split()
    folder = save_checkpoint(kind, tmp_path / kind, hidden_size=256, intermediate_size=768)
    options = ["--precision", "bf16" if compiled else "fp32", "--compile", str(compiled).lower(), *more]
    planned, measured = [], []
    for train_type in ("qlora", "bnb_dora"):
        args = args_for(folder, alpaca_file, train_type, "--use_gradient_checkpointing", "false", *options)
        saved = one_rank(saved_elements, args)[0]
        planned.append(saved[0])
        measured.append(saved[1])
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], abs=128)


def saved_elements(rank_info, args) -> tuple[float, float]:
    """Return the elements of a token that the second layer saves beside its input: (planned, measured)."""
    run = compile_run_layer("aot_eager_decomp_partition")
    with mock.patch.object(train, "compile_run_layer", lambda cpus: run):
        job, model = set_up(rank_info, args)
    width = job.precision.matmul_dtype.itemsize
    widths = layer_widths(build_on_meta(job.model_config, job.family), job.family)
    gpu = find_gpu("H200")
    few, many = (
        layer_memory(job.config, job.precision, widths, gpu, tokens=t, branches=7).saved for t in (64, 128)
    )
    sizes = [saved_bytes(model, job.family, tokens) for tokens in (64, 128)]
    return (many - few) / (64 * width), (sizes[1] - sizes[0]) / (64 * width)


def saved_bytes(model, family, tokens: int) -> int:
    """Return the bytes of the storages that autograd keeps in the second layer, without its input."""
    layer, sizes = family.decoder_layers(model)[1], {}
    running, inputs, kept = [], [], []  # kept: so that no storage is freed, and its address used again

    def enter(_, args):
        running.append(args[0])

    def leave(*_):
        inputs.append(running.pop())

    def pack(tensor):
        if running:
            kept.append(tensor)
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)
    ids = torch.arange(tokens)[None] % 200
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train.loss_sum(model.train(), Batch(ids, ids.roll(-1, 1)))
    for hook in hooks:
        hook.remove()
    ignored = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *model.parameters())}
    return sum(size for storage, size in sizes.items() if storage not in ignored)
