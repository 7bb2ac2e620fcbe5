"""Open data files, also those that are packed by gzip or zstd, without unpacking more than a memory holds."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from options.data_files import PACKINGS
from options.errors import UserError
from options.limits import MAX_UNPACKED_RATIO, MIN_UNPACKED_BYTES


@contextmanager
def open_data_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, unpacked if the suffix is one of PACKINGS.

    Reading raises UserError for a packed file that is damaged, cut, or unpacks to too many bytes. Raises
    OSError if the file cannot be opened.
    """
    packing = PACKINGS.get(path.suffix.lower())
    if packing is None:
        with path.open("rb") as file:
            yield file
        return
    with _open_packed(path, packing) as stream:
        yield io.BufferedReader(_BoundedStream(stream, path), io.DEFAULT_BUFFER_SIZE * 16)


def _open_packed(path: Path, packing: str) -> Any:
    """Return the unpacked bytes of a file as an open file. packing: a value of PACKINGS."""
    if packing == "gzip":
        return gzip.open(path)  # pyarrow refuses the zeros with which tapes and disk images pad a file
    import pyarrow  # slow to import, and most data is not packed

    return pyarrow.input_stream(str(path), compression=packing)


class _BoundedStream(io.RawIOBase):
    """The bytes of a stream, up to the limit for the packed file that it unpacks.

    Args:
        stream: an open file of gzip or pyarrow.
        path: the packed file, for its size and for messages.
    """

    def __init__(self, stream: Any, path: Path):
        self._stream, self._path = stream, path
        self._bytes_left = max(MAX_UNPACKED_RATIO * os.path.getsize(path), MIN_UNPACKED_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._stream.readinto(buffer)
        except (OSError, EOFError, zlib.error) as e:  # of the library that unpacks
            raise UserError(f"--dataset {self._path}: cannot be unpacked ({e})") from None
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise UserError(
                f"--dataset {self._path}: unpacks to more than {MAX_UNPACKED_RATIO} times its size; unpack it"
                " first, if it is sound"
            )
        return count
