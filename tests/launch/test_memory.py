"""Page-locked host memory that is refused, at once or beyond a limit; peaks of GPU memory."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import wrapping
from launch import memory
from wrapping import make_offload_policy


@pytest.fixture
def limit(monkeypatch):
    """limit(bytes): page-locked tensors may take so many at the same time; requests beyond that raise."""
    allowed, held = [0], weakref.WeakSet()

    def pinned(make):
        def make_pinned(*args, pin_memory=False, **kwargs):
            tensor = make(*args, **kwargs)
            if pin_memory:
                if sum(storage.nbytes() for storage in held) + tensor.nbytes > allowed[0]:
                    raise RuntimeError("CUDA error: out of memory")
                tensor.kept = tensor.untyped_storage()
                held.add(tensor.kept)
            return tensor

        return make_pinned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, pinned(getattr(torch, name)))
    memory.report_refusal.cache_clear()
    yield lambda n_bytes: allowed.__setitem__(0, n_bytes)
    memory.report_refusal.cache_clear()


def test_a_refusal_is_told_once(limit, capsys):
    weight = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    with memory.try_page_locking([2**20]) as allowed:
        assert not allowed
    for copy in (memory.page_locked_copy(weight), memory.empty_on_host(weight, "cuda").copy_(weight)):
        assert torch.equal(copy, weight)
    assert memory.copy_to_host(weight).tolist() == weight.tolist()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("memory: the host refuses page-locked memory")


def test_the_sum_of_the_buffers_is_tried(limit, capsys):
    """A buffer of any of these sizes is allowed; two of them are not."""
    limit(500)
    for sizes in ([100, 400], [500]):  # the second finds the memory of the first free
        with memory.try_page_locking(sizes) as allowed:
            assert allowed and capsys.readouterr().out == ""
    with memory.try_page_locking([100, 401]) as allowed:
        assert not allowed


@pytest.mark.parametrize(("shape", "ranks"), [((4,), 4), ((3, 2), 2)])
def test_shards_and_gradients_are_tried_before_fsdp_pins_them(shape, ranks, limit, monkeypatch):
    """FSDP would pin them one by one in the first forward, and a refusal there would end the run.

    A refusal of another rank counts: the host's limit may be theirs together.
    """
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 9)).to("meta")
    model[0].requires_grad_(False)
    mesh = SimpleNamespace(device_type="cuda", ndim=len(shape))
    mesh.size = lambda i=None: math.prod(shape) if i is None else shape[i]
    others = [True]
    monkeypatch.setattr(wrapping, "gather_from_ranks", lambda value, world: [value, *others])
    needed = {4: 3 * 6 + 5 * (3 * 10 + 3), 2: 5 * 6 + 5 * (5 * 10 + 5)}[ranks] * 4
    for allowed, others[0], pins in ((needed, True, True), (needed - 1, True, False), (needed, False, False)):
        limit(allowed)
        assert make_offload_policy(True, model, mesh).pin_memory is pins
        assert not make_offload_policy(True, model, mesh, other_bytes=1).pin_memory
    mesh.device_type = "cpu"
    assert make_offload_policy(True, model, mesh).pin_memory is False


def test_memory_of_graphs_is_counted_and_a_pause_is_not(monkeypatch):
    """An error ends a pause, too. A new run starts without the graphs of the one before."""
    allocator = SimpleNamespace(peak=100)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocator.peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: vars(allocator).update(peak=50))
    peaks = memory.PeakMemory()
    peaks.uncounted = 7
    with pytest.raises(KeyError), peaks.paused():
        allocator.peak = 1000
        raise KeyError
    assert peaks.pop_step_peak() == (107, 0)
    assert peaks.pop_step_peak() == (57, 0)
    peaks.reset()
    assert peaks.pop_step_peak() == (50, 0)
