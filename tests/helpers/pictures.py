"""Pictures of all kinds, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.images import ImageRef

ORIENTATION = 0x112  # EXIF's tag
# name: (mode, size, ending, options of Image.save)
KINDS = {
    "rgb": ("RGB", (61, 43), "png", {}),
    "jpeg": ("RGB", (61, 43), "jpg", {}),
    "grey": ("L", (61, 43), "png", {}),
    "grey_jpeg": ("L", (61, 43), "jpg", {}),
    "one_bit": ("1", (61, 43), "png", {}),
    "rgba": ("RGBA", (61, 43), "png", {}),
    "grey_alpha": ("LA", (61, 43), "png", {}),
    "palette": ("P", (61, 43), "png", {}),
    "palette_transparent": ("P", (61, 43), "png", {"transparency": 3}),
    "rgb_transparent": ("RGB", (61, 43), "png", {"transparency": (0, 0, 0)}),
    "gif": ("P", (61, 43), "gif", {}),
    "webp": ("RGB", (61, 43), "webp", {}),
    "bmp": ("RGB", (61, 43), "bmp", {}),
    "cmyk": ("CMYK", (61, 43), "jpg", {}),
    "cmyk_tiff": ("CMYK", (61, 43), "tif", {}),
    "sixteen_bit": ("I;16", (61, 43), "png", {}),
    "sixteen_bit_tiff": ("I;16", (61, 43), "tif", {}),
    "float_tiff": ("F", (61, 43), "tif", {}),
    **{f"turned_{n}": ("RGB", (61, 43), "jpg", {"orientation": n}) for n in range(1, 9)},
    "turned_png": ("RGBA", (61, 43), "png", {"orientation": 6}),
    "one_pixel": ("RGB", (1, 1), "png", {}),
    "long": ("RGB", (10_000, 30), "png", {}),
    "tall": ("L", (20, 3_000), "jpg", {}),
}
TRANSPARENT = {"rgba", "grey_alpha", "palette_transparent", "rgb_transparent", "turned_png"}


def draw(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return a picture of random pixels; of the modes with more than 8 bits, also of values above 255."""
    generator = np.random.default_rng(seed)
    shape = size[::-1]
    if mode in ("I;16", "F"):
        values = generator.integers(0, 600, shape)
        return Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
    bands = {"RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 1)
    if mode in ("RGB", "P"):
        picture = Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
        return picture.quantize(16) if mode == "P" else picture
    values = generator.integers(0, 256, (*shape, bands), dtype=np.uint8)
    if mode in ("L", "1"):
        return Image.fromarray(values[..., 0]).convert(mode)
    return Image.fromarray(values, mode)


def save_picture(kind: str, folder: Path) -> ImageRef:
    """Write a picture of KINDS, and return a reference to it."""
    mode, size, ending, options = KINDS[kind]
    options = dict(options)
    picture, path = draw(mode, size), folder / f"{kind}.{ending}"
    if orientation := options.pop("orientation", None):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    picture.save(path, **options)
    with Image.open(path) as opened:
        width, height = ImageOps.exif_transpose(opened).size
    return ImageRef(str(path), 0, None, width, height, "rows.jsonl, row 3")
