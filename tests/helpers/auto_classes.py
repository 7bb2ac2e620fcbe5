"""transformers' auto classes for models that predict text, wrappers too."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)


def auto_class(config):
    """Return transformers' auto class for a config; AutoModelForCausalLM does not know all wrappers."""
    return (
        AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    )


def load_transformers_model(folder: Path | str, **options):
    """Return what `from_pretrained` of the folder's auto class returns."""
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **options)
