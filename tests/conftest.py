"""Fixtures: tiny real checkpoints made with transformers, and a pool of two gloo ranks.

torch is imported by the fixtures: the process that only hands tests to its workers does not need it, and they
start when it has read this file.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import zlib

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false"
)
# One thread per process: for tiny tensors more threads cost time, and other tests run at the same time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Idle threads sleep instead of spinning. With spinning threads and any other load on the machine, each short
# operation waits for a thread that is not scheduled: up to a hundred times longer. torch reads it on import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

gc.disable()  # until all tests are imported: as in launch/fork_server.py
pytest.register_assert_rewrite("tests.helpers")


def pytest_collection_modifyitems(items):
    from transformers.utils import logging

    from launch.ranks import max_gpu_ranks

    logging.disable_progress_bar()  # tests read stderr
    gc.freeze()  # all that was imported stays
    gc.set_threshold(50_000, 20, 100)
    gc.enable()
    gpus = max_gpu_ranks()
    for item in items:
        for marker, needed in (("gpu", 1), ("two_gpus", 2)):
            if item.get_closest_marker(marker) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), found {gpus}"))


@pytest.fixture(autouse=True)
def _random_numbers(request):
    """Give each test random numbers of its own, the same at each run, also within other tests or workers."""
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoints(kind) -> the folder of a tiny checkpoint of tiny.CONFIGS or VARIANTS. Made once."""
    from tests.helpers import tiny

    made = {}

    def get(kind: str = "llama"):
        if kind not in made:
            made[kind] = tiny.save_checkpoint(kind, tmp_path_factory.mktemp("models") / kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory):
    """A .jsonl of Alpaca rows of very different lengths."""
    from tests.helpers import tiny

    return tiny.write_alpaca(tmp_path_factory.mktemp("data") / "alpaca.jsonl")


@pytest.fixture(scope="session")
def short_rows(tmp_path_factory):
    """A .jsonl of short rows of different lengths, for tests where it does not matter what is learned."""
    from tests.helpers import tiny

    return tiny.write_questions(tmp_path_factory.mktemp("data") / "short.jsonl", even=False)


@pytest.fixture(scope="session")
def even_rows(tmp_path_factory):
    """A .jsonl of rows that all have the same length, for which layers are compiled once."""
    from tests.helpers import tiny

    return tiny.write_questions(tmp_path_factory.mktemp("data") / "even.jsonl", even=True)


def _ranks(world: int):
    """On a machine with GPUs each rank has one, over NCCL; without, they are CPU processes over gloo."""
    from launch.ranks import max_gpu_ranks
    from tests.helpers.distributed import RankPool

    if 0 < max_gpu_ranks() < world:
        pytest.skip(f"needs {world} GPUs, or none")
    ranks = RankPool(world)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks():
    """two_ranks(function, *args) -> [results by rank]; function(rank_info, *args) is importable."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four_ranks():
    """Enough for two groups of two."""
    yield from _ranks(4)


@pytest.fixture(scope="session")
def one_rank():
    """The same with one rank: the plain run that others are compared with."""
    yield from _ranks(1)


@pytest.fixture(scope="session")
def plain_run(one_rank):
    """plain_run(args) -> what `train_run` returns in one rank; computed once for the same arguments."""
    from tests.helpers.distributed import cache_results
    from tests.helpers.runs import train_run

    return cache_results(one_rank, train_run)


@pytest.fixture(scope="session")
def runs(checkpoints, alpaca_file, one_rank, tmp_path_factory):
    """RUN folders of three adapters over one base with biases: finished_runs.py."""
    from tests.helpers.finished_runs import write_runs_of_one_base

    return write_runs_of_one_base(
        one_rank, tmp_path_factory.mktemp("runs"), checkpoints("llama_bias"), alpaca_file
    )


@pytest.fixture(scope="session")
def chat_run(checkpoints, one_rank, tmp_path_factory):
    """A RUN trained on conversations."""
    from tests.helpers.finished_runs import write_chat_run

    return write_chat_run(one_rank, tmp_path_factory.mktemp("chat"), checkpoints())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def processes(monkeypatch):
    """The rank processes that launch/processes.py starts in this test, in order.

    Where ranks are forks, they are forks of the server of tests/helpers/distributed.py.
    """
    from launch import processes as launch

    started, start_ranks = [], launch._start_ranks

    def start(*args):
        new = start_ranks(*args)
        started.extend(new)
        return new

    monkeypatch.setattr(launch, "_start_ranks", start)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # it goes to the ranks, and is put back
    return started


@pytest.fixture(scope="session")
def source(checkpoints, short_rows):
    """The options that name the tiny model and its data."""
    return ["--model_name", str(checkpoints()), "--dataset", str(short_rows)]


@pytest.fixture(scope="session")
def stopped(source, two_ranks, tmp_path_factory):
    """A RUN that was stopped at its third step, for copying."""
    from tests.helpers.resuming import QUIET, Signals, run

    folder = tmp_path_factory.mktemp("stopped") / "run"
    two_ranks(run, [*source, *QUIET, "--output_dir", str(folder)], Signals({3: signal.SIGTERM}))
    return folder


@pytest.fixture(scope="session")
def poisoned(checkpoints, tmp_path_factory):
    """Options of a run one of whose rows is NaN: bad_rows.py."""
    from tests.helpers.bad_rows import write_bad_row_run

    return write_bad_row_run(checkpoints(), tmp_path_factory.mktemp("poisoned"))


@pytest.fixture(scope="session")
def ended(poisoned, tmp_path_factory):
    """(folder, exit status, stdout, stderr) of a run that such a row has ended."""
    from tests.helpers.bad_rows import run_until_bad_row

    return run_until_bad_row(poisoned, tmp_path_factory.mktemp("ended") / "out")


@pytest.fixture
def copied(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")
