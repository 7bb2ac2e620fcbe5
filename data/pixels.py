"""Decode images as transformers' processors do: turned as EXIF says, in RGB, resized to uint8.

A file that is opened here is untrusted, and may have changed since its header was checked.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data.image_format import ImageFormat
from data.images import ImageRef
from options.errors import UserError, describe, reword_errors
from options.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, check_size

TILE_WIDTH, TILE_HEIGHT = 322, 323  # TIFF's tags
# What to do about an image that was whole when the run started. A run resumes with the same rows only.
PUT_BACK = (
    "; put the file back as it was and go on (--resume, if there is a checkpoint),"
    " or start anew without the row"
)
WRITE_AGAIN = "; a run that resumes, or a new one, writes the file again"
# Formats of single pictures. Others of Pillow's start programs (EPS), or are no pictures (FLI, MPEG).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def read_pixels(ref: ImageRef, image_format: ImageFormat) -> torch.Tensor:
    """Return the pixels of an image, resized for the model: [3, height, width] uint8.

    Raises UserError as `open_image` does.
    """
    return image_format.resize(open_image(ref))


def open_image(ref: ImageRef) -> Image.Image:
    """Return an image, decoded, in mode RGB.

    Raises UserError, which names the row, if the image cannot be read or is no longer what it was.
    """
    try:
        return _decode(_read_bytes(ref), (ref.width, ref.height))
    except UserError as e:
        raise _error(ref, str(e)) from None
    except UnidentifiedImageError:
        raise _error(ref, "is not an image") from None
    except OSError as e:  # Pillow raises it, too, for a file that is truncated
        raise _error(ref, e.strerror or describe(e)) from None
    except Exception as e:  # a damaged file raises SyntaxError, ValueError, struct.error and many others
        raise _error(ref, describe(e)) from None


def _read_bytes(ref: ImageRef) -> bytes:
    """Return the bytes of an encoded image. Raises OSError, and UserError for what is too large."""
    if ref.size is None:
        check_size(Path(ref.path), MAX_IMAGE_BYTES)
    with open(ref.path, "rb") as file:
        file.seek(ref.start)
        return file.read(MAX_IMAGE_BYTES if ref.size is None else ref.size)


def _decode(encoded: bytes, size: tuple[int, int]) -> Image.Image:
    """Return the image in mode RGB, turned as EXIF says, as transformers 5.23 makes it.

    Transparent pixels are put on white. Greys of more than 8 bits are cut at 255, as by `convert`: a model
    that is served with transformers or vLLM gets these pixels, so it is trained with them.

    size: (width, height) when the data was read. It was checked, and the tokens were counted by it. Raises
    UserError if the size is another one now: before anything is decoded, unless only EXIF differs.
    """
    with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as opened:
        if opened.size not in (size, size[::-1]):
            raise _size_error(opened.size, size)
        check_tiles(opened)
        image = ImageOps.exif_transpose(opened)
    if image.size != size:
        raise _size_error(image.size, size)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def check_tiles(image: Image.Image) -> None:
    """Raise UserError for a TIFF whose tiles have too many pixels: Pillow makes room for a whole one.

    The size of an image says nothing of them. Strips end with the image, whatever the file says.
    """
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag, 1) for tag in (TILE_WIDTH, TILE_HEIGHT))
    if width * height > MAX_IMAGE_PIXELS:
        raise too_large(f"tiles of {width} x {height} pixels")


def too_large(what: str) -> UserError:
    """Return the error about an image that has more than MAX_IMAGE_PIXELS. what: it has."""
    return UserError(f"has {what}; at most {MAX_IMAGE_PIXELS:,} are read; make it smaller")


def _size_error(now: tuple[int, int], before: tuple[int, int]) -> UserError:
    """Return the error about an image that has another (width, height) than before."""
    width, height = before
    return UserError(f"has {now[0]} x {now[1]} pixels, and had {width} x {height} when the run started")


def _error(ref: ImageRef, reason: str) -> UserError:
    """Return the error about an image. A range of bytes is in a file of the cache."""
    name, remedy = f"image {ref.path}", PUT_BACK
    if ref.size is not None:
        name, remedy = f"its image in the cache {ref.path}", WRITE_AGAIN
    return UserError(f"--dataset {ref.origin}: {name}: cannot be read ({reason}){remedy}")


def without_remedies() -> AbstractContextManager[None]:
    """Return a context that leaves the remedies for a training run out of UserErrors about images."""
    return reword_errors(lambda text: text.removesuffix(PUT_BACK).removesuffix(WRITE_AGAIN))
