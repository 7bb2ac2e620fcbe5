"""Quantizers and adapters are looked up by name, and a name that is not there is an error."""

from __future__ import annotations

import pytest

from models.adapters import ADAPTERS
from options.methods import METHODS
from quantization.hqq import HQQ
from quantization.nf4 import NF4
from quantization.registry import QUANTIZERS, make_quantizer


def test_methods_name_what_is_registered():
    assert {m.quantizer for m in METHODS.values()} - {None} == set(QUANTIZERS)
    assert {m.adapter for m in METHODS.values()} - {None} == set(ADAPTERS)


def test_quantizers_by_name():
    assert make_quantizer("bnb", None, None) == NF4()
    assert make_quantizer("hqq", 3, 32) == HQQ(3, 32)


@pytest.mark.parametrize("name", ["nf4", "bnb ", "", "gptq"])
def test_an_unknown_quantizer_is_none(name):
    with pytest.raises(KeyError):
        make_quantizer(name, None, None)
