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

from safetensors import SafetensorError

from files.comparison import same_bytes
from files.names import INDEX, SINGLE
from files.tensors import StoredTensor, list_tensors
from options.errors import UserError

PATTERNS = (SINGLE, "model-*-of-*.safetensors", "consolidated*.safetensors")


def check_one_set(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises UserError if the folder holds other weights under the names of `tensors`, which are to be read.

    Compares the first elements of every tensor, then every tensor in full, bit for bit. Raises OSError.
    """
    others = _other_files(folder, {stored.file for stored in tensors.values()})
    for whole in (False, True):
        for path, found in others.items():
            for name in sorted(found.keys() & tensors.keys()):
                mine, theirs = (folder, tensors[name]), (folder, found[name])
                if not same_bytes(mine, theirs, at_first=not whole):
                    raise _two_sets(folder, f"{name} is another in {tensors[name].file} than in {path.name}")
    if folder / SINGLE in others:
        _check_names(folder, tensors, others[folder / SINGLE])


def _check_names(
    folder: Path, tensors: Mapping[str, StoredTensor], single: Mapping[str, StoredTensor]
) -> None:
    """Raises UserError unless the single file holds the names of the index's shards, which are read."""
    for name in sorted(single.keys() ^ tensors.keys()):
        files = (tensors[name].file, SINGLE) if name in tensors else (SINGLE, f"the shards of {INDEX}")
        raise _two_sets(folder, f"{name} is in {files[0]}, and not in {files[1]}")


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


def _two_sets(folder: Path, difference: str) -> UserError:
    return UserError(
        f"{folder}: holds two sets of weights: {difference}; programs differ in which they read, so move one"
        " away"
    )
