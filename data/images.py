"""Where the images of a data set's rows are. They are never held decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An encoded image (PNG, JPEG and so on): a file, or a range of bytes of one.

    Attributes:
        path: absolute path of the file.
        start, size: the range in bytes; size None = to the file's end.
        width, height: in pixels, as its header says, turned as EXIF says.
        origin: the data file and row that name it, for errors.
    """

    path: str
    start: int
    size: int | None
    width: int
    height: int
    origin: str


@dataclass(frozen=True)
class RowImages:
    """The images of the examples of a TokenizedRows, in the order of their tokens.

    Attributes:
        refs: of all examples, one after the other.
        starts: [R + 1] int64; example i has refs[starts[i]:starts[i+1]]. [1] if no example has an image.
    """

    refs: Sequence[ImageRef] = ()
    starts: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def of_row(self, index: int) -> Sequence[ImageRef]:
        """Return the images of an example."""
        return self.refs[int(self.starts[index]) : int(self.starts[index + 1])]
