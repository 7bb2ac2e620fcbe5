"""Names of the files in a RUN and in a Hugging Face model folder, some as patterns of Path.glob; names of
models."""

from __future__ import annotations

import os

ADAPTER, BLOCKS = "adapter_model.safetensors", "new_blocks.safetensors"
BEST, SCORE = "best", "evaluation.json"  # the folder of the best step, and the file in it that names the step
RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl", "bad_steps.jsonl", "samples.jsonl", "loss.png", "report.html", "memory*.html",
             "memory*.png", "memory_snapshot*.pickle", "adapter_config.json", ADAPTER, BLOCKS)  # fmt: skip
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json",
             "chat_template.*")  # fmt: skip
# A model folder's small files that go along with retrained weights, as they are.
CONFIG, GENERATION = "config.json", "generation_config.json"
COMPANIONS = (CONFIG, GENERATION, *TOKENIZER)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MODEL_FILES = (CONFIG, GENERATION, INDEX, "model.safetensors", "model-*.safetensors")


def split_revision(name: str) -> tuple[str, str | None]:
    """(hub id, revision) of `owner/name@revision`; (name, None) of a folder, or without a revision."""
    repository, _, revision = name.partition("@")
    if not revision or os.path.isabs(name) or os.path.isdir(os.path.expanduser(name)):
        return name, None
    return repository, revision
