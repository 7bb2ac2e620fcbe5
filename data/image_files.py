"""Find the images that rows name, and read their headers. Nothing is decoded here.

An image that is missing, unreadable, no image, animated, too large or out of its folder ends the run with a
line that names the row.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import BinaryIO
from urllib.parse import unquote

from PIL import ExifTags, Image

from data.image_endings import check_end
from data.image_store import DATA_URL, StoredImage
from data.images import ImageRef
from data.pixels import IMAGE_FORMATS, check_tiles, too_large
from options.data_files import IMAGE_SUFFIXES
from options.errors import UserError
from options.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS

READABLE = "PNG, JPEG, WebP, BMP, GIF, TIFF or PPM"
# What Pillow raises for files that are damaged or made to do harm.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error,
          Image.DecompressionBombError)  # fmt: skip
DIGEST_BYTES = 2**16  # of an image's beginning
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # Pillow's, of grey values with more than 8 bits
TURNED = (5, 6, 7, 8)  # values of EXIF's orientation that swap width and height

ImageSource = StoredImage | str  # what a row has of an image: its bytes, or a path


class ImageFiles:
    """Finds the images of a data set's rows.

    Args:
        folder: --image_folder, which paths are relative to; None = the folder of the row's data file.
    """

    def __init__(self, folder: str | None = None):
        if folder is not None and not os.path.isdir(os.path.expanduser(folder)):
            raise UserError(f"--image_folder {folder}: no such folder")
        self._folder = None if folder is None else os.path.expanduser(folder)
        self._found: dict[tuple[str, int], ImageRef] = {}

    def find(self, source: ImageSource, folder: str, origin: str) -> ImageRef:
        """Return an image that a row names. Raises UserError, which names the row, if it cannot be used.

        Args:
            source: the image's bytes in a store, or its path.
            folder: of the row's data file; "" = it is a hub set, whose files are in the caches.
            origin: the data file and row.
        """
        error_prefix = f"--dataset {origin}"
        if isinstance(source, StoredImage):
            path, start, size, name = str(source.store.path), source.start, source.size, source.name
            error_prefix = f"{error_prefix}: image {_shown(name)}" if name else f"{error_prefix}: an image"
        else:
            path, start, size, name = self._find_file(source, folder, error_prefix), 0, None, ""
            error_prefix = f"{error_prefix}: image {_shown(source)}"
        known = self._found.get((path, start))
        if known is None:
            known = self._found[path, start] = _read_ref(path, start, size, error_prefix)
        return replace(known, origin=origin, name=name)

    def _find_file(self, source: str, folder: str, error_prefix: str) -> str:
        """Return the absolute path of an image's file. Raises UserError if it is not in its folder."""
        error_prefix = f"{error_prefix}: image {_shown(source)}"
        if source.startswith(DATA_URL):
            raise UserError(f"{error_prefix} is not base64 (docs/data.md)")
        is_file_address = source.startswith("file://")
        if "://" in source and not is_file_address:
            raise UserError(f"{error_prefix} is an address; download it, and give its path (docs/data.md)")
        path = unquote(source.removeprefix("file://")) if is_file_address else source
        roots = [self._folder] if self._folder else [folder] if folder else _cache_folders()
        try:
            found = os.path.realpath(os.path.join(roots[0], path))
        except ValueError:  # NUL, or half a character
            found = ""
        if not found or not os.path.lexists(found):
            raise UserError(f"{error_prefix}: no such file{self._describe_roots(roots, folder, source)}")
        if not any(_is_inside(found, root) for root in roots):
            raise UserError(
                f"{error_prefix} is outside of {' and '.join(dict.fromkeys(roots))}; --image_folder names"
                " another folder"
            )
        return found

    def _describe_roots(self, roots: Sequence[str], folder: str, source: str) -> str:
        """Return the end of the error about a missing file: where it was looked for."""
        if not folder and not self._folder:
            return "; the hub set holds paths, not images: download it, and name its folder by --image_folder"
        elsewhere = "" if self._folder else "; --image_folder names another folder"
        is_text = not source.lower().endswith(IMAGE_SUFFIXES)
        texts_alone = "; if these are texts, --images false trains without images" if is_text else ""
        return f" in {roots[0]}{elsewhere}{texts_alone}"


def find_image(path: str, option: str) -> ImageRef:
    """Return an image that the user names by its path, wherever that leads. Nothing is decoded.

    Raises UserError, which names the option and the path, if it cannot be used.
    """
    error_prefix = f"{option} {_shown(path)}"
    if "://" in path or path.startswith(DATA_URL):
        raise UserError(f"{error_prefix}: is an address; download it, and give its path")
    try:
        found = os.path.realpath(os.path.expanduser(path))
    except ValueError:  # NUL, or half a character
        raise UserError(f"{error_prefix}: no such file") from None
    return replace(_read_ref(found, 0, None, error_prefix), origin=option)


def _shown(source: str) -> str:
    """Return a path for a message: on one line, and not longer than that."""
    text = source if len(source) <= 200 else f"{source[:100]}..."
    return text if text.isprintable() else ascii(text)


def _cache_folders() -> list[str]:
    """Return the folders into which `datasets` puts the files of hub sets."""
    import datasets
    from huggingface_hub import constants

    return [
        str(datasets.config.HF_CACHE_HOME),
        str(datasets.config.HF_DATASETS_CACHE),
        constants.HF_HUB_CACHE,
    ]


def _is_inside(path: str, folder: str) -> bool:
    root = os.path.realpath(folder)
    return os.path.commonpath([path, root]) == root


def _read_ref(path: str, start: int, size: int | None, error_prefix: str) -> ImageRef:
    """Return an image with what its header says. Raises UserError if it cannot be used.

    Args:
        path, start, size: as in ImageRef.
        error_prefix: names the row and the image.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device may never end
            raise UserError(f"{error_prefix}: is not a file")
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size if size is None else size
            if length > MAX_IMAGE_BYTES:
                raise UserError(f"{error_prefix}: has {length:,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
            if not length:
                raise UserError(f"{error_prefix}: is empty")
            file.seek(start)
            encoded = file if size is None else io.BytesIO(file.read(size))
            head = encoded.read(DIGEST_BYTES)
            digest = hashlib.sha256(length.to_bytes(8, "little") + head).digest()
            width, height, is_deep = _read_header(encoded, length, error_prefix)
    except OSError as e:
        raise UserError(f"{error_prefix}: {e.strerror or 'cannot be read'}") from None
    return ImageRef(path, start, size, width, height, "", digest=digest, is_deep=is_deep)


def _read_header(encoded: BinaryIO, length: int, error_prefix: str) -> tuple[int, int, bool]:
    """Return (width, height, `is_deep` of ImageRef) of an encoded image, turned as EXIF says.

    Raises UserError if it is unusable. length: in bytes.
    """
    encoded.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused here, and of odd tags
            image = Image.open(encoded, formats=IMAGE_FORMATS)
            (width, height), is_deep = image.size, image.mode in DEEP_MODES
            if width * height > MAX_IMAGE_PIXELS:
                raise too_large(f"{width} x {height} pixels")
            # MPO is a photo with a preview behind it.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise UserError("is animated, or has several pages; one picture is needed")
            check_tiles(image)
            late_exif, is_whole = check_end(image, encoded, length)
            if late_exif:
                image.info["exif"] = late_exif
            if not is_whole:
                image.load()
            is_turned = _is_turned(image)
    except UserError as e:
        raise UserError(f"{error_prefix}: {e}") from None
    except Image.DecompressionBombError:
        what = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels"
        raise UserError(f"{error_prefix}: {too_large(what)}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{error_prefix}: is not an image ({READABLE})") from None
    except DAMAGE as e:
        reason = (" ".join(str(e).split()) or type(e).__name__)[:200]
        raise UserError(f"{error_prefix}: is truncated or damaged ({reason})") from None
    return (height, width, is_deep) if is_turned else (width, height, is_deep)


def _is_turned(image: Image.Image) -> bool:
    """Return whether EXIF says that the image lies on its side. Raises one of DAMAGE."""
    if image.format == "TIFF":
        return False  # Pillow turns its size
    # Pillow's method for PNG decodes the image to look for EXIF behind the pixels.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation) in TURNED
