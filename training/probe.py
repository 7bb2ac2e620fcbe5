"""plan.py --probe: two real steps with random weights on this machine's GPUs, beside what was predicted."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.evaluation_sets import prepare_sets
from data.fullest_images import fullest_images
from data.packing import PackSampler, make_sampler, max_sequence_length
from data.rows import TokenizedRows
from data.template_choice import read_trained_tokenizer
from files.model_folder import find_model
from launch.apart import Launcher
from launch.gpus import Gpu, detect_gpu, find_gpu
from launch.memory import GIB
from monitoring.memory_model import MemoryEstimate
from monitoring.page import duration
from options.config import Config
from options.errors import UserError
from options.plan import PlanOptions
from training.planned_model import PlannedModel, is_named_shape
from training.run_images import explain_refused_images, read_image_format
from training.step_clock import StepTimes
from training.trial import MAX_MICRO_BATCHES, Trial, TrialResult, run_trial

AFTER = ("load", "forward", "backward")  # phases whose estimate is what is in use when they end


@dataclass(frozen=True)
class Epoch:
    """What an epoch of --dataset has.

    Attributes:
        steps: optimizer steps.
        micro_batches: of each rank.
        tokens: of a sequence on average, padding included; missing rows of the last batch count as none.
        longest: tokens of its longest row or pack.
        run_steps: optimizer steps of the whole run.
    """

    steps: int
    micro_batches: int
    tokens: int
    longest: int
    run_steps: int


@dataclass(frozen=True)
class Probe:
    """What two steps took on this machine.

    Attributes:
        result: the trial's.
        ranks: their number.
        accumulation: micro-batches of a step of the run.
        tokens: of a row or pack of the plan.
        positions: tokens of an optimizer step on all ranks, padding included.
        epoch: None if it is not known.
        mean_times: times of a step whose rows have the epoch's mean length; None if that is not known.
        unknown: why the time of an epoch is unknown, or "".
    """

    result: TrialResult
    ranks: int
    accumulation: int
    tokens: int
    positions: int
    epoch: Epoch | None
    mean_times: StepTimes | None
    unknown: str

    @property
    def measured(self) -> dict[str, float]:
        """Bytes by phase of the estimate: in use after a phase, but the most in the optimizer's."""
        result = self.result
        found: dict[str, float] = {name: result.after[name] for name in AFTER if name in result.after}
        if "optimizer" in result.phases:
            found["optimizer"] = result.phases["optimizer"]
        return found | {"peak": result.peak}

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step of the longest rows, with all its micro-batches, once layers are compiled."""
        times = self.result.times
        return times.total(self.accumulation) if times else None

    @property
    def epoch_seconds(self) -> float | None:
        """About the seconds of an epoch's steps: all rows are taken to have their mean length."""
        if self.epoch is None or self.mean_times is None:
            return None
        return self.mean_times.total(self.epoch.micro_batches, self.epoch.steps)

    @property
    def run_seconds(self) -> float | None:
        """About the seconds of all steps of the run."""
        if self.epoch is None or self.epoch_seconds is None:
            return None
        return self.epoch_seconds * self.epoch.run_steps / self.epoch.steps


def check_gpus(options: PlanOptions) -> None:
    """Raise UserError unless this machine has the GPUs of the plan."""
    count = torch.cuda.device_count()
    if not count:
        raise UserError("--probe: this machine has no GPU; without --probe the plan needs none")
    if options.gpus > count:
        raise UserError(f"--gpus {options.gpus}: --probe runs on this machine's GPUs, and it has {count}")
    gpu = detect_gpu(torch.device("cuda", 0))
    if options.gpu is not None and gpu and not is_kind(gpu, find_gpu(options.gpu)):
        raise UserError(
            f"--gpu {options.gpu}: --probe runs on this machine's {gpu.name}; leave the option out"
        )


def is_kind(found: Gpu, named: Gpu) -> bool:
    """Return whether a GPU that was detected, NVIDIA GeForce RTX 4090, is of a kind of GPUS, RTX 4090."""
    words = re.sub(r" \d+ GB$", "", named.name).split()
    return set(words) <= set(re.split(r"[ -]", found.name)) and found.capability == named.capability


def run_probe(
    config: Config, planned: PlannedModel, tokens: int, has_rows: bool, try_rank: Callable
) -> Probe:
    """Run two steps of a planned run, and return what they took. Raises UserError for wrong data.

    Args:
        config: the run's options, resolved for this machine.
        planned: the model.
        tokens: of the longest row or pack.
        has_rows: whether --dataset was given.
        try_rank: runs a trial on a rank (train.py).
    """
    config = dataclasses.replace(config, context_length=tokens)
    rows, unknown = None, "" if has_rows else "it needs rows: give --dataset"
    if config.has_images and (not has_rows or is_named_shape(config.model_name)):
        raise UserError("--probe: with images it needs those of --dataset, and a model's folder or hub id")
    if has_rows and is_named_shape(config.model_name):
        unknown = f"{config.model_name} is a named shape, without a tokenizer for the rows of --dataset"
    elif has_rows:
        config, rows = read_rows(config, planned)
    launcher = Launcher(config.world_size, config.master_addr, config.master_port, preload=["train"])

    def take_steps(tokens: int) -> TrialResult:
        trial_rows = rows if config.packing else None
        images = fullest_images(rows, tokens) if rows and not config.packing else ()
        image_format = rows.image_format if rows else None
        parts = planned.model.config, planned.files, tokens, trial_rows, images, image_format
        trial = Trial(config, *parts)
        return run_trial(trial, try_rank, launcher)

    result = take_steps(tokens)
    epoch = count_epoch(config, rows) if rows else None
    times = result.times
    if epoch and result.fits and not config.packing and epoch.tokens < tokens:
        times = take_steps(epoch.tokens).times
    accumulation = config.gradient_accumulation_steps
    sequence = epoch.tokens if epoch and config.packing else tokens  # packs may have less than the context
    return Probe(
        result=result,
        ranks=config.world_size,
        accumulation=accumulation,
        tokens=tokens,
        positions=config.batch_size * config.world_size * accumulation * sequence,
        epoch=epoch,
        mean_times=times,
        unknown=unknown,
    )


def read_rows(config: Config, planned: PlannedModel) -> tuple[Config, TokenizedRows]:
    """Return (the options with what the data decides, the rows that a run would train on).

    planned: the model, which says how it takes images.

    Raises UserError for wrong data, or a model whose tokenizer cannot be read.
    """
    folder = find_model(config.model_name)
    name = f"--model_name {folder}"
    config = dataclasses.replace(config, chat_date=config.chat_date or datetime.date.today().isoformat())
    tokenizer = read_trained_tokenizer(Path(folder), name, config.chat_template, 2**31)
    image_format, reason = None, ""
    if config.has_images:
        image_format, reason = read_image_format(config, planned.model.config, planned.family, Path(folder))
    with explain_refused_images(reason):
        config, rows, _ = prepare_sets(config, tokenizer, image_format)
    return config, rows


def count_epoch(config: Config, rows: TokenizedRows) -> Epoch:
    """Return what an epoch of these rows has."""
    sampler = make_sampler(config, rows, 0, config.world_size)
    steps = sampler.steps_per_epoch()
    total = steps * config.num_epochs
    run_steps = total if config.max_steps < 0 else min(total, config.max_steps)
    micro_batches = -(-sampler.items_per_epoch() // (config.batch_size * config.world_size))
    if isinstance(sampler, PackSampler):
        return Epoch(steps, micro_batches, sampler.width, sampler.width, run_steps)
    sequences = micro_batches * config.batch_size * config.world_size
    tokens = max(-(-sampler.count_positions() // sequences), 2)  # one to learn, and one before it
    return Epoch(steps, micro_batches, tokens, max_sequence_length(config, rows), run_steps)


def describe(probe: Probe, predicted: MemoryEstimate) -> list[str]:
    """Return the lines about a probe: memory by phase, and the time of a step, an epoch and the run."""
    lines = [
        f"probe: two steps with random weights and the longest rows on {probe.ranks}"
        f" rank{'s' * (probe.ranks > 1)}; GiB of the fullest GPU:",
        f"  {'':<12}{'predicted':>10}{'measured':>10}{'ratio':>8}",
    ]
    for name, measured in probe.measured.items():
        planned = getattr(predicted, name)
        ratio = f"{measured / planned:8.2f}" if planned else ""
        lines.append(f"  {name:<12}{planned / GIB:10.2f}{measured / GIB:10.2f}{ratio}")
    if not probe.result.fits:
        room = f"; the GPU had room for {probe.result.room / GIB:.2f} GiB" if probe.result.room else ""
        return [*lines, f"it does not fit: the probe ran out of memory{room}"]
    lines.append(_describe_step(probe))
    if probe.epoch is None or probe.epoch_seconds is None or probe.run_seconds is None:
        return [*lines, f"the time of an epoch is unknown: {probe.unknown}"]
    epoch = probe.epoch
    lines.append(
        f"an epoch takes about {duration(probe.epoch_seconds)}: {epoch.steps:,} steps, of {epoch.tokens:,}"
        f" tokens a sequence on average; the run about"
        f" {duration(probe.run_seconds)}: {epoch.run_steps:,} steps"
    )
    if epoch.longest < probe.tokens:
        lines.append(f"no row of --dataset has more than {epoch.longest:,} tokens: a run takes less memory")
    return lines


def _describe_step(probe: Probe) -> str:
    """Return the line about the time of a step, and of the first one, which has fewer micro-batches."""
    assert probe.step_seconds is not None
    rate, taken = probe.positions / probe.step_seconds, min(probe.accumulation, MAX_MICRO_BATCHES)
    of = "of one micro-batch" if taken == 1 else f"of {taken} micro-batches"
    whole = f" of {probe.accumulation} micro-batches" if probe.accumulation > 1 else ""
    return (
        f"a step{whole} takes {probe.step_seconds:.2f} s ({rate:,.0f} tokens/s on all GPUs); the first one of"
        f" the probe, {of}, took {probe.result.step_seconds[0]:.1f} s, with what is compiled"
    )


def as_json(probe: Probe) -> dict:
    """Return a probe as an object for programs. Memory is in GiB, times in seconds; null is unknown."""
    return {
        "fits": probe.result.fits,
        "peak_gib": probe.result.peak / GIB,
        "phases": {name: size / GIB for name, size in probe.measured.items()},
        "step_seconds": probe.step_seconds,
        "epoch_seconds": probe.epoch_seconds,
        "run_seconds": probe.run_seconds,
        "steps_per_epoch": probe.epoch and probe.epoch.steps,
    }
