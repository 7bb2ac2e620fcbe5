"""A layer's forward and its backward, recorded as two CUDA graphs and replayed.

A compiled decoder layer launches about a hundred kernels in forward and backward. For small batches, and on
several GPUs, their launches take the host longer than they take the GPU. A graph is a single launch.

A graph reads and writes the addresses that it was recorded with. So a replay first copies into fixed tensors
(`Slots`) all that differs between layers and steps: the layer's inputs and buffers, and its parameters, which
FSDP gathers to new addresses each time; in backward also the gradient, and what forward saved. Then it copies
the results out. Layers that are alike share their two graphs (parallel/layer_graphs.py says which ones are).

All graphs share one pool of memory (parallel/graph_memory.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.fixed_tensors import Copies, Slots
from parallel.graph_memory import GraphMemory


class NotRecordable(Exception):
    """A call of a layer cannot be replayed from a recording; the message says why."""


class LayerParameters:
    """The parameters and buffers of a layer. FSDP replaces parameters each time it gathers them.

    Attributes:
        names: their names within the layer, in the order of `current`.
    """

    def __init__(self, layer: nn.Module):
        # A tensor that several modules share, as a table of 4-bit values, has several owners, and compiled
        # code is for one tensor, or for several.
        owners: dict[Tensor, list[tuple[dict[str, Any], str]]] = {}
        self.names: list[str] = []
        for prefix, module in layer.named_modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if tensor not in owners:
                        self.names.append(f"{prefix}.{name}")
                    owners.setdefault(tensor, []).append((tensors, name))
        self.owners = list(owners.values())

    def current(self) -> list[Tensor]:
        """Return the parameters and buffers as they are now."""
        return [tensors[name] for (tensors, name), *_ in self.owners]

    @contextlib.contextmanager
    def replaced(self, others: Sequence[Tensor]) -> Iterator[None]:
        """Let the layer compute with other parameters and buffers."""
        own = self.current()
        self._set(others)
        try:
            yield
        finally:
            self._set(own)

    def _set(self, values: Sequence[Tensor]) -> None:
        for owners, value in zip(self.owners, values, strict=True):
            for tensors, name in owners:
                tensors[name] = value


class LayerCall:
    """A call of a layer with given tensors: its forward, and its backward.

    Args:
        parameters: of the layer.
        values: what the layer computes with in their place.
        inputs: the tensors among the layer's arguments; autograd leaves.
        are_views: whether each input is passed on as a view, as FSDP does. Compiled code is for views, or for
            other tensors.
        call: calls the layer with other tensors in the place of `inputs`.
    """

    def __init__(
        self,
        parameters: LayerParameters,
        values: Sequence[Tensor],
        inputs: Sequence[Tensor],
        are_views: Sequence[bool],
        call: Callable[[Sequence[Tensor]], Any],
    ):
        self.parameters, self.values, self.inputs = parameters, values, inputs
        self.are_views, self.call = are_views, call
        self.differentiable = [t for t in (*inputs, *values) if t.requires_grad]

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """Return (the result, the tensors that are saved for backward).

        Raises NotRecordable if the result is not one tensor.
        """
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.detach())
            return saved[-1]

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        device = self.inputs[0].device.type
        with self.parameters.replaced(self.values), hooks, _no_cached_casts(device), torch.enable_grad():
            inputs = zip(self.inputs, self.are_views, strict=True)
            result = self.call([tensor.view_as(tensor) if view else tensor for tensor, view in inputs])
        if not isinstance(result, Tensor):
            raise NotRecordable(f"its result is a {type(result).__name__}")
        return result, saved

    def backward(
        self, result: Tensor, gradient: Tensor, retain_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of `differentiable`, None for an unused one, from that of forward's result.

        It runs in this thread, so that `GraphMemory.allocating` holds for its tensors, too.
        """
        no_autocast = torch.autocast(result.device.type, enabled=False)  # as in autograd's own threads
        this_thread = torch.autograd.set_multithreading_enabled(False)
        with self.parameters.replaced(self.values), no_autocast, this_thread:
            return torch.autograd.grad(
                result, self.differentiable, gradient, allow_unused=True, retain_graph=retain_graph
            )


class Recording:
    """The two graphs of a layer for one kind of call; layers that are alike can be replayed from it.

    Args:
        memory: where it is recorded.
        slots: the fixed tensors of all recordings.
        parameters: of the layer, gathered.
        inputs: the tensors among the layer's arguments.
        call: calls the layer with other tensors in the place of `inputs`.

    Raises RuntimeError if the layer does what cannot be recorded (it waits for the GPU, or there is no memory
    for it), and NotRecordable if its result is not one tensor.
    """

    def __init__(
        self,
        memory: GraphMemory,
        slots: Slots,
        parameters: LayerParameters,
        inputs: Sequence[Tensor],
        call: Callable[[Sequence[Tensor]], Any],
    ):
        fixed_inputs = [slots.like(f"input {i}", tensor) for i, tensor in enumerate(inputs)]
        fixed_parameters = [
            nn.Parameter(slots.like(name, t.detach()), t.requires_grad)
            if isinstance(t, nn.Parameter)
            else slots.like(name, t)
            for name, t in zip(parameters.names, parameters.current(), strict=True)
        ]
        are_views = [tensor._is_view() for tensor in inputs]
        fixed = LayerCall(parameters, fixed_parameters, fixed_inputs, are_views, call)
        self.arguments = Copies([*fixed_inputs, *fixed_parameters])
        with memory.allocating():  # the first call may compile or load something, which cannot be recorded
            self.arguments.copy_in([*inputs, *parameters.current()])
            warm = fixed.forward()[0]
            if fixed.differentiable:
                fixed.backward(warm, torch.zeros_like(warm))
            del warm
        self._record(memory, fixed)
        memory.count_memory()

    def _record(self, memory: GraphMemory, fixed: LayerCall) -> None:
        """Record forward and backward; keep the tensors that they read and write."""
        (result, saved), self.replay_forward = memory.record(fixed.forward)
        own = _storages([*fixed.inputs, *fixed.values])
        # The result is copied out before there is its gradient, so the two can share memory, if nothing else
        # is in it. An expanded tensor has one element for several gradients.
        gradient = result.detach()
        is_dense = gradient.is_contiguous() and gradient.numel() > 0
        if not is_dense or _storages([result]) & (own | _storages(saved)):
            gradient = torch.empty_like(gradient)
        gradients: tuple[Tensor | None, ...] = ()
        if fixed.differentiable:  # else this layer and all below it are frozen, and backward ends above it
            gradients, self.replay_backward = memory.record(
                lambda: fixed.backward(result, gradient, memory.retains_graph)
            )
        self.has_gradient = [each is not None for each in gradients]
        unique = {(t.data_ptr(), t.shape, t.stride(), t.dtype): t for t in saved}
        others = [t for t in unique.values() if not _storages([t]) & own]
        returned = [each for each in gradients if each is not None]
        self.gradient, self.result, self.saved, self.gradients = (
            Copies(memory.without_owner(each)) for each in ([gradient], [result], others, returned)
        )

    def run_forward(
        self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (the layer's result, what `run_backward` needs beside inputs and parameters)."""
        self.arguments.copy_in([*inputs, *parameters])
        self.replay_forward()
        return self.result.copy_out()[0], self.saved.copy_out()

    def load_backward(
        self,
        gradient: Tensor,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> None:
        """Copy in what `run_backward` reads; the caller may free it then.

        Args:
            gradient: of the layer's result.
            inputs, parameters: as in `run_forward`.
            saved: what `run_forward` returned.
        """
        self.gradient.copy_in([gradient])
        self.arguments.copy_in([*inputs, *parameters])
        self.saved.copy_in(saved)

    def run_backward(self) -> list[Tensor | None]:
        """Return the gradients of the inputs and parameters that need one, in this order; or None."""
        self.replay_backward()
        found = iter(self.gradients.copy_out())
        return [next(found) if has_gradient else None for has_gradient in self.has_gradient]


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    """Return the addresses of the memory that tensors are in."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _no_cached_casts(device_type: str) -> torch.autocast:
    """Return the current autocast, or none, without its cache: a cached cast would belong to one graph."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


class Replay(torch.autograd.Function):
    """(recording, parameters of the layer, number of inputs, *inputs, *trained parameters) -> the result.

    Differentiable with respect to inputs and trained parameters. Frozen parameters are read from the layer.
    """

    @staticmethod
    def forward(ctx, recording: Recording, parameters: LayerParameters, n_inputs: int, *tensors: Tensor):
        ctx.recording, ctx.parameters, ctx.n_inputs = recording, parameters, n_inputs
        inputs = tensors[:n_inputs]
        result, saved = recording.run_forward(inputs, parameters.current())
        ctx.save_for_backward(*inputs, *saved)
        return result

    @staticmethod
    def backward(ctx, gradient):
        saved, n_inputs = ctx.saved_tensors, ctx.n_inputs
        parameters = ctx.parameters.current()  # gathered again by now
        ctx.recording.load_backward(gradient, saved[:n_inputs], parameters, saved[n_inputs:])
        del saved
        ctx.maybe_clear_saved_tensors()  # the layer's input, at the moment of the peak
        gradients = ctx.recording.run_backward()
        needed = ctx.needs_input_grad[3:]
        assert len(gradients) == sum(needed), "parameters were frozen or thawed after the recording"
        found = iter(gradients)
        return (None, None, None, *(next(found) if is_needed else None for is_needed in needed))
