"""FSDP2's all-gather and reduce-scatter on copy engines, where GPUs can read each other's memory.

NCCL's kernels wait on multiprocessors for the other GPUs. A large matmul beside them has a block for each
multiprocessor, and all blocks wait for the few that find none (docs/design/collectives.md has measurements).
Here nothing waits on a multiprocessor. A rank's data is in a buffer that the others have mapped
(torch.distributed._symmetric_memory), and their copy engines fetch it. Counters order the streams: a stream
writes them into the other ranks' memory, and waits for theirs (CUDA driver API, "Stream Memory Operations").
torch's own symmetric-memory collectives are as fast, but gave wrong losses (docs/design/collectives.md).

Symmetric memory is not a stable part of torch, and not every machine allows it. So `make_copy_collectives`
tries everything that is needed before a run relies on it. If that fails, NCCL remains.

Shapes: W ranks of a group, n bytes.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from launch.gpus import forbids_peers
from models.loss import all_gather, reduce_scatter, shard_mesh
from options.errors import UserError

# Bytes of a unit's gradients. Larger ones, of whole layers that are trained, would occupy a buffer for the
# whole run: NCCL sums those.
MAX_SUMMED_BYTES = 2**27
MAX_WASTE = 2  # largest ratio of a buffer to the gathered unit in it
ALIGNMENT = 256  # bytes
TRIAL_ELEMENTS = 2**14
TIMEOUT_SECONDS = 60.0


class Buffer:
    """A buffer of n_bytes on each of n_ranks ranks, which every rank maps.

    Attributes:
        parts: n_ranks tensors [n_bytes] uint8, one of each rank, after `map`.
        user: a weak reference to the tensor for which this rank uses the buffer.
    """

    def __init__(self, n_ranks: int, n_bytes: int, device: torch.device):
        from cuda.bindings import driver  # comes with torch's CUDA builds
        from torch.distributed import _symmetric_memory as symmetric

        self.driver, self.symmetric, self.n_bytes, self.n_barriers = driver, symmetric, n_bytes, 0
        self.user: Callable[[], Tensor | None] = lambda: None
        self.end = -(-n_bytes // ALIGNMENT) * ALIGNMENT  # offset of the counters, one of each rank
        # In a pool of torch's own allocator, so that its statistics, and a limit, include the buffer.
        with torch.cuda.use_mem_pool(symmetric.get_mem_pool(device)):
            self.local = torch.zeros(self.end + 4 * n_ranks, dtype=torch.uint8, device=device)

    def map(self, group: dist.ProcessGroup) -> None:
        """Map this buffer's memory of all ranks, as `parts`. Collective; waits for the GPU."""
        self.rank = group.rank()
        handle = self.symmetric.rendezvous(self.local, group)
        mapped = [
            self.local if r == self.rank else handle.get_buffer(r, self.local.shape, self.local.dtype)
            for r in range(group.size())
        ]
        self.parts = [m[: self.n_bytes] for m in mapped]
        self.counter_addresses = [m.data_ptr() + self.end for m in mapped]
        torch.cuda.synchronize()
        dist.barrier(group)  # all counters are 0 before any rank counts

    def other_ranks(self) -> list[int]:
        """Return the other ranks, starting after this one: not all fetch from the same rank at once."""
        world = len(self.parts)
        return [(self.rank + i) % world for i in range(1, world)]

    def barrier(self) -> None:
        """Let the current streams of all ranks wait for each other; the hosts do not wait. Collective.

        Earlier writes are visible afterwards.
        """
        self.n_barriers += 1
        stream = torch.cuda.current_stream().cuda_stream
        after_all_before_it, at_least = 0, self.driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ.value
        for other in self.other_ranks():
            address = self.counter_addresses[other] + 4 * self.rank
            _raise_on_error(
                self.driver.cuStreamWriteValue32(stream, address, self.n_barriers, after_all_before_it)
            )
        for other in self.other_ranks():
            address = self.counter_addresses[self.rank] + 4 * other
            _raise_on_error(self.driver.cuStreamWaitValue32(stream, address, self.n_barriers, at_least))


def _raise_on_error(result: tuple) -> None:
    """Raise RuntimeError unless (status, ...), returned by a function of cuda.bindings, is a success."""
    if result[0].value:
        raise RuntimeError(f"CUDA driver: {result[0].name}")


class Buffers:
    """The buffers of one purpose, reused in the order of one stream.

    All ranks must acquire them in the same order. They do if all ranks release them in the same order.

    Args:
        group: the ranks that map the buffers.
        make: makes a Buffer.
        max_waste: largest ratio of a buffer to the tensor in it.
    """

    def __init__(self, group: dist.ProcessGroup, make: Callable = Buffer, max_waste: float = math.inf):
        self.group, self.make, self.max_waste = group, make, max_waste
        self.all: list[Buffer] = []

    def add(self, n_bytes: int, device: torch.device) -> Buffer:
        """Make a buffer, not mapped yet, add it to `all` and return it."""
        self.all.append(buffer := self.make(self.group.size(), n_bytes, device))
        return buffer

    def acquire(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Buffer, Tensor]:
        """Return (a mapped buffer, a tensor in this rank's part that reserves it while alive). Collective."""
        n_bytes = math.prod(size) * dtype.itemsize
        fitting = [b for b in self.all if n_bytes <= b.n_bytes <= self.max_waste * n_bytes]
        free = [b for b in fitting if b.user() is None]
        if not (buffer := min(free, key=lambda b: b.n_bytes, default=None)):
            buffer = self.add(n_bytes, device)
            buffer.map(self.group)
        tensor = buffer.parts[buffer.rank][:n_bytes].view(dtype).view(size)
        buffer.user = weakref.ref(tensor)
        return buffer, tensor

    def buffer_of(self, tensor: Tensor) -> Buffer:
        """Return the buffer that `acquire` returned with this tensor."""
        return next(b for b in self.all if b.parts[b.rank].data_ptr() == tensor.data_ptr())


class CopiedAllGather:
    """The all-gather, in the form that FSDPModule.set_custom_all_gather takes."""

    def __init__(self, buffers: Buffers):
        self.buffers = buffers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized tensor in this rank's part of a buffer, for the output. Collective."""
        return self.buffers.acquire(size, dtype, device)[1]

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill output_tensor [W n] with every rank's input_tensor [n]; the host does not wait. Collective.

        output_tensor comes from `allocate`, and has this rank's input_tensor [n] in its position already.
        """
        buffer, n = self.buffers.buffer_of(output_tensor), input_tensor.nbytes
        buffer.barrier()
        for other in buffer.other_ranks():
            part = slice(other * n, (other + 1) * n)
            buffer.parts[buffer.rank][part].copy_(buffer.parts[other][part], non_blocking=True)
        buffer.barrier()  # before any rank overwrites its input


class CopiedReduceScatter:
    """The reduce-scatter of sums, in the form that FSDPModule.set_custom_reduce_scatter takes.

    Every rank sums in the order of ranks.
    """

    def __init__(self, buffers: Buffers):
        self.buffers = buffers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an ordinary uninitialized tensor: inputs are copied into a buffer."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Set output_tensor [n] to the sum of this rank's row of all ranks' input_tensor [W n]. Collective.

        input_tensor may be overwritten.
        """
        assert op == dist.ReduceOp.SUM
        if input_tensor.nbytes > MAX_SUMMED_BYTES:
            reduce_scatter(output_tensor, input_tensor, op=op, group=group)
            return
        buffer, local = self.buffers.acquire(input_tensor.shape, input_tensor.dtype, input_tensor.device)
        local.copy_(input_tensor)
        rows, n = input_tensor.view(group.size(), -1), output_tensor.nbytes
        own_row = slice(buffer.rank * n, (buffer.rank + 1) * n)
        buffer.barrier()
        for other in buffer.other_ranks():
            rows[other].copy_(buffer.parts[other][own_row].view(input_tensor.dtype), non_blocking=True)
        buffer.barrier()
        torch.sum(rows, 0, out=output_tensor)


def make_copy_collectives(mesh: DeviceMesh) -> tuple[CopiedAllGather, CopiedReduceScatter] | None:
    """Return these collectives for the ranks that share a copy of the model; None: use NCCL. Collective."""
    shards = shard_mesh(mesh)
    if mesh.device_type != "cuda" or shards.size() == 1:
        return None
    return _try_copies(shards.get_group())


@cache  # never freed: made again, the buffers of ranks could have different offsets
def _try_copies(group: dist.ProcessGroup) -> tuple[CopiedAllGather, CopiedReduceScatter] | None:
    """Try the collectives, and return them if they work on all ranks, else None (cached). Collective."""
    # Multicast is not used here, and what its failure leaves behind can stop the other GPUs of a machine.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    trial = Trial(group)
    stages = trial.list_gpus, trial.check_peer_access, trial.allocate, trial.map, trial.matches_nccl
    # After each stage the ranks compare, so that none waits in a collective for a rank that failed alone.
    # Only torch's own collective within `map` is not covered.
    return trial.copies if all(_on_all_ranks(_succeeds(stage), group) for stage in stages) else None


def _succeeds(stage: Callable[[], bool]) -> bool:
    """Return stage(); False if it raises ImportError, AttributeError or RuntimeError: no support here."""
    try:
        return stage()
    # There are no bindings, torch has another version, or a container forbids it.
    except (ImportError, AttributeError, RuntimeError):
        return False


def _on_all_ranks(value: bool, group: dist.ProcessGroup) -> bool:
    """Return whether the value is true on all ranks. Collective."""
    values: list[bool] = [False] * group.size()
    dist.all_gather_object(values, value, group=group)
    return all(values)


class Trial:
    """A trial of the collectives, in stages that all ranks enter together.

    A stage is a method without arguments. It returns whether it succeeded on this rank.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.device = group, torch.device("cuda", torch.cuda.current_device())
        # Without a limit, a layer could take the head's buffer. The head would then need a second one.
        self.gathered, self.summed = Buffers(group, max_waste=MAX_WASTE), Buffers(group)
        self.copies = CopiedAllGather(self.gathered), CopiedReduceScatter(self.summed)

    def list_gpus(self) -> bool:
        """Keep the UUIDs of this process's GPUs; return whether NCCL's settings allow access between GPUs."""
        gpus = range(torch.cuda.device_count())
        self.names = [str(torch.cuda.get_device_properties(i).uuid) for i in gpus]
        return not forbids_peers()

    def check_peer_access(self) -> bool:
        """Return whether each rank has a GPU of its own that this rank's GPU can read. Collective."""
        own_gpu, ranks = self.device.index, [""] * self.group.size()
        dist.all_gather_object(ranks, self.names[own_gpu], group=self.group)
        here = {name: i for i, name in enumerate(self.names)}
        others = [here.get(name) for name in ranks if here.get(name) != own_gpu]
        return len(others) == len(ranks) - 1 and all(
            i is not None and torch.cuda.can_device_access_peer(own_gpu, i) for i in others
        )

    def allocate(self) -> bool:
        """Allocate two buffers and the tensors of `matches_nccl`. Always True, as a stage's result."""
        world = self.group.size()
        for buffers in self.gathered, self.summed:
            buffers.add(TRIAL_ELEMENTS * world * torch.float32.itemsize, self.device)
        generator = torch.Generator(self.device).manual_seed(self.group.rank())
        # Integers, whose sums are exact.
        shape = world, TRIAL_ELEMENTS
        self.input = torch.randint(2**10, shape, generator=generator, device=self.device).float()
        self.expected = torch.empty_like(self.input)
        self.row, self.expected_sum, self.sum = (self.input[self.group.rank()].clone() for _ in range(3))
        return True

    def map(self) -> bool:
        """Map all ranks' memory of `allocate`'s two buffers. Always True, as a stage's result. Collective."""
        for buffers in self.gathered, self.summed:
            buffers.all[0].map(self.group)
        return True

    def matches_nccl(self) -> bool:
        """Return whether both collectives give this rank NCCL's results. Collective. Raises UserError.

        On some machines GPUs read wrong values from each other; on some, nothing arrives: UserError.
        """
        start, (gather, scatter) = self.group.rank() * TRIAL_ELEMENTS, self.copies
        own_part = slice(start, start + TRIAL_ELEMENTS)
        all_gather(self.expected.flatten(), self.row, group=self.group)
        reduce_scatter(self.expected_sum, self.input, group=self.group)
        gathered = gather.allocate((self.input.numel(),), dtype=self.input.dtype, device=self.device)
        gathered[own_part].copy_(self.row)
        torch.sum(self.input, 0, out=self.sum)  # loads the kernel, which may wait for the GPU
        # From here until `_wait_for_event` nothing may wait for the GPU: without the counters it would hang.
        gather(gathered, gathered[own_part], self.group)
        scatter(self.sum, self.input.flatten(), self.group, dist.ReduceOp.SUM)
        _wait_for_event(torch.cuda.current_stream().record_event())
        return torch.equal(gathered, self.expected.flatten()) and torch.equal(self.sum, self.expected_sum)


def _wait_for_event(event: torch.cuda.Event) -> None:
    """Let the host wait for an event. Raises UserError after TIMEOUT_SECONDS.

    A stream that waits cannot be cancelled.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not event.query():
        if time.monotonic() > deadline:
            raise UserError(
                "the GPUs report access to each other's memory, but no data arrives; NCCL_P2P_DISABLE=1"
                " avoids that access"
            )
        time.sleep(0.001)
