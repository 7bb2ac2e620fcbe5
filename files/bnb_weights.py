"""Weights that a checkpoint stores packed by bitsandbytes, like many `*-bnb-4bit` hub repositories.

The format is bitsandbytes' QuantState.as_dict, packed. `<name>.weight` holds the codes. Its other tensors are
`<name>.weight.absmax`, `.quant_map`, with double quantization `.nested_absmax` and `.nested_quant_map`, and
`.quant_state.bitsandbytes__nf4`, the UTF-8 bytes of a JSON object with shape, block sizes and offset. NF4 in
quantization/nf4.py stores the same numbers in another layout, so nothing is quantized again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from files.finite import check_finite
from files.tensors import StoredTensor, read_tensor
from options.errors import UserError
from quantization.nf4 import NF4, SCALE_BLOCK
from quantization.quantizers import PackedWeight, flat_bytes

STATE_MARK = ".quant_state.bitsandbytes__"  # in the name of the JSON object's tensor; quant_type follows
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class BnbWeight:
    """A weight in bitsandbytes' format.

    Attributes:
        name: name of the weight.
        folder: the model's folder.
        tensors: {suffix: stored tensor}; the codes have the suffix "".
        quant_state: the JSON object.
    """

    name: str
    folder: Path
    tensors: dict[str, StoredTensor]
    quant_state: dict

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.quant_state["shape"])

    @property
    def is_double_quantized(self) -> bool:
        return "nested_absmax" in self.tensors

    @property
    def quantizer(self) -> NF4:
        return NF4(double=self.is_double_quantized)

    def _read(self, suffix: str) -> torch.Tensor:
        return read_tensor(self.folder, self.tensors[suffix])

    def read(self) -> PackedWeight:
        """Return the codes and scales in the layout of `NF4`. Raises UserError if a scale is NaN or infinite.

        Raises OSError if a file cannot be read.
        """
        codes, absmax = self._read(""), self._read("absmax")
        scales = "nested_absmax" if self.is_double_quantized else "absmax"
        check_finite(f"{self.folder / self.tensors[scales].file}: {self.name}.{scales}", self._read(scales))
        if not self.is_double_quantized:
            return PackedWeight(flat_bytes(codes), flat_bytes(absmax))
        offset = torch.tensor([self.quant_state["nested_offset"]], dtype=torch.float32)
        return PackedWeight(flat_bytes(codes), flat_bytes(self._read("nested_absmax"), offset, absmax))

    def dequantize(self) -> torch.Tensor:
        """Return the weight in fp32, on the CPU. Raises as `read` does."""
        packed = self.read()
        table = self.quantizer.table(packed.codes.device)
        return self.quantizer.dequantize(packed.codes, packed.scales, table, self.shape, torch.float32)

    def check(self) -> None:
        """Raise UserError unless block sizes, tables and sizes are those of NF4 in quantization/nf4.py."""
        double = self.is_double_quantized
        origin = f"{self.folder / self.tensors[''].file}: {self.name}"
        expected = {"quant_type": "nf4", "blocksize": NF4.block}
        if double:
            expected["nested_blocksize"] = SCALE_BLOCK
        for key, value in expected.items():
            if (found := self.quant_state.get(key)) != value:
                raise UserError(f"{origin}: packed with {key} {found}; only {value} can be read")
        for suffix, table in _nf4_tables().items():
            if suffix.startswith("nested") and not double:
                continue
            if not self._has_table(suffix, table):
                raise UserError(f"{origin}: its {suffix} is not that of nf4")
        self.check_sizes()

    def check_sizes(self) -> None:
        """Raise UserError unless codes and scales have as many bytes as those of NF4 in quantization/nf4.py.

        Reads nothing beyond the headers.
        """
        double = self.is_double_quantized
        codes, scales = self.quantizer.packed_sizes(self.shape)
        scales -= 4 * double  # the offset is in the JSON object
        stored_scales = [_nbytes(self.tensors[s]) for s in ("absmax", *["nested_absmax"] * double)]
        if _nbytes(self.tensors[""]) != codes or sum(stored_scales) != scales:
            raise UserError(
                f"{self.folder / self.tensors[''].file}: {self.name}: holds too little or too much for a"
                f" weight of shape {list(self.shape)}"
            )

    def _has_table(self, suffix: str, table: torch.Tensor) -> bool:
        """Return whether the tensor with this suffix is stored and equals `table`."""
        stored = self.tensors.get(suffix)
        if stored is None or not isinstance(stored.dtype, torch.dtype) or stored.shape != tuple(table.shape):
            return False  # without reading it, since it may have any size
        return torch.allclose(self._read(suffix).float(), table, atol=1e-6)


def _nbytes(stored: StoredTensor) -> int:
    """Return the size of a tensor in bytes; -1 if its dtype is none of DTYPES."""
    return math.prod(stored.shape) * stored.dtype.itemsize if isinstance(stored.dtype, torch.dtype) else -1


@cache
def _nf4_tables() -> dict[str, torch.Tensor]:
    """Return {suffix: table} of bitsandbytes' two tables, which map codes and quantized scales to numbers."""
    import bitsandbytes.functional as bnb  # slow, and only packed checkpoints need it

    return {"quant_map": bnb.get_4bit_type("nf4", device="cpu"), "nested_quant_map": bnb.create_dynamic_map()}


def find_bnb_weights(folder: Path, tensors: dict[str, StoredTensor]) -> dict[str, BnbWeight]:
    """Return {name: weight} of the weights that bitsandbytes packed; each becomes one tensor in `tensors`.

    That tensor has the dense shape; the other tensors of the weight are removed from `tensors`. Raises
    UserError for a weight that is damaged or not NF4, OSError if a file cannot be read.
    """
    weights = {}
    for name, (key, stored, parts) in _pop_packed_weights(tensors).items():
        try:
            parts[""] = tensors[name]
            state = json.loads(bytes(read_tensor(folder, stored).tolist()))
            state |= {"quant_type": key.partition(STATE_MARK)[2]}
            weight = weights[name] = BnbWeight(name, folder, parts, state)
            assert all(isinstance(n, int) for n in state["shape"]) and "absmax" in parts
            offset = state["nested_offset"] if weight.is_double_quantized else 0.0
            # JSON integers may have any number of digits. An offset beyond fp32 would make weights infinite.
            assert type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max
        except (ValueError, LookupError, TypeError, AssertionError, RecursionError):
            raise UserError(f"{folder / stored.file}: {key} does not describe a packed weight") from None
        weight.check()
        tensors[name] = StoredTensor(tensors[name].file, weight.shape, torch.uint8)
    return weights


def find_bnb_headers(
    folder: Path, tensors: dict[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, BnbWeight]:
    """Do the same as `find_bnb_weights` by the headers alone; the result cannot be read.

    Args:
        folder: for messages.
        tensors: as for `find_bnb_weights`.
        shapes: the dense shapes, {name of the model's parameter: shape}, which no header has.
    """
    weights = {}
    for name, (key, stored, parts) in _pop_packed_weights(tensors).items():
        quant_type = key.partition(STATE_MARK)[2]
        if name not in tensors or "absmax" not in parts or quant_type != "nf4":
            raise UserError(f"{folder / stored.file}: {key} does not describe a weight packed to nf4")
        if name not in shapes:
            raise UserError(f"{folder / stored.file}: {name} belongs to no parameter of this model")
        parts[""] = tensors[name]
        weights[name] = BnbWeight(name, folder, parts, {"shape": shapes[name], "quant_type": quant_type})
        weights[name].check_sizes()
        tensors[name] = StoredTensor(tensors[name].file, shapes[name], torch.uint8)
    return weights


def _pop_packed_weights(
    tensors: dict[str, StoredTensor],
) -> dict[str, tuple[str, StoredTensor, dict[str, StoredTensor]]]:
    """Remove packed weights' tensors but their codes from `tensors`.

    Returns {weight's name: (name of the JSON object's tensor, that tensor, {suffix: other removed tensor})}.
    """
    keys = {key.partition(STATE_MARK)[0]: key for key in tensors if STATE_MARK in key}
    found = {name: (key, tensors.pop(key), dict[str, StoredTensor]()) for name, key in keys.items()}
    for key in list(tensors) if found else ():
        name, _, suffix = key.rpartition(".")
        if name in found and suffix in SUFFIXES:
            found[name][2][suffix] = tensors.pop(key)
    return found
