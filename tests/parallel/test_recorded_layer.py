"""Recordings of layers that save, return or are given unusual tensors; how a recording may fail."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor

from parallel.recorded_layer import Copies

foreach_copy = torch._foreach_copy_


def foreach_copy_of_gpus(fixed: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy as on a GPU, where `_foreach_copy_` has fewer dtypes, and is one launch on one device only."""
    assert len({t.device for t in (*fixed, *tensors)}) == 1
    for tensor in (*fixed, *tensors):
        if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e8m0fnu):
            raise RuntimeError(f'"foreach_tensor_copy" not implemented for {tensor.dtype}')
    foreach_copy(fixed, tensors)


ODD = {
    "uint64": torch.tensor([2**64 - 1, 7], dtype=torch.uint64),
    "uint64 scalar": torch.tensor(2**63, dtype=torch.uint64),
    "uint32": torch.tensor([[1, 2**32 - 1]], dtype=torch.uint32).expand(3, 2),
    "uint16": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint16)[:, :1],
    "float8": torch.tensor([0.5, 2]).to(torch.float8_e8m0fnu),
    "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "expanded": torch.arange(3.0)[:, None].expand(3, 5),
    "slice": torch.arange(12.0).view(3, 4)[:, 1:3],
    "transposed": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
    "NaN": torch.tensor([torch.nan, -0.0]),
}


@pytest.mark.parametrize("name", ODD)
def test_unusual_tensors_are_copied(name):
    """In and out, each alone and beside others of its dtype."""
    tensor = ODD[name]
    with mock.patch.object(torch, "_foreach_copy_", foreach_copy_of_gpus):
        fixed = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        copies = Copies([fixed, torch.ones(2)])
        copies.copy_in([tensor, torch.full((2,), 5.0)])
        result, other = copies.copy_out()
    assert other.tolist() == [5, 5]
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    assert as_bytes(result) == as_bytes(tensor)


def as_bytes(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_copies_are_no_views():
    """Dynamo compiles the next layer anew for an input that is one."""
    (copy,) = Copies([torch.ones(2, 3)]).copy_out()
    assert not copy._is_view()
