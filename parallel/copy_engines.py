"""FSDP2's all-gather and reduce-scatter by the GPUs' copy engines, where those of a node reach each other's memory.

NCCL's kernels wait on multiprocessors for the other GPUs, and a large matmul beside them has a block for each: all wait
for the few that find none (docs/benchmarks.md, "8B shape, one and two H100"). Here nothing waits on a multiprocessor. What
a rank has to give lies in a buffer that the others have mapped (torch.distributed._symmetric_memory), their copy engines
fetch it, and streams are kept in order by numbers that they write into each other's memory and wait for (CUDA driver API,
"Stream Memory Operations").

Symmetric memory is no stable part of torch, and not every machine grants it: `make_copies` tries all that is needed
before a run relies on it. Where that fails, NCCL remains.

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

from models.loss import all_gather, reduce_scatter, shard_mesh
from options.errors import UserError

# Bytes of a unit's gradients. More, as of whole layers that are trained, would be held for good: NCCL sums those.
MOST_SUMMED = 2**27
WASTE = 2  # times as large as a gathered unit its buffer may be
ALIGNMENT = 256  # bytes
TRIAL = 2**14  # elements
PATIENCE_SECONDS = 60.0


class Buffer:
    """n bytes of each rank, W of them, which all map: parts, W times [n] uint8, once `map` has been called.

    taken: a weak reference to what this rank uses it for."""

    def __init__(self, world: int, n: int, device: torch.device):
        from cuda.bindings import driver  # comes with torch's CUDA builds
        from torch.distributed import _symmetric_memory as symmetric

        self.driver, self.symmetric, self.n, self.met = driver, symmetric, n, 0
        self.taken: Callable[[], Tensor | None] = lambda: None
        self.end = -(-n // ALIGNMENT) * ALIGNMENT  # where the numbers are, one of each rank
        # In a pool of torch's own allocator, so that its statistics, and a limit, have it.
        with torch.cuda.use_mem_pool(symmetric.get_mem_pool(device)):
            self.own = torch.zeros(self.end + 4 * world, dtype=torch.uint8, device=device)

    def map(self, group: dist.ProcessGroup) -> None:
        """Collective, and waits for the GPU."""
        self.rank = group.rank()
        handle = self.symmetric.rendezvous(self.own, group)
        mapped = [
            self.own if r == self.rank else handle.get_buffer(r, self.own.shape, self.own.dtype)
            for r in range(group.size())
        ]
        self.parts, self.numbers = [m[: self.n] for m in mapped], [m.data_ptr() + self.end for m in mapped]
        torch.cuda.synchronize()
        dist.barrier(group)  # before anybody counts, all numbers are 0

    def others(self) -> list[int]:
        """The other ranks, each rank's own way round: not all fetch from the same one at once."""
        world = len(self.parts)
        return [(self.rank + i) % world for i in range(1, world)]

    def meet(self) -> None:
        """The current stream goes on when those of all ranks have come here, and finds what they wrote before."""
        self.met += 1
        stream = torch.cuda.current_stream().cuda_stream
        after_all_before_it, at_least = 0, self.driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ.value
        for other in self.others():
            at = self.numbers[other] + 4 * self.rank
            _checked(self.driver.cuStreamWriteValue32(stream, at, self.met, after_all_before_it))
        for other in self.others():
            at = self.numbers[self.rank] + 4 * other
            _checked(self.driver.cuStreamWaitValue32(stream, at, self.met, at_least))


def _checked(result: tuple) -> None:
    """result: of a function of cuda.bindings. Raises RuntimeError."""
    if result[0].value:
        raise RuntimeError(f"CUDA driver: {result[0].name}")


class Buffers:
    """Of one purpose, within which streams keep reuse in order. All ranks must take them in the same order, as they do
    when all let go of them in the same order. waste: times as large as what it holds a buffer may be."""

    def __init__(self, group: dist.ProcessGroup, make: Callable = Buffer, waste: float = math.inf):
        self.group, self.make, self.waste = group, make, waste
        self.all: list[Buffer] = []

    def add(self, n: int, device: torch.device) -> Buffer:
        """A buffer that is to be mapped."""
        self.all.append(buffer := self.make(self.group.size(), n, device))
        return buffer

    def take(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Buffer, Tensor]:
        """A buffer, and the beginning of this rank's part of it as a tensor, for as long as which is held it is taken."""
        n = math.prod(size) * dtype.itemsize
        free = [b for b in self.all if n <= b.n <= self.waste * n and b.taken() is None]
        if not (buffer := min(free, key=lambda b: b.n, default=None)):
            buffer = self.add(n, device)
            buffer.map(self.group)
        tensor = buffer.parts[buffer.rank][:n].view(dtype).view(size)
        buffer.taken = weakref.ref(tensor)
        return buffer, tensor

    def of(self, tensor: Tensor) -> Buffer:
        """The one that `take` gave with this tensor."""
        return next(b for b in self.all if b.parts[b.rank].data_ptr() == tensor.data_ptr())


class CopiedAllGather:
    """As FSDPModule.set_custom_all_gather takes it."""

    def __init__(self, buffers: Buffers):
        self.buffers = buffers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.buffers.take(size, dtype, device)[1]

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """output_tensor [W n]: of `allocate`, holding this rank's input_tensor [n] in its place already."""
        buffer, n = self.buffers.of(output_tensor), input_tensor.nbytes
        buffer.meet()
        for other in buffer.others():
            at = slice(other * n, (other + 1) * n)
            buffer.parts[buffer.rank][at].copy_(buffer.parts[other][at], non_blocking=True)
        buffer.meet()  # before anybody's next input takes the place of this one


class CopiedReduceScatter:
    """As FSDPModule.set_custom_reduce_scatter takes it, for sums. The sum of a rank is in the order of ranks."""

    def __init__(self, buffers: Buffers):
        self.buffers = buffers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """output_tensor [n]: the sum over ranks of this rank's row of their input_tensor [W n], which is overwritten."""
        assert op == dist.ReduceOp.SUM
        if input_tensor.nbytes > MOST_SUMMED:
            reduce_scatter(output_tensor, input_tensor, op=op, group=group)
            return
        buffer, own = self.buffers.take(input_tensor.shape, input_tensor.dtype, input_tensor.device)
        own.copy_(input_tensor)
        rows, n = input_tensor.view(group.size(), -1), output_tensor.nbytes
        at = slice(buffer.rank * n, (buffer.rank + 1) * n)
        buffer.meet()
        for other in buffer.others():
            rows[other].copy_(buffer.parts[other][at].view(input_tensor.dtype), non_blocking=True)
        buffer.meet()
        torch.sum(rows, 0, out=output_tensor)


def make_copies(mesh: DeviceMesh) -> tuple[CopiedAllGather, CopiedReduceScatter] | None:
    """For the ranks that share one copy of the model; None where NCCL is to do it. Collective."""
    shards = shard_mesh(mesh)
    if mesh.device_type != "cuda" or shards.size() == 1:
        return None
    return _tried(shards.get_group())


@cache  # they stay: freed and made again, ranks could come to different places
def _tried(group: dist.ProcessGroup) -> tuple[CopiedAllGather, CopiedReduceScatter] | None:
    # Multicast has no part in it, and what a failure leaves of that can stop the other GPUs of a machine.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    trial = Trial(group)
    stages = trial.name, trial.reach_each_other, trial.allocate, trial.map, trial.exchange
    # A rank that fails alone says so before the others are in a collective that it does not come to; but for torch's own
    # within `map`.
    return trial.copies if all(_all(_holds(stage), group) for stage in stages) else None


def _holds(stage: Callable[[], bool]) -> bool:
    try:
        return stage()
    # There are no bindings, torch is another one, or a container forbids it.
    except (ImportError, AttributeError, RuntimeError):
        return False


def _all(here: bool, group: dist.ProcessGroup) -> bool:
    """Whether it holds on all ranks."""
    answers: list[bool] = [False] * group.size()
    dist.all_gather_object(answers, here, group=group)
    return all(answers)


def _forbidden() -> bool:
    """Whether NCCL is told that GPUs are not to read each other's memory, or not that of all."""
    disabled, level = os.environ.get("NCCL_P2P_DISABLE", ""), os.environ.get("NCCL_P2P_LEVEL", "")
    return disabled not in ("", "0") or level not in ("", "5", "SYS")


class Trial:
    """In stages, which all ranks begin and end together. Each returns whether this rank can go on."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.device = group, torch.device("cuda", torch.cuda.current_device())
        # A layer in the head's buffer would have the head take a second one, for good.
        self.gathered, self.summed = Buffers(group, waste=WASTE), Buffers(group)
        self.copies = CopiedAllGather(self.gathered), CopiedReduceScatter(self.summed)

    def name(self) -> bool:
        gpus = range(torch.cuda.device_count())
        self.names = [str(torch.cuda.get_device_properties(i).uuid) for i in gpus]
        return not _forbidden()

    def reach_each_other(self) -> bool:
        """Whether each rank has a GPU of its own that this one can read."""
        own, ranks = self.device.index, [""] * self.group.size()
        dist.all_gather_object(ranks, self.names[own], group=self.group)
        here = {name: i for i, name in enumerate(self.names)}
        others = [here.get(name) for name in ranks if here.get(name) != own]
        return len(others) == len(ranks) - 1 and all(
            i is not None and torch.cuda.can_device_access_peer(own, i) for i in others
        )

    def allocate(self) -> bool:
        world = self.group.size()
        for buffers in self.gathered, self.summed:
            buffers.add(TRIAL * world * torch.float32.itemsize, self.device)
        generator = torch.Generator(self.device).manual_seed(self.group.rank())
        # Whole numbers, whose sums are exact.
        self.given = torch.randint(2**10, (world, TRIAL), generator=generator, device=self.device).float()
        self.expected = torch.empty_like(self.given)
        self.row, self.expected_sum, self.sum = (self.given[self.group.rank()].clone() for _ in range(3))
        return True

    def map(self) -> bool:
        for buffers in self.gathered, self.summed:
            buffers.all[0].map(self.group)
        return True

    def exchange(self) -> bool:
        """Whether they give what NCCL gives. There are machines whose GPUs read other numbers than stand there."""
        at, (gather, scatter) = self.group.rank() * TRIAL, self.copies
        all_gather(self.expected.flatten(), self.row, group=self.group)
        reduce_scatter(self.expected_sum, self.given, group=self.group)
        whole = gather.allocate((self.given.numel(),), dtype=self.given.dtype, device=self.device)
        whole[at : at + TRIAL].copy_(self.row)
        torch.sum(self.given, 0, out=self.sum)  # loads the kernel, which may wait for the GPU
        # From here until `_await` nothing may: numbers that never come would hold it up for good.
        gather(whole, whole[at : at + TRIAL], self.group)
        scatter(self.sum, self.given.flatten(), self.group, dist.ReduceOp.SUM)
        _await(torch.cuda.current_stream().record_event())
        return torch.equal(whole, self.expected.flatten()) and torch.equal(self.sum, self.expected_sum)


def _await(event: torch.cuda.Event) -> None:
    """Raises UserError if it does not come: a stream that waits cannot be called back."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while not event.query():
        if time.monotonic() > ends:
            raise UserError(
                "the GPUs say that they reach each other's memory, but nothing comes; NCCL_P2P_DISABLE=1 goes without"
            )
        time.sleep(0.001)
