"""Names of files in a RUN and in a Hugging Face model folder, some as Path.glob patterns; other names."""

from __future__ import annotations

import os

OPTIONS, METRICS = "config.yaml", "metrics.jsonl"  # all options of a run; one line per step
ADAPTER, BLOCKS = "adapter_model.safetensors", "new_blocks.safetensors"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's description of an adapter
# PEFT's target_parameters for adapters on routed experts: transformers' stacked parameters.
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
BEST, SCORE = "best", "evaluation.json"  # the folder of the best step, and its file that names the step
EVENTS = "tensorboard"  # the folder of events for TensorBoard
SAMPLE_IMAGES = "sample_images"  # the folder of small copies of the images in samples
RUN_FILES = (OPTIONS, "run.json", METRICS, "bad_steps.jsonl", "samples.jsonl", "loss.png", "report.html",
             "memory*.html", "memory*.png", "memory_snapshot*.pickle",
             f"{EVENTS}/events.out.tfevents.*", f"{SAMPLE_IMAGES}/*.jpg",
             ADAPTER_CONFIG, ADAPTER, BLOCKS)  # fmt: skip
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, CHAT_TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
ADDED_TOKENS = "added_tokens.json"
# Such as additional_chat_templates/tool_use.jinja, for rows with tools.
TEMPLATE_FILES = ("chat_template.*", "additional_chat_templates/*.jinja")
VOCABULARY = ("vocab.json", "merges.txt")  # byte-level BPE without tokenizer.json
TOKENIZER_FILES = (
    "tokenizer*", SPECIAL_TOKENS, "vocab.*", "merges.txt", ADDED_TOKENS, *TEMPLATE_FILES,
)  # fmt: skip
# Those of them that are texts and define a tokenizer together.
TOKENIZER_TEXTS = (TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE, SPECIAL_TOKENS, ADDED_TOKENS, *VOCABULARY)
CARD = "README.md"  # of a hub repository
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # how a wrapper reads pictures
# Copied beside retrained weights.
SMALL_MODEL_FILES = (CONFIG, GENERATION_CONFIG, *PROCESSOR_FILES, *TOKENIZER_FILES)
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
MODEL_FILES = (CONFIG, GENERATION_CONFIG, INDEX, SINGLE_FILE, "model-*.safetensors")


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `owner/name@revision` into (hub id, revision). A folder or a plain id gives (name, None)."""
    repository, _, revision = name.partition("@")
    if not revision or os.path.isabs(name) or os.path.isdir(os.path.expanduser(name)):
        return name, None
    return repository, revision
