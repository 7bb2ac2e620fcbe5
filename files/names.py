"""Names of the files in a RUN and in a Hugging Face model folder, some as patterns of Path.glob; names of
models."""

from __future__ import annotations

import os

OPTIONS, METRICS = "config.yaml", "metrics.jsonl"  # every option of a run; a line for each step
ADAPTER, BLOCKS = "adapter_model.safetensors", "new_blocks.safetensors"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's description of an adapter
BEST, SCORE = "best", "evaluation.json"  # the folder of the best step, and the file in it that names the step
RUN_FILES = (OPTIONS, "run.json", METRICS, "bad_steps.jsonl", "samples.jsonl", "loss.png", "report.html",
             "memory*.html", "memory*.png", "memory_snapshot*.pickle",
             ADAPTER_CONFIG, ADAPTER, BLOCKS)  # fmt: skip
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, CHAT_TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
ADDED_TOKENS = "added_tokens.json"
VOCABULARY = ("vocab.json", "merges.txt")  # of byte-level BPE, without tokenizer.json
TOKENIZER = ("tokenizer*", SPECIAL_TOKENS, "vocab.*", "merges.txt", ADDED_TOKENS, "chat_template.*")
# A model folder's small files that go along with retrained weights, as they are.
CONFIG, GENERATION = "config.json", "generation_config.json"
COMPANIONS = (CONFIG, GENERATION, *TOKENIZER)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MODEL_FILES = (CONFIG, GENERATION, INDEX, SINGLE, "model-*.safetensors")


def split_revision(name: str) -> tuple[str, str | None]:
    """(hub id, revision) of `owner/name@revision`; (name, None) of a folder, or without a revision."""
    repository, _, revision = name.partition("@")
    if not revision or os.path.isabs(name) or os.path.isdir(os.path.expanduser(name)):
        return name, None
    return repository, revision
