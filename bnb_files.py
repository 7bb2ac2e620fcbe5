"""Weights that a checkpoint holds packed by bitsandbytes, as in many `*-bnb-4bit` hub repositories.

The format is bitsandbytes' QuantState.as_dict, packed: beside `<name>.weight`, the codes, lie
`<name>.weight.absmax`, `.quant_map`, with double quantization `.nested_absmax` and `.nested_quant_map`, and
`.quant_state.bitsandbytes__nf4`, the UTF-8 bytes of a JSON object with shape, block sizes and offset. These are
the same numbers that NF4 in quantizers.py stores, in other places: nothing is quantized again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from config import UserError
from quantizers import NF4, SCALE_BLOCK, PackedWeight, flat_bytes
from tensor_files import read_tensors

STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class BnbWeight:
    """A weight in bitsandbytes' format. files: which file holds the codes, and each companion by its suffix;
    state: the JSON object."""

    name: str
    files: dict[str, Path]
    state: dict

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    @property
    def double(self) -> bool:
        return "nested_absmax" in self.files

    @property
    def quantizer(self) -> NF4:
        return NF4(double=self.double)

    def _read(self, suffix: str) -> torch.Tensor:
        return read_tensors(self.files[suffix], [f"{self.name}.{suffix}" if suffix else self.name])[0]

    def read(self) -> PackedWeight:
        """The codes and scales in NF4's order."""
        codes, absmax = self._read(""), self._read("absmax")
        if not self.double:
            return PackedWeight(flat_bytes(codes), flat_bytes(absmax))
        offset = torch.tensor([self.state["nested_offset"]], dtype=torch.float32)
        return PackedWeight(flat_bytes(codes), flat_bytes(self._read("nested_absmax"), offset, absmax))

    def check(self) -> None:
        """Raises UserError for anything but NF4 with the block sizes and tables that NF4 in quantizers.py has."""
        where = f"{self.files['']}: {self.name}"
        expected = {"quant_type": "nf4", "blocksize": NF4.block} | (
            {"nested_blocksize": SCALE_BLOCK} if self.double else {}
        )
        for key, value in expected.items():
            if self.state.get(key) != value:
                raise UserError(f"{where}: packed with {key} {self.state.get(key)}; only {value} can be read")
        tables = {"quant_map": bnb.get_4bit_type("nf4", device="cpu")}
        if self.double:
            tables["nested_quant_map"] = bnb.create_dynamic_map()
        for suffix, table in tables.items():
            if suffix not in self.files or not torch.allclose(self._read(suffix).float(), table, atol=1e-6):
                raise UserError(f"{where}: its {suffix} is not that of nf4")


def find_bnb(folder: Path, raw: dict[str, str]) -> dict[str, BnbWeight]:
    """The packed weights among a folder's tensors, by name. raw: {tensor: file}; loses what belongs to them."""
    found = {}
    for key in [k for k in raw if STATE in k]:
        name, _, kind = key.partition(STATE)
        prefix = f"{name}."
        companions = [k for k in raw if k.startswith(prefix) and k != key]
        files = {k.removeprefix(prefix): folder / raw[k] for k in companions}
        try:
            state = json.loads(bytes(read_tensors(folder / raw[key], [key])[0].tolist()))
            files[""] = folder / raw[name]
            found[name] = BnbWeight(name, files, state | {"quant_type": kind})
            assert all(isinstance(n, int) for n in state["shape"]) and "absmax" in files
        except (ValueError, LookupError, TypeError, AssertionError):
            raise UserError(f"{folder / raw[key]}: {key} does not describe a packed weight") from None
        found[name].check()
        for k in [*companions, key, name]:
            del raw[k]
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
        f"{folder}/config.json: the weights are quantized already ({kind}); only 16- and 32-bit weights and"
        " bitsandbytes' 4 bits (nf4) can be read"
    )
