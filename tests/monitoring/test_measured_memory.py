"""The model of memory against what runs took on H200s: torch 2.11, CUDA 13.0, transformers 5.17, 2026-12-01.

measured_memory.jsonl has a line per run of three steps: options, ranks, and the most that torch allocated on
the fullest rank. Lines with host_gib are those of docs/memory.md (benchmarks.memory). In those with
subtracted_gib the loop still held the gradients of the step before, so many GiB; peak_gib is without them.
"t4": as benchmarks.turing runs. reads_peers false: with NCCL_P2P_DISABLE=1. images: of each row, 896 x 896
pixels, in the rows that benchmarks.vision writes; tokens: of these rows, which --context_length does not cut.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from launch.gpus import GPUS
from launch.memory import GIB
from launch.precision import choose_precision
from models.llama_pro import NEW_LAYERS
from models.shapes import IMAGE_SHAPES, SHAPES, Shape
from monitoring.memory_model import estimate_memory
from monitoring.run_sizes import run_sizes
from options.train import parse
from training.image_plan import assume_images
from training.planned_model import open_planned_model

ROWS = [json.loads(line) for line in (Path(__file__).parent / "measured_memory.jsonl").open()]
PEAK, HOST = 0.03, 0.10  # relative error
KINDS = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "qwen3": Qwen3Config, "qwen2": Qwen2Config,
         "phi3": Phi3Config, "mistral": MistralConfig}  # fmt: skip
SIZES = {  # vocabulary, hidden, MLP, layers, heads, key heads
    "gemma2": (256000, 2304, 9216, 10, 8, 4),
    "gemma3": (262144, 2560, 10240, 12, 8, 4),
    "qwen3": (151936, 2560, 9728, 12, 32, 8),
    "qwen2": (151936, 3584, 18944, 8, 28, 4),
    "phi3": (32064, 3072, 8192, 12, 32, 32),
    "mistral": (32768, 4096, 14336, 8, 32, 8),
}
MORE = {
    "gemma2": {"head_dim": 256},
    "gemma3": {"head_dim": 256, "sliding_window": 1024},
    "qwen3": {"head_dim": 128},
    "qwen2": {"tie_word_embeddings": False},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": None},
}


def write_config(name: str, folder: Path) -> None:
    """Write the config.json of a measured model."""
    if name in SHAPES and not isinstance(SHAPES[name], Shape):
        SHAPES[name].model_config().save_pretrained(folder)
        return
    if name in SIZES:
        kind, sizes, more = KINDS[name], SIZES[name], MORE[name]
    else:  # "8b", "1b", or with four new layers "8bpro"
        shape, new = SHAPES[name.removesuffix("pro")], [8, 17, 26, 35] if name == "8bpro" else []
        layers = shape.layers + len(new)
        sizes = shape.vocabulary, shape.hidden, shape.mlp, layers, shape.heads, shape.kv_heads
        kind, more = LlamaConfig, {NEW_LAYERS: new} if new else {}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip
    ends = {"bos_token_id": 256, "eos_token_id": 257}
    config = kind(**dict(zip(names, sizes, strict=True)), **ends, **more, dtype="bfloat16")
    config.save_pretrained(folder)


@pytest.fixture(scope="module")
def predict(tmp_path_factory):
    """predict(row) -> the MemoryEstimate of a measured run."""
    models = {}

    def of(row: dict):
        name = row["model"]
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            write_config(name, folder)
            models[name] = open_planned_model(str(folder), images=name in IMAGE_SHAPES)
        planned = models[name]
        fixed = ["--model_name", "any", "--world_size", str(row["ranks"]), *row["options"].split()]
        config, _ = parse(fixed)
        if config.sharding_strategy == "auto":
            config = dataclasses.replace(config, sharding_strategy="full_shard")
        gpu = dataclasses.replace(
            GPUS[row["gpu"]], **({"reads_peers": False} if "reads_peers" in row else {})
        )
        precision = choose_precision(config.precision, has_gpu=True, has_bf16_gpu=gpu.has_bf16)
        tokens = row.get("tokens", config.context_length)
        images = assume_images(planned, config, row.get("images"))
        pixels = images.pixels(config, tokens) if images else 0
        sizes = run_sizes(
            planned.model, planned.family, config, precision, planned.files, tokens, pixels=pixels
        )
        return estimate_memory(config, precision, sizes, gpu)

    return of


def test_predictions_are_near_what_was_measured(predict):
    wrong = []
    for row in ROWS:
        estimate = predict(row)
        figures = [("peak", estimate.peak, PEAK)] + [("host", estimate.host, HOST)] * ("host_gib" in row)
        for name, n_bytes, bound in figures:
            ratio = n_bytes / GIB / row[f"{name}_gib"]
            if abs(ratio - 1) > bound:
                wrong.append((row["model"], row["options"], row["ranks"], name, round(ratio, 3)))
    assert wrong == []


def test_the_measured_runs_cover_what_is_modelled():
    options = " ".join(row["options"] for row in ROWS)
    for word in ("full", "lora", "qlora", "dora", "bnb_dora", "hqq_lora", "hqq_dora", "bnb_llama_pro",
                 "--use_gradient_checkpointing false", "--use_activation_cpu_offload", "--use_cpu_offload",
                 "--packing", "--compile false", "--train_embeddings", "--no_sync", "sublayer", "ddp",
                 "shard_grad_op", "adamw_8bit", "fp16_autocast", "--context_length 65536",
                 "--vision_targets all", "--vision_bits 4", "--lora_expert_rank",
                 "--cuda_graphs"):  # fmt: skip
        assert word in options, word
    assert {row["gpu"] for row in ROWS} == {"h200", "t4"} and {row["ranks"] for row in ROWS} == {1, 2}
    of_images = [row for row in ROWS if "images" in row]
    assert {row["gpu"] for row in of_images} == {"h200", "t4"}
    assert any("--use_gradient_checkpointing false" in row["options"] for row in of_images)
