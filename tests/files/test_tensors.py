"""A tensor on its way from a file to a GPU, piece by piece; the stream is pretended here, real in tests/gpu/test_modes.py."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from files import tensors as tensor_files
from files.tensors import Stage, list_tensors, read_tensor

PIECE, PIECES = 64, 3
EDGES = [n + d for n in (0, PIECE, PIECE * PIECES, PIECE * PIECES * 2) for d in (-1, 0, 1) if n + d >= 0]


class Copied:
    """Pretends to be the event of a piece of memory."""

    under_way, recorded = False, 0

    def record(self) -> None:
        self.under_way, self.recorded = True, self.recorded + 1

    def synchronize(self) -> None:
        self.under_way = False


@pytest.fixture
def stage(monkeypatch) -> Stage:
    monkeypatch.setattr(tensor_files, "PIECE", PIECE)
    monkeypatch.setattr(tensor_files, "PIECES", PIECES)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Copied())
    return Stage("cpu")


def test_tensors_of_any_size_go_through_the_same_memory(stage, tmp_path):
    """At and around the edges of pieces and of the whole stage, one after another."""
    tensors = {f"bytes.{n}": torch.randint(0, 256, (n,), dtype=torch.uint8) for n in EDGES}
    tensors |= {
        "matrix": torch.randn(37, 5).bfloat16(),
        "number": torch.randn(()),
        "empty": torch.empty(0, 5),
    }
    save_file(tensors, tmp_path / "file")
    stored = list_tensors(tmp_path / "file")
    found = {name: read_tensor(tmp_path, stored[name], stage).to(torch.device("cpu")) for name in stored}
    for name, tensor in tensors.items():  # after all was read: none lies in memory that is used again
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_piece_is_overwritten_only_when_it_has_been_copied(stage, tmp_path, monkeypatch):
    save_file({"x": torch.zeros(PIECE * PIECES * 3, dtype=torch.uint8)}, tmp_path / "file")
    read, events = tensor_files._read_into, {memory.data_ptr(): copied for memory, copied in stage.pieces}

    def read_into(memory, file):
        assert not events[memory.data_ptr()].under_way
        read(memory, file)

    monkeypatch.setattr(tensor_files, "_read_into", read_into)
    for _ in range(2):
        read_tensor(tmp_path, list_tensors(tmp_path / "file")["x"], stage).to(torch.device("cpu"))
    assert [copied.recorded for copied in events.values()] == [6] * PIECES


@pytest.mark.parametrize("left", [PIECE, PIECE * PIECES + 1], ids=["ahead", "later"])
@pytest.mark.parametrize("staged", [True, False])
def test_a_file_that_is_cut_while_it_is_read(staged, left, stage, tmp_path):
    save_file({"x": torch.zeros(PIECE * PIECES * 2, dtype=torch.uint8)}, tmp_path / "file")
    stored = list_tensors(tmp_path / "file")["x"]
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(stored.begin + left)
    with pytest.raises(OSError, match=r"/file was cut while it was read$"):
        read_tensor(tmp_path, stored, stage if staged else None).to(torch.device("cpu"))
