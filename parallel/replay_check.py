"""Compares a replay with the layer itself, in forward and backward, before the layer is replayed.

Layers that seem to be alike may differ in an attribute that is no plain value, and a layer may keep a tensor
for backward where a recording does not see it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.graph_memory import GraphMemory
from parallel.recorded_layer import LayerCall, Recording

# Gradients may differ by this share of their own size, and by this share of the largest one's: attention's
# backward adds in an order that varies. Some gradients, as that of a key's bias, consist of such rounding
# only. A wrong tensor makes a far larger difference.
OWN_SHARE, LARGEST_SHARE = 0.05, 0.005


@torch.no_grad()
def replay_agrees(recording: Recording, own: LayerCall, memory: GraphMemory) -> Tensor:
    """Call the layer and the recording, forward and backward; return whether they agree, as a bool tensor.

    Results must be equal bit for bit; gradients nearly (`are_close`), and with deterministic algorithms bit
    for bit. The layer is called first, in the graphs' memory, and what it returns is copied out before the
    replay.

    Args:
        recording: for this kind of layer and call.
        own: the call with the layer's own parameters.
        memory: of the recording.
    """
    inputs, values = own.inputs, own.values
    with memory.allocating():
        called = own.forward()[0]
        gradient = called.cos()  # of any sign, and never so large that fp16 overflows
        gradients = own.backward(called, gradient) if own.differentiable else ()
        called = called.detach()
    own_result, gradient = called.clone(), gradient.clone()
    own_gradients = [None if each is None else each.clone() for each in gradients]
    del called, gradients
    result, saved = recording.run_forward(inputs, values)
    agrees = _are_equal(result, own_result)
    if not own.differentiable:
        return agrees
    # As the next layer would, so that whatever backward needs and has not got in `saved` is lost.
    others = [torch.zeros_like(t) if t.is_floating_point() else t for t in inputs]
    recording.run_forward(others, values)
    recording.load_backward(gradient, inputs, values, saved)
    del saved
    return agrees & are_close(recording.run_backward(), own_gradients)


def are_close(replayed: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> bool | Tensor:
    """Return whether gradients of a replay are those of the layer; but for rounding, where that may vary."""
    if [each is None for each in replayed] != [each is None for each in gradients]:
        return False
    own = [each for each in gradients if each is not None]
    if not own:
        return True
    others = [each for each in replayed if each is not None]
    if torch.are_deterministic_algorithms_enabled():
        pairs = zip(own, others, strict=True)
        return torch.stack([_are_equal(a, b) for a, b in pairs]).all()
    sizes = torch.stack([_size(each) for each in own])
    differences = torch.stack([_size(a - b) for a, b in zip(own, others, strict=True)])
    largest = torch.where(sizes.isfinite(), sizes, 0).max()
    allowed = OWN_SHARE * sizes + LARGEST_SHARE * largest
    return ((differences <= allowed) | ~allowed.isfinite()).all()  # an overflow says nothing


def _are_equal(a: Tensor, b: Tensor) -> Tensor:
    """Return whether two tensors are equal bit for bit, except for kinds of NaN, as a bool tensor."""
    return torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all()


def _size(tensor: Tensor) -> Tensor:
    """Return the root mean square of a tensor, without an fp32 copy of it; 0 for one without elements."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float32) / max(tensor.numel(), 1) ** 0.5
