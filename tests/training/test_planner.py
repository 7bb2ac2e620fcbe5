"""What fits a machine: the options on that machine, the largest batch and the longest context."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from launch.gpus import GPUS
from launch.memory import GIB
from launch.precision import choose_precision
from monitoring.memory_model import MemoryEstimate, estimate_memory
from monitoring.run_sizes import run_sizes
from options.config import FIELDS, Config
from options.errors import UserError
from options.train import parse
from training.batch_table import LARGEST_BATCH, make_batch_table
from training.machine import RESERVED_GIB, Machine, fits
from training.memory_changes import MEMORY_OPTIONS
from training.planned_model import open_planned_model
from training.planner import (
    OF_A_STEP,
    Estimator,
    check_model,
    estimate,
    largest_batch,
    longest_context,
    precision_on,
    resolve_on,
)

# Options that are read before the model of memory is asked, or decide what a row is.
OF_THE_PLANNER = {
    "model_name",
    "llama_pro_path",
    "preset",
    "adapter",
    "context_length",
    "packing",
    "images",
    "image_size",
    "images_per_pack",
    "effective_batch_size",
}
SETTINGS = [
    "--train_type=full",
    "--train_type=qlora --sharding_strategy=shard_grad_op --packing",
    "--train_type=bnb_dora --use_gradient_checkpointing=false --no_sync --gradient_accumulation_steps=2",
    "--train_type=hqq_lora --sharding_strategy=hybrid_full_shard --hybrid_shard_size=2 --optimizer=sgd",
    "--train_type=lora --use_cpu_offload --use_activation_cpu_offload --train_embeddings",
    "--train_type=dora --optimizer=adamw_8bit --wrap_policy=sublayer --sharding_strategy=ddp",
    "--train_type=qlora --activation_budget=1 --compile=true",
]


class RecordingConfig(Config):
    """A Config that notes which options are read."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str):
        if name in FIELDS:
            RecordingConfig.read.add(name)
        return super().__getattribute__(name)


def machine_of(kind: str = "4090", gpus: int = 1, **more) -> Machine:
    return Machine(GPUS[kind], gpus, **{"gib": GPUS[kind].gib} | more)


def resolved(options: str, machine: Machine, model: str = "tiny") -> Config:
    return resolve_on(machine, parse(["--model_name", model, *options.split()])[0], open_planned_model(model))


def test_the_options_that_memory_depends_on_are_those_that_are_read():
    read: set[str] = set()
    planned, machine = open_planned_model("tiny"), machine_of(gpus=4)
    for setting in SETTINGS:
        config = resolved(setting, machine)
        parts = planned.model, planned.family, RecordingConfig(**vars(config))
        precision = precision_on(machine.gpu, parts[-1])
        RecordingConfig.read -= OF_A_STEP.keys()
        sizes = run_sizes(*parts, precision, planned.files, 512)
        assert not RecordingConfig.read & OF_A_STEP.keys(), "sizes are shared by options that differ in these"
        estimate_memory(parts[-1], precision, sizes, machine.gpu)
        read |= RecordingConfig.read
    assert {"batch_size", "lora_rank", "wrap_policy", "use_cpu_offload"} < read <= MEMORY_OPTIONS
    assert MEMORY_OPTIONS - read == OF_THE_PLANNER


def test_options_are_resolved_for_the_machine():
    config = resolved("--batch_size 2", machine_of(gpus=4))
    assert (config.world_size, config.sharding_strategy, config.compile) == (4, "full_shard", "true")
    config = resolved("--world_size 2 --sharding_strategy hybrid_full_shard", machine_of("t4", gpus=4))
    assert (config.world_size, config.hybrid_shard_size, config.compile) == (2, 2, "false")


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ("--world_size 3", "4090", "--world_size 3: the machine has 2"),
        ("--precision bf16", "t4", "--precision bf16: a T4 has no bf16"),
        ("--use_cpu_offload --optimizer paged_adamw_8bit", "4090", "--optimizer paged_adamw_8bit"),
        ("--sharding_strategy hybrid_full_shard --hybrid_shard_size 3", "4090", "--hybrid_shard_size 3"),
    ],
)
def test_what_train_would_refuse_there(options, kind, words):
    with pytest.raises(UserError, match=words):
        resolved(options, machine_of(kind, gpus=2))


@pytest.mark.parametrize(
    "options, words",
    [
        ("--lora_target_modules nothing", "matches no linear"),
        ("--lora_rank 500", "--lora_rank 500"),
        (
            "--train_type bnb_llama_pro",
            "^--train_type bnb_llama_pro: tiny has no new layers; give --new_blocks N",
        ),
        ("--train_type hqq_lora --group_size 24", "--group_size 24"),
    ],
)
def test_what_the_model_does_not_allow(options, words):
    with pytest.raises(UserError, match=words):
        check_model(resolved(options, machine_of()), open_planned_model("tiny"))


def test_a_turing_gpu_computes_in_fp16():
    """--precision auto is that of the GPU that is planned for."""
    planned, machine = open_planned_model("tiny"), machine_of("t4")
    config = resolved("--train_type lora", machine)
    precision = choose_precision("fp16_autocast", has_gpu=True, has_bf16_gpu=False)
    sizes = run_sizes(planned.model, planned.family, config, precision, planned.files, 256)
    expected = estimate_memory(config, precision, sizes, machine.gpu)
    assert estimate(config, planned, machine.gpu, 256) == expected
    assert estimate(config, planned, GPUS["h100"], 256).load < expected.load, "bf16 weights are smaller"


@pytest.mark.parametrize(
    "peak, host, host_gib, expected",
    [
        (23.0, 0, None, True),
        (23.1, 0, None, False),
        (5, 64, 64, True),
        (5, 65, 64, False),
        (5, 65, None, True),
    ],
)
def test_fitting(peak, host, host_gib, expected):
    estimated = MemoryEstimate(0, 0, 0, 0, peak * GIB, host * GIB)
    assert RESERVED_GIB == 1.0
    assert fits(estimated, machine_of(gib=24.0, host_gib=host_gib)) is expected


def test_the_largest_batch_and_the_longest_context_are_those_of_a_search_one_by_one():
    planned, options = open_planned_model("1b"), "--train_type qlora"
    estimator = Estimator(planned, GPUS["4090"])
    for gib in (2.5, 5.0, 7.0):
        machine = machine_of(gib=gib)
        config = resolved(options, machine, "1b")

        def is_possible(batch: int, tokens: int, config: Config = config, machine: Machine = machine) -> bool:
            return fits(estimator(dataclasses.replace(config, batch_size=batch), tokens), machine)

        batches = [n for n in range(1, 40) if is_possible(n, 1024)]
        assert largest_batch(config, planned, machine, 1024) == max(batches, default=0) < 39
        contexts = [n for n in range(128, 2**15, 128) if is_possible(1, n)]
        assert longest_context(config, Estimator(planned, machine.gpu), machine) == max(contexts, default=0)
        assert not is_possible(1, 2**15), "the search ends before"


def test_a_models_limit_is_the_longest_context(checkpoints):
    planned, machine = open_planned_model(str(checkpoints())), machine_of()
    config = resolved("", machine, str(checkpoints()))
    assert (
        longest_context(config, Estimator(planned, machine.gpu), machine)
        == 512
        == planned.model.config.max_position_embeddings
    )
    assert largest_batch(config, planned, machine_of(gib=900.0), 1) == LARGEST_BATCH


def test_the_table_has_the_peak_of_each_batch_and_context():
    planned, machine = open_planned_model("1b"), machine_of(gib=7.0)
    config = resolved("--train_type qlora", machine, "1b")

    def estimate_batch(batch: int, tokens: int) -> MemoryEstimate:
        return estimate(dataclasses.replace(config, batch_size=batch), planned, machine.gpu, tokens)

    table = make_batch_table(estimate_batch, machine, longest=3000, limit=8192)
    assert make_batch_table(estimate_batch, machine, longest=300, limit=400).contexts == [256]
    assert table.contexts == [512, 1024, 2048, 4096] and table.batches == [
        2**i for i in range(len(table.batches))
    ]
    for batch, peaks, enough in zip(table.batches, table.peaks, table.fits, strict=True):
        for tokens, gib, is_enough in zip(table.contexts, peaks, enough, strict=True):
            expected = estimate(dataclasses.replace(config, batch_size=batch), planned, machine.gpu, tokens)
            assert gib == expected.peak / GIB and is_enough == fits(expected, machine)
    assert not any(table.fits[-1]) and all(any(line) for line in table.fits[:-1])
