"""Streaming of a tensor from a file to a GPU, chunk by chunk, with fake events.

tests/gpu/test_modes.py has the same on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from files import tensors as tensor_files
from files.tensors import PinnedBuffers, list_tensors, read_tensor

CHUNK_BYTES, CHUNK_COUNT = 64, 3
EDGES = [
    n + d
    for n in (0, CHUNK_BYTES, CHUNK_BYTES * CHUNK_COUNT, CHUNK_BYTES * CHUNK_COUNT * 2)
    for d in (-1, 0, 1)
    if n + d >= 0
]


class FakeEvent:
    """A fake CUDA event of a chunk."""

    under_way, recorded = False, 0

    def record(self) -> None:
        self.under_way, self.recorded = True, self.recorded + 1

    def synchronize(self) -> None:
        self.under_way = False


@pytest.fixture
def buffers(monkeypatch) -> PinnedBuffers:
    """Small buffers with fake events."""
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(tensor_files, "CHUNK_COUNT", CHUNK_COUNT)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: FakeEvent())
    return PinnedBuffers("cpu")


def test_tensors_of_any_size_go_through_the_same_memory(buffers, tmp_path):
    """Sizes at and around multiples of a chunk and of all buffers, one tensor after another."""
    tensors = {f"bytes.{n}": torch.randint(0, 256, (n,), dtype=torch.uint8) for n in EDGES}
    tensors |= {
        "matrix": torch.randn(37, 5).bfloat16(),
        "number": torch.randn(()),
        "empty": torch.empty(0, 5),
    }
    save_file(tensors, tmp_path / "file")
    stored = list_tensors(tmp_path / "file")
    found = {name: read_tensor(tmp_path, stored[name], buffers).to(torch.device("cpu")) for name in stored}
    for name, tensor in tensors.items():  # after all reads: no tensor shares memory with the buffers
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_chunk_is_overwritten_only_after_its_copy(buffers, tmp_path, monkeypatch):
    save_file({"x": torch.zeros(CHUNK_BYTES * CHUNK_COUNT * 3, dtype=torch.uint8)}, tmp_path / "file")
    read, events = tensor_files._read_into, {memory.data_ptr(): copied for memory, copied in buffers.chunks}

    def read_into(memory, file):
        assert not events[memory.data_ptr()].under_way
        read(memory, file)

    monkeypatch.setattr(tensor_files, "_read_into", read_into)
    for _ in range(2):
        read_tensor(tmp_path, list_tensors(tmp_path / "file")["x"], buffers).to(torch.device("cpu"))
    assert [copied.recorded for copied in events.values()] == [6] * CHUNK_COUNT


@pytest.mark.parametrize("left", [CHUNK_BYTES, CHUNK_BYTES * CHUNK_COUNT + 1], ids=["ahead", "later"])
@pytest.mark.parametrize("staged", [True, False])
def test_a_file_that_is_cut_while_it_is_read(staged, left, buffers, tmp_path):
    save_file({"x": torch.zeros(CHUNK_BYTES * CHUNK_COUNT * 2, dtype=torch.uint8)}, tmp_path / "file")
    stored = list_tensors(tmp_path / "file")["x"]
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(stored.begin + left)
    with pytest.raises(OSError, match=r"/file was cut while it was read$"):
        read_tensor(tmp_path, stored, buffers if staged else None).to(torch.device("cpu"))
