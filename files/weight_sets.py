"""Several sets of weights in one folder: accepted if they are the same, refused if they differ.

transformers reads model.safetensors, and an index only without that file; this program prefers the index.
Shards that the index does not name come from another save, before or after that of the index.
consolidated*.safetensors is the layout of Mistral's own releases, which some programs prefer; with other
names of tensors it is no second set. Files of a variant (model.fp16.safetensors) are ignored, since every
program reads one only if asked by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from files.comparison import same_bytes, same_values
from files.names import INDEX, SINGLE_FILE
from files.tensors import StoredTensor, list_tensors
from options.errors import UserError

WEIGHT_PATTERNS = (SINGLE_FILE, "model-*-of-*.safetensors", "consolidated*.safetensors")
START_ELEMENTS = 4096  # of each tensor, compared first: most tensors that differ already do there


class UnmatchedTensor(NamedTuple):
    """A tensor that only one of two sets holds.

    Attributes:
        name: the tensor's name.
        tensors: all tensors of the set that holds it.
        missing_from: the other set, for messages.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    missing_from: str


def compare_weight_sets(folder: Path, tensors: Mapping[str, StoredTensor]) -> list[UnmatchedTensor]:
    """Raise UserError if other weight files of the folder hold these tensors with other values or dtypes.

    Compares the first START_ELEMENTS of every tensor, then every tensor in full, bit for bit.

    Args:
        folder: the model's folder.
        tensors: the tensors to be read, from the index's shards if there is an index.

    Returns:
        The tensors that only one of the index's shards and the single file hold.

    Raises:
        UserError: a tensor differs, even if only in its dtype.
        OSError: a file cannot be read.
    """
    others = _list_other_files(folder, {stored.file for stored in tensors.values()})
    shared = [
        (name, tensors[name], found[name])
        for found in others.values()
        for name in sorted(found.keys() & tensors.keys())
    ]
    for max_elements in (START_ELEMENTS, None):
        for name, mine, theirs in shared:
            if not _is_same_tensor(folder, mine, theirs, max_elements):
                raise two_sets_error(folder, f"{name} differs between {mine.file} and {theirs.file}")
    for name, mine, theirs in shared:
        if mine.dtype != theirs.dtype:
            # The set that is read decides the dtype of computation and saved files.
            dtypes = [f"in {each.file} {str(each.dtype).removeprefix('torch.')}" for each in (mine, theirs)]
            problem = f"{name} has the same numbers in two dtypes: {dtypes[0]}, {dtypes[1]}"
            raise two_sets_error(folder, problem)
    single = others.get(folder / SINGLE_FILE)
    if single is None:
        return []
    return [
        UnmatchedTensor(name, tensors, SINGLE_FILE)
        if name in tensors
        else UnmatchedTensor(name, single, f"the shards of {INDEX}")
        for name in sorted(single.keys() ^ tensors.keys())
    ]


def _is_same_tensor(folder: Path, mine: StoredTensor, theirs: StoredTensor, max_elements: int | None) -> bool:
    """Return whether two tensors have equal bits or, if their dtypes differ, equal numbers.

    max_elements: compare only the first ones; None = all.
    """
    if mine.dtype == theirs.dtype:
        return same_bytes((folder, mine), (folder, theirs), max_elements)
    return not isinstance(mine.dtype, str) and same_values((folder, mine), (folder, theirs), max_elements)


def _list_other_files(folder: Path, read: set[str]) -> dict[Path, dict[str, StoredTensor]]:
    """Return {path: tensors} of the folder's other weight files, without links to a file of `read`.

    Files that cannot be read are ignored: git leaves a text file in place of a file that it did not fetch.
    """
    others = {}
    for path in sorted({path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)}):
        if path.name in read or not path.is_file() or any(path.samefile(folder / file) for file in read):
            continue
        try:
            found = list_tensors(path)
        except (SafetensorError, OSError):
            continue
        others[path] = {name: stored for name, stored in found.items() if not isinstance(stored.dtype, str)}
    return others


def two_sets_error(folder: Path, difference: str) -> UserError:
    """Return the error about a difference between two sets of weights in a folder."""
    return UserError(
        f"{folder}: holds two sets of weights: {difference}; programs differ in which they read, so move one"
        " away"
    )
