"""README.md of what export.py writes: base model, data, the options that matter, the final loss.

Format: https://huggingface.co/docs/hub/model-cards (YAML between two lines of ---, then Markdown). The hub
refuses a base_model or a data set there that is no id of its own, so local paths stand in the text only.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from data.sources import find_recipe
from files.names import METRICS, SCORE, split_revision
from options.config import FIELDS, TOY_MODEL, Config
from options.declaration import format_value
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What decides the result; the rest says where and how fast it was computed.
TOLD = (
    "train_type", "n_bits", "group_size", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules",
    "dataset_format", "dataset_samples", "context_length", "num_epochs", "max_steps", "batch_size",
    "gradient_accumulation_steps", "world_size", "optimizer", "lr", "lr_scheduler", "lr_warmup", "wd",
    "apply_gradient_clipping", "grad_norm", "precision", "seed",
)  # fmt: skip
assert set(TOLD) <= FIELDS.keys()


def is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not os.path.exists(os.path.expanduser(name))


def card(config: Config, run: Path, base: str, title: str, what: str, library: str) -> str:
    """The whole README.md. base: the base model's name, with its revision; title: a heading; what: a
    paragraph on the files; library: what loads them, by the hub's name."""
    head: dict[str, Any] = {"library_name": library}
    base, revision = split_revision(base)
    if is_hub_id(base):
        head["base_model"] = base
    data = _hub_data(config)
    if data:
        head["datasets"] = [data]
    head |= {"pipeline_tag": "text-generation", "tags": ["fsdp-finetune", config.train_type]}
    rows = [(name, getattr(config, name)) for name in TOLD]
    table = "\n".join(f"| {name} | {format_value(value)} |" for name, value in rows if value is not None)
    shown_base = {TOY_MODEL: "a tiny Llama with random weights, made on the spot (`toy`)"}.get(
        base, f"`{base}`" + (f", revision `{revision}`" if revision else "")
    )
    from_hub = f" ({data})" if data else ""
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}\n\n{what}\n\n"
        f"- Base model: {shown_base}\n- Data: `{config.dataset}`{from_hub}\n- {_loss(run)}\n\n"
        f"Trained by `train.py` of fsdp-finetune with:\n\n| option | value |\n|---|---|\n{table}\n"
    )


def _hub_data(config: Config) -> str | None:
    """The data set's id on the hub, if it has one."""
    try:
        recipe, file = find_recipe(config.dataset)
    except UserError:  # a recipe that was moved since
        return None
    return recipe.source if file is None and is_hub_id(recipe.source) else None


def _loss(run: Path) -> str:
    """The last line of metrics.jsonl in words; of best/, which has none, the evaluation that chose it."""
    try:
        if (run / SCORE).is_file():
            score = read_json(run / SCORE, MAX_CONFIG_BYTES)
            return f"Evaluation loss: {score['eval_loss']:.4f} after {score['step']:,} steps, the best of its run"
        last = json.loads((run / METRICS).read_text(encoding="utf-8").strip().splitlines()[-1])
        return f"Final loss: {last['loss']:.4f} after {last['step']:,} steps ({last['epoch']:.2f} epochs)"
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return "Final loss: not known (the run has no metrics.jsonl that can be read)"
