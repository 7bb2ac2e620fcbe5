"""Arguments of ranks: the same in each rank, mapped from one file that has no name and ends with them."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from launch import processes as launch
from launch.stored_arguments import StoredArguments
from options.errors import UserError


@dataclass(frozen=True)
class Data:
    name: str
    tensors: dict[str, torch.Tensor]


def make_data() -> Data:
    big = torch.arange(3_000_000, dtype=torch.int32)
    tensors = {"big": big, "again": big, "learned": big % 3 == 0, "half": torch.randn(5, 7).bfloat16()}
    return Data("rows", tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)})


def write_what_came(rank_info, data: Data, folder: Path) -> None:
    (folder / f"{rank_info.rank}.maps").write_text(Path("/proc/self/maps").read_text())
    torch.save((data.name, data.tensors), folder / f"{rank_info.rank}.pt")
    data.tensors["big"].zero_()  # a rank may write, and changes nothing for the others


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_map_the_tensors_of_one_file(processes, tmp_path, monkeypatch):
    """Nothing goes through /dev/shm. The file has no name, so none is left however the processes end."""
    shared = tmp_path / "temporary"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(tempfile.TemporaryFile, dir=shared))
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", None)
    data, expected = make_data(), make_data()
    expected.tensors["half"].copy_(data.tensors["half"])
    assert launch.start(write_what_came, 2, (data, tmp_path), "localhost", None) == 0
    for rank in range(2):
        name, tensors = torch.load(tmp_path / f"{rank}.pt")
        assert name == "rows"
        torch.testing.assert_close(tensors, expected.tensors, rtol=0, atol=0)
        assert "temporary/" in (tmp_path / f"{rank}.maps").read_text(), "a mapping of the deleted file"
    torch.testing.assert_close(data.tensors, expected.tensors, rtol=0, atol=0)
    assert list(shared.iterdir()) == []


def test_a_folder_for_temporary_files_that_is_full_is_named(small_disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    data = make_data()
    with pytest.raises(UserError, match=rf"^{small_disk}: cannot take the data .*No space left.*TMPDIR"):
        StoredArguments((data,))
    assert data.tensors["big"][-1] == 2_999_999
