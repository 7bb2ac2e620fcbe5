"""The streaming load: fills a sharded model from a checkpoint's files, one tensor at a time.

Each tensor is read and packed by one rank of a node, which sends the node's other ranks their shards. What
becomes of a tensor is its module's business (`ConvertingModule` in quantization/layer.py), so nothing here knows
adapters.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from files.finite import NONFINITE_MESSAGE, fp32_sum, is_finite, nonfinite_sums
from files.model_folder import CheckpointFiles
from files.tensors import PinnedBuffers, read_tensor
from files.weight_cache import CacheWriter
from launch.devices import set_current_device
from launch.memory import empty_on_host
from launch.ranks import RankInfo, gather_from_ranks
from models.family import Family, unwrapped_name
from models.longrope import make_rotary
from models.loss import FrozenEmbedding
from options.errors import UserError
from parallel.shards import fill_shard, local_shard, shard_count
from quantization.layer import ConvertingModule, convert_tensor, parameters_from, quantizer_for
from quantization.quantizers import PackedWeight, pack_weight


def load_weights(
    model: PreTrainedModel,
    family: Family,
    files: CheckpointFiles,
    rank_info: RankInfo,
    home: torch.device,
    seed: int,
    workers: int,
    cache: CacheWriter | None = None,
) -> None:
    """Gives a meta model, sharded by FSDP or not, memory and fills all of it: parameters from the checkpoint
    or by their module (`ConvertingModule.initial_values`), buffers from constants and the config.

    home: where the shards of the parameters are kept, rank_info.device or, with --use_cpu_offload, the CPU;
    workers: threads that read and pack; cache: gets what is packed.

    Raises UserError, the same on all ranks, if a tensor holds NaN or infinity, or cannot be packed or read as
    packed; AssertionError if anything was left unfilled: it would train on garbage. Collective.
    """
    _materialize(model, family, rank_info.device, home)
    params = {unwrapped_name(name): p for name, p in model.named_parameters()}
    filled = _stream(model, params, files, rank_info, workers, cache)
    for path, module in model.named_modules():
        if isinstance(module, ConvertingModule):
            # Seeded by name: the values depend neither on the order of modules nor on the number of ranks.
            generator = torch.Generator().manual_seed(
                (seed << 32) % 2**63 + zlib.crc32(unwrapped_name(path).encode())
            )
            for name, full in module.initial_values(generator).items():
                fill_shard(params[f"{unwrapped_name(path)}.{name}"], full)
                filled.add(f"{unwrapped_name(path)}.{name}")
    assert filled == set(params), f"not filled: {sorted(set(params) - filled)[:3]}"


def _materialize(model: PreTrainedModel, family: Family, device: torch.device, home: torch.device) -> None:
    model.to_empty(device=home)
    for module in model.modules():
        if isinstance(module, FrozenEmbedding) and module.on_host:
            module.weight = nn.Parameter(empty_on_host(module.weight, device.type), requires_grad=False)
    if model.config.tie_word_embeddings:  # to_empty makes new parameters, one for each of the two names
        model.get_submodule(family.head).weight = model.get_submodule(family.embedding).weight
    with device:  # no checkpoint holds its tables; only the config argument is stable between versions
        rotary = make_rotary(family, model.config)
    model.set_submodule(family.rotary, rotary)
    for module in model.modules():
        if isinstance(module, ConvertingModule):
            module.fill_buffers(device)
    filled = {
        id(b)
        for m in model.modules()
        if isinstance(m, ConvertingModule) or m is rotary
        for b in m.buffers(False)
    }
    for name, content in family.constant_buffers(model.config).items():
        path, _, last = name.rpartition(".")
        buffer = model.get_buffer(name)
        assert buffer.shape == content.shape, f"{name}: {content.shape} for {buffer.shape}"
        setattr(model.get_submodule(path), last, content.to(device, buffer.dtype))
        filled.add(id(model.get_buffer(name)))
    unknown = [name for name, buffer in model.named_buffers() if id(buffer) not in filled]
    assert not unknown, f"buffers that nothing fills: {unknown}"


def _stream(
    model: nn.Module, params: dict, files: CheckpointFiles, rank_info: RankInfo, workers: int, cache
) -> set:
    """Reads every tensor of the checkpoint once on each node, packs it as its module says, and sends every rank
    of the node its shard. Returns the names of the parameters that it filled.

    Tensors go round the node's ranks, so the contents are the same for any number of ranks. Each rank's threads
    work ahead on its own tensors while others are sent: at most `workers` of them are read and not yet sent.
    A rank whose tensor cannot be used sends zeros instead. Raises UserError as `load_weights`.
    """
    names = sorted(files.tensors, key=lambda n: files.tensors[n].file)  # file by file, each in its own order
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    node, filled, thread, finite = Node(rank_info), set(), threading.local(), FiniteCheck(files)
    read = partial(_read, finite=finite, device=rank_info.device, turn=threading.Lock(), thread=thread)
    mine = iter(names[rank_info.local_rank :: rank_info.local_world])
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(read, name, modules[name]) for name in islice(mine, workers))
        for i, name in enumerate(names):
            path, _, last = name.rpartition(".")
            targets = {key: params[f"{path}.{key}"] for key in parameters_from(modules[name], last)}
            content: dict[str, Any] = dict.fromkeys(targets)
            owner = i % rank_info.local_world
            if owner == rank_info.local_rank:
                try:
                    source = ahead.popleft().result()
                    if cache and isinstance(source, PackedWeight):
                        cache.add(name, source)
                    content |= convert_tensor(modules[name], last, source)
                except UserError as e:
                    finite.failed[name] = str(e)
                    # The node's other ranks wait for their shards, and end with this one when all is loaded.
                    content |= {key: _zeros(param, rank_info.device) for key, param in targets.items()}
                ahead.extend(pool.submit(read, later, modules[later]) for later in islice(mine, 1))
            for key, param in targets.items():
                node.share(param, content[key], owner)
                filled.add(f"{path}.{key}")
    finite.check(rank_info.world)
    return filled


def _zeros(param: nn.Parameter, device: torch.device) -> torch.Tensor:
    return torch.zeros(param.shape, dtype=param.dtype, device=device)


def _read(name: str, module: nn.Module, finite: FiniteCheck, device: torch.device, turn, thread):
    """The tensor on the device, packed if its module packs it. One thread at a time is on the device: what
    quantization needs for a moment, several times the tensor, is needed once. Raises UserError."""
    if device.type == "cuda" and not hasattr(thread, "stage"):
        set_current_device(device)
        thread.stage = PinnedBuffers(device.type)
    source = finite.files.read(name, getattr(thread, "stage", None))
    with turn:
        tensor = source.to(device)
        finite.note(name, tensor)
        return pack_weight(
            finite.files.tensor_origin(name), tensor, quantizer_for(module, name.rpartition(".")[2])
        )


class FiniteCheck:
    """Finds NaN and infinity in what this rank reads, by the sum of each tensor. The sums are read once, at
    the end: a GPU would have to be waited for at each tensor. failed: {tensor: message} of those that could
    not be read or packed."""

    def __init__(self, files: CheckpointFiles):
        self.files = files
        self.sums: dict[str, torch.Tensor] = {}
        self.failed: dict[str, str] = {}

    def note(self, name: str, tensor: torch.Tensor | PackedWeight) -> None:
        """Adds a tensor; one that was packed in its file was checked there."""
        if isinstance(tensor, torch.Tensor):
            self.sums[name] = fp32_sum(tensor)

    def check(self, world: int) -> None:
        """Raises UserError, the same on all ranks, if any rank has failed, or has read NaN or infinity.
        Collective. world: number of ranks."""
        found = dict(self.failed)
        for name in nonfinite_sums(self.sums):
            # The sum may have overflowed.
            if not is_finite(read_tensor(self.files.folder, self.files.tensors[name])):
                found[name] = f"{self.files.tensor_origin(name)} {NONFINITE_MESSAGE}"
        messages: dict[str, str] = {}
        for each in gather_from_ranks(found, world):
            messages |= each
        if messages:
            first = next(name for name in self.files.tensors if name in messages)
            others = f"; {len(messages) - 1} more of its tensors cannot be used" if len(messages) > 1 else ""
            raise UserError(messages[first] + others)


class Node:
    """The ranks of this machine, among which the contents of parameters are dealt out."""

    def __init__(self, rank_info: RankInfo):
        self.rank_info, self.group = rank_info, None  # None: all ranks
        if rank_info.local_world < rank_info.world:
            self.group, _ = dist.new_subgroups(rank_info.local_world)
        self.first = rank_info.rank - rank_info.local_rank

    def share(self, param: nn.Parameter, full: torch.Tensor | None, owner: int) -> None:
        """Fills this rank's part of a parameter from the full contents, which the node's rank `owner` has."""
        if self.rank_info.local_world == 1:
            assert full is not None
            fill_shard(param, full)
            return
        local = param.to_local() if isinstance(param, DTensor) else param
        rows = -(-param.shape[0] // shard_count(param))  # of the ranks with most: scatter sends equal parts
        mine = torch.empty(rows, *param.shape[1:], dtype=param.dtype, device=self.rank_info.device)
        parts = None
        if owner == self.rank_info.local_rank:
            assert full is not None
            assert full.shape == param.shape, f"{full.shape} for {param.shape}"
            full = full.to(param.dtype)
            ranks = range(self.first, self.first + self.rank_info.local_world)
            parts = [_as_bytes(_padded(local_shard(param, full, rank), rows)) for rank in ranks]
        # As bytes: codes are not numbers.
        dist.scatter(_as_bytes(mine), parts, src=self.first + owner, group=self.group)
        with torch.no_grad():
            local.copy_(mine[: local.shape[0]])


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _padded(local_shard: torch.Tensor, rows: int) -> torch.Tensor:
    if local_shard.shape[0] == rows:
        return local_shard
    return torch.cat(
        [local_shard, local_shard.new_zeros(rows - local_shard.shape[0], *local_shard.shape[1:])]
    )
