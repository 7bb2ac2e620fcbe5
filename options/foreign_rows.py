"""Translations of foreign settings of the rows: data sets, their length, templates, and what is learned."""

from __future__ import annotations

from options.foreign import Settings, Translation, is_off
from options.foreign_values import as_number, first

TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "llama-3": "llama3", "gemma": "gemma",
             "gemma3": "gemma", "gemma-3": "gemma", "qwen3": "qwen", "qwen-3": "qwen"}  # fmt: skip
NOT = ("false", "no", "off", "0")  # values that say no, not none


def name_set(base: str, config: str = "", split: str = "", revision: str = "") -> str:
    """Return a data set as --dataset names it: base:config:split@revision."""
    parts = f":{'' if config == 'default' else config}:{'' if split == 'train' else split}".rstrip(":")
    return base + parts + (f"@{revision}" if revision not in ("", "main") else "")


def dataset(given: Settings, settings: Settings) -> Translation:
    """Translate a data set with its configuration and split."""
    base = first(settings, "dataset_name", "dataset")
    if not base:
        return Translation(note="they are part of --dataset: name:config:split", lost=True, is_advice=True)
    parts = first(given, "dataset_config"), first(given, "dataset_train_split")
    return Translation({"dataset": name_set(base, *parts)})


def context_length(given: Settings, _settings: Settings) -> Translation:
    """Translate the tokens that a row is cut to; none means no cut elsewhere."""
    value = next(iter(given.values()))
    if is_off(value):
        note = "rows are not cut there; --context_length N cuts them here, and the default is 512"
        return Translation(note=note, lost=True, is_advice=True)
    return Translation({"context_length": value})


def answers_only(given: Settings, _settings: Settings) -> Translation:
    """Translate whether answers alone are learned, as they are here."""
    if any(value.strip().lower() in NOT for value in given.values()):
        return Translation(
            note="prompts are never learned; the format `completion` learns all of a text", lost=True
        )
    return Translation(note="answers alone are learned")


def share_of_rows(given: Settings, _settings: Settings) -> Translation:
    """Translate a size of the evaluation set; from 1 on it is a number of rows elsewhere."""
    value = next(iter(given.values()))
    number = as_number(value)
    if number is not None and number >= 1:
        return Translation(note=f"{number:g} rows: --eval_share is a share, as 0.05", lost=True)
    return (
        Translation(note="it is off") if is_off(value) or number == 0 else Translation({"eval_share": value})
    )


def chat_template(given: Settings, _settings: Settings) -> Translation:
    """Translate the chat template: a name, or a file of Jinja."""
    path = first(given, "chat_template_path")
    name = first(given, "chat_template", "template")
    if path.endswith(".jinja") or name.endswith(".jinja"):
        return Translation({"chat_template": path or name})
    if name.lower() in TEMPLATES:
        return Translation({"chat_template": TEMPLATES[name.lower()]})
    if "{" in name or first(given, "chat_template_jinja"):
        return Translation(note="write its text to a file: --chat_template FILE", lost=True)
    if path:
        return Translation(note="--chat_template takes a file of Jinja", lost=True)
    if is_off(name) or name.lower() in ("tokenizer_default", "default", "alpaca"):
        return Translation(note="the tokenizer's own is used")
    return Translation(note="the tokenizer's own is used; or name one by --chat_template", lost=True)
