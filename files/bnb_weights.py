"""Weights that a checkpoint holds packed by bitsandbytes, as in many `*-bnb-4bit` hub repositories.

The format is bitsandbytes' QuantState.as_dict, packed: beside `<name>.weight`, the codes, lie
`<name>.weight.absmax`, `.quant_map`, with double quantization `.nested_absmax` and `.nested_quant_map`, and
`.quant_state.bitsandbytes__nf4`, the UTF-8 bytes of a JSON object with shape, block sizes and offset. These
are the same numbers that NF4 in quantization/nf4.py stores, in other places: nothing is quantized again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from files.finite import check_finite
from files.names import CONFIG
from files.tensors import StoredTensor, read_tensor
from options.errors import UserError
from quantization.nf4 import NF4, SCALE_BLOCK
from quantization.quantizers import PackedWeight, flat_bytes

STATE = ".quant_state.bitsandbytes__"
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class BnbWeight:
    """A weight in bitsandbytes' format. parts: by suffix the codes ("") and their companions; state: the JSON
    object."""

    name: str
    folder: Path
    parts: dict[str, StoredTensor]
    state: dict

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    @property
    def double(self) -> bool:
        return "nested_absmax" in self.parts

    @property
    def quantizer(self) -> NF4:
        return NF4(double=self.double)

    def _read(self, suffix: str) -> torch.Tensor:
        return read_tensor(self.folder, self.parts[suffix])

    def read(self) -> PackedWeight:
        """The codes and scales in NF4's order. Raises UserError if a scale is NaN or infinite."""
        codes, absmax = self._read(""), self._read("absmax")
        scales = "nested_absmax" if self.double else "absmax"
        check_finite(f"{self.folder / self.parts[scales].file}: {self.name}.{scales}", self._read(scales))
        if not self.double:
            return PackedWeight(flat_bytes(codes), flat_bytes(absmax))
        offset = torch.tensor([self.state["nested_offset"]], dtype=torch.float32)
        return PackedWeight(flat_bytes(codes), flat_bytes(self._read("nested_absmax"), offset, absmax))

    def check(self) -> None:
        """Raises UserError for anything but NF4 with the block sizes, tables and amounts of bytes that NF4 in
        quantization/nf4.py has."""
        where = f"{self.folder / self.parts[''].file}: {self.name}"
        expected = {"quant_type": "nf4", "blocksize": NF4.block} | (
            {"nested_blocksize": SCALE_BLOCK} if self.double else {}
        )
        for key, value in expected.items():
            if self.state.get(key) != value:
                raise UserError(f"{where}: packed with {key} {self.state.get(key)}; only {value} can be read")
        for suffix, table in _tables().items():
            if suffix.startswith("nested") and not self.double:
                continue
            if not self._holds(suffix, table):
                raise UserError(f"{where}: its {suffix} is not that of nf4")
        codes, scales = self.quantizer.sizes(self.shape)
        scales -= 4 * self.double  # the offset is in the JSON object
        held = [_nbytes(self.parts[s]) for s in ("absmax", *["nested_absmax"] * self.double)]
        if _nbytes(self.parts[""]) != codes or sum(held) != scales:
            raise UserError(f"{where}: holds too little or too much for a weight of shape {list(self.shape)}")

    def _holds(self, suffix: str, table: torch.Tensor) -> bool:
        stored = self.parts.get(suffix)
        if stored is None or not isinstance(stored.dtype, torch.dtype) or stored.shape != tuple(table.shape):
            return False  # and is not read: it may be of any size
        return torch.allclose(self._read(suffix).float(), table, atol=1e-6)


def _nbytes(stored: StoredTensor) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize if isinstance(stored.dtype, torch.dtype) else -1


@cache
def _tables() -> dict[str, torch.Tensor]:
    return {"quant_map": bnb.get_4bit_type("nf4", device="cpu"), "nested_quant_map": bnb.create_dynamic_map()}


def find_bnb(folder: Path, tensors: dict[str, StoredTensor]) -> dict[str, BnbWeight]:
    """The packed weights among a folder's tensors, by name. In `tensors` each of them becomes one tensor of
    the shape that it stands for; its companions go."""
    states = {key.partition(STATE)[0]: key for key in tensors if STATE in key}
    if not states:
        return {}
    parts: dict[str, dict[str, StoredTensor]] = {name: {} for name in states}
    for key in list(tensors):
        name, _, suffix = key.rpartition(".")
        if name in parts and suffix in COMPANIONS:
            parts[name][suffix] = tensors.pop(key)
    found = {}
    for name, key in states.items():
        stored = tensors.pop(key)
        try:
            parts[name][""] = tensors[name]
            state = json.loads(bytes(read_tensor(folder, stored).tolist()))
            found[name] = BnbWeight(
                name, folder, parts[name], state | {"quant_type": key.partition(STATE)[2]}
            )
            assert all(isinstance(n, int) for n in state["shape"]) and "absmax" in parts[name]
            offset = state["nested_offset"] if found[name].double else 0.0
            # A whole number may have any number of digits, and one that fp32 does not hold would make weights
            # infinite.
            assert type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max
        except (ValueError, LookupError, TypeError, AssertionError, RecursionError):
            raise UserError(f"{folder / stored.file}: {key} does not describe a packed weight") from None
        found[name].check()
        tensors[name] = StoredTensor(tensors[name].file, found[name].shape, torch.uint8)
    return found


def check_stored_quantization(description: dict | None, folder: Path) -> bool:
    """Whether a model is packed by bitsandbytes. description: config.json's quantization_config. Raises
    UserError for a kind that cannot be read."""
    if not description:
        return False
    method = description.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in description else "?")
    if method == "bitsandbytes" and description.get("load_in_4bit"):
        return True
    kind = "bitsandbytes 8 bit" if method == "bitsandbytes" else str(method)
    raise UserError(
        f"{folder}/{CONFIG}: the weights are quantized already ({kind}); only 16- and 32-bit weights and"
        " bitsandbytes' 4 bits (nf4) can be read"
    )
