"""Small copies of the images in a run's samples: written into the RUN, for its report and its logger.

The images themselves may be gone, or on another machine, when report.py makes the page again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from data.images import ImageRef
from data.pixels import open_image
from files.atomic_writes import stage_files
from files.disk_room import warn_on_full_disk
from files.names import SAMPLE_IMAGES

SIDE = 160  # pixels of the longer side of a copy
MAX_BYTES = 2**15  # of a copy
QUALITIES = (80, 40, 10)  # of JPEG; the first one that is small enough
MAX_COPIES = 4  # of a prompt's images
MAX_EMBEDDED_CHARS = 2**21  # of all images that a page embeds
COPY_NAME = re.compile(r"[0-9a-f]{16}\.jpg")


def write_copies(folder: Path, refs: Sequence[ImageRef]) -> list[dict[str, str]]:
    """Write copies of a prompt's images into a RUN. Return {label: of the image, copy: name} of each.

    Images beyond MAX_COPIES, and those for which the disk has no room, have no `copy`. Raises UserError for
    one that cannot be read.
    """
    images = []
    for i, ref in enumerate(refs):
        images.append({"label": ref.label})
        if i < MAX_COPIES:
            encoded = _shrink(open_image(ref))
            name = f"{hashlib.sha256(encoded).hexdigest()[:16]}.jpg"
            if _write(folder / SAMPLE_IMAGES / name, encoded):
                images[-1]["copy"] = name
    return images


def embed_image(ref: ImageRef) -> str:
    """Return a small copy of an image as a `data:` URL for a page. Raises UserError if it cannot be read."""
    return _data_url(_shrink(open_image(ref)))


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _shrink(image: Image.Image) -> bytes:
    """Return an image of mode RGB as a small JPEG."""
    image.thumbnail((SIDE, SIDE))
    for quality in QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= MAX_BYTES:
            break
    return file.getvalue()


def _write(path: Path, encoded: bytes) -> bool:
    """Write a copy, unless it is there. Return whether the disk had room for it."""
    with warn_on_full_disk(path):
        path.parent.mkdir(exist_ok=True)
        if not path.is_file():
            with stage_files(path.parent) as stage:
                stage(path.name).write_bytes(encoded)
        return True
    return False


def find_copy(folder: Path, name: str) -> Path | None:
    """Return the path of a copy in a RUN; None if the name is not one of a copy, or the copy is missing."""
    path = folder / SAMPLE_IMAGES / name
    if not COPY_NAME.fullmatch(name) or path.parent.is_symlink() or path.is_symlink() or not path.is_file():
        return None
    return path


def find_copies(folder: Path, images: Sequence[Mapping[str, str]]) -> list[tuple[str, Path]]:
    """Return (label without folders, path) of those images of a sample that have a copy in the RUN.

    images: as `write_copies` returns them.
    """
    found = ((os.path.basename(image["label"]), find_copy(folder, image.get("copy", ""))) for image in images)
    return [(label, path) for label, path in found if path]


def embed_copy(folder: Path, name: str) -> str:
    """Return a copy in a RUN as a `data:` URL for a page; "" if it is none, or is missing."""
    path = find_copy(folder, name)
    if path is None:
        return ""
    with path.open("rb") as file:
        encoded = file.read(MAX_BYTES + 1)
    if len(encoded) > MAX_BYTES or not encoded.startswith(b"\xff\xd8"):
        return ""
    return _data_url(encoded)


class ImageEmbedder:
    """Embeds copies of images into one page, at most MAX_EMBEDDED_CHARS in all."""

    def __init__(self):
        self.left = MAX_EMBEDDED_CHARS

    def embed(self, folder: Path, images: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
        """Return (label, `data:` URL) of each image of a sample in a RUN; "" for a URL that has no room."""
        embedded = []
        for image in images:
            url = embed_copy(folder, image.get("copy", ""))
            embedded.append((image["label"], url if len(url) <= self.left else ""))
            self.left -= len(embedded[-1][1])
        return embedded
