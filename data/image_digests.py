"""Tell whether images are equal, by all of their bytes where their beginnings agree."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from data.images import ImageRef
from options.errors import UserError

CHUNK_BYTES = 2**20


def digest_whole_images(refs: Iterable[ImageRef]) -> dict[tuple[str, int], bytes]:
    """Return a digest of each image, by its (path, start). Only equal images have equal digests.

    `ImageRef.digest` has an image's size and first bytes. Only images that agree in these are read again,
    each once. Raises UserError if one cannot be read.
    """
    alike = defaultdict[bytes, dict[tuple[str, int], ImageRef]](dict)
    for ref in refs:
        alike[ref.digest].setdefault((ref.path, ref.start), ref)
    return {
        place: digest if len(images) == 1 else _digest_bytes(ref)
        for digest, images in alike.items()
        for place, ref in images.items()
    }


def _digest_bytes(ref: ImageRef) -> bytes:
    """Return the SHA-256 of an image's bytes. Raises UserError, which names the row, if it cannot be read."""
    digest, left = hashlib.sha256(), ref.size
    try:
        with open(ref.path, "rb") as file:
            file.seek(ref.start)
            while chunk := file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)):
                digest.update(chunk)
                left = None if left is None else left - len(chunk)
    except OSError as e:
        raise UserError(f"--dataset {ref.origin}: image {ref.path}: {e.strerror}") from None
    return digest.digest()
