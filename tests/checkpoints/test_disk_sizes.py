"""The computed bytes on disks, compared with the files of runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch.distributed as dist

from checkpoints.disk_sizes import DiskSizes, _alike_ranks, _local_elements, disk_sizes
from files.names import BEST
from monitoring.weight_memory import PlannedParameter
from options.config import CHECKPOINTS
from options.train import parse
from tests.helpers.parity import biased_checkpoint
from tests.helpers.runs import full_run
from train import check_run
from training.planned_model import open_planned_model

COMMON = (
    "--context_length 64 --max_steps 3 --save_every 1 --keep 1 --compile false --batch_size 1"
    " --use_gradient_checkpointing false --log_to stdout"
).split()
RESULTS = ("adapter_model*", "new_blocks*", "model*", "config.json", "tokenizer*", "generation_config.json")


def write(rank_info, argv: list[str]) -> tuple[DiskSizes, dict[str, int]]:
    """Run; return (the bytes that a plan says, those of the files by kind)."""
    config, _ = parse([*argv, "--world_size", str(rank_info.world)])
    job = check_run(config)
    planned = open_planned_model(config.model_name)
    sizes = disk_sizes(planned.model, planned.family, job.config, job.precision, planned.files)
    full_run(rank_info, job)
    dist.barrier()  # rank 0 writes last
    out, cache = Path(config.output_dir), config.quantized_cache
    checkpoints = list((out / CHECKPOINTS).iterdir())
    assert len(checkpoints) == config.keep
    return sizes, {
        "cache": sum_of_files(Path(cache)) if cache else 0,
        "checkpoint": sum_of_files(*checkpoints),
        "best": 2 * sum_of_files(out / BEST, patterns=RESULTS),
        "result": sum_of_files(out, patterns=RESULTS),
    }


def sum_of_files(*folders: Path, patterns: tuple[str, ...] = ("*",)) -> int:
    return sum(path.stat().st_size for f in folders for pattern in patterns for path in f.glob(pattern))


@pytest.mark.parametrize(
    ("ranks", "given"),
    [
        ("one_rank", "bnb_dora --lora_rank 32 --optimizer adamw_8bit --precision bf16"),
        ("two_ranks", "hqq_lora --lora_rank 32 --optimizer adamw --train_embeddings"),
        ("two_ranks", "bnb_llama_pro --llama_pro_save blocks --optimizer adadelta"),
        *(
            pytest.param(ranks, given, marks=pytest.mark.slow)
            for ranks, given in [
                ("two_ranks", "lora --lora_rank 32 --sharding_strategy ddp --optimizer adamw_8bit"),
                ("two_ranks", "full --optimizer sgd --precision bf16 --eval_every 2 --eval_share 0.2"),
                ("two_ranks", "full --optimizer adamw_8bit"),
                ("one_rank", "bnb_dora --lora_rank 4 --lora_expert_rank 1 --optimizer sgd --precision bf16"),
                ("one_rank", "full --precision bf16 --optimizer paged_adamw_32bit"),
                ("two_ranks", "llama_pro --eval_every 2 --eval_share 0.2"),
                (
                    "four_ranks",
                    "qlora --lora_rank 32 --sharding_strategy hybrid_full_shard --hybrid_shard_size 2",
                ),
            ]
        ),
    ],
)
def test_files_of_runs(ranks, given, checkpoints, short_rows, tmp_path, request):
    train_type, *options = given.split()
    has_experts = "--lora_expert_rank" in options
    model = checkpoints("qwen3_moe" if has_experts else biased_checkpoint(train_type))
    argv = [f"--model_name={model}", f"--dataset={short_rows}", f"--output_dir={tmp_path / 'out'}", *COMMON]
    if train_type.startswith(("bnb", "hqq", "q")):
        argv.append(f"--quantized_cache={tmp_path / 'cache'}")
    planned, written = request.getfixturevalue(ranks)(write, [*argv, "--train_type", train_type, *options])[0]
    for kind, found in written.items():
        assert getattr(planned, kind) == pytest.approx(found, rel=0.02), kind
    assert planned.checkpoints == 2 * planned.checkpoint
    assert planned.total == sum(v for k, v in dataclasses.asdict(planned).items() if k != "checkpoint")


@pytest.mark.parametrize(("world", "shards"), [(1, 1), (4, 4), (7, 7), (8, 1), (12, 4), (300, 300)])
def test_ranks_with_shards_alike_are_counted_at_once(world, shards):
    """Each rank is in one group, and has as many elements of each parameter as the group's first."""
    trained = [PlannedParameter("w", "trained", (rows, 3), 2) for rows in (1, 4, 7, 64, 100)]
    groups = _alike_ranks(trained, world, shards)
    assert [rank for first, number in groups for rank in range(first, first + number)] == list(range(world))
    assert len(groups) <= 2 * len(trained) * world // shards + 1
    for first, number in groups:
        for rank in range(first, first + number):
            for parameter in trained:
                elements = _local_elements(parameter, shards, rank)
                assert elements == _local_elements(parameter, shards, first)
