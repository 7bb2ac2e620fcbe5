"""The interface of a logger, which gives a run's numbers and samples to another program; what it may give.

monitoring/wandb_logger.py and monitoring/tensorboard_logger.py implement it. Only rank 0 has a logger. Its
methods return at once, and may raise OSError if the disk is full.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.dataset_names import split_mixture, split_name
from monitoring.metrics import Metrics
from options.config import Config
from options.errors import UserError

DATA_OPTIONS = ("dataset", "eval_dataset", "sample_prompts")  # which name sets of data


class Sample(NamedTuple):
    """A prompt and a model's answer.

    Attributes:
        prompt: as the model saw it.
        answer: the model's.
        images: (label, small copy) of the prompt's images, as monitoring/sample_images.py writes them.
    """

    prompt: str
    answer: str
    images: Sequence[tuple[str, Path]] = ()


class NoLogger:
    """The logger of a run without one: its methods do nothing."""

    name = ""  # as --log_to has it

    def state_dict(self) -> dict:
        """Return what a checkpoint saves of the logger: here nothing."""
        return {}

    def log_facts(self, facts: dict) -> None:
        """Do nothing; a logger records run.json, before the first step."""

    def log(self, metrics: Metrics) -> None:
        """Do nothing; a logger records a step."""

    def log_best(self, metrics: Metrics) -> None:
        """Do nothing; a logger records that the evaluation of this step is the best so far."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Do nothing; a logger records the samples after a step; 0 = before the first."""

    def finish(self) -> None:
        """Do nothing; a logger writes what is still to be written."""


def logged_fields(metrics: Metrics) -> dict[str, int | float]:
    """Return the values of a step by their names in metrics.jsonl, without its number."""
    return {name: value for name, value in metrics.fields().items() if name != "step"}


def public_facts(facts: dict) -> dict:
    """Return run.json without the rows of the data, with the last part alone of paths of this machine."""
    names = [each["name"] for each in facts.get("data", {}).get("sets", [])]
    public = {name: public_dataset(name) for name in sorted(names, key=len, reverse=True)}
    hidden = {name: short for name, short in public.items() if name != short}
    return {
        section: _hide_in_values(value, hidden) for section, value in facts.items() if section != "first_rows"
    }


def public_options(config: Config) -> dict:
    """Return all options, {name: value}, with the last part alone of paths of this machine.

    config.yaml has the whole paths.
    """
    return {
        name: public_dataset(value) if name in DATA_OPTIONS and value else _hide_folders(value)
        for name, value in dataclasses.asdict(config).items()
    }


def public_dataset(text: str) -> str:
    """Return a value of --dataset, or of an option like it, with the last part alone of each set's path.

    The weights of a mixture, the part and the revision of a set stay.
    """
    try:
        shares = split_mixture(text)
        names = [split_name(share.name) for share in shares]
    except UserError:  # a file of it was moved meanwhile
        return ",".join(map(_hide_folders, text.split(",")))
    return ",".join(
        str(dataclasses.replace(share, name=str(dataclasses.replace(name, base=_hide_folders(name.base)))))
        for share, name in zip(shares, names, strict=True)
    )


def _hide_in_values(value: Any, hidden: dict[str, str]) -> Any:
    """Return a value of run.json without paths in any of its texts.

    hidden: {name of a set: what stands for it}, the longest name first. Reasons contain such names.
    """
    if isinstance(value, dict):
        return {key: _hide_in_values(each, hidden) for key, each in value.items()}
    if isinstance(value, list):
        return [_hide_in_values(each, hidden) for each in value]
    if not isinstance(value, str):
        return value
    for name, public in hidden.items():
        value = value.replace(name, public)
    return _hide_folders(value)


def _hide_folders(value: Any) -> Any:
    """Return the last part of a text that is a path of this machine; other values as they are."""
    if not isinstance(value, str) or os.sep not in value:
        return value
    is_path = os.path.isabs(value) or value[0] in "~." or os.path.exists(value)
    return os.path.basename(value.rstrip(os.sep)) if is_path else value
