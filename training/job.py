"""`Job`: a checked run, with everything that a rank needs to start it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from checkpoints.same_run import run_identity
from checkpoints.storage import Checkpoint
from data.batches import StepSampler
from data.evaluation_data import EvaluationData
from data.row_text import RecordedRow
from data.rows import TokenizedRows, digest_rows
from data.template_choice import read_trained_tokenizer
from files.base_model import BaseModel
from files.config_parts import router_loss_factor, text_config
from files.model_folder import CheckpointFiles
from files.names import GENERATION_CONFIG, TOKENIZER_TEXTS
from files.weight_cache import CachePlan
from launch.gpus import Gpu, detect_gpu
from launch.precision import Precision, detect_precision
from launch.ranks import local_world_size
from models.family import Family
from models.registry import family_of
from options.config import Config, dump_yaml
from options.declaration import format_value
from training.recorded import CONTENT_OPTIONS
from training.warm_start import WarmStart


@dataclass(frozen=True)
class Job:
    """A checked run, the same on all ranks of a node."""

    config: Config  # final, every default filled in
    model_config: PretrainedConfig
    files: CheckpointFiles
    base: BaseModel  # as the weights were before the run
    rows: TokenizedRows
    evaluation: EvaluationData
    cache: CachePlan | None  # if --quantized_cache is still to be written
    saved: Checkpoint | None  # the checkpoint that the run is resumed from
    adapter: WarmStart | None  # the adapter of --adapter
    started: float  # when the run began, as time.time() returns it
    # {name: text} of the files of a model folder in which a result differs from its base: an untied config,
    # the tokenizer in use, the stops that were learned.
    small_files: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # lines to print once at start
    first_rows: tuple[RecordedRow, ...] = ()  # for run.json

    @cached_property
    def family(self) -> Family:
        """The model's family, with its vision parts if the run has images."""
        return family_of(self.model_config, images=self.config.has_images)

    @cached_property
    def precision(self) -> Precision:
        """What --precision means on this process's GPU."""
        return detect_precision(self.config.precision)

    @cached_property
    def gpu(self) -> Gpu | None:
        """The kind of this process's GPU; None without one."""
        return detect_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __getstate__(self) -> dict:
        """Leave out the cached properties: another process has another GPU, and families hold functions."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def output_dir(self) -> str:
        """--output_dir, which is never None here."""
        assert self.config.output_dir is not None
        return self.config.output_dir

    @property
    def adapter_files(self) -> dict[str, str]:
        """{name: text} of the files beside a result that is no model folder.

        generation_config.json is one of them if the base does not stop at the same tokens, and with
        --chat_template the tokenizer's files are.
        """
        names = {GENERATION_CONFIG}
        if self.config.chat_template is not None:
            names |= {*TOKENIZER_TEXTS}
        return {name: text for name, text in self.small_files.items() if name in names}

    def read_tokenizer(self) -> Any:
        """Return the tokenizer of the run, with its --chat_template."""
        folder, rows = self.files.folder, text_config(self.model_config).vocab_size
        return read_trained_tokenizer(folder, f"--model_name {folder}", self.config.chat_template, rows)

    def total_steps(self, sampler: StepSampler) -> int:
        """Return the number of optimizer steps of the run."""
        steps = sampler.steps_per_epoch() * self.config.num_epochs
        return steps if self.config.max_steps < 0 else min(steps, self.config.max_steps)

    def options_file(self, **replaced) -> str:
        """Return the text of config.yaml, with output_dir absolute. replaced: options with other values."""
        return dump_yaml(self.config, output_dir=os.path.abspath(self.output_dir), **replaced)

    def run_identity(self) -> dict:
        """Return what a resumed run must share with its checkpoints: options, digests of contents."""
        evaluation = digest_rows(self.evaluation.rows) if self.evaluation.rows else ""
        rows, adapter = digest_rows(self.rows), self.adapter.digest if self.adapter else ""
        base = self.base.digest()
        router_loss = router_loss_factor(self.model_config)
        return run_identity(self.config, str(self.precision), base, rows, evaluation, adapter, router_loss)

    def with_shared_defaults(self, output_dir: str, chat_date: str | None, started: float) -> Job:
        """Return a copy with these values, which are rank 0's, in place of this node's."""
        config = dataclasses.replace(self.config, output_dir=output_dir, chat_date=chat_date)
        return dataclasses.replace(self, config=config, started=started)

    def facts_to_compare(self) -> dict[str, str]:
        """Return the options, versions, digests and others in which all nodes must agree, {name: text}."""
        options = dataclasses.asdict(self.config)
        # All nodes get rank 0's. If the date matters, the rows differ.
        del options["output_dir"], options["chat_date"]
        rows = [digest_rows(each) for each in (self.rows, self.evaluation.rows) if each]
        ranks = {"LOCAL_WORLD_SIZE": str(local_world_size(self.config.world_size))}
        return (
            ranks
            | {f"--{name}": _comparable_value(name, value) for name, value in options.items()}
            | {
                "the version of torch": torch.__version__,
                "the version of transformers": transformers.__version__,
                "the precision of --precision": str(self.precision),
                "what config.json and the weights' shapes say": self.base.structure_digest,
                "the weights": self.base.weights_digest.text(),
                "the factor of the routers' auxiliary loss": str(router_loss_factor(self.model_config)),
                "the adapter of --adapter": self.adapter.digest if self.adapter else "none",
                "the rows of the data": " ".join(rows),
                "the checkpoint to go on from": f"step {self.saved.step}" if self.saved else "none",
                # A node with a cache would read it, and one without would wait for all to make it.
                "what --quantized_cache holds": "nothing yet" if self.cache else "all that is needed",
                "the prompts of the samples": str([prompt.ids for prompt in self.evaluation.prompts]),
            }
        )


def _comparable_value(option: str, value) -> str:
    """Return an option's value as a text to compare between nodes, the same for all local paths.

    Paths of the model and the data may differ: their contents are compared instead.
    """
    paths = value.split(",") if option in CONTENT_OPTIONS and value is not None else ()  # of a mixture
    local = any(os.path.isabs(path) for path in paths)
    return "a path on this node" if local else format_value(value)
