"""The memory that CUDA graphs are recorded in, and that nothing owns between their replays.

All graphs share one pool. They run one after the other, and no tensor in the pool is needed after the replay
that wrote it, once its results are copied. So all graphs, and what else is allocated there while none is
replayed, use the same memory.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from launch.memory import PEAK_MEMORY


class GraphMemory:
    """The memory pool of all graphs of this process, and the stream on which they are recorded."""

    retains_graph = False  # whether a replay needs the autograd graph of the recording: CUDA graphs do not

    def __init__(self, device: torch.device):
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream(device)

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record the kernels that `function` launches; they do not run yet.

        Returns:
            (the function's result, whose tensors have no values yet; a replay, which computes them).
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream), _no_garbage_collection():
                result = self._capture(graph, function)
        finally:
            current.wait_stream(self.stream)
            self.count_memory()
        return result, graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], Any]) -> Any:
        """Return the function's result, recorded into `graph` on the current stream."""
        # thread_local: other threads, as NCCL's watchdog, may ask the driver for events meanwhile.
        graph.capture_begin(self.pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]
        try:
            result = function()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # says only that the recording is invalid
                graph.capture_end()
            with contextlib.suppress(RuntimeError):  # capture_end stopped before it did this
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool.id)
            raise
        graph.capture_end()
        return result

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """Allocate the tensors of this context in the pool, while no graph is replayed.

        They must be freed before the next replay, which overwrites them.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        reserved = torch.cuda.memory_reserved()
        with PEAK_MEMORY.paused():
            try:
                with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
                    yield
            finally:  # after an error, too: kernels may still be running
                current.wait_stream(self.stream)
                if torch.cuda.memory_reserved() != reserved:  # the pool may have grown
                    self.count_memory()

    def without_owner(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the same tensors, but so that they do not keep memory in the pool from being used otherwise.

        A graph still reads or writes it: the pool returns no memory to the driver. A tensor that is not in
        the pool is kept.
        """
        segments = [(each["address"], each["address"] + each["total_size"]) for each in self.pool.snapshot()]

        def without(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not any(first <= storage.data_ptr() < end for first, end in segments):
                return tensor.detach()
            memory = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=tensor.device)
            same = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            return same.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

        return [without(tensor) for tensor in tensors]

    def count_memory(self) -> None:
        """Count the pool's memory as used, all of it: between replays torch's allocator counts it as free."""
        segments = self.pool.snapshot()
        free = sum(segment["total_size"] - segment["allocated_size"] for segment in segments)
        PEAK_MEMORY.uncounted = free


class _Memory:
    """Bytes of a GPU's memory, for `torch.as_tensor`, which makes a tensor of them without a copy."""

    def __init__(self, address: int, length: int):
        self.__cuda_array_interface__ = {
            "shape": (length,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's garbage collector from freeing GPU objects meanwhile, which would end a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
