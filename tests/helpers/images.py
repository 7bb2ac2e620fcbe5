"""Small image files, and a model's way of taking images, for the tests of data."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import datasets
import huggingface_hub
import torch
from PIL import Image

from benchmarks.make_checkpoint import byte_tokenizer
from data.image_format import ImageFormat, ImagePixels
from data.reading import ReadingOptions
from tests.helpers.hub_cache import FIRST, add_set_to_hub_cache

BEGIN, PART, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
# Like Gemma 3's: contents are texts or lists of parts; each text is stripped.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ p.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def image_tokenizer(template: str | None = TEMPLATE):
    """Return a tokenizer of bytes, with the tokens of turns and images of Gemma 3."""
    tokenizer = byte_tokenizer()
    names = ["<start_of_turn>", "<end_of_turn>", BEGIN, PART, END]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = template
    return tokenizer


class StandInFormat(ImageFormat):
    """Images of one token for each begun square of 16 x 16 pixels, framed as Gemma 3 frames them."""

    def expand(self, width: int, height: int) -> str:
        return f"\n\n{BEGIN}{PART * self.count_tokens(width, height)}{END}\n\n"

    def count_tokens(self, width: int, height: int) -> int:
        return -(-width // 16) * -(-height // 16)

    def count_pixels(self, width: int, height: int) -> int:
        return width * height

    def limit_side(self, side: int) -> ImageFormat:
        raise NotImplementedError

    def resize(self, image) -> torch.Tensor:
        raise NotImplementedError

    def arrange(self, images) -> ImagePixels:
        raise NotImplementedError

    def blank(self) -> torch.Tensor:
        raise NotImplementedError


def stand_in(tokenizer) -> StandInFormat:
    token_id = tokenizer.convert_tokens_to_ids(PART)
    return StandInFormat(BEGIN, token_id, (BEGIN, PART, END), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def image_options(tokenizer=None, **options) -> ReadingOptions:
    """Return how the rows of a model with images are read."""
    tokenizer = tokenizer or image_tokenizer()
    return ReadingOptions(
        tokenizer, **{"context_length": 1000, "image_format": stand_in(tokenizer)} | options
    )


def encode_image(width: int = 40, height: int = 20, kind: str = "PNG", color: int = 0, **options) -> bytes:
    """Return an image of one colour as the bytes of a file. options: of Pillow's `save`."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (color, 90, 200)).save(file, kind, **options)
    return file.getvalue()


def write_image(path: Path, *size: int, **options) -> Path:
    """Write an image of `encode_image` to a file, by whose name Pillow knows the kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(path.suffix, path.suffix[1:].upper())
    path.write_bytes(encode_image(*size, kind=kind, **options))
    return path


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header says so many pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ]
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_image_set(folder: Path, splits: dict[str, list[dict]]) -> Path:
    """Write a data set as Hugging Face's library writes one: its files say which columns are images.

    splits: {name: rows}, where bytes are an image.
    """
    folder.mkdir(parents=True)
    lines = []
    for split, rows in splits.items():
        values = {name: "image" if isinstance(value, bytes) else value for name, value in rows[0].items()}
        kinds = {
            name: datasets.Image()
            if value == "image"
            else datasets.List(datasets.Value("string"))
            if isinstance(value, list)
            else datasets.Value("string")
            for name, value in values.items()
        }
        encoded = [
            {k: {"bytes": v, "path": None} if isinstance(v, bytes) else v for k, v in row.items()}
            for row in rows
        ]
        path = folder / f"{split}.parquet"
        datasets.Dataset.from_list(encoded, features=datasets.Features(kinds)).to_parquet(path)
        lines.append(f"  - {{split: {split}, path: {path.name}}}\n")
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    (folder / "README.md").write_text(f"{head}{''.join(lines)}---\n")
    return folder


def put_on_hub(monkeypatch, cache: Path, name: str, folder: Path) -> None:
    """Put a folder of `write_image_set` into the caches as a data set of the hub, which cannot be reached."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    add_set_to_hub_cache(cache, name, folder, FIRST, "main")
