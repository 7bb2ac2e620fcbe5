"""Offloaded tensors are fetched once, one layer ahead, in whatever order backward unpacks a layer's tensors.

Here on the CPU: the same bookkeeping with plain copies. tests/gpu/test_modes.py shows that memory is freed.
"""

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
from parallel.activation_checkpointing import CheckpointedModule, SavedActivations
from parallel.activation_offload import HostActivations, HostTensor, OffloadedLayer
from tests.helpers.adapters import build_meta_model
from tests.helpers.compiled import CHECKPOINTED, EXTRA_GRAPHS, LAYERS, compiled_run
from tests.helpers.parity import PLAIN, arguments, assert_same
from wrapping import _save_last_output

DEEP = 4


class Saving(torch.autograd.Function):
    """x + 1. It saves the given tensors (None: its output); backward unpacks all of them, in order."""

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

    saved = SavedActivations.INPUT

    def forward(self, x):
        return Saving.apply(x, x, None)


class AsEager(nn.Module):
    """Two nodes; backward runs the second one first."""

    saved = SavedActivations.INPUT

    def forward(self, x):
        return Saving.apply(Saving.apply(x, x), None)


class LoggedActivations(HostActivations):
    """Logs when a tensor is unpacked and when it is fetched, by (index of the layer, index in the layer)."""

    def __init__(self):
        super().__init__()
        self.names, self.events, self.counts = {}, [], []

    def begin_layer(self, is_first):
        super().begin_layer(is_first)
        self.counts = [0] if is_first else [*self.counts, 0]

    def pack(self, tensor):
        packed = super().pack(tensor)
        assert torch.equal(packed.host, tensor)
        self.names[id(packed)] = len(self.counts) - 1, self.counts[-1]
        self.counts[-1] += 1
        return packed

    def unpack(self, packed):
        if isinstance(packed, HostTensor):
            self.events.append(("unpack", *self.names[id(packed)]))
        return super().unpack(packed)

    def _copy_to_device(self, packed):
        self.events.append(("fetch", *self.names[id(packed)]))
        return super()._copy_to_device(packed)


@pytest.fixture
def any_size(monkeypatch):
    """Tensors of any size go to the host."""
    monkeypatch.setattr(activation_offload, "MIN_OFFLOAD_BYTES", 0)


def offloaded(
    kind: Callable[[], nn.Module], host_activations: HostActivations, offload_input: bool = True
) -> nn.Module:
    """A model of DEEP offloaded layers."""
    options = {"offload_input": offload_input, "offload_last_output": True}
    layers = [
        OffloadedLayer(kind(), host_activations, **options, first=i == 0, last=i == DEEP - 1)
        for i in range(DEEP)
    ]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("kind", "order"), [(AsCompiled, (0, 1)), (AsEager, (1, 0))])
def test_each_tensor_comes_back_once_and_a_layer_ahead(kind, order, any_size):
    log = LoggedActivations()
    model = offloaded(kind, log)
    first, second = order
    expected = [("fetch", DEEP - 1, 0), ("fetch", DEEP - 1, 1)]
    for layer in reversed(range(DEEP)):
        unpacked = [("unpack", layer, first), ("unpack", layer, second)]
        prefetched = [("fetch", layer - 1, 0), ("fetch", layer - 1, 1)] if layer else []
        expected += [unpacked[0], *prefetched, unpacked[1]]
    # No layer prefetches the tensors of the last one, which fetches them itself.
    expected[:3] = [expected[2], *expected[:2]]
    for _ in range(3):
        log.events.clear()
        model(torch.ones(2, 3, requires_grad=True)).sum().backward()
        assert log.events == expected


def test_nothing_is_held_after_a_step(any_size):
    """That needs no garbage collector, and no backward."""
    model = offloaded(AsCompiled, HostActivations())
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
    """A layer whose inputs and results autograd would save, without checkpointing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def test_layers_inputs_are_freed_on_the_device(any_size):
    """Between forward and backward nothing holds the original of an offloaded tensor: neither autograd's
    graph nor its closures."""
    outputs, counts = [], []
    model = offloaded(lambda: CheckpointedModule(Block(), SavedActivations.INPUT), HostActivations())

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
    assert counts == [1] + [2] * (DEEP - 1), "a layer's output and its input, the previous output"
    assert [ref() is not None for ref in outputs] == [False] * (DEEP - 1) + [True]
    y.sum().backward()


def alive() -> int:
    return sum(isinstance(o, HostTensor) for o in gc.get_objects())


def test_a_second_backward_gets_them_again(any_size):
    log = LoggedActivations()
    leaf = torch.ones(2, 3, requires_grad=True)
    y = offloaded(AsCompiled, log)(leaf).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))
    assert sum(kind == "fetch" for kind, *_ in log.events) == 2 * 2 * DEEP


def test_layers_that_offload_nothing_are_skipped(any_size):
    """A layer that saves MATMULS offloads no output. The layer before it is prefetched."""
    log = LoggedActivations()
    model = offloaded(AsCompiled, log, offload_input=False)
    model[1]._checkpoint_wrapped_module.saved = SavedActivations.MATMULS
    leaf = torch.ones(2, 3, requires_grad=True)
    model(leaf).sum().backward()
    layers = [(kind, layer) for kind, layer, _ in log.events]
    assert layers == [("unpack", 3), ("fetch", 3), ("fetch", 2), ("unpack", 2), ("fetch", 0), ("unpack", 0)]


def offloading_run(rank_info, argv: list[str]):
    """(a compiled run's results and graphs, tensors sent to the host, fetched from it, and still there)."""
    counts = {"sent": 0, "fetched": 0}
    pack, copy = HostActivations.pack, HostActivations._copy_to_device

    def counted_pack(self, tensor):
        counts["sent"] += 1
        return pack(self, tensor)

    def counted_copy(self, packed):
        counts["fetched"] += 1
        return copy(self, packed)

    with (
        mock.patch.object(activation_offload, "MIN_OFFLOAD_BYTES", 0),
        mock.patch.object(HostActivations, "pack", counted_pack),
        mock.patch.object(HostActivations, "_copy_to_device", counted_copy),
    ):
        results, graphs = compiled_run(rank_info, argv)
    gc.collect()
    return results, graphs, counts["sent"], counts["fetched"], alive()


def test_compiled_dora(checkpoints, even_rows, plain_run, one_rank):
    """It offloads the layers' inputs and the last projections' outputs.

    The first layer is a graph of its own: its input has no gradient.
    """
    args = arguments(checkpoints("llama_bias"), even_rows, "hqq_dora")
    results, graphs, sent, fetched, held = one_rank(
        offloading_run, [*args, *CHECKPOINTED, "--use_activation_cpu_offload", "true"]
    )[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert graphs == 2 + EXTRA_GRAPHS
    assert sent == fetched == 2 * LAYERS * len(results[0])
    assert held == 0


@pytest.mark.parametrize(("policy", "saves"), [(OffloadPolicy(), True), (CPUOffloadPolicy(), False)])
def test_dora_saves_its_last_output(policy, saves, checkpoints):
    """It does not where parameters are in host memory."""
    family = FAMILIES["llama"]
    model = build_meta_model(checkpoints(), "bnb_dora")
    layer = model.get_submodule(family.layers)[0]
    assert _save_last_output(layer, family, policy) is saves
    assert layer.mlp.down_proj.saves_output is saves


@pytest.mark.slow
def test_with_parameters_in_host_memory_no_output_is_offloaded(checkpoints, even_rows, plain_run, one_rank):
    """DoRA's last projection is recomputed."""
    args = arguments(checkpoints("llama_bias"), even_rows, "bnb_dora")
    results, _, sent, *_ = one_rank(offloading_run, [*args, *CHECKPOINTED, "--use_cpu_offload", "true"])[0]
    assert_same(plain_run([*args, *PLAIN]), results)
    assert sent == 0


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_activations_go_to_other_memory_where_page_locking_is_refused(any_size, monkeypatch):
    """The first tensor is asked for, the later ones are not."""
    asked, empty_like = [], torch.empty_like

    def refuse(tensor, pin_memory=False, **kwargs):
        if pin_memory:
            asked.append(tensor)
            raise RuntimeError("CUDA error: out of memory")
        return empty_like(tensor, **kwargs)

    monkeypatch.setattr(torch, "empty_like", refuse)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    activations = HostActivations()
    activations.begin_layer(is_first=True)
    for value in (1.0, 2.0):
        packed = activations.pack(torch.full((2, 3), value).as_subclass(OnGpu))
        assert packed.host.tolist() == [[value] * 3] * 2
    assert len(asked) == 1
