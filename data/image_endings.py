"""Tell, without decoding it, whether an encoded image seems to be whole."""

from __future__ import annotations

import struct
from typing import BinaryIO

from PIL import ExifTags, Image

TAIL_BYTES = 2**16  # of a JPEG's end, where its last marker is; few cameras append more
SHORT_BYTES = 2**16  # of an image that is decoded at once to see whether it is whole
BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # of a JPEG, without a length behind them
START_OF_SCAN, END_OF_IMAGE = 0xDA, b"\xff\xd9"
# Chunks behind the pixels of a PNG that do no harm. Pillow reads the others while it decodes: they may hold
# EXIF, or more than Pillow takes.
PLAIN_CHUNKS = {b"IDAT", b"eXIf", b"tIME"}
MAX_NAME_BYTES = 80  # of a text, with the zero behind it
EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
UNCOMPRESSED = 1  # TIFF's
OFFSETS_AND_SIZES = (
    (ExifTags.Base.StripOffsets, ExifTags.Base.StripByteCounts),
    (ExifTags.Base.TileOffsets, ExifTags.Base.TileByteCounts),
)


def check_end(image: Image.Image, encoded: BinaryIO, length: int) -> tuple[bytes, bool]:
    """Return (EXIF behind the pixels of a PNG or b"", whether the image seems to be whole).

    One that does not seem so may be whole: some programs leave the end out, or write behind it. Decoding it
    tells.

    Args:
        image: opened, not decoded.
        encoded: its file.
        length: in bytes.
    """
    if image.format == "PNG":
        return _walk_png(encoded, length)
    encoded.seek(0)
    if image.format in ("JPEG", "MPO"):
        return b"", _has_jpeg_end(encoded, length)
    if image.format == "WEBP":
        return b"", int.from_bytes(encoded.read(8)[4:], "little") + 8 <= length
    # An uncompressed format, or one whose directory may be anywhere: decoding the short ones is quick.
    return b"", length > SHORT_BYTES and image.format == "TIFF" and _has_tiff_parts(image, length)


def _walk_png(encoded: BinaryIO, length: int) -> tuple[bytes, bool]:
    """Return (the EXIF of a PNG's chunks or b"", whether its last chunk is there).

    One with chunks behind its pixels that only decoding reads does not seem whole.
    """
    exif, at, has_pixels, is_plain = b"", 8, False, True
    while at + 12 <= length:
        encoded.seek(at)
        size, kind = struct.unpack(">I4s", encoded.read(8))
        if kind == b"IEND":
            return exif, is_plain
        has_pixels = has_pixels or kind == b"IDAT"
        if has_pixels and kind not in PLAIN_CHUNKS:
            is_plain = (
                is_plain and kind == b"tEXt" and not encoded.read(MAX_NAME_BYTES).startswith(EXIF_TEXTS)
            )
        if kind == b"eXIf" and at + 12 + size <= length:
            exif = b"Exif\0\0" + encoded.read(size)
        at += 12 + size
    return exif, False


def _has_jpeg_end(encoded: BinaryIO, length: int) -> bool:
    """Return whether the end of a JPEG is behind its pixels, near the end of the file.

    Segments before the pixels may hold a preview, which is a JPEG with an end of its own.
    """
    at = 2
    while at + 4 <= length:
        encoded.seek(at)
        mark, kind, size = struct.unpack(">BBH", encoded.read(4))
        if mark != 0xFF:
            return False
        if kind == START_OF_SCAN:
            encoded.seek(max(at, length - TAIL_BYTES))
            return END_OF_IMAGE in encoded.read()
        # A marker may be filled up with 0xFF.
        at += 1 if kind == 0xFF else 2 if kind in BARE_MARKERS else 2 + size
    return False


def _has_tiff_parts(image: Image.Image, length: int) -> bool:
    """Return whether the strips or tiles of a TIFF are within its file, and long enough if not compressed."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    for offset_tag, size_tag in OFFSETS_AND_SIZES:
        offsets, sizes = tags.get(offset_tag), tags.get(size_tag)
        if not offsets or not sizes:
            continue
        ends = [start + size for start, size in zip(offsets, sizes, strict=True)]
        bits = sum(tags.get(ExifTags.Base.BitsPerSample, (1,)))  # of a pixel; those of tiles are more
        is_long = sum(sizes) * 8 >= image.width * image.height * bits
        is_packed = tags.get(ExifTags.Base.Compression, UNCOMPRESSED) != UNCOMPRESSED
        return max(ends) <= length and (is_packed or is_long)
    return False
