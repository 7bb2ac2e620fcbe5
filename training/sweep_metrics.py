"""Reads the metrics.jsonl of a run while train.py writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from files.names import METRICS
from monitoring.run_facts import FACTS
from options.config import Config
from training.sweep_pruning import STEPS_PER_FOLD


class MetricsFile:
    """The metrics.jsonl of a run that is being written.

    Attributes:
        step: the last step in it.
        best: the lowest evaluation loss in it; infinite if it has none.
    """

    def __init__(self, folder: Path, config: Config):
        """folder: the RUN; config: its options."""
        self.folder, self.config = folder, config
        self.step, self.best = 0, math.inf
        self._read = self._worse = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 if it has not begun."""
        try:
            facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0
        steps = facts["data"]["steps_per_epoch"] * self.config.num_epochs
        return steps if self.config.max_steps < 0 else min(steps, self.config.max_steps)

    @property
    def share(self) -> int:
        """Share of the run's steps that are done, in thousandths: from 1 to STEPS_PER_FOLD."""
        return min(max(STEPS_PER_FOLD * self.step // max(self.total_steps, 1), 1), STEPS_PER_FOLD)

    @property
    def is_complete(self) -> bool:
        """Whether the run has taken all its steps."""
        return 0 < self.total_steps <= self.step

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended by itself: after all its steps, or by --early_stopping_patience."""
        patience = self.config.early_stopping_patience
        return self.is_complete or 0 < patience <= self._worse

    def new_evaluations(self) -> Iterator[tuple[int, float]]:
        """Yield (share of the run, loss) of each evaluation that was written since the last call.

        A resumed run cuts the file and writes on. Then a call may begin within a line, which is left out; the
        evaluations of the steps that are repeated have been yielded before.
        """
        for line in self._new_lines():
            try:
                metrics = json.loads(line)
                self.step = int(metrics["step"])
            except (ValueError, KeyError, TypeError):
                continue
            if "eval_loss" not in metrics:
                continue
            loss = metrics["eval_loss"]
            is_better = loss is not None and math.isfinite(loss) and loss < self.best
            self.best, self._worse = (loss, 0) if is_better else (self.best, self._worse + 1)
            if loss is not None and math.isfinite(loss):
                yield self.share, loss

    def read_all(self) -> None:
        """Read what there is: set `step` and `best`."""
        for _ in self.new_evaluations():
            pass

    def _new_lines(self) -> list[bytes]:
        """Return the complete lines after those of the last call."""
        path = self.folder / METRICS
        size = path.stat().st_size if path.exists() else 0
        if size < self._read:
            self._read = 0
        if size == self._read:
            return []
        with path.open("rb") as file:
            file.seek(self._read)
            text = file.read(size - self._read)
        end = text.rfind(b"\n") + 1
        self._read += end
        return text[:end].splitlines()
