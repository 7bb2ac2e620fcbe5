"""benchmarks.fp8_errors: each error is that of what it names; a rehearsal of the command."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import fp8_errors
from benchmarks.fp8_errors import Row, draw_x, list_blocks, make_linear
from models.shapes import SHAPES

ARGV = ["--shape", "tiny", "--tokens", "96", "--ways"]


def measured(tmp_path, ways: str) -> list[Row]:
    """Run the command and return its rows."""
    assert fp8_errors.main([*ARGV, ways, "--out", str(tmp_path / "rows.json")]) == 0
    return [Row(**fields) for fields in json.loads((tmp_path / "rows.json").read_text())]


def test_16_bits_beside_nf4(tmp_path, capsys):
    rows = measured(tmp_path, "16bit")
    assert len(rows) == 5 * 2 * 3 and capsys.readouterr().out.count("\n") == 30 + 5
    for row in rows:
        small = {name for name, error in row.errors.items() if error < 0.01}
        if row.reference == "dequantized":  # bf16 rounds to 1 part in 256
            assert small == {*row.errors} and all(error > 1e-4 for error in row.errors.values())
        elif row.linear == "mlp":  # NF4's error of other linears reaches the adapters' gradients
            assert not small
        else:
            assert small == {"grad A", "grad B"} and 0.08 < row.errors["W"] < 0.1
        if row.way == "float64" and "W" in row.errors:
            assert row.errors["grad A"] == row.errors["grad B"] == 0


def test_errors_are_those_of_the_way(tmp_path, monkeypatch):
    """A way that applies 1.25 x W has that error in W; LoRA's part of y and of grad x has none."""

    def make(weight, way):
        return make_linear(weight * 1.25 if way == "scaled" else weight, "16bit")

    monkeypatch.setattr(fp8_errors, "make_linear", make)
    scaled = [
        r for r in measured(tmp_path, "16bit,scaled") if (r.way, r.reference) == ("scaled", "dequantized")
    ]
    assert len(scaled) == 10
    for row in scaled:
        if row.linear != "mlp":
            assert row.errors["W"] == pytest.approx(0.25, abs=0.01)
            assert 0.1 < row.errors["y"] < 0.25 and 0.1 < row.errors["grad x"] < 0.25
            assert row.errors["grad A"] < 0.01 and row.errors["grad B"] < 0.01
        else:
            assert all(error > 0.2 for error in row.errors.values())


def test_the_linears_of_the_8b_shape():
    assert [shapes for _, shapes in list_blocks(SHAPES["8b"]).values()] == [
        [(4096, 4096)],
        [(1024, 4096)],
        [(14336, 4096)],
        [(4096, 14336)],
        [(14336, 4096), (14336, 4096), (4096, 14336)],
    ]


def test_one_channel_in_a_thousand_is_an_outlier():
    drawn = [
        draw_x(200, 4096, kind, torch.Generator().manual_seed(0)).float() for kind in ("normal", "outliers")
    ]
    larger = drawn[1].std(0) / drawn[0].std(0)
    assert (larger > 19).sum() == 5 and ((larger - 1).abs() < 1e-6).sum() == 4091


def test_an_unknown_way(capsys):
    assert fp8_errors.main([*ARGV, "16bit,fp7"]) == 2
    assert capsys.readouterr().err.startswith("error: --ways fp7: must be ")


def test_a_linear_that_is_not_rounded(capsys):
    """The tiny shape's down projection reads 160 features, which are no whole blocks of 64."""
    assert fp8_errors.main([*ARGV, "16bit,int8"]) == 2
    assert capsys.readouterr().err == "error: --ways int8: a linear of 64 x 160 multiplies in 16 bits\n"
