"""Search for NaN and infinity in weights, by one reduction over each tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from options.errors import UserError

CHUNK_ELEMENTS = 2**22  # checked one by one at a time
NONFINITE_MESSAGE = (
    "holds NaN or infinity: get the model again, or repair what made it (a merge, a conversion to fp16)"
)


@torch.no_grad()
def fp32_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of all elements: an fp32 scalar on the tensor's device, without a device sync.

    The sum is NaN or infinite if an element is, and otherwise only if it overflows. Unlike isfinite this
    needs no extra memory. It takes a hundredth of the time of reading the tensor from a disk.
    """
    # A GPU sums half precision in fp32 without a copy; a CPU would make one.
    wider = tensor.is_cuda and tensor.dtype.itemsize == 2
    return tensor.sum(dtype=torch.float32 if wider else None).float()


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite. Synchronizes with a GPU."""
    if fp32_sum(tensor).isfinite():
        return True
    return all(bool(chunk.isfinite().all()) for chunk in tensor.reshape(-1).split(CHUNK_ELEMENTS))


def nonfinite_sums(sums: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the sums that are NaN or infinite. Synchronizes with a GPU once.

    sums: `fp32_sum` of each tensor. A tensor named here holds NaN or infinity, or its sum overflows.
    """
    are_finite = torch.stack(list(sums.values())).isfinite().tolist() if sums else []
    return [name for name, is_sum_finite in zip(sums, are_finite, strict=True) if not is_sum_finite]


def find_nonfinite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity. Synchronizes with a GPU."""
    sums = {name: fp32_sum(tensor) for name, tensor in tensors.items()}
    return [name for name in nonfinite_sums(sums) if not is_finite(tensors[name])]


def check_finite(origin: str, tensor: torch.Tensor) -> None:
    """Raise UserError if a tensor holds NaN or infinity. origin: its file and name, for the message."""
    if not is_finite(tensor):
        raise UserError(f"{origin} {NONFINITE_MESSAGE}")
