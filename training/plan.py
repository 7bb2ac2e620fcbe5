"""`Plan`: what a run takes on a machine, whether it fits, and what would make it fit."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from checkpoints.disk_sizes import DiskSizes
from launch.memory import GIB
from launch.precision import Precision
from monitoring.memory_model import MemoryEstimate
from monitoring.traffic import Traffic
from options.config import FIELDS, Config
from options.plan import Request
from training.batch_table import BatchTable
from training.fitting import Proposal
from training.image_plan import ImagePlan
from training.machine import Machine
from training.memory_changes import MEMORY_OPTIONS, NOT_COUNTED
from training.plan_curve import MemoryCurve
from training.planned_model import PlannedModel, is_named_shape

PLACEHOLDER = "MODEL"  # in commands, in place of a named shape, which train.py cannot load
EXPANDED = "EXPANDED_MODEL"  # in place of a model that block_expansion.py is still to expand


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it.

    Attributes:
        request: what was asked.
        planned: the model.
        machine: where it would run.
        assumption: why it is that kind of GPU, if the request does not say so; "" if it does.
        config: the options, resolved for the machine.
        precision: dtypes of the run.
        tokens: of the longest row or, with --packing, of a pack.
        images: what its rows have of them; None = a run on text alone.
        estimate: the memory that the run takes.
        fits: whether the machine has that much.
        proposals: what makes it fit if it does not, the cheapest first.
        searched: {option: value} that were searched because no --context_length was given; else {}.
        disk, traffic: what it writes to disks, and what a rank moves in a step.
        table: batches against contexts if the context was searched, and one fits; else None.
        curve: the peak against --curve; None without.
    """

    request: Request
    planned: PlannedModel
    machine: Machine
    assumption: str
    config: Config
    precision: Precision
    tokens: int
    images: ImagePlan | None
    estimate: MemoryEstimate
    fits: bool
    proposals: list[Proposal]
    searched: dict
    disk: DiskSizes
    traffic: Traffic
    table: BatchTable | None = None
    curve: MemoryCurve | None = None

    def command(self, changes: dict | None = None) -> str:
        """Return the command of the run to paste: as it was typed, with what was searched and changed.

        It names the number of ranks, since the machine that it runs on may have more GPUs. A named shape
        becomes PLACEHOLDER, and a model that is not expanded yet EXPANDED.
        """
        fixed: dict = {"model_name": PLACEHOLDER} if self.is_shape else {}
        if self.request.plan.new_blocks:
            fixed["model_name"] = EXPANDED
        if self.request.config.world_size == -1:
            fixed["world_size"] = self.config.world_size
        return self.request.command(fixed | self.searched | (changes or {}))

    def first_command(self) -> str | None:
        """Return the command that makes the expanded model; None if the run needs none."""
        if not (blocks := self.request.plan.new_blocks):
            return None
        name = PLACEHOLDER if self.is_shape else self.planned.name
        words = ["--model_name", name, "--new_blocks", str(blocks), "--output_dir", EXPANDED]
        return shlex.join(["python", "block_expansion.py", *words])

    @property
    def is_shape(self) -> bool:
        """Whether the model is a named shape only, without weights."""
        return is_named_shape(self.planned.name)

    def phases_gib(self) -> dict[str, float]:
        """Return {phase: GiB on the fullest GPU}, of the phases of MemoryEstimate and the peak."""
        phases = ("load", "forward", "backward", "optimizer", "peak")
        return {phase: getattr(self.estimate, phase) / GIB for phase in phases}

    @property
    def is_models_limit(self) -> bool:
        """Whether the context is as long as the model allows."""
        return self.tokens == self.planned.context_limit

    @property
    def without_effect(self) -> list[str]:
        """The options that were typed and that its memory does not depend on."""
        known = MEMORY_OPTIONS | NOT_COUNTED
        return [name for name, _ in self.request.typed if name in FIELDS and name not in known]

    @property
    def not_counted(self) -> list[str]:
        """The options that were typed and that take memory which the estimate leaves out."""
        return [name for name, _ in self.request.typed if name in NOT_COUNTED]
