"""data/image_files.py: images that rows name, found and checked by their headers."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps, PngImagePlugin

from data import image_files
from data.image_files import ImageFiles, find_image
from data.image_store import ImageStore
from data.pixels import open_image
from options.errors import UserError
from options.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from tests.helpers.data_files import write_file
from tests.helpers.images import bomb, encode_image, write_image
from tests.helpers.pictures import draw


def find(source, folder: Path, image_folder: Path | None = None):
    files = ImageFiles(None if image_folder is None else str(image_folder))
    return files.find(source, str(folder), "rows.jsonl:7")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tif", "a.ppm"])
def test_a_file_of_each_kind(tmp_path, name):
    path = write_image(tmp_path / "sub" / name, 40, 20)
    ref = find(f"sub/{name}", tmp_path)
    assert (ref.path, ref.start, ref.size) == (str(path), 0, None) and ref.origin == "rows.jsonl:7"
    assert (ref.width, ref.height, ref.label) == (40, 20, f"{name} 40x20")
    assert find(str(path), tmp_path) == find(f"file://{path}", tmp_path) == ref


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_size_is_that_of_the_turned_image(tmp_path, kind, orientation):
    """As Pillow itself turns it after decoding."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_file(tmp_path / "a", encode_image(40, 20, kind, exif=exif))
    ref = find("a", tmp_path)
    with Image.open(tmp_path / "a") as image:
        assert (ref.width, ref.height) == ImageOps.exif_transpose(image).size
    assert (ref.width > ref.height) == (orientation < 5)


def add_chunk(png: bytes, kind: bytes, data: bytes, is_behind: bool) -> bytes:
    """Return a PNG with a chunk before or behind its pixels."""
    chunk = io.BytesIO()
    PngImagePlugin.putchunk(chunk, kind, data)
    at = len(png) - 12 if is_behind else 33  # the last chunk has no data; the first one is the header
    return png[:at] + chunk.getvalue() + png[at:]


EXIF = Image.Exif()
EXIF[0x0112] = 6
RAW_EXIF = b"\nexif\n%8d\n%s\n" % (len(EXIF.tobytes()), EXIF.tobytes().hex().encode())
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TURNING = {
    "EXIF": (b"eXIf", EXIF.tobytes()[6:]),
    "EXIF as a text": (b"tEXt", b"Raw profile type exif\0" + RAW_EXIF),
    "EXIF as a packed text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_EXIF)),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
}


@pytest.mark.parametrize("is_behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("kind, data", TURNING.values(), ids=TURNING)
def test_a_png_that_is_turned(tmp_path, kind, data, is_behind):
    """It has the size that it has when it is decoded, wherever its chunk is."""
    write_file(tmp_path / "a.png", add_chunk(encode_image(40, 20), kind, data, is_behind))
    with Image.open(tmp_path / "a.png") as image:
        assert ImageOps.exif_transpose(image).size == (20, 40)
    ref = find("a.png", tmp_path)
    assert (ref.width, ref.height) == (20, 40) == open_image(ref).size


def test_only_odd_chunks_are_decoded_at_the_start(tmp_path, monkeypatch):
    """Not the dates that ImageMagick writes behind the pixels."""
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    dated = add_chunk(encode_image(40, 20), b"tEXt", b"date:create\x002026-11-30", True)
    write_file(tmp_path / "a.png", add_chunk(dated, b"eXIf", EXIF.tobytes()[6:], True))
    assert find("a.png", tmp_path).height == 40


def with_preview(jpeg: bytes) -> bytes:
    """Return a JPEG with a whole one in its EXIF, as cameras write it."""
    segment = b"Exif\0\0II*\0\x08" + bytes(9) + encode_image(8, 8, "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def tiled_tiff(side: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels in one packed tile of side x side."""
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side),
            (324, 134), (325, 9)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + zlib.compress(bytes(9))


def noise(kind: str, **options) -> bytes:
    """Return a picture of random pixels, which no format packs well."""
    file = io.BytesIO()
    draw("RGB", (400, 300)).save(file, kind, **options)
    return file.getvalue()


def test_an_image_that_the_user_names(tmp_path):
    """Its path is in each line once."""
    path = write_image(tmp_path / "a.png")
    ref = find_image(str(path), "--image_path")
    path.unlink()
    with pytest.raises(UserError, match=rf"^--dataset --image_path: image {path}: cannot be read \(No such"):
        open_image(ref)
    with pytest.raises(UserError, match=rf"^--image_path {path}: No such file or directory$"):
        find_image(str(path), "--image_path")


def test_images_that_are_whole(tmp_path):
    """What the checks for cut ones must let pass."""
    for data in (
        with_preview(encode_image(90, 90, "JPEG", quality=100)), noise("TIFF"),
        noise("TIFF", compression="tiff_lzw"), noise("JPEG", progressive=True, quality=95),
    ):  # fmt: skip
        write_file(tmp_path / "a", data)
        ref = find("a", tmp_path)
        assert open_image(ref).size == (ref.width, ref.height)


def test_a_stored_image_is_a_range_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with ImageStore("rows") as store:
        stored = [store.add(encode_image(8, size), f"{size}.png") for size in (9, 10)]
    refs = [find(one, tmp_path) for one in stored]
    assert [(ref.width, ref.height, ref.label) for ref in refs] == [
        (8, 9, "9.png 8x9"),
        (8, 10, "10.png 8x10"),
    ]
    data = Path(refs[1].path).read_bytes()[refs[1].start :][: refs[1].size]
    assert data == encode_image(8, 10)
    alone = find("a.png", write_image(tmp_path / "a.png", 8, 10).parent)
    assert alone.digest == refs[1].digest != refs[0].digest


def test_photos_are_whole_whatever_follows_them(tmp_path, monkeypatch):
    """Phones append films and previews to a JPEG. Only such an image is decoded at the start."""
    decoded = []
    load = Image.Image.load
    monkeypatch.setattr(
        "PIL.JpegImagePlugin.JpegImageFile.load", lambda self: decoded.append(1) or load(self)
    )
    for name, tail in (("plain", b""), ("film", bytes(2**17))):
        write_file(tmp_path / name, encode_image(40, 20, "JPEG") + tail)
        assert find(name, tmp_path).width == 40
        assert len(decoded) == (name == "film")
    frames = [Image.new("RGB", (40, 20)), Image.new("RGB", (4, 2))]
    frames[0].save(tmp_path / "photo.mpo", "MPO", save_all=True, append_images=frames[1:])
    assert find("photo.mpo", tmp_path).height == 20


BAD = {
    "missing": ("", r"image a.png: no such file in .*; --image_folder names another folder$"),
    "empty": (b"", r"image a.png: is empty$"),
    "not an image": (b"<html>", r"image a.png: is not an image \(PNG, JPEG"),
    "an image that is not read": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "header cut": (encode_image()[:20], "image a.png: is (not an image|truncated)"),
    "PNG cut": (encode_image(90, 90, compress_level=0)[:-2000], "image a.png: is truncated or damaged"),
    "JPEG cut": (encode_image(90, 90, "JPEG", quality=100)[:-200], "image a.png: is truncated or damaged"),
    "WebP cut": (encode_image(90, 90, "WEBP", lossless=True)[:-20], "image a.png: is truncated or damaged"),
    "JPEG with a preview cut": (
        with_preview(encode_image(90, 90, "JPEG", quality=100)[:-200]),
        "image a.png: is truncated or damaged"),
    "long TIFF cut": (noise("TIFF")[:-100_000], "image a.png: is truncated or damaged"),
    "text bomb behind the pixels": (
        add_chunk(encode_image(), b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)), True),
        "image a.png: is truncated or damaged"),
    "tile bomb": (tiled_tiff(25_600), "image a.png: has tiles of 25600 x 25600 pixels; at most"),
    "BMP cut": (encode_image(90, 90, "BMP")[:-20], "image a.png: is truncated or damaged"),
    "bomb": (bomb(30_000, 30_000), f"image a.png: has .*pixels; at most {MAX_IMAGE_PIXELS:,} are read"),
    "bomb that Pillow takes": (bomb(10_000, 10_000), "image a.png: has 10000 x 10000 pixels; at most"),
}  # fmt: skip


@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD)
def test_an_image_that_cannot_be_used(tmp_path, monkeypatch, data, message):
    """The line names the row. Nothing too large is decoded."""
    if "pixels" in message:
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    if data != "":
        write_file(tmp_path / "a.png", data)
    with pytest.raises(UserError, match=f"^--dataset rows.jsonl:7: .*{message}") as raised:
        find("a.png", tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animated_image(tmp_path, kind):
    frames = [Image.new("RGB", (40, 20), (i, i, i)) for i in (0, 90)]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"rows.jsonl:7: image a: is animated, or has several pages"):
        find("a", tmp_path)


def test_a_file_of_too_many_bytes(tmp_path):
    path = write_image(tmp_path / "a.png")
    os.truncate(path, MAX_IMAGE_BYTES + 1)
    with pytest.raises(UserError, match=f"image a.png: has {MAX_IMAGE_BYTES + 1:,} bytes; at most"):
        find("a.png", tmp_path)


@pytest.mark.parametrize("source, message", [
    ("http://host/a.png", r"image http://host/a.png is an address; download it"),
    ("https://host/a.png", r"is an address"),
    ("../a.png", r"image ../a.png is outside of .*data; --image_folder names another folder"),
    ("link.png", r"image link.png is outside of"),
    ("folder_link/a.png", r"is outside of"),
    ("{outside}/a.png", r"is outside of"),
    ("data:image/png;base64,?", r"is not base64"),
    ("a\0.png", r"image 'a\\x00.png': no such file"),
    ("\ud800.png", r"image '\\ud800.png': no such file"),
    ("x" * 5000, r"no such file"),
    ("sub", r"is not a file"),
    ("pipe", r"is not a file"),
])  # fmt: skip
def test_a_path_that_leads_elsewhere(tmp_path, source, message):
    write_image(tmp_path / "a.png")
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "link.png").symlink_to(tmp_path / "a.png")
    (data / "folder_link").symlink_to(tmp_path)
    os.mkfifo(data / "pipe")
    with pytest.raises(UserError, match=f"^--dataset rows.jsonl:7: image .*{message}|{message}"):
        find(source.replace("{outside}", str(tmp_path)), data)


def test_the_image_folder(tmp_path):
    """Paths are relative to it, and must be in it; a link to the folder itself is followed."""
    write_image(tmp_path / "data" / "a.png", 10, 10)
    images = write_image(tmp_path / "images" / "a.png", 20, 20).parent
    (tmp_path / "link").symlink_to(images)
    assert find("a.png", tmp_path / "data").width == 10
    assert (
        find("a.png", tmp_path / "data", images).width == find("a.png", images, tmp_path / "link").width == 20
    )
    with pytest.raises(UserError, match=r"is outside of .*images"):
        find("../data/a.png", tmp_path / "data", images)
    with pytest.raises(UserError, match=rf"image b.png: no such file in {re.escape(str(images))}$"):
        find("b.png", tmp_path / "data", images)
    with pytest.raises(UserError, match=r"^--image_folder .*nowhere: no such folder$"):
        ImageFiles(str(tmp_path / "nowhere"))


def test_paths_of_a_hub_set(tmp_path, monkeypatch):
    """A set of the hub may name files in the caches alone."""
    cached = write_image(tmp_path / "cache" / "a.png", 10, 10)
    monkeypatch.setattr(
        image_files, "_cache_folders", lambda: [str(tmp_path / "hub"), str(tmp_path / "cache")]
    )
    assert ImageFiles().find(str(cached), "", "owner/name row 1").width == 10
    with pytest.raises(UserError, match=r"owner/name row 1: image .*b.png is outside of"):
        ImageFiles().find(str(write_image(tmp_path / "b.png")), "", "owner/name row 1")
    with pytest.raises(UserError, match=r"no such file; the hub set holds paths, not images"):
        ImageFiles().find("images/a.png", "", "owner/name row 1")
