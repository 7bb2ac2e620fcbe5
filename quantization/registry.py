"""The quantizers by the name that METHODS in options/methods.py gives them. A new one is a class and a line
here.
"""

from __future__ import annotations

from collections.abc import Callable

from quantization.hqq import HQQ
from quantization.nf4 import NF4
from quantization.quantizers import Quantizer

# name -> maker(--n_bits, --group_size); both are None where METHODS' quantizer has no such options.
QUANTIZERS: dict[str, Callable[..., Quantizer]] = {
    "bnb": lambda n_bits, block: NF4(),
    "hqq": HQQ,
}


def make_quantizer(name: str, n_bits: int | None, block: int | None) -> Quantizer:
    """The quantizer of that name. n_bits, block: --n_bits and --group_size, None where it has no such options. Raises
    KeyError for a name that is not registered."""
    return QUANTIZERS[name](n_bits, block)
