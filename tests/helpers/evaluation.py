"""Options of small runs that evaluate."""

from __future__ import annotations


def options(checkpoints, data, *more) -> list[str]:
    """Of a run on `data` in batches of 5."""
    own = ["--model_name", checkpoints(), "--dataset", data, "--lora_rank", "8", "--batch_size", "5"]
    own += ["--context_length", "256"]
    return [str(a) for a in (*own, "--save_model", "false", *more)]
