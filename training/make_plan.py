"""Makes a plan of what plan.py is asked (training/plan.py)."""

from __future__ import annotations

import dataclasses

import torch

from checkpoints.disk_sizes import disk_sizes
from launch.gpus import GPUS, detect_gpu, find_gpu
from launch.memory import GIB
from monitoring.memory_model import MemoryEstimate
from monitoring.traffic import step_traffic
from options.config import Config
from options.declaration import AUTO
from options.errors import UserError
from options.plan import PlanOptions, Request
from options.resolve import resolve
from training.batch_table import LARGEST_BATCH, SHORTEST_CONTEXT, BatchTable, make_batch_table
from training.fitting import MOST_GPUS, Proposal, Search
from training.image_plan import assume_images
from training.machine import RESERVED_GIB, Machine, find_largest, fits
from training.memory_changes import PLANNED_CONTEXT_STEP, as_arguments
from training.plan import Plan
from training.plan_curve import MemoryCurve, trace_peak
from training.planned_model import open_planned_model
from training.planner import Estimator, check_model, longest_context, precision_on, resolve_on
from training.step_sizes import list_batches, with_batch

DEFAULT_GPU = "4090"  # 24 GB and bf16: what most people have or rent first


def make_plan(request: Request) -> Plan:
    """Return the plan of a run. Raises UserError if it is not possible, or if no change makes it fit."""
    machine, assumption = choose_machine(request.plan)
    planned = open_planned_model(request.config.model_name, request.config.has_images)
    if request.plan.new_blocks:
        from training.expanded_model import expand_planned  # with the packages that write models

        planned = expand_planned(planned, request.plan.new_blocks)
    config = resolve_on(machine, request.config, planned)
    check_model(config, planned)
    images = assume_images(planned, config, request.plan.images_per_row)
    estimator = Estimator(planned, machine.gpu, machine.cpus, images)
    searched, table = search_sizes(config, "context_length" not in request.given, estimator, machine)
    config = dataclasses.replace(config, **searched)
    tokens = config.context_length
    if images:
        images.check_context(tokens)
    estimated, precision = estimator(config, tokens), precision_on(machine.gpu, config)
    is_enough = fits(estimated, machine)
    parts = planned.model, planned.family, config, precision, planned.files
    return Plan(
        request=request,
        planned=planned,
        machine=machine,
        assumption=assumption,
        config=config,
        precision=precision,
        tokens=tokens,
        images=images,
        estimate=estimated,
        fits=is_enough,
        proposals=[] if is_enough else propose(request.given | searched, estimator, machine, tokens),
        searched=searched,
        disk=disk_sizes(*parts),
        traffic=step_traffic(
            *parts, tokens, gpu=machine.gpu, pixels=images.pixels(config, tokens) if images else 0
        ),
        table=table,
        curve=trace(request.plan.curve, config, estimator, machine, tokens) if request.plan.curve else None,
    )


def search_sizes(
    config: Config, any_context: bool, estimator: Estimator, machine: Machine
) -> tuple[dict, BatchTable | None]:
    """Return ({option: value} that was searched, the table of batches against contexts if one fits).

    Without a context it is the longest of one row, and the step keeps its rows. If none fits, it is
    train.py's default. With a context, --batch_size auto is the largest batch that fits, or 1.

    Args:
        config: the run's options, in which sizes may be AUTO.
        any_context: whether no --context_length was given; AUTO means the same.
        estimator: of the model.
        machine: the GPUs.
    """
    limit = estimator.planned.context_limit
    if not any_context and config.context_length != AUTO:
        settled = search_batch(config, estimator, machine) if config.batch_size == AUTO else config
        return _changes(config, settled), None
    one_row, least = _split_batch(config), estimator.images.least_tokens if estimator.images else 1
    longest = longest_context(one_row, estimator, machine)
    if not longest:
        shortest = -(-least // PLANNED_CONTEXT_STEP) * PLANNED_CONTEXT_STEP
        default = min(max(Config.context_length, shortest), limit)
        return _changes(config, one_row) | {"context_length": default}, None

    def estimate_batch(batch: int, tokens: int) -> MemoryEstimate:
        return estimator(dataclasses.replace(one_row, batch_size=batch), tokens)

    searched = _changes(config, one_row) | {"context_length": longest}
    return searched, make_batch_table(estimate_batch, machine, longest, limit, least)


def search_batch(config: Config, estimator: Estimator, machine: Machine) -> Config:
    """Return the options with the largest batch that --batch_size auto may take and that fits, or 1."""
    batches = list_batches(config, items=LARGEST_BATCH * config.world_size)

    def is_possible(n: int) -> bool:
        return fits(estimator(with_batch(config, batches[n - 1]), config.context_length), machine)

    return with_batch(config, batches[max(find_largest(1, len(batches), is_possible), 1) - 1])


def _split_batch(config: Config) -> Config:
    """Return the options with micro-batches of one row, as many as leave the rows of a step as they are."""
    if config.batch_size != AUTO and config.effective_batch_size is None:
        rows = config.batch_size * config.gradient_accumulation_steps
        config = dataclasses.replace(config, gradient_accumulation_steps=rows)
    return with_batch(config, 1)


def _changes(old: Config, new: Config) -> dict:
    """Return {option: value} of the sizes of a step in which `new` differs from `old`."""
    names = ("batch_size", "gradient_accumulation_steps")
    return {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}


def trace(varied: str, config: Config, estimator: Estimator, machine: Machine, tokens: int) -> MemoryCurve:
    """Return the curve of the peak against the context or the batch.

    Args:
        varied: context, or batch.
        config: the run's options.
        estimator: of the model.
        machine: the GPUs.
        tokens: of a row, for a curve against the batch.
    """

    def peak_of_context(value: int) -> float:
        return estimator(config, value).peak

    def peak_of_batch(value: int) -> float:
        return estimator(dataclasses.replace(config, batch_size=value), tokens).peak

    limit, longest = machine.usable_gib, estimator.planned.context_limit
    if varied == "context":
        label = f"context of {config.batch_size} per GPU, tokens"
        least = estimator.images.least_tokens if estimator.images else 1
        start = max(SHORTEST_CONTEXT, 2 ** (least - 1).bit_length())
        points = trace_peak(peak_of_context, min(start, longest), limit, longest)
    else:
        label = f"batch of {tokens:,} tokens, rows"
        points = trace_peak(peak_of_batch, 1, limit, LARGEST_BATCH)
    return MemoryCurve(f"{config.model_name}, {config.train_type}, {machine}", label, points, limit)


def choose_machine(options: PlanOptions) -> tuple[Machine, str]:
    """Return (the machine that the options describe, why its GPUs are of that kind if they do not say so).

    Raises UserError for an unknown kind.
    """
    assumption = ""
    if options.gpu is not None:
        gpu = find_gpu(options.gpu)
    elif found := detect_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        gpu, assumption = found, "this machine's GPU; --gpu names another"
    else:
        gpu, assumption = GPUS[DEFAULT_GPU], "no GPU here, so this kind is assumed; --gpu names another"
    gib = options.gib or gpu.gib
    gpu = dataclasses.replace(gpu, gib=gib)
    return Machine(gpu, options.gpus, gib, options.host_gib, options.cpus), assumption


def propose(given: dict, estimator: Estimator, machine: Machine, tokens: int) -> list[Proposal]:
    """Return what makes the run fit. Raises UserError, which says what would be needed, if nothing does.

    Args:
        given: the options of train.py that were given, or searched.
        estimator: of the model.
        machine: the GPUs.
        tokens: of the longest row or, with --packing, of a pack.
    """
    planned = estimator.planned

    def resolve_with(machine: Machine, options: dict) -> Config:
        config = resolve_on(machine, resolve(given | options)[0], planned)
        if "train_type" in options:
            check_model(config, planned)
        return config

    shortest = max(SHORTEST_CONTEXT, estimator.images.least_tokens if estimator.images else 1)
    search = Search(machine, tokens, planned.files.prequantized, resolve_with, estimator, shortest)
    if proposals := search.find():
        return proposals
    strongest, gpus = search.strongest(), search.least_gpus()
    needed = f"{strongest.estimate.peak / GIB + RESERVED_GIB:.1f} GiB on each GPU"
    if machine.host_gib is not None:
        needed += f" and {strongest.estimate.host / GIB:.1f} GiB of host memory"
    more = (
        f"{gpus} GPUs of this kind would do" if gpus else f"not even {MOST_GPUS} GPUs of this kind would do"
    )
    changed = f"with {as_arguments(strongest.options)} " if strongest.options else ""
    raise UserError(
        f"--model_name {planned.name}: no option makes it fit {machine}: {changed}it needs {needed}; {more}"
    )
