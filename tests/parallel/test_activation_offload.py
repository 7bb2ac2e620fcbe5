"""What layers leave on the host comes back once, a layer ahead, in whichever order backward asks for a layer's tensors.
On the CPU: the same bookkeeping with plain copies. That memory is freed: tests/gpu/test_modes.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from models.registry import FAMILIES
from parallel import activation_offload
from parallel.activation_checkpointing import Keep, Recomputed
from parallel.activation_offload import HostStash, Offloaded, Stashed
from tests.helpers.adapters import build_meta_model
from tests.helpers.compiled import CHECKPOINTED, LAYERS, compiled_run
from tests.helpers.parity import PLAIN, arguments, assert_same
from wrapping import _keep_last_output

DEEP = 4


class Saving(torch.autograd.Function):
    """x + 1, with what is given saved for backward, which asks for all of it at once, the first one first."""

    @staticmethod
    def forward(ctx, x, *saved):
        y = x + 1
        ctx.save_for_backward(*(y if s is None else s for s in saved))
        return y

    @staticmethod
    def backward(ctx, grad):
        assert all(torch.isfinite(t).all() for t in ctx.saved_tensors)
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


class AsCompiled(nn.Module):
    """One node, which saves its input and its output."""

    keep = Keep.NOTHING

    def forward(self, x):
        return Saving.apply(x, x, None)


class AsEager(nn.Module):
    """Two nodes, of which backward comes to the second one first."""

    keep = Keep.NOTHING

    def forward(self, x):
        return Saving.apply(Saving.apply(x, x), None)


class Log(HostStash):
    """Notes when a tensor is asked for and when it is fetched, by (number of the layer, which of its tensors)."""

    def __init__(self):
        super().__init__()
        self.names, self.events, self.counts = {}, [], []

    def begin(self, first):
        super().begin(first)
        self.counts = [0] if first else [*self.counts, 0]

    def pack(self, tensor):
        kept = super().pack(tensor)
        assert torch.equal(kept.host, tensor)
        self.names[id(kept)] = len(self.counts) - 1, self.counts[-1]
        self.counts[-1] += 1
        return kept

    def unpack(self, kept):
        if isinstance(kept, Stashed):
            self.events.append(("ask", *self.names[id(kept)]))
        return super().unpack(kept)

    def _copy(self, kept):
        self.events.append(("fetch", *self.names[id(kept)]))
        return super()._copy(kept)


@pytest.fixture
def small(monkeypatch):
    """Tensors of any size go to the host."""
    monkeypatch.setattr(activation_offload, "SMALLEST", 0)


def offloaded(kind: Callable[[], nn.Module], stash: HostStash, inputs: bool = True) -> nn.Module:
    layers = [kind() for _ in range(DEEP)]
    return nn.Sequential(
        *[
            Offloaded(layer, stash, inputs=inputs, results=True, first=i == 0, last=i == DEEP - 1)
            for i, layer in enumerate(layers)
        ]
    )


@pytest.mark.parametrize(("kind", "order"), [(AsCompiled, (0, 1)), (AsEager, (1, 0))])
def test_each_tensor_comes_back_once_and_a_layer_ahead(kind, order, small):
    stash = Log()
    model = offloaded(kind, stash)
    first, second = order
    expected = [("fetch", DEEP - 1, 0), ("fetch", DEEP - 1, 1)]
    for layer in reversed(range(DEEP)):
        asked = [("ask", layer, first), ("ask", layer, second)]
        ahead = [("fetch", layer - 1, 0), ("fetch", layer - 1, 1)] if layer else []
        expected += [asked[0], *ahead, asked[1]]
    expected[:3] = [
        expected[2],
        *expected[:2],
    ]  # nobody asked before the last layer, which fetches for itself
    for _ in range(3):
        stash.events.clear()
        model(torch.ones(2, 3, requires_grad=True)).sum().backward()
        assert stash.events == expected


def test_nothing_is_held_after_a_step(small):
    """Also without the garbage collector, and where backward does not come to every layer or does not come at all."""
    stash = HostStash()
    model = offloaded(AsCompiled, stash)
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False, True):
            leaf = torch.ones(2, 3, requires_grad=True)
            y = model(leaf)
            assert alive() == 2 * DEEP
            if backward:
                y.sum().backward()
            del y
            assert alive() == 0
    finally:
        gc.enable()


class Block(nn.Module):
    """Of the elementwise operations and the matmul autograd would keep inputs and results."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def test_layers_inputs_do_not_stay_where_they_were(small):
    """Between forward and backward nothing holds what is on the host: neither autograd's graph nor the functions that it
    keeps."""
    stash, outputs, counts = HostStash(), [], []
    model = offloaded(lambda: Recomputed(Block(), Keep.NOTHING), stash)

    def count(layer, args, output):
        outputs.append(weakref.ref(output))
        counts.append(sum(ref() is not None for ref in outputs))

    for layer in model:
        layer.register_forward_hook(count)
    gc.disable()
    try:
        y = model(torch.ones(2, 3, requires_grad=True))
    finally:
        gc.enable()
    assert alive() == DEEP, "the inputs, on the host"
    assert counts == [1] + [2] * (DEEP - 1), "a layer's output and its input, which is the one before's"
    assert [ref() is not None for ref in outputs] == [False] * (DEEP - 1) + [True]
    y.sum().backward()


def alive() -> int:
    return sum(isinstance(o, Stashed) for o in gc.get_objects())


def test_a_second_backward_gets_them_again(small):
    stash = Log()
    leaf = torch.ones(2, 3, requires_grad=True)
    y = offloaded(AsCompiled, stash)(leaf).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))
    assert sum(kind == "fetch" for kind, *_ in stash.events) == 2 * 2 * DEEP


def test_layers_that_stash_nothing_are_passed_over(small):
    """Those that keep their results, where only results are offloaded: the layer before them is fetched ahead."""
    stash = Log()
    model = offloaded(AsCompiled, stash, inputs=False)
    model[1]._checkpoint_wrapped_module.keep = Keep.RESULTS
    leaf = torch.ones(2, 3, requires_grad=True)
    model(leaf).sum().backward()
    layers = [(kind, layer) for kind, layer, _ in stash.events]
    assert layers == [("ask", 3), ("fetch", 3), ("fetch", 2), ("ask", 2), ("fetch", 0), ("ask", 0)]


def offloading_run(place, argv: list[str]):
    """(a compiled run's results, tensors sent to the host, fetched from it, and still there)."""
    counts = {"stashed": 0, "fetched": 0}
    pack, copy = HostStash.pack, HostStash._copy

    def counting_pack(self, tensor):
        counts["stashed"] += 1
        return pack(self, tensor)

    def counting_copy(self, kept):
        counts["fetched"] += 1
        return copy(self, kept)

    with (
        mock.patch.object(activation_offload, "SMALLEST", 0),
        mock.patch.object(HostStash, "pack", counting_pack),
        mock.patch.object(HostStash, "_copy", counting_copy),
    ):
        results, _ = compiled_run(place, argv)
    gc.collect()
    return results, counts["stashed"], counts["fetched"], alive()


def test_compiled_dora(checkpoints, even_rows, plain_run, one_rank):
    """The layers' inputs and the last projections' outputs."""
    args = arguments(checkpoints("llama_bias"), even_rows, "hqq_dora")
    results, stashed, fetched, held = one_rank(
        offloading_run, [*args, *CHECKPOINTED, "--use_activation_cpu_offload", "true"]
    )[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert stashed == fetched == 2 * LAYERS * len(results[0])
    assert held == 0


@pytest.mark.parametrize(("policy", "kept"), [(OffloadPolicy(), True), (CPUOffloadPolicy(), False)])
def test_what_dora_keeps(policy, kept, checkpoints):
    """Its last projection's output, but not where host memory is short."""
    family = FAMILIES["llama"]
    model = build_meta_model(checkpoints(), "bnb_dora")
    layer = model.get_submodule(family.layers)[0]
    assert _keep_last_output(layer, family, policy) is kept
    assert layer.mlp.down_proj.saves_output is kept


@pytest.mark.slow
def test_parameters_in_host_memory_leave_no_room_for_results(checkpoints, even_rows, plain_run, one_rank):
    """Of DoRA's last projection: it is computed again."""
    args = arguments(checkpoints("llama_bias"), even_rows, "bnb_dora")
    results, stashed, *_ = one_rank(offloading_run, [*args, *CHECKPOINTED, "--use_cpu_offload", "true"])[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert stashed == 0
