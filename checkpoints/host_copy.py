"""Copies a rank's tensors to host memory while the GPU computes; a checkpoint is written from the copies."""

from __future__ import annotations

import torch

from checkpoints.training_state import Tensors
from launch.memory import MIB, empty_on_host

# Bytes of host memory to allocate at once. torch rounds each page-locked allocation up to a power of two, and
# the driver may delay kernel launches while it locks one.
CHUNK_BYTES = 64 * MIB

ALIGNMENT = 64  # bytes, a multiple of every element's size


def allocate_host_buffers(tensors: Tensors, pin: bool) -> Tensors:
    """Return {name: uninitialized host tensor with the same shape and dtype}, cut out of few allocations.

    pin: Page-lock them, where the system allows it.
    """
    sizes = {name: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for name, tensor in tensors.items()}
    n_remaining, free, buffers = sum(sizes.values()), torch.empty(0, dtype=torch.uint8), {}
    for name, tensor in tensors.items():
        if sizes[name] > len(free):
            free = _allocate_chunk(max(sizes[name], min(CHUNK_BYTES, n_remaining)), pin)
        buffers[name] = free[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        free, n_remaining = free[sizes[name] :], n_remaining - sizes[name]
    return buffers


def _allocate_chunk(n_bytes: int, pin: bool) -> torch.Tensor:
    """Return `n_bytes` of host memory as uint8, page-locked if `pin` and the system allows it."""
    # Memory that the system refuses to page-lock only makes copies slower; that should not end a run.
    chunk = torch.empty(n_bytes, dtype=torch.uint8, device="meta")
    return empty_on_host(chunk, "cuda" if pin else "cpu")


class HostCopy:
    """Copies of a rank's tensors in host memory, which is allocated once.

    A background thread copies, from a GPU on a stream of its own, during the next step's forward and
    backward. Call in this order: `mark_ready` when the originals have their final values; `start` in the
    thread; when that has returned and before the originals change, `hold_gpu_until_copied`; before the copies
    are read, `wait`.
    """

    def __init__(self, device: torch.device):
        self.buffers: Tensors = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready_event, self.copied_event = (torch.cuda.Event() if self.stream else None for _ in range(2))
        self.pin = device.type == "cuda"

    def mark_ready(self) -> None:
        """Mark the point in the GPU's queue after which the originals can be copied; no-op without a GPU."""
        if self.ready_event:
            self.ready_event.record()

    def hold_gpu_until_copied(self) -> None:
        """Let later work in the GPU's queue, not the caller, wait for the copies; no-op without a GPU."""
        if self.copied_event:
            torch.cuda.current_stream().wait_event(self.copied_event)

    def allocate(self, local: Tensors) -> None:
        """Allocate buffers for the tensors that have none of their shape and dtype. Values are not read."""
        missing = {name: tensor for name, tensor in local.items() if not self._has_buffer(name, tensor)}
        for from_gpu in (False, True):  # copies of host tensors need no page-locked memory
            tensors = {name: tensor for name, tensor in missing.items() if tensor.is_cuda == from_gpu}
            self.buffers |= allocate_host_buffers(tensors, self.pin and from_gpu)

    def _has_buffer(self, name: str, tensor: torch.Tensor) -> bool:
        buffer = self.buffers.get(name)
        return buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)

    def start(self, local: Tensors) -> Tensors:
        """Start copying tensors to the host. Return {name: copy}; the copies are complete after `wait`."""
        self.allocate(local)
        if not self.stream:
            return self._copy(local)
        assert self.ready_event is not None and self.copied_event is not None
        self.stream.wait_event(self.ready_event)
        with torch.cuda.stream(self.stream):
            copies = self._copy(local)
            self.copied_event.record()
        return copies

    def _copy(self, local: Tensors) -> Tensors:
        """Return {name: buffer}. Copies from a GPU are only queued on the current stream."""
        copies = {name: self.buffers[name] for name in local}
        # One call, during which the training thread has the interpreter.
        torch._foreach_copy_(list(copies.values()), list(local.values()), non_blocking=True)
        return copies

    def wait(self) -> None:
        """Block the caller until the copies of the last `start` are complete."""
        if self.copied_event:
            self.copied_event.synchronize()
