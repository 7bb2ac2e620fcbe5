"""The interface of a logger, which gives a run's numbers and samples to another program; what it may give.

monitoring/wandb_logger.py and monitoring/tensorboard_logger.py implement it. Only rank 0 has a logger. Its
methods return at once, and may raise OSError if the disk is full.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from monitoring.metrics import Metrics
from options.config import Config


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

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Do nothing; a logger records (prompt, answer) of the samples after a step; 0 = before the first."""

    def finish(self) -> None:
        """Do nothing; a logger writes what is still to be written."""


def logged_fields(metrics: Metrics) -> dict[str, int | float]:
    """Return the values of a step by their names in metrics.jsonl, without its number."""
    return {name: value for name, value in metrics.fields().items() if name != "step"}


def public_facts(facts: dict) -> dict:
    """Return run.json without the rows of the data."""
    return {name: section for name, section in facts.items() if name != "first_rows"}


def public_options(config: Config) -> dict:
    """Return all options, {name: value}, with the last part alone of paths of this machine.

    config.yaml has the whole paths.
    """
    return {name: _hide_folders(value) for name, value in dataclasses.asdict(config).items()}


def _hide_folders(value):
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
