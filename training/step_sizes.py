"""Rows of a step: --effective_batch_size, the batches that divide it, and the sizes of a resumed run."""

from __future__ import annotations

import dataclasses

from checkpoints.same_run import is_run_state, recorded_option
from checkpoints.storage import Checkpoint
from options.config import Config
from options.declaration import AUTO
from options.errors import UserError


def settle_effective_batch(config: Config) -> Config:
    """Return the options with the batch or the accumulation that follow from --effective_batch_size.

    A --batch_size auto stays, and its accumulation with it. Raises UserError if the numbers do not agree.

    config: with the final world_size.
    """
    total, world = config.effective_batch_size, config.world_size
    processes = f"{world} process{'es' * (world > 1)}"
    if total is None:
        return config
    name = f"--effective_batch_size {total}"
    if total % world:
        below, above = total - total % world, total - total % world + world
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(f"{name}: must be a multiple of the {processes}; {nearest} would be")
    batch, accumulation = config.batch_size, config.gradient_accumulation_steps
    if batch == AUTO and accumulation == AUTO:
        return config
    if AUTO in (batch, accumulation):
        given = "gradient_accumulation_steps" if batch == AUTO else "batch_size"
        number = getattr(config, given)
        if total % (world * number):
            factors = f"{processes} x --{given} {number}"
            raise UserError(f"{name}: must be a multiple of {factors} = {world * number}")
        quotient = total // (world * number)
        if batch == AUTO:
            return dataclasses.replace(config, batch_size=quotient)
        return dataclasses.replace(config, gradient_accumulation_steps=quotient)
    if world * batch * accumulation != total:
        raise UserError(
            f"{name}: {processes} x --batch_size {batch} x --gradient_accumulation_steps {accumulation}"
            f" are {world * batch * accumulation}; leave one of the three options out"
        )
    return config


def check_step_fits_epoch(config: Config, items: int) -> None:
    """Raise UserError if --effective_batch_size is more than an epoch has, so that no step could have it.

    items: rows, or packs, of an epoch.
    """
    total, world = config.effective_batch_size, config.world_size
    if total is None or total <= items:
        return
    kind = "packs" if config.packing else "rows"
    most = f"at most {items - items % world} is possible with" if items >= world else "too few for"
    processes = f"{world} process{'es' * (world > 1)}"
    raise UserError(f"--effective_batch_size {total}: an epoch has {items:,} {kind}; {most} {processes}")


def with_batch(config: Config, batch: int) -> Config:
    """Return the options with this --batch_size, and the accumulation that --effective_batch_size leaves."""
    config = dataclasses.replace(config, batch_size=batch)
    if config.effective_batch_size is None:
        return config
    rows = config.world_size * batch
    assert config.effective_batch_size % rows == 0
    return dataclasses.replace(config, gradient_accumulation_steps=config.effective_batch_size // rows)


def list_batches(config: Config, items: int, most: int | None = None) -> list[int]:
    """Return the values that --batch_size auto may take, ascending.

    None is larger than the data can use: a step has at most the rows of an epoch.

    Args:
        config: the options, with the final world_size.
        items: rows, or packs, of an epoch.
        most: upper limit; None = none.
    """
    if config.effective_batch_size is None:
        usable = -(-items // (config.world_size * config.gradient_accumulation_steps))
        batches = list(range(1, usable + 1))
    else:
        per_rank = config.effective_batch_size // config.world_size
        usable = -(-items // config.world_size)
        batches = [n for n in range(1, min(per_rank, usable) + 1) if per_rank % n == 0]
    return [n for n in batches if most is None or n <= most]


def adopt_recorded_sizes(config: Config, saved: Checkpoint | None) -> Config:
    """Return the options of a resumed run with its own numbers in place of `auto`.

    On another number of processes a step keeps its rows, or --effective_batch_size: the batch is the largest
    that divides them and is not above the recorded one.

    saved: the checkpoint to resume from; None = the options stay. `check_same_run` checks it later.
    """
    if saved is None or not config.unsettled or not is_run_state(saved.run):
        return config
    context, batch = (recorded_option(saved.run, name) for name in ("context_length", "batch_size"))
    if not all(type(number) is int and number > 0 for number in (context, batch)):
        return config
    if config.context_length == AUTO:
        config = dataclasses.replace(config, context_length=context)
    if config.batch_size != AUTO:
        return config
    per_rank, rest = divmod(config.effective_batch_size or saved.run["rows_per_step"], config.world_size)
    if rest or not per_rank:  # `check_same_run` says that a step cannot have these rows
        return dataclasses.replace(config, batch_size=batch, gradient_accumulation_steps=1)
    batch = max(n for n in range(1, min(batch, per_rank) + 1) if per_rank % n == 0)
    return dataclasses.replace(config, batch_size=batch, gradient_accumulation_steps=per_rank // batch)


def describe_adopted(config: Config, unsettled: list[str]) -> list[str]:
    """Return lines on the options `unsettled`, which were given as auto and are the resumed run's now."""
    names = [name for name in unsettled if name != "gradient_accumulation_steps"]
    return [f"--{name} auto: {getattr(config, name)}, as the resumed run has it" for name in names]
