"""What a checkpoint holds in tensors: trained parameters, the optimizer's state of each, and random states.

    model.<parameter>                  sharded as the parameter is
    optimizer.<key>.<parameter>        the same, or one number; of 8-bit optimizers each rank's own: .<key>@<rank>
    random.cpu@<rank>, random.cuda@<rank>

Names are the checkpoint files' (`unwrapped_name`), so that neither the way the model is wrapped nor the number of ranks matters.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.tensor import DTensor

from checkpoints.storage import Reader, Saved, dtype_of, rank_of
from files.finite import find_nonfinite, is_finite
from launch.ranks import gather_from_ranks
from models.family import unwrapped_name
from options.errors import UserError, describe
from parallel.optimizers import ShardedAdamW, has_8bit_state, merge_8bit_states
from parallel.shards import local_shard

Tensors = dict[str, torch.Tensor]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {unwrapped_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def describe_not_finite(model: nn.Module) -> str:
    """Return what to tell of a model whose trained parameters hold NaN or infinity, else "". The same on all
    ranks. Collective; waits for a GPU."""
    shards = {name: local_part(param) for name, param in trained_parameters(model).items()}
    per_rank = gather_from_ranks(find_nonfinite(shards), dist.get_world_size())
    names = sorted({name for found in per_rank for name in found})
    if not names:
        return ""
    return (
        f"{names[0]} holds NaN or infinity after training ({len(names)} such in all), so no result is saved:"
        " the run has diverged; a lower --lr helps, and --save_every leaves checkpoints of before"
    )


@torch.no_grad()  # of DTensors, `to_local` is otherwise an operation to be differentiated, and takes ten times as long
def collect(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int
) -> tuple[Tensors, Tensors]:
    """(how each tensor is laid out: DTensors, and plain ones that are the same on every rank or belong to one; this
    rank's part of each, the live one), by name. trained: the trained parameters, by name."""
    local = _random_states(rank)
    layout = dict(local)
    for name, param in trained.items():
        layout[f"model.{name}"], local[f"model.{name}"] = param, local_part(param)
        for key, value in optimizer.state.get(param, {}).items():
            suffix, placed = _layout(value, param, rank, has_8bit_state(optimizer))
            stored = f"optimizer.{key}{suffix}.{name}"
            layout[stored], local[stored] = placed, placed if _is_number(value) else local_part(value)
    return layout, local


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _is_number(value) -> bool:
    return not isinstance(value, torch.Tensor)


def _random_states(rank: int) -> Tensors:
    states = {f"random.cpu@{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda@{rank}"] = torch.cuda.get_rng_state()
    return states


def _layout(value, param: nn.Parameter, rank: int, blocks: bool) -> tuple[str, torch.Tensor]:
    """(suffix of the key, layout) of an entry of the optimizer's state. bitsandbytes keeps numbers and plain tensors;
    those of 32 bits have the shape of the shard. blocks: some ranks may have 8-bit codes of the parameter."""
    if _is_number(value):
        return "", torch.tensor(value)
    if isinstance(value, DTensor) or value.dim() == 0:
        return "", value
    if blocks:
        return f"@{rank}", value
    return "", torch.empty_like(param, dtype=value.dtype, device="meta")


def restore(
    saved: Saved,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rank: int,
    group: dist.ProcessGroup,
) -> None:
    """Puts a checkpoint's tensors into the trained parameters, by name, and a fresh optimizer, on any number of ranks.
    Random states are a rank's own: one beyond those of the checkpoint keeps what it has. 8-bit moments of a rank that
    had the same rows stay what they are, others are put together anew. Collective. Raises UserError if it is of another
    model."""
    _check_names(saved, params)
    sources = {name: _sources(saved, name, param, rank) for name, param in params.items()}
    states = _fresh_states(saved, params, sources)
    wanted: Tensors = {f"model.{name}": p.detach() for name, p in params.items()}
    for name, state in states.items():
        wanted |= {f"optimizer.{key}.{name}": tensor for key, tensor in state.items()}
    random = {n: torch.empty_like(t) for n, t in _random_states(rank).items() if n in saved.tensors}
    with warnings.catch_warnings():
        # Of torch 2.11. What is a rank's own has the rank in its name, and is wanted by that rank only.
        warnings.filterwarnings("ignore", message="Detected mismatched keys")
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(wanted | random, storage_reader=Reader(saved), planner=planner, process_group=group)
        except dcp.CheckpointException as e:  # which is no Exception
            reason = describe(next(error for error, _ in e.failures.values()))
            raise UserError(f"{saved.folder}: cannot be loaded ({reason})") from e
    for name, tensor in wanted.items():
        if tensor.is_floating_point() and _is_spoilt(name, local_part(tensor)):
            raise UserError(f"{saved.folder}: cannot be loaded ({name} holds NaN or infinity)")
    of_optimizer: Mapping[str, dict] = states
    if isinstance(optimizer, ShardedAdamW):
        of_optimizer = {name: _of_shard(state, sources[name]) for name, state in states.items()}
    _fill_optimizer(optimizer, {params[name]: state for name, state in of_optimizer.items()})
    for name, rng_state in random.items():
        try:
            (torch.cuda.set_rng_state if name.startswith("random.cuda") else torch.set_rng_state)(rng_state)
        except RuntimeError as e:  # of numbers that no generator has
            raise UserError(f"{saved.folder}: cannot be loaded ({name}: {describe(e)})") from None


def _is_spoilt(name: str, tensor: torch.Tensor) -> bool:
    """Whether training could not go on with it. An infinite second moment is harmless: its update is zero."""
    return not is_finite(tensor) if name.startswith("model.") else bool(tensor.isnan().any())


def _check_names(saved: Saved, params: dict[str, nn.Parameter]) -> None:
    of_model = {name.removeprefix("model.") for name in saved.tensors if name.startswith("model.")}
    of_optimizer = {name.split(".", 2)[-1] for name in saved.tensors if name.startswith("optimizer.")}
    same = of_model == params.keys() and all(
        dtype_of(saved.tensors[f"model.{n}"]) == p.dtype for n, p in params.items()
    )
    if not same or not of_optimizer <= of_model:
        raise UserError(f"{saved.folder}: holds other parameters than those that are trained")


def _empty(saved: Saved, name: str) -> torch.Tensor:
    return torch.empty(saved.tensors[name]["shape"], dtype=dtype_of(saved.tensors[name]))


def _sources(saved: Saved, name: str, param: nn.Parameter, rank: int) -> dict[int, slice]:
    """{rank of the saved run: which of its rows} that make up this rank's rows of a parameter, in their order; a
    single one where a rank had the very same."""
    mine = local_shard(param, torch.arange(param.shape[0]), rank).tolist()
    found = {}
    for (start, *_), (length, *_), file in sorted(saved.tensors[f"model.{name}"]["chunks"]) if mine else ():
        first, end = max(start, mine[0]), min(start + length, mine[-1] + 1)
        if first < end:
            found[rank_of(file)] = slice(first - start, end - start)
    return found


def _fresh_states(
    saved: Saved, params: dict[str, nn.Parameter], sources: dict[str, dict[int, slice]]
) -> dict[str, Tensors]:
    """{parameter: {key of its state: tensor to be filled}}, as `_layout` has them; of what was a rank's own, that of
    the sources."""
    states: dict[str, Tensors] = {name: {} for name in params}
    for stored in saved.tensors:
        if not stored.startswith("optimizer."):
            continue
        _, key, name = stored.split(".", 2)
        _, of_rank, owner = key.partition("@")
        if not of_rank and saved.tensors[stored]["shape"]:
            # In host memory, from where the optimizer takes it where it wants it: a GPU may have no room for both.
            dtype = dtype_of(saved.tensors[stored])
            states[name][key] = torch.zeros_like(params[name], dtype=dtype, device="cpu").detach()
        elif not of_rank or int(owner) in sources[name]:
            states[name][key] = _empty(saved, stored)
    return states


def _of_shard(state: Tensors, sources: dict[int, slice]) -> dict[str, torch.Tensor | float]:
    """The state of a shard as bitsandbytes has it, out of what `_fresh_states` asked for; of an empty one none."""
    if not sources:
        return {}
    whole = {key: _as_bitsandbytes(value) for key, value in state.items() if "@" not in key}
    parts = [
        ({key.partition("@")[0]: value for key, value in state.items() if key.endswith(f"@{rank}")}, rows)
        for rank, rows in sources.items()
    ]
    return whole | (merge_8bit_states(parts) if parts[0][0] else {})


def _fill_optimizer(optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict]) -> None:
    """By the optimizer's own load_state_dict, which knows where each part of its state belongs. Its groups stay as
    they are: the options made them, and the schedule sets their rates."""
    filled = dict(enumerate(states[p] for group in optimizer.param_groups for p in group["params"]))
    optimizer.load_state_dict({"state": filled, "param_groups": optimizer.state_dict()["param_groups"]})


def _as_bitsandbytes(value: torch.Tensor) -> torch.Tensor | float:
    if value.dim() == 0:
        return value.item()
    return local_part(value)
