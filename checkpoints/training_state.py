"""The tensors of a checkpoint: trained parameters, the optimizer's state of each, and random states.

    model.<parameter>                  sharded as the parameter is
    optimizer.<key>.<parameter>        sharded as the parameter is, or one number
    optimizer.<key>@<rank>.<parameter> one rank's own state, of 8-bit optimizers
    random.cpu@<rank>, random.cuda@<rank>

Names are those of the model's checkpoint files (`unwrapped_name`), so they depend neither on wrapping
nor on the number of ranks.
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

from checkpoints.storage import Checkpoint, CheckpointReader, rank_of_file, stored_dtype
from files.finite import find_nonfinite, is_finite
from launch.ranks import gather_from_ranks
from models.family import unwrapped_name
from options.errors import UserError, describe
from parallel.optimizers import ShardedAdamW, has_8bit_state, merge_8bit_states
from parallel.shards import local_shard

Tensors = dict[str, torch.Tensor]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by their names in checkpoint files."""
    return {unwrapped_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def describe_not_finite(model: nn.Module) -> str:
    """Return an error message if trained parameters hold NaN or infinity, else "". The same on all ranks.

    Collective; waits for the GPU.
    """
    shards = {name: local_tensor(param) for name, param in trained_parameters(model).items()}
    per_rank = gather_from_ranks(find_nonfinite(shards), dist.get_world_size())
    names = sorted({name for found in per_rank for name in found})
    if not names:
        return ""
    tensors = "tensor" if len(names) == 1 else "tensors"
    return (
        f"{names[0]} holds NaN or infinity after training ({len(names)} such {tensors}), so no result is"
        " saved: the run has diverged; a lower --lr helps, and --save_every keeps earlier checkpoints"
    )


# Without no_grad, DTensor.to_local is a differentiable operation and takes ten times as long.
@torch.no_grad()
def collect_tensors(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int
) -> tuple[Tensors, Tensors]:
    """Return (layout, local): the sharded tensors of a checkpoint, and this rank's part of each; no copies.

    Args:
        trained: The trained parameters, by name.

    Returns:
        (layout, local), both by name. layout shows how each tensor is sharded: DTensors, and plain tensors
        that are the same on all ranks or belong to one rank. local has this rank's part of each.
    """
    local = _random_states(rank)
    layout = dict(local)
    for name, param in trained.items():
        layout[f"model.{name}"], local[f"model.{name}"] = param, local_tensor(param)
        for key, value in optimizer.state.get(param, {}).items():
            suffix, state_layout = _state_layout(value, param, rank, has_8bit_state(optimizer))
            full_name = f"optimizer.{key}{suffix}.{name}"
            layout[full_name] = state_layout
            local[full_name] = state_layout if _is_number(value) else local_tensor(value)
    return layout, local


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, or a plain tensor, detached."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _is_number(value) -> bool:
    return not isinstance(value, torch.Tensor)


def _random_states(rank: int) -> Tensors:
    """Return {name in a checkpoint: state} of this process's generators on the CPU and, if any, the GPU."""
    states = {f"random.cpu@{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda@{rank}"] = torch.cuda.get_rng_state()
    return states


def _state_layout(value, param: nn.Parameter, rank: int, is_8bit: bool) -> tuple[str, torch.Tensor]:
    """Return (suffix of the key, tensor that shows the sharding) for a value of the optimizer's state.

    The suffix is @<rank> for one rank's own state, else "". bitsandbytes has numbers and plain tensors; its
    32-bit tensors have the shape of the shard. is_8bit: some ranks may have 8-bit codes for the parameter.
    """
    if _is_number(value):
        return "", torch.tensor(value)
    if isinstance(value, DTensor) or value.dim() == 0:
        return "", value
    if is_8bit:
        return f"@{rank}", value
    return "", torch.empty_like(param, dtype=value.dtype, device="meta")


def restore_tensors(
    checkpoint: Checkpoint,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rank: int,
    group: dist.ProcessGroup,
) -> None:
    """Load a checkpoint into parameters, a new optimizer and the random generators. Collective.

    The number of ranks may have changed. Random states are per rank; ranks that the checkpoint lacks keep
    theirs. 8-bit moments are unchanged if a rank of the saved run had the same rows, and are assembled anew
    otherwise.

    Args:
        params: The trained parameters, by name.

    Raises UserError if the checkpoint has other parameters, holds NaN, or cannot be loaded.
    """
    _check_names(checkpoint, params)
    sources = {name: _find_sources(checkpoint, name, param, rank) for name, param in params.items()}
    states = _allocate_states(checkpoint, params, sources)
    targets: Tensors = {f"model.{name}": p.detach() for name, p in params.items()}
    for name, state in states.items():
        targets |= {f"optimizer.{key}.{name}": tensor for key, tensor in state.items()}
    random = {n: torch.empty_like(t) for n, t in _random_states(rank).items() if n in checkpoint.tensors}
    with warnings.catch_warnings():
        # Warning of torch 2.11. Per-rank tensors have the rank in their name; only that rank asks for them.
        warnings.filterwarnings("ignore", message="Detected mismatched keys")
        reader = CheckpointReader(checkpoint)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(targets | random, storage_reader=reader, planner=planner, process_group=group)
        except dcp.CheckpointException as e:  # which is no Exception
            reason = describe(next(error for error, _ in e.failures.values()))
            raise UserError(f"{checkpoint.folder}: cannot be loaded ({reason})") from e
    for name, tensor in targets.items():
        if tensor.is_floating_point() and _is_unusable(name, local_tensor(tensor)):
            raise UserError(f"{checkpoint.folder}: cannot be loaded ({name} holds NaN or infinity)")
    optimizer_states: Mapping[str, dict] = states
    if isinstance(optimizer, ShardedAdamW):
        optimizer_states = {name: _to_shard_state(state, sources[name]) for name, state in states.items()}
    _fill_optimizer(optimizer, {params[name]: state for name, state in optimizer_states.items()})
    for name, rng_state in random.items():
        try:
            (torch.cuda.set_rng_state if name.startswith("random.cuda") else torch.set_rng_state)(rng_state)
        except RuntimeError as e:  # the numbers are no generator's state
            raise UserError(f"{checkpoint.folder}: cannot be loaded ({name}: {describe(e)})") from None


def _is_unusable(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds NaN, or, if `name` is a parameter's (model.*), infinity.

    An infinite second moment is harmless: its update is zero.
    """
    return not is_finite(tensor) if name.startswith("model.") else bool(tensor.isnan().any())


def _check_names(checkpoint: Checkpoint, params: dict[str, nn.Parameter]) -> None:
    """Raise UserError unless the checkpoint has exactly the trained parameters, with their dtypes."""
    model_names = {name.removeprefix("model.") for name in checkpoint.tensors if name.startswith("model.")}
    state_names = {name.split(".", 2)[-1] for name in checkpoint.tensors if name.startswith("optimizer.")}
    same = model_names == params.keys() and all(
        stored_dtype(checkpoint.tensors[f"model.{n}"]) == p.dtype for n, p in params.items()
    )
    if not same or not state_names <= model_names:
        raise UserError(f"{checkpoint.folder}: holds other parameters than those that are trained")


def _find_sources(checkpoint: Checkpoint, name: str, param: nn.Parameter, rank: int) -> dict[int, slice]:
    """Return {rank of the saved run: slice of its rows} that make up this rank's rows of a parameter.

    They are in the order of rows, and a slice counts from the first row of its rank's shard. There is a
    single entry if a rank of the saved run had exactly these rows.
    """
    rows = local_shard(param, torch.arange(param.shape[0]), rank).tolist()
    sources = {}
    chunks = sorted(checkpoint.tensors[f"model.{name}"]["chunks"]) if rows else ()
    for (start, *_), (length, *_), file in chunks:
        first, end = max(start, rows[0]), min(start + length, rows[-1] + 1)
        if first < end:
            sources[rank_of_file(file)] = slice(first - start, end - start)
    return sources


def _allocate_states(
    checkpoint: Checkpoint, params: dict[str, nn.Parameter], sources: dict[str, dict[int, slice]]
) -> dict[str, Tensors]:
    """Return {parameter: {key of its state: tensor to fill}}, with the layout of `_state_layout`.

    Per-rank state is allocated only for the ranks in `sources`.
    """
    states: dict[str, Tensors] = {name: {} for name in params}
    for full_name, entry in checkpoint.tensors.items():
        if not full_name.startswith("optimizer."):
            continue
        _, key, name = full_name.split(".", 2)
        _, is_per_rank, owner = key.partition("@")
        dtype = stored_dtype(entry)
        if not is_per_rank and entry["shape"]:
            # In host memory, since a GPU may lack room for both; the optimizer moves it to where it needs it.
            states[name][key] = torch.zeros_like(params[name], dtype=dtype, device="cpu").detach()
        elif not is_per_rank or int(owner) in sources[name]:
            states[name][key] = torch.empty(entry["shape"], dtype=dtype)
    return states


def _to_shard_state(state: Tensors, sources: dict[int, slice]) -> dict[str, torch.Tensor | float]:
    """Return a shard's state as bitsandbytes has it, from the loaded tensors of `_allocate_states`.

    The state of an empty shard is empty.
    """
    if not sources:
        return {}
    common = {key: _to_bitsandbytes(value) for key, value in state.items() if "@" not in key}
    per_rank = [
        ({key.partition("@")[0]: value for key, value in state.items() if key.endswith(f"@{rank}")}, rows)
        for rank, rows in sources.items()
    ]
    return common | (merge_8bit_states(per_rank) if per_rank[0][0] else {})


def _fill_optimizer(optimizer: torch.optim.Optimizer, states: dict[nn.Parameter, dict]) -> None:
    """Load states through the optimizer's load_state_dict, which knows the device and dtype of each value.

    The parameter groups stay unchanged: the options made them, and the schedule sets their learning rates.
    """
    filled = dict(enumerate(states[p] for group in optimizer.param_groups for p in group["params"]))
    optimizer.load_state_dict({"state": filled, "param_groups": optimizer.state_dict()["param_groups"]})


def _to_bitsandbytes(value: torch.Tensor) -> torch.Tensor | float:
    return value.item() if value.dim() == 0 else local_tensor(value)
