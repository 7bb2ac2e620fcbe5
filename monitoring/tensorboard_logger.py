"""--log_to tensorboard: steps, samples and options of a run as events below <output_dir>/tensorboard.

A thread of the package tensorboard writes the events. It ends at a disk error, so the free space is checked
before, and after an error a new file is begun.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from files.disk_room import check_free_space
from files.names import EVENTS
from launch.memory import MIB
from monitoring.loggers import NoLogger, Sample, logged_fields, public_facts, public_options
from monitoring.metrics import Metrics
from options.config import Config
from options.errors import UserError

SPARE_BYTES = MIB  # that events leave free, for the next lines of metrics.jsonl
MAX_QUEUE = 10_000  # events that wait for a slow disk before the loop does; a step has some fifteen
FLUSH_SECONDS = 10


class TensorboardLogger(NoLogger):
    """Logs events for TensorBoard.

    Args:
        config: the run's options, which are logged as a text.
        folder: the RUN.
        steps_done: steps before the run was resumed. TensorBoard drops events of later steps that an earlier
            start of the run has written.
    """

    name = "tensorboard"

    def __init__(self, config: Config, folder: Path, steps_done: int):
        self.folder, self.steps_done, self.options = folder / EVENTS, steps_done, public_options(config)
        self.shows_images = True
        self.writer: Any = self._open(purge_step=steps_done + 1 if steps_done else None)

    def _open(self, purge_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(
            str(self.folder), purge_step=purge_step, max_queue=MAX_QUEUE, flush_secs=FLUSH_SECONDS
        )

    def log_facts(self, facts: dict) -> None:
        options = yaml.safe_dump(self.options, sort_keys=False)
        texts = {"options": options, "facts": json.dumps(public_facts(facts), indent=2)}
        self._write("add_text", {name: _as_code(text) for name, text in texts.items()}, self.steps_done)

    def log(self, metrics: Metrics) -> None:
        # As metrics.jsonl has null there. torch would print a warning of its own for each NaN.
        finite = {name: value for name, value in logged_fields(metrics).items() if math.isfinite(value)}
        self._write("add_scalar", finite, metrics.step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        texts = {
            f"samples/{i}": f"prompt\n\n{_as_code(each.prompt)}\n\nanswer\n\n{_as_code(each.answer)}"
            for i, each in enumerate(samples, 1)
        }
        self._write("add_text", texts, step)
        if self.shows_images:  # the prompts of a run do not change
            images = {
                f"samples/{i}/image_{j}": _read_pixels(path)
                for i, each in enumerate(samples, 1)
                for j, (_, path) in enumerate(each.images, 1)
            }
            self._write("add_image", images, step)
            self.shows_images = False

    def finish(self) -> None:
        if self.writer:
            self.writer.close()

    def _write(self, method: str, values: dict, step: int) -> None:
        """Call a method of the writer with each {tag: value}. Raises OSError without room on the disk."""
        check_free_space(self.folder, SPARE_BYTES)
        self.writer = self.writer or self._open()
        try:
            for tag, value in values.items():
                getattr(self.writer, method)(tag, value, step)
        except OSError:  # the thread has ended
            self.writer = None
            raise


def _read_pixels(path: Path) -> np.ndarray:
    """Return an image as uint8 [3, height, width]."""
    with Image.open(path, formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _as_code(text: str) -> str:
    """Return a text as a block of code in Markdown: TensorBoard shows it as it is."""
    return textwrap.indent(text, "    ", lambda line: True)


def check_tensorboard() -> None:
    """Raise UserError if the package tensorboard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "--log_to tensorboard: needs the package tensorboard; run `pip install tensorboard`"
        ) from None
