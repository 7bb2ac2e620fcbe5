"""Copies of a rank's tensors in host memory, made while the GPU computes, for a checkpoint to be written."""

from __future__ import annotations

import contextlib

import torch

from checkpoints.training_state import Tensors
from launch.memory import MIB, can_pin

# Of host memory at once: torch rounds each piece of page-locked memory up to a power of two, and the driver may hold
# up what is launched on the GPU while it locks one.
PIECE = 64 * MIB


ALIGNED = 64  # bytes, a multiple of every element's size


def host_memory(tensors: Tensors, pin: bool) -> Tensors:
    """Room for a copy of each of these tensors, by name, cut out of few pieces."""
    room = {name: -(-tensor.nbytes // ALIGNED) * ALIGNED for name, tensor in tensors.items()}
    left, free, cut = sum(room.values()), torch.empty(0, dtype=torch.uint8), {}
    for name, tensor in tensors.items():
        if room[name] > len(free):
            free = _piece(max(room[name], min(PIECE, left)), pin)
        cut[name] = free[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        free, left = free[room[name] :], left - room[name]
    return cut


def _piece(n_bytes: int, pin: bool) -> torch.Tensor:
    if pin:
        # What the system does not page-lock any more is copied to slowly, and no reason to end a run.
        with contextlib.suppress(RuntimeError):
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(n_bytes, dtype=torch.uint8)


class HostCopy:
    """Copies of a rank's tensors in host memory, which is allocated once.

    They are made by a thread, from a GPU on a stream of its own, while the next step's forward and backward run: `mark`
    when the originals are as they are to be copied, then `take` in the thread; before they change, when that is
    through, `originals_may_change`; before the copies are read, `wait`.
    """

    def __init__(self, device: torch.device):
        self.buffers: Tensors = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.marked, self.copied = (torch.cuda.Event() if self.stream else None for _ in range(2))
        self.pin = can_pin(device.type)

    def mark(self) -> None:
        if self.marked:
            self.marked.record()

    def originals_may_change(self) -> None:
        """By what is queued on the GPU from here on."""
        if self.copied:
            torch.cuda.current_stream().wait_event(self.copied)

    def allocate(self, local: Tensors) -> None:
        """The memory that copies of these tensors need and have not yet; of their data nothing is read."""
        missing = {name: tensor for name, tensor in local.items() if not self._has_room(name, tensor)}
        for from_gpu in (False, True):  # what is on the host already need not be page-locked
            tensors = {name: tensor for name, tensor in missing.items() if tensor.is_cuda == from_gpu}
            self.buffers |= host_memory(tensors, self.pin and from_gpu)

    def _has_room(self, name: str, local: torch.Tensor) -> bool:
        buffer = self.buffers.get(name)
        return buffer is not None and (buffer.shape, buffer.dtype) == (local.shape, local.dtype)

    def take(self, local: Tensors) -> Tensors:
        """Starts the copies."""
        self.allocate(local)
        if not self.stream:
            return self._copy(local)
        assert self.marked is not None and self.copied is not None
        self.stream.wait_event(self.marked)
        with torch.cuda.stream(self.stream):
            copies = self._copy(local)
            self.copied.record()
        return copies

    def _copy(self, local: Tensors) -> Tensors:
        copies = {name: self.buffers[name] for name in local}
        # In one call, in which the thread that trains has the interpreter.
        torch._foreach_copy_(list(copies.values()), list(local.values()), non_blocking=True)
        return copies

    def wait(self) -> None:
        if self.copied:
            self.copied.synchronize()
