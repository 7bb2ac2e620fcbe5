"""The images of samples in report.html."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from monitoring import sample_images
from options.errors import UserError
from tests.helpers.report_pages import make_run, metrics, page_of


def small_jpeg(color: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG")
    return file.getvalue()


def test_images_of_samples(tmp_path, monkeypatch):
    """The same question on two images is two prompts. What is no copy of the RUN is named, not embedded."""
    run = make_run(tmp_path / "run", [metrics(1)])
    (run / "sample_images").mkdir()
    names = [f"{i:016x}.jpg" for i in range(6)]
    for name, color in zip(names[:2], ("red", "blue"), strict=True):
        (run / "sample_images" / name).write_bytes(small_jpeg(color))
    (run / "sample_images" / names[2]).write_bytes(small_jpeg("red") + bytes(2**15))
    (run / "sample_images" / names[3]).write_text("<svg/>")
    (run / "sample_images" / names[4]).symlink_to(run / "sample_images" / names[0])
    (run / names[0]).write_bytes(small_jpeg("red"))
    others = [{"label": f"no {name}", "copy": name} for name in (*names[2:], f"../{names[0]}")]
    lines = [
        {
            "step": step,
            "prompt": "What?",
            "text": f"{label} {step}",
            "reference": f"{label}!",
            "images": images,
        }
        for step in (0, 9)
        for label, images in (
            ("A", [{"label": "a.png 8x8", "copy": names[0]}]),
            ("B", [{"label": "b.png 8x8", "copy": names[1]}, *others]),
        )
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run)
    assert (
        "What? a.png 8x8 Reference A! Before training A 0 After step 9 A 9"
        f" What? b.png 8x8 {' '.join(image['label'] for image in others)} Reference B!"
        " Before training B 0 After step 9 B 9"
    ) in page.text
    urls = {a["alt"]: a["src"] for tag, a in page.tags if tag == "img"}
    encoded = {label: url.removeprefix("data:image/jpeg;base64,") for label, url in urls.items()}
    assert {label: base64.b64decode(each) for label, each in encoded.items()} == {
        "a.png 8x8": small_jpeg("red"),
        "b.png 8x8": small_jpeg("blue"),
    }
    monkeypatch.setattr(sample_images, "MAX_EMBEDDED_CHARS", len(urls["a.png 8x8"]))
    assert [a["alt"] for tag, a in page_of(run).tags if tag == "img"] == ["a.png 8x8"]
    (run / "samples.jsonl").write_text(json.dumps(lines[0] | {"images": ["x"]}) + "\n")
    with pytest.raises(UserError, match="reference or images of step 0"):
        page_of(run)
