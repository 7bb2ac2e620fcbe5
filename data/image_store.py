"""Keep the images that the rows of a data file hold as bytes in one file of the cache.

So the host's memory does not grow with the images, and all ranks read the same file. Its name is a hash of
its contents: it is written once, and no run changes it, unless it finds that it is damaged.
"""

from __future__ import annotations

import base64
import binascii
import filecmp
import hashlib
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from options.errors import UserError

IMAGE_COLUMNS = ("images", "image")
DATA_URL = "data:image/"  # data:image/png;base64,...
# Levels at which a row can hold an image: messages, one of them, its parts, one of them, its image, a URL.
LEVELS = 6
SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5\n", b"P6\n")


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An encoded image in the file of a store, at a range of bytes. name: what the data calls it, or ""."""

    store: ImageStore
    start: int
    size: int
    name: str


def image_cache() -> Path:
    """Return the folder of the stores: beside what the hub's libraries download, where HF_HOME puts that."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(home).expanduser() / "fsdp-finetune" / "images"


def decode_base64(text: str) -> bytes | None:
    """Return the bytes that a text of base64 stands for; None if it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


class UnreadImage(int):
    """The number of bytes of an image in a column that is not read as one."""


def holds_image(value: bytes) -> bool:
    """Return whether bytes begin as those of an image do."""
    return value.startswith(SIGNATURES) or (value[:4] == b"RIFF" and value[8:12] == b"WEBP")


class ImageStore:
    """Writes images to a file of the cache, each once; a context manager.

    The file gets its name when the context ends; after an error it is deleted.

    Args:
        source: the data file or set whose images these are, for messages.
    """

    def __init__(self, source: str):
        self.source, self.path = source, Path()
        self._file: BinaryIO | None = None
        self._hash, self._ranges, self._end = hashlib.sha256(), dict[bytes, tuple[int, int]](), 0

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            with self._file:
                self._keep() if kind is None else self.path.unlink()
        except OSError as e:
            raise self._make_error(e) from None

    def add(self, data: bytes, name: str = "") -> StoredImage:
        """Return an encoded image, which it writes unless the file has it. Raises UserError if it cannot."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._ranges:
            self._write(data)
            self._hash.update(digest)
            self._ranges[digest] = self._end, len(data)
            self._end += len(data)
        return StoredImage(self, *self._ranges[digest], name)

    def take_row(self, row: dict, columns: Collection[str]) -> dict:
        """Return a row in which a StoredImage replaces each image that it holds as bytes.

        Such images are objects with `bytes`, as Hugging Face's data has them, and texts of base64 in these
        and in data URLs. What is no base64 stays as it is. An image in another column becomes an UnreadImage.
        Raises UserError if the cache cannot hold the images.

        Args:
            row: {column: value}.
            columns: those that hold images.
        """
        return {
            column: self._take(value, is_image=column in columns)
            if column in columns or isinstance(value, dict | list)
            else value
            for column, value in row.items()
        }

    def _take(self, value: Any, is_image: bool, levels: int = LEVELS, is_content: bool = False) -> Any:
        """Return a value with its images stored.

        Args:
            value: a cell, or a part of it.
            is_image: whether it holds images only.
            levels: of lists and objects that may hold images.
            is_content: whether it is the content of a message, or a part of that.
        """
        if not levels:
            return value
        if isinstance(value, list):
            return [self._take(each, is_image, levels - 1, is_content) for each in value]
        if isinstance(value, str) and is_image and value.startswith(DATA_URL):
            data = decode_base64(value.partition(",")[2])
            return value if data is None else self.add(data)
        if isinstance(value, bytes) and is_image:
            return self.add(value)
        if not isinstance(value, dict):
            return value
        kind = value.get("type")
        is_part = is_image or str(kind).startswith("image") or (kind is None and is_content)
        data = value.get("bytes")
        if is_part and isinstance(data, str):
            data = decode_base64(data)
        if is_part and isinstance(data, bytes):
            stored = self.add(data, os.path.basename(str(value.get("path") or "")))
            return stored if is_image else {"type": "image", "image": stored}
        if isinstance(data, bytes):
            return value | {"bytes": UnreadImage(len(data)) if holds_image(data) else len(data)}
        return {key: self._take(each, is_part, levels - 1, key == "content") for key, each in value.items()}

    def _write(self, data: bytes) -> None:
        """Append an image to the file, which the first one creates. Raises UserError."""
        try:
            if self._file is None:
                folder = image_cache()
                folder.mkdir(parents=True, exist_ok=True)
                descriptor, name = tempfile.mkstemp(".part", dir=folder)
                self._file, self.path = os.fdopen(descriptor, "wb"), Path(name)
            self._file.write(data)
        except OSError as e:
            raise self._make_error(e) from None

    def _keep(self) -> None:
        """Name the file by its contents, or use the one that has them already.

        One of that name may be damaged, so its bytes are compared. A power cut after the name is given must
        not leave a file without its bytes.
        """
        assert self._file is not None
        self._file.flush()
        kept = self.path.parent / f"{self._hash.hexdigest()}.images"
        if kept.is_file() and os.access(kept, os.R_OK) and filecmp.cmp(self.path, kept, shallow=False):
            self.path.unlink()
        else:
            os.fsync(self._file.fileno())
            self.path.replace(kept)
        self.path = kept

    def _make_error(self, error: OSError) -> UserError:
        return UserError(
            f"--dataset {self.source}: the cache {image_cache()} cannot hold its images ({error.strerror});"
            " HF_HOME names another place"
        )
