"""Options of small runs that evaluate."""

from __future__ import annotations


def options(checkpoints, data, *more) -> list[str]:
    """Return the options of a run on `data` in batches of 5, which saves no model."""
    common = ["--model_name", checkpoints(), "--dataset", data, "--lora_rank", "8", "--batch_size", "5"]
    common += ["--context_length", "256"]
    return [str(a) for a in (*common, "--save_model", "false", *more)]
