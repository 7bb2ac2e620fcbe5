"""Page-locked host memory that is refused, at once or beyond a limit."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

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
    assert not memory.can_page_lock([2**20])
    for copy in (memory.page_locked_copy(weight), memory.empty_on_host(weight, "cuda").copy_(weight)):
        assert torch.equal(copy, weight)
    assert memory.copy_to_host(weight).tolist() == weight.tolist()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("memory: the host refuses page-locked memory")


def test_the_sum_of_the_buffers_is_tried(limit, capsys):
    """A buffer of any of these sizes is allowed; two of them are not."""
    limit(500)
    assert memory.can_page_lock([100, 400]) and memory.can_page_lock([500])
    assert capsys.readouterr().out == ""
    assert not memory.can_page_lock([100, 401])


@pytest.mark.parametrize(("shape", "ranks"), [((4,), 4), ((3, 2), 2)])
def test_shards_and_gradients_are_tried_before_fsdp_pins_them(shape, ranks, limit):
    """FSDP would pin them one by one in the first forward, and a refusal there would end the run."""
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 9)).to("meta")
    model[0].requires_grad_(False)
    mesh = SimpleNamespace(device_type="cuda", ndim=len(shape), size=shape.__getitem__)
    needed = {4: 3 * 6 + 2 * (3 * 10 + 3), 2: 5 * 6 + 2 * (5 * 10 + 5)}[ranks] * 4
    for allowed, pins in ((needed, True), (needed - 1, False)):
        limit(allowed)
        assert make_offload_policy(True, model, mesh).pin_memory is pins
    mesh.device_type = "cpu"
    assert make_offload_policy(True, model, mesh).pin_memory is False
