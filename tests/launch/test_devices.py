"""The device of evaluate.py, generate.py and export.py."""

from __future__ import annotations

import pytest
import torch

from launch.devices import choose_device


@pytest.mark.parametrize(
    "name, gpus, expected",
    [
        (None, 0, "cpu"),
        (None, 2, "cuda:1"),
        ("cuda", 2, "cuda:1"),
        ("cuda:0", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 0, "cuda"),  # for the caller to refuse
    ],
)
def test_a_gpu_has_its_index(name, gpus, expected, monkeypatch):
    """torch.cuda.set_device refuses "cuda" alone. GPU 1 is the current one here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device(name) == torch.device(expected)
