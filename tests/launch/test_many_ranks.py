"""What many ranks need: messages in log2(world) rounds, and many open files."""

from __future__ import annotations

import contextlib
import resource

import pytest
import torch

from launch import ranks
from tests.helpers.distributed import RankPool


def find_max(rank_info) -> list[list[int]]:
    """Return the maximum of all ranks for values that are largest on one rank each."""
    own = [100 * (rank_info.rank == i) + rank_info.rank for i in range(rank_info.world)]
    return [ranks.max_over_ranks(torch.tensor(own)).tolist() for _ in range(3)]


def test_the_maximum_reaches_every_rank():
    """Also with a number of ranks that is no power of two, and call after call."""
    with contextlib.closing(RankPool(5)) as five_ranks:
        expected = [100 + i for i in range(5)]
        assert five_ranks(find_max) == [[expected] * 3] * 5


@pytest.fixture
def limit_of_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_ranks_may_open_as_many_files_as_the_system_allows(limit_of_files):
    hard = limit_of_files[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    ranks.raise_file_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
