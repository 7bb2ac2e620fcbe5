"""NaN and infinity are found anywhere in a tensor, and large finite numbers are not reported."""

from __future__ import annotations

import math

import pytest
import torch

from files import finite
from files.finite import check_finite, fp32_sum, is_finite
from files.tensors import DTYPES
from options.errors import UserError

FLOATING = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
@pytest.mark.parametrize("dtype", FLOATING)
def test_one_of_a_million_is_found(dtype, values, monkeypatch):
    monkeypatch.setattr(finite, "CHUNK_ELEMENTS", 1000)
    tensor = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor)
    tensor.view(-1)[torch.tensor([999_998, 12345])[: len(values)]] = torch.tensor(values, dtype=dtype)
    assert not is_finite(tensor) and not fp32_sum(tensor).isfinite()
    with pytest.raises(UserError, match=r"^a/file: a\.weight holds NaN or infinity"):
        check_finite("a/file: a.weight", tensor)


@pytest.mark.parametrize("dtype", FLOATING)
def test_large_numbers_are_finite(dtype):
    """Even if their sum overflows."""
    tensor = torch.full((4, 100), torch.finfo(dtype).max, dtype=dtype)
    assert not fp32_sum(tensor).isfinite() and is_finite(tensor)


def test_an_empty_tensor_is_finite():
    assert is_finite(torch.empty(0, 5))
