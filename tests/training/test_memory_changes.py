"""The table of changes that save memory: values, order of values, and what is possible beside what."""

from __future__ import annotations

import re

import pytest

from options.train import parse
from tests.helpers.programs import ROOT
from training.memory_changes import CHANGES, SHORTER_CONTEXT, Situation


def values_of(change, *options: str, tokens: int = 1000, **more) -> list[dict]:
    config = parse(["--model_name", "some/model", "--sharding_strategy", "full_shard", *options])[0]
    return list(change.find_values(Situation(config, tokens, **more)))


def possible(*options: str, **more) -> dict[str, list[dict]]:
    """Return {the option of a change: its values} of all changes that are possible."""
    found = {change.option: values_of(change, *options, **more) for change in CHANGES}
    return {option: values for option, values in found.items() if values}


def test_only_what_is_not_in_use_is_changed():
    assert [*possible("--train_type", "qlora")] == [
        "wrap_policy", "optimizer", "use_activation_cpu_offload", "lora_rank", "use_cpu_offload"
    ]  # fmt: skip
    assert possible(
        "--train_type=bnb_llama_pro", "--wrap_policy=sublayer", "--optimizer=sgd", "--use_cpu_offload",
        "--use_activation_cpu_offload",
    ) == {}  # fmt: skip
    everything = possible(
        "--train_type=lora",
        "--no_sync",
        "--batch_size=2",
        "--sharding_strategy=ddp",
        "--activation_budget=3",
        "--cuda_graphs=true",
        "--lora_expert_rank=2",
    )
    of_images = 2
    assert len(everything) == len(CHANGES) - 1 - of_images  # gradient checkpointing is on
    assert list(possible("--train_type=lora", "--use_gradient_checkpointing=false"))[2:] == [
        "use_gradient_checkpointing", "lora_rank", "train_type", "use_cpu_offload"
    ]  # fmt: skip


def test_batches_keep_the_rows_of_a_step():
    values = possible("--batch_size", "12", "--gradient_accumulation_steps", "2")["batch_size"]
    assert [(v["batch_size"], v["gradient_accumulation_steps"]) for v in values] == [
        (8, 3), (6, 4), (4, 6), (3, 8), (2, 12), (1, 24)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options, name, values",
    [
        (["--lora_rank=20"], "lora_rank", [{"lora_rank": 10}]),
        (["--lora_expert_rank=5"], "lora_expert_rank", [{"lora_expert_rank": rank} for rank in (2, 1, 0)]),
        (["--train_type=full"], "train_type", [{"train_type": "bnb_dora"}]),
        (
            ["--sharding_strategy=hybrid_full_shard", "--hybrid_shard_size=2"],
            "sharding_strategy",
            [{"sharding_strategy": "full_shard", "hybrid_shard_size": -1}],
        ),
        (
            ["--optimizer=paged_adamw_8bit"],
            "use_cpu_offload",
            [{"use_cpu_offload": True, "optimizer": "adamw_8bit"}],
        ),
    ],
)
def test_values_that_depend_on_others(options, name, values):
    assert possible(*options)[name] == values


def test_what_cannot_be_changed():
    of_adapter = possible("--adapter", "some/run", "--lora_expert_rank", "4")
    assert not {"lora_rank", "lora_expert_rank"} & set(of_adapter), "they are the saved adapter's"
    assert "train_type" not in possible("--train_type", "lora", prequantized=True)


def test_contexts_are_multiples_below_the_given_one():
    contexts = [value["context_length"] for value in values_of(SHORTER_CONTEXT, tokens=1000)]
    assert contexts == [896, 768, 640, 512] and values_of(SHORTER_CONTEXT, tokens=512) == []


def test_the_page_has_the_table_in_its_order():
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8").partition("## What makes a run fit")[2]
    rows = re.findall(r"^\| `(\w+)` ([^|]*)\|", page.partition("## JSON")[0], re.MULTILINE)
    changes = (*CHANGES, SHORTER_CONTEXT)
    assert [name for name, _ in rows] == [change.option for change in changes]
    assert ["*" in text for _, text in rows] == [change.alters for change in changes]


def test_values_are_taken_by_train():
    for change in (*CHANGES, SHORTER_CONTEXT):
        for value in values_of(change, "--train_type=lora", "--batch_size=8", "--no_sync", tokens=4096):
            parse([f"--{name}={text}" for name, text in value.items()] + ["--model_name", "some/model"])
