"""Recordings of layers that save, return or are given unusual tensors; how a recording may fail."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from launch.memory import PEAK_MEMORY
from parallel.fixed_tensors import Copies, Slots
from parallel.graph_memory import GraphMemory
from parallel.layer_graphs import CALLS_BEFORE
from tests.helpers.layer_graphs import Graphed, Layer

foreach_copy = torch._foreach_copy_


def foreach_copy_of_gpus(fixed: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy as on a GPU, where `_foreach_copy_` has fewer dtypes, and is one launch on one device only."""
    assert len({t.device for t in (*fixed, *tensors)}) == 1
    for tensor in (*fixed, *tensors):
        if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e8m0fnu):
            raise RuntimeError(f'"foreach_tensor_copy" not implemented for {tensor.dtype}')
    foreach_copy(fixed, tensors)


ODD = {
    "uint64": torch.tensor([2**64 - 1, 7], dtype=torch.uint64),
    "uint64 scalar": torch.tensor(2**63, dtype=torch.uint64),
    "uint32": torch.tensor([[1, 2**32 - 1]], dtype=torch.uint32).expand(3, 2),
    "uint16": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint16)[:, :1],
    "float8": torch.tensor([0.5, 2]).to(torch.float8_e8m0fnu),
    "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "expanded": torch.arange(3.0)[:, None].expand(3, 5),
    "slice": torch.arange(12.0).view(3, 4)[:, 1:3],
    "transposed": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
    "NaN": torch.tensor([torch.nan, -0.0]),
}


@pytest.mark.parametrize("name", ODD)
def test_unusual_tensors_are_copied(name):
    """In and out, each alone and beside others of its dtype."""
    tensor = ODD[name]
    with mock.patch.object(torch, "_foreach_copy_", foreach_copy_of_gpus):
        fixed = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        copies = Copies([fixed, torch.ones(2)])
        copies.copy_in([tensor, torch.full((2,), 5.0)])
        result, other = copies.copy_out()
    assert other.tolist() == [5, 5]
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    assert as_bytes(result) == as_bytes(tensor)


def as_bytes(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_copies_are_no_views():
    """Dynamo compiles the next layer anew for an input that is one."""
    (copy,) = Copies([torch.ones(2, 3)]).copy_out()
    assert not copy._is_view()


def test_slots_are_on_the_device_of_their_tensor():
    slots, tensor = Slots(), torch.ones(3, 2).t()
    first, second = slots.like("x", tensor), slots.like("x", torch.ones(2))
    assert first.stride() == tensor.stride() and first.data_ptr() == second.data_ptr()
    assert slots.like("x", torch.ones(2, device="meta")).device.type == "meta"
    assert slots.like("x", tensor).data_ptr() == first.data_ptr()


class SavesOddTensors(torch.autograd.Function):
    """y -> 3 y. Saves y in many forms. Backward checks them, and overwrites some, as donated buffers are."""

    @staticmethod
    def forward(ctx, y):
        bits = y.detach().clone().view(torch.int32).view(torch.uint32)
        buffer = torch.cat([y, y], 1)
        result = 3 * y
        ctx.save_for_backward(
            y[0, 0].clone(),
            bits,
            buffer[:, 1:5],
            buffer,
            y.sum(0, keepdim=True).expand_as(y),
            y.t().clone(),
            y.new_empty(0, 4),
            result,
        )
        return result

    @staticmethod
    def backward(ctx, gradient):
        first, bits, part, buffer, total, flipped, _empty, result = ctx.saved_tensors
        y = bits.view(torch.float32)
        parts = (3 * y == result, y == flipped.t(), y == buffer[:, :4], first == y[0, 0], total == y.sum(0))
        right = torch.stack([part.all() for part in parts]).all()
        weight = torch.where(right, 3 * y + part + total, torch.nan)
        buffer.zero_()
        flipped.fill_(torch.inf)
        return gradient * weight


class Saving(Layer):
    def forward(self, x):
        return SavesOddTensors.apply(super().forward(x))


class Passing(Layer):
    """Its result is a view of its input."""

    def forward(self, x):
        return x.view_as(x)


class Expanding(Layer):
    """Elements of its result share memory."""

    def forward(self, x):
        return super().forward(x).sum(1, keepdim=True).expand_as(x)


class Slicing(Layer):
    """Its result shares memory with a tensor that it saves."""

    def forward(self, x):
        y = torch.cat([x, super().forward(x)], 1).exp()
        return y[:, 4:]


@pytest.mark.parametrize("kind", [Saving, Passing, Expanding, Slicing])
def test_unusual_layers_are_replayed(kind: type[nn.Module]):
    graphed = Graphed(kind(), kind())
    with mock.patch.object(torch, "_foreach_copy_", foreach_copy_of_gpus):
        graphed.call(CALLS_BEFORE + 3)
    assert graphed.lines == ["--cuda_graphs: layers are replayed as CUDA graphs"]


@pytest.mark.parametrize("fails", ["allocating", "record"])
def test_after_an_error_the_gpu_waits_and_memory_is_counted(fails):
    """Other recordings write the same fixed tensors, and the pool keeps what it has grown to."""
    pool, stream, current = mock.Mock(), mock.Mock(), mock.Mock()
    pool.snapshot.return_value = [{"total_size": 10, "allocated_size": 3}]
    fakes = {
        "MemPool": lambda: pool,
        "Stream": lambda device: stream,
        "current_stream": lambda: current,
        "CUDAGraph": mock.Mock(),
        "stream": lambda stream: contextlib.nullcontext(),
        "use_mem_pool": lambda pool: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "memory_reserved": mock.Mock(side_effect=[10, 20]),
    }
    with mock.patch.multiple(torch.cuda, **fakes), mock.patch.object(PEAK_MEMORY, "uncounted", 0):
        memory = GraphMemory(torch.device("cuda"))
        with pytest.raises(KeyError):
            if fails == "record":
                memory.record(mock.Mock(side_effect=KeyError))
            else:
                with memory.allocating():
                    raise KeyError
        current.wait_stream.assert_called_once_with(stream)
        assert PEAK_MEMORY.uncounted == 7


class Scaling(Layer):
    """As Gemma 4's layers, each with a scale of its own."""

    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x):
        return self.scale * super().forward(x)


def test_buffers_may_differ_and_change():
    graphed = Graphed(Scaling(1.0), Scaling(2.0))
    graphed.call(CALLS_BEFORE + 2)
    graphed.layers[0].scale.fill_(3.0)
    graphed.call()
    assert graphed.lines == ["--cuda_graphs: layers are replayed as CUDA graphs"]
    assert len(graphed.graphs.recordings) == 1


def test_layers_that_share_other_tensors_have_recordings_of_their_own():
    layers = [nn.Sequential(Scaling(1.0), Scaling(2.0)) for _ in range(2)]
    layers[0][1].scale = layers[0][0].scale
    layers[1][1].linear.weight = layers[1][0].linear.weight
    graphed = Graphed(*layers)
    graphed.call(CALLS_BEFORE + 2)
    layers[0][0].scale.fill_(3.0)
    graphed.call()
    assert len(graphed.graphs.recordings) == 2
    assert graphed.lines == ["--cuda_graphs: layers are replayed as CUDA graphs"]
