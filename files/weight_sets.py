"""Several sets of weights in one folder: read if they are the same, refused if they differ.

transformers reads model.safetensors, and an index only where there is none; this program takes the index
first. Shards that the index does not name come from another save, before the index or after it.
consolidated*.safetensors is the layout of Mistral's own releases, which other programs prefer; it names its
tensors otherwise, and then is no second set. Files of a variant (model.fp16.safetensors) are not looked at:
all programs need to be asked for one by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from files.comparison import same_bytes, same_values
from files.names import INDEX, SINGLE
from files.tensors import StoredTensor, list_tensors
from options.errors import UserError

PATTERNS = (SINGLE, "model-*-of-*.safetensors", "consolidated*.safetensors")


class Extra(NamedTuple):
    """A tensor that only one of two sets holds. tensors: of that set; missing: what lacks it."""

    name: str
    tensors: Mapping[str, StoredTensor]
    missing: str


def compare_sets(folder: Path, tensors: Mapping[str, StoredTensor]) -> list[Extra]:
    """Compare `tensors`, which are to be read, with those of the same names in the folder's other files.

    Compares the first elements of every tensor, then every tensor in full, bit for bit. Returns the tensors
    that the index's shards hold and the single file does not, and the other way round.

    Raises UserError for a tensor that differs, if only in its dtype, and OSError.
    """
    others = _other_files(folder, {stored.file for stored in tensors.values()})
    shared = [
        (name, tensors[name], found[name])
        for found in others.values()
        for name in sorted(found.keys() & tensors.keys())
    ]
    for at_first in (True, False):
        for name, mine, theirs in shared:
            if not _same(folder, mine, theirs, at_first):
                raise two_sets(folder, f"{name} is another in {mine.file} than in {theirs.file}")
    for name, mine, theirs in shared:
        if mine.dtype != theirs.dtype:  # which one is read decides the dtype of what is computed and saved
            held = [
                f"in {stored.file} {str(stored.dtype).removeprefix('torch.')}" for stored in (mine, theirs)
            ]
            raise two_sets(folder, f"the same numbers, but of {name} the dtype is {held[0]}, and {held[1]}")
    return _extras(tensors, others[folder / SINGLE]) if folder / SINGLE in others else []


def _same(folder: Path, mine: StoredTensor, theirs: StoredTensor, at_first: bool) -> bool:
    """Whether two tensors are the same bit for bit or, in two dtypes, number for number."""
    if mine.dtype == theirs.dtype:
        return same_bytes((folder, mine), (folder, theirs), at_first)
    return not isinstance(mine.dtype, str) and same_values((folder, mine), (folder, theirs), at_first)


def _extras(tensors: Mapping[str, StoredTensor], single: Mapping[str, StoredTensor]) -> list[Extra]:
    """tensors: of the index's shards, which are read; single: of the single file."""
    return [
        Extra(name, tensors, SINGLE) if name in tensors else Extra(name, single, f"the shards of {INDEX}")
        for name in sorted(single.keys() ^ tensors.keys())
    ]


def _other_files(folder: Path, read: set[str]) -> dict[Path, dict[str, StoredTensor]]:
    """The tensors of each file that holds weights and is none of `read`, nor a link to one. A file that
    cannot be read, as git leaves a text in the place of what it did not fetch, holds none."""
    others = {}
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}):
        if path.name in read or not path.is_file() or any(path.samefile(folder / file) for file in read):
            continue
        try:
            found = list_tensors(path)
        except (SafetensorError, OSError):
            continue
        others[path] = {name: stored for name, stored in found.items() if not isinstance(stored.dtype, str)}
    return others


def two_sets(folder: Path, difference: str) -> UserError:
    """The error that tells of a second set of weights in a folder, and of a difference between the two."""
    return UserError(
        f"{folder}: holds two sets of weights: {difference}; programs differ in which they read, so move one"
        " away"
    )
