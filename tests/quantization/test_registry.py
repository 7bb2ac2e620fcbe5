"""Quantizers and adapters are looked up by name, and an unknown name is an error."""

from __future__ import annotations

import pytest

from models.adapters import ADAPTERS
from options.methods import METHODS
from quantization.hqq import HQQ
from quantization.nf4 import NF4
from quantization.registry import QUANTIZERS, make_quantizer


def test_methods_name_registered_quantizers_and_adapters():
    assert {m.quantizer for m in METHODS.values()} - {None} == set(QUANTIZERS)
    assert {m.adapter for m in METHODS.values()} - {None} == set(ADAPTERS)


def test_quantizers_by_name():
    assert make_quantizer("bnb", None, None) == NF4()
    assert make_quantizer("hqq", 3, 32) == HQQ(3, 32)


@pytest.mark.parametrize("name", ["nf4", "bnb ", "", "gptq"])
def test_an_unknown_quantizer_is_an_error(name):
    with pytest.raises(KeyError):
        make_quantizer(name, None, None)
