"""Run train.py so that it asks for page-locked memory wherever it would on a GPU, and is refused everywhere.

Without a GPU torch refuses each request, but train.py makes none. The arguments are train.py's.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from unittest import mock

import quantize_layers
import train
from checkpoints import host_copy
from data.prefetch import PrefetchedSteps
from files import tensors
from launch import memory
from launch.ranks import RankInfo
from training.job import Job
from wrapping import make_offload_policy

_run_rank, _empty_on_host, _init_host_copy = train.run_rank, memory.empty_on_host, host_copy.HostCopy.__init__


def ask_on_host(weight, device_type):
    return _empty_on_host(weight, "cuda")


def ask_for_batches(steps, thread_device, pin, decoders):
    return PrefetchedSteps(steps, thread_device, True, decoders)


def ask_for_offload(enabled, model, mesh, *others):
    gpu_mesh = SimpleNamespace(device_type="cuda", ndim=mesh.ndim, size=mesh.size)
    return make_offload_policy(enabled, model, gpu_mesh, *others)


def ask_for_checkpoints(self, device):
    _init_host_copy(self, device)
    self.pin = True


def run_refused(rank_info: RankInfo, job: Job) -> None:
    """Run a rank of train.py, and print how often each of its parts asked."""
    asking = {
        (train, "PrefetchedSteps"): ask_for_batches,
        (train, "make_offload_policy"): ask_for_offload,
        (memory, "empty_on_host"): ask_on_host,  # for metrics
        (tensors, "empty_on_host"): ask_on_host,
        (quantize_layers, "empty_on_host"): ask_on_host,
        (host_copy, "empty_on_host"): ask_on_host,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(host_copy.HostCopy, "__init__", autospec=True, side_effect=ask_for_checkpoints)
        )
        mocks = {
            f"{module.__name__}.{name}": stack.enter_context(
                mock.patch.object(module, name, side_effect=function)
            )
            for (module, name), function in asking.items()
        }
        _run_rank(rank_info, job)
        if rank_info.rank == 0:
            print("asked:", ", ".join(name for name, made in mocks.items() if made.called), flush=True)


if __name__ == "__main__":
    train.run_rank = run_refused
    sys.exit(train.main(sys.argv[1:]))
