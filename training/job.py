"""`Job`: a run that has been checked, with all that a rank needs to start it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property

import torch
import transformers
from transformers import PretrainedConfig

from checkpoints import resume
from checkpoints.storage import Saved
from data.batches import StepSampler
from data.evaluation_sets import EvaluationData
from data.rows import TokenizedRows, digest_rows
from files.base_model import BaseModel
from files.model_folder import CheckpointFiles
from files.names import GENERATION_CONFIG
from files.weight_cache import CachePlan
from launch.precision import Precision, detect_precision
from launch.ranks import local_world_size
from models.family import Family
from models.registry import FAMILIES
from options.config import Config, dump_yaml
from options.declaration import format_value
from training.recorded import CONTENT_OPTIONS


@dataclass(frozen=True)
class Job:
    """A checked run. config: final, every default filled in; started: time.time(); small_files: {name: text}
    of the files of a model folder that a result has otherwise than its base: an untied config, the tokenizer
    in use, the stops that were learned; remarks: lines to print once at start. Each process that has it looks
    up the family, and what --precision means on its GPU, once."""

    config: Config
    model_config: PretrainedConfig
    files: CheckpointFiles
    base: BaseModel  # as the weights were before the run
    rows: TokenizedRows
    evaluation: EvaluationData
    cache: CachePlan | None  # if --quantized_cache is still to be written
    saved: Saved | None  # the checkpoint that the run is resumed from
    started: float
    small_files: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @cached_property
    def family(self) -> Family:
        return FAMILIES[self.model_config.model_type]

    @cached_property
    def precision(self) -> Precision:
        return detect_precision(self.config.precision)

    def __getstate__(self) -> dict:
        """Without what was looked up: another process has another GPU, and families hold functions."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def output_dir(self) -> str:
        assert self.config.output_dir is not None
        return self.config.output_dir

    @property
    def generation_settings(self) -> dict[str, str]:
        """generation_config.json of a result that is no model folder, if its base does not stop as the run
        learned to."""
        return {name: text for name, text in self.small_files.items() if name == GENERATION_CONFIG}

    def total_steps(self, sampler: StepSampler) -> int:
        """Optimizer steps of the run."""
        steps = sampler.steps_per_epoch() * self.config.num_epochs
        return steps if self.config.max_steps < 0 else min(steps, self.config.max_steps)

    def options_file(self, **instead) -> str:
        """config.yaml of the run, which is read from other folders than the current one. instead: as for
        `dump_yaml`."""
        return dump_yaml(self.config, output_dir=os.path.abspath(self.output_dir), **instead)

    def about(self) -> dict:
        """What a checkpoint says of the run: its options, and digests of the model below and of the rows."""
        evaluation = digest_rows(self.evaluation.rows) if self.evaluation.rows else ""
        rows = digest_rows(self.rows)
        return resume.about(self.config, str(self.precision), self.base.digest(), rows, evaluation)

    def with_shared_defaults(self, output_dir: str, chat_date: str | None, started: float) -> Job:
        """The same for a rank of several nodes. output_dir, chat_date: rank 0's; began: when the run began,
        as time.time() says it."""
        config = dataclasses.replace(self.config, output_dir=output_dir, chat_date=chat_date)
        return dataclasses.replace(self, config=config, started=started)

    def facts_to_compare(self) -> dict[str, str]:
        """What all nodes must have in common, as texts by name."""
        options = dataclasses.asdict(self.config)
        # Rank 0's are everybody's; the rows tell whether a day matters.
        del options["output_dir"], options["chat_date"]
        rows = [digest_rows(each) for each in (self.rows, self.evaluation.rows) if each]
        ranks = {"LOCAL_WORLD_SIZE": str(local_world_size(self.config.world_size))}
        return (
            ranks
            | {f"--{name}": _in_common(name, value) for name, value in options.items()}
            | {
                "the version of torch": torch.__version__,
                "the version of transformers": transformers.__version__,
                "the precision of --precision": str(self.precision),
                "what config.json and the weights' shapes say": self.base.structure_digest,
                "the weights": self.base.weights_digest.text(),
                "the rows of the data": " ".join(rows),
                "the checkpoint to go on from": f"step {self.saved.step}" if self.saved else "none",
                # One would read it, and the other wait for all to make it.
                "what --quantized_cache holds": "nothing yet" if self.cache else "all that is needed",
                "the prompts of the samples": str([prompt.ids for prompt in self.evaluation.prompts]),
            }
        )


def _in_common(option: str, value) -> str:
    """What nodes must have in common of an option: not where each has the model and the data, whose contents
    are compared."""
    local = option in CONTENT_OPTIONS and value is not None and os.path.isabs(value)
    return "a path on this node" if local else format_value(value)
