"""A model's tensors as the headers of its files describe them, wherever the files are: names, shapes, dtypes.

`CheckpointFiles` (model_folder.py) adds the files of a folder, from which tensors can be read. A plan needs
no more than this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Protocol

import torch

from files.expert_stacks import ExpertTensor, split_stacks, stack_name, stacked_shape
from files.names import INDEX
from files.quantized_releases import suggest_original
from files.tensors import StoredTensor
from options.errors import UserError
from quantization.quantizers import PackedWeight, Quantizer


class StoredPackedWeight(Protocol):
    """Interface of packed weights in files: BnbWeight, bnb_weights.py, and CachedWeight, weight_cache.py."""

    @property
    def quantizer(self) -> Quantizer: ...

    def read(self) -> PackedWeight: ...


class WeightHeaders:
    """The tensors of a model, by name.

    Attributes:
        folder: the model's folder. Of a model that is not on this disk, its name as a path, for messages.
        tensors: all tensors.
        packed: those of them that are stored packed, by bitsandbytes or in a cache.
        dequantized: names of those of `packed` that no 4-bit layer holds: they are read dequantized.
        stored_names: {parameter's name: name in the files}, of tensors that `rename` renamed.
        apart: the tensors of the parts of the model that are not built, such as a vision tower, by the names
            in the files; None without any.
        vision: names of the tensors of vision parts that are built.
        prequantized: whether bitsandbytes packed some of them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.packed: dict[str, StoredPackedWeight] = {}
        self.dequantized: frozenset[str] = frozenset()
        self.stored_names: dict[str, str] = {}
        self.apart: WeightHeaders | None = None
        self.vision: frozenset[str] = frozenset()
        self.prequantized = False

    def add_file(self, file: str, found: dict[str, StoredTensor], expected: set[str] | None) -> None:
        """Add the tensors in a file's header.

        Raises UserError for a tensor that another file holds, or that is missing.

        Args:
            file: the file's name.
            found: its tensors.
            expected: names that the index assigns to the file; None without an index.
        """
        for name in sorted(found.keys() & self.tensors.keys()):
            other = self.tensors[name].file
            raise UserError(f"{self.folder / file}: tensor {name} is in {other} as well")
        for name in sorted((expected or set()) - found.keys()):
            raise UserError(
                f"{self.folder / file}: tensor {name} is missing; {INDEX} says it is in this file"
            )
        self.tensors |= {name: found[name] for name in sorted(found)}

    def data_bytes(self, files: Collection[str] | None = None) -> int:
        """Return the bytes of the tensors in these files; None = in all."""
        return sum(tensor.nbytes for tensor in self.tensors.values() if files is None or tensor.file in files)

    def set_packed(self, packed: dict) -> None:
        """Set the weights that bitsandbytes packed. Raises UserError if another tensor is no weight.

        packed: {name of the weight: StoredPackedWeight}.
        """
        self.packed.update(packed)
        self.prequantized = bool(packed)
        for name, tensor in self.tensors.items():
            if name not in packed and not (
                isinstance(tensor.dtype, torch.dtype) and tensor.dtype.is_floating_point
            ):
                raise UserError(
                    f"{self.folder / tensor.file}: tensor {name} is stored as {tensor.dtype}; expected"
                    " floating-point weights, or bitsandbytes' 4 bits; if it is quantized,"
                    f" {suggest_original(self.folder)}"
                )

    def rename(
        self,
        parameter_name: Callable[[str], str],
        is_unused: Callable[[str], bool],
        is_of_vision: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Rename all tensors from their names in the files to names of parameters.

        Args:
            parameter_name: maps a name in the files to the parameter's.
            is_unused: whether the parameter with this name is not built; its tensor moves to `apart`.
            is_of_vision: whether the parameter with this name belongs to a vision part that is built.

        Raises UserError if two tensors would get one name.
        """
        renamed = {stored: parameter_name(stored) for stored in self.tensors}
        self.stored_names = {name: stored for stored, name in renamed.items() if name != stored}
        for stored, name in renamed.items():
            other = self.stored_names.get(name, name)
            if stored != other:
                raise UserError(
                    f"{self.folder / self.tensors[stored].file}: {stored} and {other} are both the model's"
                    f" {name}; leave one of them"
                )
        unused = {stored for stored, name in renamed.items() if is_unused(name)}
        if unused:
            apart = self.apart = copy.copy(self)
            apart.stored_names = {}
            apart.tensors = {key: self.tensors[key] for key in self.tensors if key in unused}
            apart.packed = {key: self.packed[key] for key in self.packed if key in unused}
        self.tensors = {renamed[key]: t for key, t in self.tensors.items() if key not in unused}
        self.packed = {renamed[key]: weight for key, weight in self.packed.items() if key not in unused}
        self.vision = frozenset(filter(is_of_vision, self.tensors))

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError unless there is a tensor of this name and shape."""
        if name not in self.tensors:
            raise UserError(f"{self.folder}: tensor {name} is missing from the weights")
        stored = self.tensors[name]
        if stored.shape != shape:
            raise UserError(
                f"{self.folder}/{stored.file}: {self.stored_name(name)} has shape {list(stored.shape)}"
                f"{stored.note}, but config.json says {list(shape)}"
            )

    def split_experts(self) -> None:
        """Replace the stacks of experts by the parameters of each expert. Raises UserError."""
        self.tensors = split_stacks(self.folder, self.tensors)

    def stored_name(self, name: str) -> str:
        """Return the name that a parameter, or the stack that holds it, has in the files."""
        if isinstance(self.tensors.get(name), ExpertTensor):
            name = stack_name(name)
        return self.stored_names.get(name, name)

    def written_shapes(self, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return {name in the files: (shape, dtype)} of parameters; experts are stacked.

        names: with one parameter of a stack, all others.
        """
        grouped: dict[str, list[StoredTensor]] = {}
        for name in names:
            grouped.setdefault(self.stored_name(name), []).append(self.tensors[name])
        return {
            stored: (
                stacked_shape(first.shape, len(tensors), first.parts)
                if isinstance(first := tensors[0], ExpertTensor)
                else first.shape,
                first.torch_dtype,
            )
            for stored, tensors in grouped.items()
        }
