"""The curve of memory: which values it has, its text and its picture."""

from __future__ import annotations

import re

import pytest

from training.plan_curve import WIDTH, MemoryCurve, draw_picture, draw_text, trace_peak

GIB = 2**30


def test_values_double_up_to_the_first_that_does_not_fit():
    peak = lambda tokens: (4 + tokens / 1024) * GIB  # noqa: E731
    assert trace_peak(peak, 512, 9.0, 2**20) == [(512, 4.5), (1024, 5), (2048, 6), (4096, 8), (8192, 12)]
    assert trace_peak(peak, 512, 9.0, 2048) == [(512, 4.5), (1024, 5), (2048, 6)]
    # Nothing fits: a few more, as far as the model goes.
    assert trace_peak(peak, 512, 1.0, 2**20) == [(512, 4.5), (1024, 5), (2048, 6), (4096, 8)]
    assert trace_peak(peak, 512, 1.0, 1024) == [(512, 4.5), (1024, 5)]


def bars(text: str) -> list[str]:
    """Return what stands right of the axis in each line of the plot."""
    return [line.partition("|")[2] for line in text.splitlines() if "|" in line]


@pytest.mark.parametrize("limit", [0.5, 10.0, 23.6, 139.8])
def test_the_text_shows_each_value_to_scale(limit):
    points = [(512, 5.9), (1024, 6.25), (65_536, 20.0), (131_072, 38.0)]
    curve = MemoryCurve("8b, qlora, one RTX 4090", "context, tokens", points, limit)
    text = draw_text(curve)
    lines = text.splitlines()
    assert lines[0] == curve.title and max(map(len, lines)) <= WIDTH and text.isascii()
    assert lines[1].split() == ["tokens", "GiB"] and len(lines) == 3 + len(points)
    found = [re.match(r" *([\d,]+)  *([\d.]+) \|", line) for line in lines[2:-1]]
    assert [(int(m[1].replace(",", "")), float(m[2])) for m in found] == points
    assert [line.endswith("too much") for line in lines[2:-1]] == [gib > limit for _, gib in points]
    # The limit is the same column in each line, and the note points to it.
    column = lines[-1].index("^")
    assert all(line.ljust(WIDTH)[column] == "|" for line in lines[2:-1]) and f"{limit:.2f} GiB" in lines[-1]
    for (_, gib), bar in zip(points, bars(text), strict=True):
        length = len(re.match(r"[=#|>]*", bar)[0])
        axis_columns = column - lines[2].index("|") - 1
        if gib <= limit:
            assert abs(length - gib / limit * axis_columns) <= 1.6 and "#" not in bar
        else:
            assert "=" not in bar and (">" in bar) == (gib > 1.25 * limit)


def test_the_picture(tmp_path):
    from matplotlib.image import imread

    curve = MemoryCurve("8b", "rows per GPU", [(1, 6.0), (2, 8.0), (4, 12.0)], 10.0)
    draw_picture(curve, tmp_path / "curve.png")
    pixels = imread(tmp_path / "curve.png")[..., :3]
    colours = {tuple(c) for c in (pixels * 255).round().astype(int).reshape(-1, 3)}
    assert {(0x1F, 0x5F, 0xA8), (0xB0, 0x24, 0x3C), (0xB0, 0x6A, 0x00)} <= colours
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    for end, start in ((".pdf", b"%PDF"), (".SVG", b"<?xml")):
        draw_picture(curve, tmp_path / f"curve{end}")
        assert (tmp_path / f"curve{end}").read_bytes().startswith(start)
