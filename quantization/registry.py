"""The quantizers by their names in METHODS of options/methods.py. A new one is a class and a line here."""

from __future__ import annotations

from collections.abc import Callable

from quantization.hqq import HQQ
from quantization.nf4 import NF4
from quantization.quantizers import Quantizer

# name -> function of (--n_bits, --group_size); both are None if the quantizer has no such options.
QUANTIZERS: dict[str, Callable[..., Quantizer]] = {
    "bnb": lambda n_bits, block: NF4(),
    "hqq": HQQ,
}


def make_quantizer(name: str, n_bits: int | None, group_size: int | None) -> Quantizer:
    """Return the quantizer of that name in QUANTIZERS. Raises KeyError for any other name.

    n_bits, group_size: --n_bits and --group_size; None if it has no such options.
    """
    return QUANTIZERS[name](n_bits, group_size)
