"""Packs a checkpoint's weight, with an error that names the weight."""

from __future__ import annotations

import torch

from options.errors import UserError
from quantization.quantizers import PackedWeight, Quantizer


def pack_weight(
    origin: str, tensor: torch.Tensor | PackedWeight, quantizer: Quantizer | None
) -> torch.Tensor | PackedWeight:
    """Return the tensor packed by `quantizer`, or unchanged if that is None or the tensor is packed already.

    origin: the tensor's file and name, for messages. Raises UserError if `quantize` raises ValueError.
    """
    if quantizer is None or isinstance(tensor, PackedWeight):
        return tensor
    try:
        return PackedWeight(*quantizer.quantize(tensor))
    except ValueError as e:
        raise UserError(f"{origin} {e}") from None
