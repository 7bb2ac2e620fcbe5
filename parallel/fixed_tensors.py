"""Tensors at fixed addresses, which CUDA graphs read and write, and copies into and out of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Slots:
    """Fixed tensors for copies. All recordings share them: only one graph runs at a time."""

    def __init__(self):
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """Return the fixed tensor `name` with the shape, strides and dtype of `tensor`; an autograd leaf.

        Tensors of one name, dtype and device share their memory.
        """
        length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        length, key = length if tensor.numel() else 0, (name, tensor.dtype, tensor.device)
        if key not in self.buffers or len(self.buffers[key]) < length:  # older recordings keep the old one
            self.buffers[key] = torch.empty(length, dtype=tensor.dtype, device=tensor.device)
        slot = self.buffers[key].as_strided(tensor.shape, tensor.stride())
        return slot.detach().requires_grad_(tensor.requires_grad)


# Dtypes that `_foreach_copy_` has on GPUs (torch 2.11 and 2.13). It raises an error for others, as uint64,
# which flash attention has for its state of the random numbers.
COPIED_DTYPES = {
    torch.complex128,
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class Copies:
    """Copies tensors into fixed ones, or fixed ones out, with one launch per dtype.

    Tensors of a dtype that is not in COPIED_DTYPES are copied as integers of the same size.
    """

    def __init__(self, fixed: Sequence[Tensor]):
        self.shapes = [tensor.shape for tensor in fixed]
        # The elements along an expanded dimension are the same memory, which is copied once.
        self.expanded = [
            [dim for dim in range(t.dim()) if t.stride(dim) == 0 and t.shape[dim] > 1] for t in fixed
        ]
        self.dtypes = [tensor.dtype for tensor in fixed]
        self.fixed = [self._cut(i, tensor) for i, tensor in enumerate(fixed)]
        by_kind: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, tensor in enumerate(self.fixed):
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(i)
        self.groups = [(indices, [self.fixed[i] for i in indices]) for indices in by_kind.values()]

    def _cut(self, i: int, tensor: Tensor) -> Tensor:
        """Return the memory to copy: length 1 along the expanded dimensions of fixed tensor i."""
        tensor = tensor.detach()
        for dim in self.expanded[i]:
            tensor = tensor.narrow(dim, 0, 1)
        return tensor if tensor.dtype in COPIED_DTYPES else tensor.view(INTEGERS[tensor.itemsize])

    def _restore(self, i: int, copy: Tensor) -> Tensor:
        """Return a copy in the shape and dtype of fixed tensor i."""
        copy = copy if copy.dtype == self.dtypes[i] else copy.view(self.dtypes[i])
        # Other results must not be views, which the next layer's code may be compiled anew for.
        return copy.expand(self.shapes[i]) if self.expanded[i] else copy

    def copy_in(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors, one for each fixed one, in the same order."""
        assert len(tensors) == len(self.fixed)
        for indices, fixed in self.groups:
            torch._foreach_copy_(fixed, [self._cut(i, tensors[i]) for i in indices])

    def copy_out(self) -> list[Tensor]:
        """Return copies of the fixed tensors."""
        results = [torch.empty_like(tensor) for tensor in self.fixed]
        for indices, fixed in self.groups:
            torch._foreach_copy_([results[i] for i in indices], fixed)
        return [self._restore(i, result) for i, result in enumerate(results)]
