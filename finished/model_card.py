"""README.md that export.py writes: base model, data, the options that decide the result, the losses.

Format: https://huggingface.co/docs/hub/model-cards (YAML between two lines of ---, then Markdown). The hub
refuses a base_model or a dataset that is not one of its ids, so local paths appear only in the text.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from data.dataset_names import split_mixture
from data.sources import find_recipe
from files.names import METRICS, SCORE, split_revision
from monitoring.best_step import find_better_step, read_evaluations, read_saved_step
from options.config import FIELDS, TOY_MODEL, TOY_VISION, Config
from options.declaration import format_value
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json
from options.presets import describe_preset

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Options that decide the result. The others say where and how fast it was computed.
CARD_OPTIONS = (
    "train_type", "preset", "n_bits", "group_size", "base_matmul", "lora_rank", "lora_alpha", "use_rslora",
    "lora_dropout", "lora_target_modules", "lora_expert_rank", "train_embeddings", "train_router",
    "dataset_format", "dataset_samples", "context_length", "num_epochs", "max_steps", "batch_size",
    "gradient_accumulation_steps", "world_size", "optimizer", "lr", "lora_plus_ratio", "lr_scheduler",
    "lr_warmup", "wd",
    "apply_gradient_clipping", "grad_norm", "precision", "seed",
)  # fmt: skip
IMAGE_OPTIONS = ("images", "image_size", "vision_targets", "vision_bits")  # on images only
assert {*CARD_OPTIONS, *IMAGE_OPTIONS} <= FIELDS.keys()


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form owner/name and is no local path."""
    return bool(HUB_ID.fullmatch(name)) and not os.path.exists(os.path.expanduser(name))


def render_card(config: Config, run: Path, base: str, title: str, description: str, library: str) -> str:
    """Render the whole README.md.

    Args:
        config: the run's options.
        run: the RUN's folder.
        base: the base model's name, with its revision.
        title: heading of the card.
        description: paragraph on the exported files.
        library: the hub's name of the library that loads them.
    """
    metadata: dict[str, Any] = {"library_name": library}
    base, revision = split_revision(base)
    if is_hub_id(base):
        metadata["base_model"] = base
    data = _find_hub_datasets(config)
    if data:
        metadata["datasets"] = data
    task = "image-text-to-text" if config.has_images else "text-generation"
    metadata |= {"pipeline_tag": task, "tags": ["fsdp-finetune", config.train_type]}
    names = (*CARD_OPTIONS, *(IMAGE_OPTIONS if config.has_images else ()))
    values = vars(config) | {"preset": describe_preset(config)}
    rows = [(name, values[name]) for name in names]
    table = "\n".join(f"| {name} | {format_value(value)} |" for name, value in rows if value is not None)
    shown_base = {
        TOY_MODEL: "the tiny Llama of the demo (`toy`)",
        TOY_VISION: "the tiny Gemma 3 with images (`toy_vision`)",
    }.get(base, f"`{base}`" + (f", revision `{revision}`" if revision else ""))
    from_hub = f" ({', '.join(data)})" if data else ""
    losses = "".join(f"- {line}\n" for line in _describe_losses(run))
    start = f"- Continued from the adapter: `{config.adapter}`\n" if config.adapter else ""
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {title}\n\n{description}\n\n"
        f"- Base model: {shown_base}\n{start}- Data: `{config.dataset}`{from_hub}\n"
        f"{losses}\n"
        f"Trained by `train.py` of fsdp-finetune with:\n\n| option | value |\n|---|---|\n{table}\n"
    )


def _find_hub_datasets(config: Config) -> list[str]:
    """Return the ids on the hub of the run's data sets that are from there, without moved recipes."""
    ids = []
    with contextlib.suppress(UserError):  # a recipe was moved since
        for share in split_mixture(config.dataset):
            recipe, file = find_recipe(share.name)
            if file is None and is_hub_id(recipe.source):
                ids.append(recipe.source)
    return list(dict.fromkeys(ids))


def _describe_losses(run: Path) -> list[str]:
    """Return lines with the evaluation loss of the weights in a RUN or its best/, and the last loss.

    A RUN's weights are those of the last step. If an earlier step evaluated better, the first line says so.
    """
    if (run / SCORE).is_file():
        with contextlib.suppress(ValueError, LookupError, TypeError, UserError):
            score = read_json(run / SCORE, MAX_CONFIG_BYTES)
            loss, step = score["eval_loss"], score["step"]
            return [f"Evaluation loss: {loss:.4f} after {step:,} steps, the best of its run"]
    lines, better, evaluations = [], find_better_step(run), read_evaluations(run)
    if better:
        lines.append(
            f"Best evaluation loss of the run: {better.loss:.4f} after {better.step:,} steps; those weights"
            " are in the run's `best/`, not here"
        )
    saved_step = read_saved_step(run)
    if saved_step is None and evaluations:
        lines.append("Evaluation and final loss: not known (the run does not say which step it saved)")
        return lines
    for step, loss in evaluations:
        if step == saved_step:
            shown = f"{loss:.4f}" if math.isfinite(loss) else "not finite"
            lines.append(f"Evaluation loss: {shown} after {step:,} steps")
    try:
        steps = map(json.loads, (run / METRICS).read_text(encoding="utf-8").strip().splitlines())
        last = next(line for line in steps if line["step"] == saved_step)
        shown = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        lines.append(f"Final loss: {shown} after {last['step']:,} steps ({last['epoch']:.2f} epochs)")
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        lines.append("Final loss: not known (the run has no metrics.jsonl that can be read)")
    return lines
