"""Streaming load: fills a sharded model from a checkpoint's files, one tensor at a time.

One rank of each node reads and packs a tensor, and sends the node's other ranks their shards. The tensor's
module decides how it is packed (`ConvertingModule` in quantization/layer.py), so nothing here knows adapters.
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
from torch import nn
from transformers import PreTrainedModel

from files.finite import NONFINITE_MESSAGE, fp32_sum, is_finite, nonfinite_sums
from files.model_folder import CheckpointFiles
from files.tensors import PinnedBuffers
from files.weight_cache import CacheWriter
from launch.devices import set_current_device
from launch.memory import empty_on_host
from launch.ranks import RankInfo, gather_from_ranks
from models.family import Family, unwrapped_name
from models.longrope import make_rotary
from models.loss import FrozenEmbedding
from options.errors import UserError
from parallel.node_ranks import NodeRanks
from parallel.shards import fill_shard
from quantization.layer import (
    ConvertingModule,
    Part,
    convert_tensor,
    locate_tensor,
    parameters_from,
    part_of,
    quantizer_for,
)
from quantization.packing import pack_weight
from quantization.quantizers import PackedWeight


def load_weights(
    model: PreTrainedModel,
    family: Family,
    files: CheckpointFiles,
    rank_info: RankInfo,
    param_device: torch.device,
    seed: int,
    workers: int,
    cache: CacheWriter | None = None,
) -> None:
    """Allocate and fill a meta model, sharded by FSDP or not. Collective.

    Parameters come from the checkpoint or from their module (`ConvertingModule.initial_values`),
    buffers from constants and the config.

    Args:
        param_device: Where sharded parameters live: rank_info.device, or the CPU with --use_cpu_offload.
        seed: For the modules' initial values.
        workers: Number of threads that read and pack.
        cache: Receives the packed weights.

    Raises:
        UserError: A tensor holds NaN or infinity, or cannot be read or packed. The same on all ranks.
        AssertionError: A parameter or buffer was not filled: the model would train on garbage.
    """
    allocate(model, family, rank_info.device, param_device)
    params = {unwrapped_name(name): p for name, p in model.named_parameters()}
    filled = _stream_tensors(model, params, files, rank_info, workers, cache)
    filled |= fill_initial_values(model, params, seed)
    assert filled == set(params), f"not filled: {sorted(set(params) - filled)[:3]}"


def fill_initial_values(model: nn.Module, params: dict[str, nn.Parameter], seed: int) -> set[str]:
    """Fill the parameters that no checkpoint holds, such as adapters; return their names.

    params: all parameters, {name: parameter}.
    """
    filled = set()
    for path, module in model.named_modules():
        if isinstance(module, ConvertingModule):
            # Seeded by name: values depend neither on the order of modules nor on the number of ranks.
            path = unwrapped_name(path)
            generator = torch.Generator().manual_seed((seed << 32) % 2**63 + zlib.crc32(path.encode()))
            for name, full in module.initial_values(generator).items():
                fill_shard(params[f"{path}.{name}"], full)
                filled.add(f"{path}.{name}")
    return filled


def allocate(
    model: PreTrainedModel, family: Family, device: torch.device, param_device: torch.device
) -> None:
    """Allocate a meta model: parameters, uninitialized, on `param_device`; buffers, filled, on `device`.

    A frozen embedding may be in host memory. Raises AssertionError for a buffer that nothing fills.
    """
    model.to_empty(device=param_device)
    family.set_fixed_parameters(model, lambda fixed: fixed.to(device))  # no unit of FSDP brings them there
    for module in model.modules():
        if isinstance(module, FrozenEmbedding) and module.on_host:
            module.weight = nn.Parameter(empty_on_host(module.weight, device.type), requires_grad=False)
    if model.config.tie_word_embeddings:  # to_empty makes two parameters of the tied one
        model.get_submodule(family.head).weight = model.get_submodule(family.embedding).weight
    # Made anew: no checkpoint holds its tables, and only its config argument is stable between versions.
    with device:
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
    for name, content in family.all_constant_buffers(model.config).items():
        path, _, last = name.rpartition(".")
        buffer = model.get_buffer(name)
        assert buffer.shape == content.shape, f"{name}: {content.shape} for {buffer.shape}"
        # transformers rounds those of the text model to its dtype, and not a tower's rotary frequencies.
        dtype = content.dtype if family.is_of_vision(name) else buffer.dtype
        setattr(model.get_submodule(path), last, content.to(device, dtype))
        filled.add(id(model.get_buffer(name)))
    unknown = [name for name, buffer in model.named_buffers() if id(buffer) not in filled]
    assert not unknown, f"buffers that nothing fills: {unknown}"


def _stream_tensors(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    files: CheckpointFiles,
    rank_info: RankInfo,
    workers: int,
    cache: CacheWriter | None,
) -> set[str]:
    """Read and pack each tensor once per node, and fill every rank's shards. Collective.

    Returns the names of the filled parameters.

    The node's ranks take tensors in turn, so the contents are the same for any number of ranks. Each rank's
    threads prefetch its own tensors while others are sent: at most `workers` tensors are read and not yet
    sent. A rank whose tensor cannot be used sends zeros instead. Raises UserError like `load_weights`.
    """
    # File by file, in each file's own order.
    names = sorted(files.tensors, key=lambda n: files.tensors[n].file)
    located = {name: locate_tensor(model, name) for name in names}
    node, filled, thread, finite_check = NodeRanks(rank_info), set(), threading.local(), FiniteCheck(files)
    read = partial(
        _read, finite_check=finite_check, device=rank_info.device, device_lock=threading.Lock(), thread=thread
    )
    own_names = iter(names[rank_info.local_rank :: rank_info.local_world])
    with ThreadPoolExecutor(workers) as pool:
        prefetched = deque(pool.submit(read, name, *located[name][1:]) for name in islice(own_names, workers))
        for i, name in enumerate(names):
            path, module, attribute = located[name]
            targets = {key: params[f"{path}.{key}"] for key in parameters_from(module, attribute)}
            parts = {key: part_of(module, attribute, key) for key in targets}
            content: dict[str, Any] = dict.fromkeys(targets)
            owner = i % rank_info.local_world
            if owner == rank_info.local_rank:
                try:
                    source = prefetched.popleft().result()
                    if cache and isinstance(source, PackedWeight):
                        cache.add(name, source)
                    content |= convert_tensor(module, attribute, source)
                except UserError as e:
                    finite_check.failed[name] = str(e)
                    # The other ranks wait for their shards. All ranks fail together, after the last tensor.
                    content |= {
                        key: _zeros(param, parts[key], rank_info.device) for key, param in targets.items()
                    }
                prefetched.extend(pool.submit(read, n, *located[n][1:]) for n in islice(own_names, 1))
            for key, param in targets.items():
                node.scatter(param, parts[key], content[key], owner)
                filled.add(f"{path}.{key}")
    finite_check.check(rank_info.world)
    return filled


def _zeros(param: nn.Parameter, part: Part | None, device: torch.device) -> torch.Tensor:
    return torch.zeros(part.numel if part else param.shape, dtype=param.dtype, device=device)


def _read(
    name: str,
    module: nn.Module,
    attribute: str,
    finite_check: FiniteCheck,
    device: torch.device,
    device_lock: threading.Lock,
    thread: threading.local,
) -> torch.Tensor | PackedWeight:
    """Read a file's tensor to the device, packed if its module packs it. Raises UserError.

    attribute: the tensor's name in its module.
    The tensor's sum is added to `finite_check`; `thread` keeps the thread's page-locked buffers.

    Threads use the device one at a time: quantization briefly needs several times the tensor's memory, and so
    needs it only once.
    """
    if device.type == "cuda" and not hasattr(thread, "buffers"):
        set_current_device(device)
        thread.buffers = PinnedBuffers(device.type)
    source = finite_check.files.read(name, getattr(thread, "buffers", None))
    with device_lock:
        tensor = source.to(device)
        finite_check.add(name, tensor)
        quantizer = quantizer_for(module, attribute)
        return pack_weight(finite_check.files.tensor_origin(name), tensor, quantizer)


class FiniteCheck:
    """Finds NaN and infinity in the tensors that this rank reads, by the sum of each tensor.

    The sums are read once, at the end: reading each one would wait for the GPU.

    Attributes:
        failed: {tensor: message} for tensors that could not be read or packed.
    """

    def __init__(self, files: CheckpointFiles):
        self.files = files
        self.sums: dict[str, torch.Tensor] = {}
        self.failed: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor | PackedWeight) -> None:
        """Store the sum of a tensor, unless it was packed in its file: then it was checked there."""
        if isinstance(tensor, torch.Tensor):
            self.sums[name] = fp32_sum(tensor)

    def check(self, world: int) -> None:
        """Raise UserError, the same on all ranks, if a rank failed or read NaN or infinity. Collective.

        world: Number of ranks.
        """
        found = dict(self.failed)
        for name in nonfinite_sums(self.sums):
            # The sum of finite numbers may have overflowed.
            tensor = self.files.read(name)
            assert isinstance(tensor, torch.Tensor)
            if not is_finite(tensor):
                found[name] = f"{self.files.tensor_origin(name)} {NONFINITE_MESSAGE}"
        messages: dict[str, str] = {}
        for rank_messages in gather_from_ranks(found, world):
            messages |= rank_messages
        if messages:
            first = next(name for name in self.files.tensors if name in messages)
            others = f"; {len(messages) - 1} more of its tensors cannot be used" if len(messages) > 1 else ""
            raise UserError(messages[first] + others)
