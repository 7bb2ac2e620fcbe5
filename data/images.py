"""Where the images of a data set's rows are. They are never held decoded.

Shapes: R examples.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

MAX_NAME_LENGTH = 60  # characters of a name that a line shows


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An encoded image (PNG, JPEG and so on): a file, or a range of bytes of one.

    Attributes:
        path: absolute path of the file.
        start, size: the range in bytes; size None = to the file's end.
        width, height: in pixels, as its header says, turned as EXIF says.
        origin: the data file and row that name it, for errors.
        name: what the data calls it; "" = the file's name, or none for bytes of a data file.
        digest: of its size in bytes and its first bytes; images of equal digests count as equal.
        is_deep: whether its grey values have more than 8 bits: those over 255 are cut.
    """

    path: str
    start: int
    size: int | None
    width: int
    height: int
    origin: str
    name: str = ""
    digest: bytes = b""
    is_deep: bool = False

    @property
    def label(self) -> str:
        """What lines about the data call it, such as "scan.jpg 512x768": one line, whatever its name holds.

        Bytes without a name are called by their row.
        """
        name = self.name or os.path.basename(self.path)
        if self.size is not None and not self.name:
            name = f"image of {os.path.basename(self.origin)}"
        name = name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}..."
        return f"{name if name.isprintable() else ascii(name)} {self.width}x{self.height}"


@dataclass(frozen=True)
class RowImages:
    """The images of the examples of a TokenizedRows, in the order of their tokens.

    Attributes:
        refs: of all examples, one after the other.
        starts: [R + 1] int64; example i has refs[starts[i]:starts[i+1]]. [1] if no example has an image.
    """

    refs: Sequence[ImageRef] = ()
    starts: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[ImageRef]]) -> RowImages:
        """Return the images of examples, each given with its own."""
        counts = torch.tensor([len(refs) for refs in rows], dtype=torch.int64)
        if not int(counts.sum()):
            return cls()
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return cls([ref for refs in rows for ref in refs], starts)

    def of_row(self, index: int) -> Sequence[ImageRef]:
        """Return the images of an example."""
        if not self.refs:
            return ()
        return self.refs[int(self.starts[index]) : int(self.starts[index + 1])]


def describe_deep_images(refs: Iterable[ImageRef]) -> tuple[str, ...]:
    """Return a remark on the images whose values are cut, if there are any. Each image counts once."""
    count = len({(ref.path, ref.start) for ref in refs if ref.is_deep})
    if not count:
        return ()
    images = "image has" if count == 1 else "images have"
    return (
        f"data: {count:,} grey {images} more than 8 bits: values over 255 are cut to white, as other programs"
        " do it; convert them to 8 bits (docs/vision.md)",
    )


def join_row_images(parts: Sequence[tuple[RowImages, int]]) -> RowImages:
    """Return the images of the examples of several sets, one set after the other.

    parts: (the images of a set, its number of examples).
    """
    return RowImages.from_rows([images.of_row(i) for images, count in parts for i in range(count)])
