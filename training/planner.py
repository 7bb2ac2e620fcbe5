"""What a run takes on a machine, and the largest batch and the longest context that fit.

All numbers come from `estimate_memory` (monitoring/memory_model.py). No weights are read and no GPU is used.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from files.saved_adapter import open_adapter
from launch.gpus import Gpu
from launch.precision import Precision, choose_precision
from launch.ranks import resolve_group_size, resolve_strategy
from models.adapters import adapted_linears, check_expert_adapters, check_quantization, check_rank
from models.llama_pro import is_expanded, new_layers
from monitoring.memory_model import MemoryEstimate, estimate_memory
from monitoring.run_sizes import run_sizes
from monitoring.sizes import RunSizes
from options.config import Config
from options.errors import UserError
from options.strategies import STRATEGIES
from parallel.optimizers import check_optimizer
from training.base_matmul import check_base_matmul
from training.batch_table import LARGEST_BATCH
from training.image_plan import ImagePlan
from training.machine import Machine, find_largest, fits, share_cpus
from training.memory_changes import PLANNED_CONTEXT_STEP
from training.planned_model import PlannedModel
from training.step_sizes import settle_effective_batch
from training.warm_start import adopt_options

# Options that the sizes of a model do not depend on; here they have values of no meaning.
OF_A_STEP: dict[str, Any] = {
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "context_length": 2,
    "no_sync": False,
    "optimizer": "adamw",
    "use_gradient_checkpointing": True,
    "use_activation_cpu_offload": False,
    "activation_budget": 0.0,
}


def resolve_on(machine: Machine, config: Config, planned: PlannedModel) -> Config:
    """Return the options as train.py resolves them on that machine, not on this one.

    Raises UserError if it would refuse them there. `check_model` compares them with the model.
    """
    world = machine.gpus if config.world_size == -1 else config.world_size
    if world > machine.gpus:
        raise UserError(f"--world_size {world}: the machine has {machine.gpus} (--gpus {machine.gpus})")
    if config.precision.startswith("bf16") and not machine.gpu.has_bf16:
        raise UserError(
            f"--precision {config.precision}: a {machine.gpu.name} has no bf16; use auto, fp16_autocast or"
            " fp32"
        )
    check_base_matmul(config.base_matmul, machine.gpu, precision_on(machine.gpu, config))
    check_optimizer(config.optimizer, config.use_cpu_offload)
    if config.adapter is not None:
        config = adopt_options(config, open_adapter(config.adapter), planned.model.config, planned.family)
    changes: dict[str, Any] = {"world_size": world}
    changes["sharding_strategy"] = resolve_strategy(config.sharding_strategy, world)
    if STRATEGIES[changes["sharding_strategy"]].replicas == "groups":
        changes["hybrid_shard_size"] = resolve_group_size(config.hybrid_shard_size, world)
    if config.compile == "auto":
        changes["compile"] = str(machine.gpu.runs_triton and planned.family.compiles).lower()
    return settle_effective_batch(dataclasses.replace(config, **changes))


def check_model(config: Config, planned: PlannedModel) -> None:
    """Raise UserError if the model cannot be trained as the options say. config: from `resolve_on`."""
    model, family = planned.model, planned.family
    if config.method.expansion and not is_expanded(model.config):
        raise UserError(
            f"--train_type {config.train_type}: {planned.name} has no new layers; give --new_blocks N, or a"
            " model that block_expansion.py has expanded"
        )
    if config.method.expansion:
        new_layers(model.config)
    check_quantization(model, family, config, planned.files)
    if config.method.adapter:
        check_rank(model, adapted_linears(model, family, config), config.lora_rank)
        check_expert_adapters(model, family, config)


def precision_on(gpu: Gpu, config: Config) -> Precision:
    """Return the dtypes of --precision on a kind of GPU."""
    return choose_precision(config.precision, has_gpu=True, has_bf16_gpu=gpu.has_bf16)


@dataclass(frozen=True)
class Estimator:
    """Estimates the memory of many runs of one model: estimator(config, tokens), in bytes.

    Adding up the sizes of a model takes from 10 ms to a second, so it is done once for options that share
    them.

    Attributes:
        planned: the model.
        gpu: the kind of the GPUs.
        cpus: CPUs of the host; None = not known.
        images: what rows have of them; None = nothing.
        known: sizes so far, by the options.
    """

    planned: PlannedModel
    gpu: Gpu
    cpus: int | None = None
    images: ImagePlan | None = None
    known: dict[Config, RunSizes] = field(default_factory=dict)

    def __call__(self, config: Config, tokens: int) -> MemoryEstimate:
        """Return the memory that a run takes.

        Args:
            config: from `resolve_on`.
            tokens: of the longest row or, with --packing, of a pack.
        """
        precision = precision_on(self.gpu, config)
        key = dataclasses.replace(config, **OF_A_STEP)
        if key not in self.known:
            model, family, files = self.planned.model, self.planned.family, self.planned.files
            self.known[key] = run_sizes(model, family, config, precision, files, tokens)
        pixels = self.images.pixels(config, tokens) if self.images else 0
        sizes = dataclasses.replace(self.known[key], tokens=tokens, pixels=pixels)
        cpus = share_cpus(self.cpus, config.world_size)
        return estimate_memory(config, precision, sizes, self.gpu, cpus)


def estimate(config: Config, planned: PlannedModel, gpu: Gpu, tokens: int) -> MemoryEstimate:
    """Return the memory that a run takes, in bytes. Args as for `Estimator`."""
    return Estimator(planned, gpu)(config, tokens)


def largest_batch(config: Config, planned: PlannedModel, machine: Machine, tokens: int) -> int:
    """Return the largest --batch_size that fits, or 0. Args as for `Estimator`."""
    estimator = Estimator(planned, machine.gpu, machine.cpus)

    def is_possible(batch: int) -> bool:
        return fits(estimator(dataclasses.replace(config, batch_size=batch), tokens), machine)

    return find_largest(1, LARGEST_BATCH, is_possible)


def longest_context(config: Config, estimator: Estimator, machine: Machine) -> int:
    """Return the most tokens of a row that fit, its images included, or 0.

    They are a multiple of PLANNED_CONTEXT_STEP, or the model's own limit.
    """
    limit, images = estimator.planned.context_limit, estimator.images
    if fits(estimator(config, limit), machine):
        return limit

    def is_possible(steps: int) -> bool:
        return fits(estimator(config, steps * PLANNED_CONTEXT_STEP), machine)

    steps = find_largest(1, limit // PLANNED_CONTEXT_STEP, is_possible)
    longest = PLANNED_CONTEXT_STEP * steps
    return 0 if images and longest < images.least_tokens else longest
