"""--log_to wandb: steps, samples, the best evaluation and facts of a run at Weights & Biases.

wandb's own process writes and sends them. It gets options, facts and texts of this program only: wandb's own
records of the git remote, which may hold a token, and of commands and paths are turned off.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from monitoring.loggers import NoLogger, Sample, logged_fields, public_facts, public_options
from monitoring.metrics import Metrics
from monitoring.run_files import read_samples
from monitoring.sample_images import find_copies
from options.config import Config
from options.errors import UserError

MAX_TABLE_ROWS = 500  # newest samples in the table, which is sent as a whole each time


class WandbLogger(NoLogger):
    """Logs to a run at wandb.

    Args:
        config: the run's options: wandb's project, name, group and entity, and all of them as its config.
        folder: the RUN; wandb writes its own files there too. The samples it holds begin the table.
        run_id: wandb's id of the resumed run; None = a new run.
    """

    name = "wandb"

    def __init__(self, config: Config, folder: Path, run_id: str | None):
        import wandb

        self.make_table, self.make_image = wandb.Table, cache(wandb.Image)
        self.samples = [
            (s["step"], Sample(s["prompt"], s["text"], find_copies(folder, s["images"])))
            for s in read_samples(folder)
        ]
        self.run = wandb.init(
            id=run_id,
            resume="allow",  # an unknown id starts a new run
            project=config.project_name,
            name=config.name,
            group=config.group,
            entity=config.entity,
            config=public_options(config),
            dir=str(folder),
            settings=wandb.Settings(disable_git=True, x_disable_meta=True),
        )

    def state_dict(self) -> dict:
        return {"wandb": self.run.id}

    def log_facts(self, facts: dict) -> None:
        public = public_facts(facts)
        memory = public.pop("memory")
        self.run.config.update(public, allow_val_change=True)  # which a resumed run has already
        self.run.summary.update({f"memory_{name}": gib for name, gib in memory.items()})

    def log(self, metrics: Metrics) -> None:
        self.run.log(logged_fields(metrics), step=metrics.step)

    def log_best(self, metrics: Metrics) -> None:
        self.run.summary.update({"best_eval_loss": metrics.eval_loss, "best_step": metrics.step})

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self.samples += [(step, sample) for sample in samples]
        del self.samples[:-MAX_TABLE_ROWS]
        most = max(len(sample.images) for _, sample in self.samples)
        rows = []
        for of_step, sample in self.samples:
            images = [self.make_image(str(path), caption=label) for label, path in sample.images]
            rows.append([of_step, sample.prompt, sample.answer, *images, *[None] * (most - len(images))])
        columns: list[str | int] = ["step", "prompt", "answer", *(f"image {i + 1}" for i in range(most))]
        self.run.log({"samples": self.make_table(columns=columns, data=rows)}, step=step)

    def finish(self) -> None:
        self.run.finish()


def check_wandb() -> None:
    """Raise UserError if wandb is neither logged in nor set to offline or disabled by WANDB_MODE."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun", "disabled"):
        return
    try:
        if "prompt" in inspect.signature(wandb.login).parameters:
            logged_in = wandb.login(prompt=False)
        else:  # before 0.30 it asks at the terminal if there is no key
            logged_in = bool(wandb.api.api_key) and wandb.login()
    except wandb.Error as e:
        raise UserError(f"--log_to wandb: the login was not accepted ({' '.join(str(e).split())})") from None
    if not logged_in:
        raise UserError("--log_to wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline")
