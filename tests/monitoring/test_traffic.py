"""The computed bytes between ranks, equal to those that collectives carry in a step; bytes to the host."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from data.images import ImageRef
from data.packing import make_sampler
from data.prefetch import load_images
from data.rows import TokenizedRows
from launch.gpus import find_gpu
from launch.precision import choose_precision
from models.causal_lm import loss_sum
from monitoring.traffic import Traffic, step_traffic
from monitoring.weight_memory import plan_parameters
from options.train import parse
from tests.helpers.counted_collectives import CollectiveBytes
from tests.helpers.image_models import FORMAT
from tests.helpers.parity import arguments
from tests.helpers.picture_rows import make_picture_rows, rows_replaced, write_pictures
from tests.helpers.runs import set_up
from training.planned_model import open_planned_model
from wrapping import set_gradient_sync

LAYERS, H, T, RANKS = 32, 4096, 2048, 2  # of the shape 8b


def picture_rows(refs: list[ImageRef]) -> TokenizedRows:
    """Return rows of one length, with an image each."""
    rows = make_picture_rows(refs, [1] * len(refs), FORMAT)
    shortest, starts = int(rows.lengths().min()), rows.starts[:-1]
    at = (starts[:, None] + torch.arange(shortest)).flatten()
    tokens = torch.where(rows.learned[at], rows.tokens[at] % 250, rows.tokens[at])
    starts = torch.arange(len(refs) + 1) * shortest
    return dataclasses.replace(rows, tokens=tokens, learned=rows.learned[at], starts=starts)


def run_step(
    rank_info, argv: list[str], refs: list[ImageRef] | None = None
) -> tuple[Traffic, dict[str, float]]:
    """Compute a step's gradients; return (the planned traffic, {operator: received bytes}).

    refs: of rows with images, which take the place of the data's.
    """
    with rows_replaced(lambda _: picture_rows(refs)) if refs else nullcontext():
        job, model = set_up(rank_info, argv)
    sampler = make_sampler(job.config, job.rows, rank_info.rank, rank_info.world)
    with ThreadPoolExecutor(1) as threads:
        batches = load_images(next(iter(sampler.steps(1, 0))).batches, threads)
    model.train()
    with CollectiveBytes() as counted:
        for i, batch in enumerate(batches, 1):
            is_last = i == len(batches)
            set_gradient_sync(model, is_last or not job.config.no_sync, bool(refs))
            with job.precision.context("cpu"):
                loss_sum(model, batch).backward()
    planned = open_planned_model(job.config.model_name, images=bool(refs))
    sizes = {(batch.ids.shape[1], len(batch.target_positions)) for batch in batches}
    assert len(sizes) == 1
    model_and_options = planned.model, planned.family, job.config, job.precision, planned.files
    pixels = FORMAT.side**2 if refs else 0
    return step_traffic(*model_and_options, *sizes.pop(), pixels=pixels), dict(counted.received)


TWO = [
    "bnb_dora --sharding_strategy shard_grad_op --precision bf16 --gradient_accumulation_steps 2",
    "full --precision bf16_autocast --no_sync true --gradient_accumulation_steps 2",
    "hqq_lora --wrap_policy sublayer --train_embeddings",
    "lora --sharding_strategy ddp",
    "qlora --lora_target_modules layers.2.self_attn.q_proj",
]
FOUR = ["bnb_dora --sharding_strategy hybrid_full_shard --hybrid_shard_size 2"]
SLOW_TWO = [
    "qlora",  # the run with fewer targets has its gathers, too
    "full --use_cpu_offload",
    "qlora --lora_target_modules layers.1.mlp.down_proj --wrap_policy sublayer",
    "qlora --use_gradient_checkpointing false --packing",
    "bnb_dora --precision fp16_autocast --wrap_policy sublayer --sharding_strategy shard_grad_op",
]
SLOW_FOUR = [
    "full --sharding_strategy full_shard",
    "full --sharding_strategy hybrid_shard_grad_op --hybrid_shard_size 2 --no_sync true"
    " --gradient_accumulation_steps 3",
    "bnb_llama_pro",
    "qlora",
]
FAMILIES = [
    *("qwen2 qlora --train_embeddings", "qwen2 qlora", "qwen3_moe full", "gemma2 bnb_dora"),
    *("phi full", "phi qlora --train_embeddings", "phi bnb_dora"),  # a head's bias
]


def slow(ranks: str, given: list[str]) -> list:
    return [pytest.param(ranks, each, marks=pytest.mark.slow) for each in given]


@pytest.mark.skipif(torch.cuda.is_available(), reason="copy engines do not go through process groups")
@pytest.mark.parametrize(
    ("ranks", "given"),
    [
        *(("two_ranks", each) for each in TWO),
        *(("four_ranks", each) for each in FOUR),
        *slow("two_ranks", SLOW_TWO),
        *slow("four_ranks", SLOW_FOUR),
        *slow("two_ranks", FAMILIES),
    ],
)
def test_collectives(ranks, given, checkpoints, even_rows, request):
    words = given.split()
    kind = words.pop(0) if words[0] in ("qwen2", "qwen3_moe", "gemma2", "phi") else "llama"
    kind += "_pro" * words[0].endswith("llama_pro")
    argv = arguments(checkpoints(kind), even_rows, *words, "--batch_size", "2")
    for planned, received in request.getfixturevalue(ranks)(run_step, argv):
        assert planned.between_gpus == pytest.approx(sum(received.values()), rel=1e-9)
        assert planned.to_gpu == planned.to_host == 0  # the ranks are on a CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="copy engines do not go through process groups")
@pytest.mark.parametrize(
    "given",
    [
        "qlora --vision_bits 4",
        pytest.param("bnb_dora --vision_targets all", marks=pytest.mark.slow),
        pytest.param("full --sharding_strategy shard_grad_op", marks=pytest.mark.slow),
    ],
)
def test_collectives_with_images(given, checkpoints, even_rows, two_ranks, tmp_path):
    """The tower is gathered block by block; its gradients are reduced if it is adapted."""
    argv = arguments(checkpoints("gemma3_wrapper"), even_rows, *given.split(), "--batch_size", "2")
    argv += ["--images", "true", "--context_length", "64"]
    for planned, received in two_ranks(run_step, argv, write_pictures(tmp_path, 8)):
        assert planned.between_gpus == pytest.approx(sum(received.values()), rel=1e-9)


def host_traffic(gpu: str, options: str) -> tuple[float, float, list]:
    """Return (bytes to the GPU, bytes to the host, planned parameters) of a step of the shape 8b, 1 row."""
    argv = f"--model_name 8b --batch_size 1 --gradient_accumulation_steps 1 --world_size {RANKS} --train_type"
    config, _ = parse([*argv.split(), *options.split(), "--sharding_strategy", "full_shard"])
    precision = choose_precision("auto", True, find_gpu(gpu).has_bf16)
    planned = open_planned_model("8b")
    arguments_of_plan = planned.model, planned.family, config, precision, planned.files
    traffic = step_traffic(*arguments_of_plan, T, gpu=find_gpu(gpu))
    return traffic.to_gpu, traffic.to_host, plan_parameters(*arguments_of_plan)


def test_host_memory_of_a_gpu():
    """An embedding's rows in bf16 and, on a T4 without the kernel, those of all ranks' tokens, in fp32."""
    assert host_traffic("4090", "qlora")[:2] == (2 * H * T, 0)
    assert host_traffic("t4", "bnb_dora")[:2] == (4 * H * T * RANKS, 0)


def test_host_memory_of_offloads():
    """Inputs of layers; outputs of DoRA's last projections, if they are compiled; weights and gradients."""
    rows, states = 2 * H * T, 2 * H * T * LAYERS
    to_gpu, to_host, _ = host_traffic("4090", "qlora --use_activation_cpu_offload true")
    assert (to_gpu - rows, to_host) == (states, states)
    to_gpu, to_host, _ = host_traffic("4090", "bnb_dora")
    assert (to_gpu - rows, to_host) == (states, states)
    to_gpu, to_host, planned = host_traffic("4090", "bnb_dora --use_cpu_offload true")
    in_units = sum(p.nbytes(RANKS) for p in planned if not p.name.startswith(("model.embed", "lm_head")))
    head = sum(p.nbytes(RANKS) for p in planned if p.name.startswith("lm_head"))
    assert to_gpu == 2 * in_units + head + rows
    assert to_host == sum(p.nbytes(RANKS) for p in planned if p.kind == "trained")
