"""Offload of the activations that checkpointed layers save, to host memory, overlapped with computation.

With activation checkpointing, all that a layer saves between its forward and its backward is its input,
[B, T, hidden]. In forward, that input is copied to the host on a separate stream. In backward, the input is
fetched while the layer after it is computed. So neither direction waits, unless the bus is slower than a
layer. The output of the last projection is offloaded too: DoRA's magnitude needs it in backward, and nothing
else does, and recomputing it would cost a quarter of a layer's forward.

The order in which backward unpacks the tensors of one layer varies (a compiled layer unpacks all at once). So
tensors are fetched and prefetched a whole layer at a time.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

from launch.memory import empty_on_host
from parallel.activation_checkpointing import SavedActivations

MIN_OFFLOAD_BYTES = 2**16  # copying a smaller tensor costs more than it saves


@dataclass(eq=False)
class LayerTensors:
    """The tensors of one layer that are on the host."""

    previous: LayerTensors | None  # those of the layer before, which backward needs next
    # Tensors that backward has not unpacked yet. They are gone once autograd drops them.
    tensors: list[weakref.ref[HostTensor]] = field(default_factory=list)
    fetched: torch.cuda.Event | None = None  # recorded after the last copy back to the GPU


@dataclass(eq=False)
class HostTensor:
    """One tensor on the host."""

    host: torch.Tensor
    device: torch.device  # where it came from, and returns to
    layer: LayerTensors
    on_device: torch.Tensor | None = None  # the copy back, once it is fetched


class HostActivations:
    """The offloaded tensors of one model, by layer, in the order of forward."""

    def __init__(self):
        self.current_layer: LayerTensors | None = None
        self.stream: torch.cuda.Stream | None = None
        self.page_lock = True  # until the host refuses it; asking for each tensor again would take time
        # Copies to the host that may not have finished: (layer, tensor on the GPU, recorded after the copy).
        self.pending_copies: deque[tuple[LayerTensors, torch.Tensor, torch.cuda.Event]] = deque()

    def begin_layer(self, is_first: bool) -> None:
        """Begin a layer: tensors packed from here on belong to it.

        The GPU waits for copies of older layers, except the newest one. is_first: whether it is the model's
        first layer.
        """
        if is_first:
            self.current_layer = None
        self._wait_for_copies(except_layer=self.current_layer)  # those may overlap with this layer
        if self.current_layer is None or self.current_layer.tensors:  # skip a layer that offloaded nothing
            self.current_layer = LayerTensors(self.current_layer)

    def end_layers(self) -> None:
        """Let the GPU wait for the copies to the host of all layers but the last, and free their tensors.

        Called where the last layer ends: head and loss need memory.
        """
        self._wait_for_copies(except_layer=self.current_layer)

    # The hooks of torch.autograd.graph.saved_tensors_hooks.
    def pack(self, tensor: torch.Tensor) -> torch.Tensor | HostTensor:
        """Start to copy a saved tensor to the host, and return the copy. A small one is returned itself."""
        if tensor.nbytes < MIN_OFFLOAD_BYTES:
            return tensor
        assert self.current_layer is not None
        if not tensor.is_cuda:  # nothing to overlap: the same bookkeeping with plain copies
            host = tensor.clone()
        else:
            self.stream = self.stream or torch.cuda.Stream(tensor.device)
            host = empty_on_host(tensor, "cuda" if self.page_lock else "cpu")
            self.page_lock = self.page_lock and host.is_pinned()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
                self.pending_copies.append((self.current_layer, tensor, self.stream.record_event()))
        packed = HostTensor(host, tensor.device, self.current_layer)
        self.current_layer.tensors.append(weakref.ref(packed))
        return packed

    def unpack(self, packed: torch.Tensor | HostTensor) -> torch.Tensor:
        """Return a packed tensor on its device, and start to prefetch those of the layer before its own."""
        if isinstance(packed, torch.Tensor):
            return packed
        layer = packed.layer
        self._wait_for_copies()
        self._fetch(layer, packed)
        tensor, packed.on_device = packed.on_device, None
        assert tensor is not None
        layer.tensors = [ref for ref in layer.tensors if ref() not in (None, packed)]
        if self.stream:
            # Wait for this layer's event only: the stream may be copying the layer before already.
            assert layer.fetched is not None
            torch.cuda.current_stream().wait_event(layer.fetched)
        if layer.previous:
            self._fetch(layer.previous)  # while this layer is computed
        return tensor

    def _wait_for_copies(self, except_layer: LayerTensors | None = None) -> None:
        """Let the GPU wait for pending copies to the host, then free their tensors.

        Where the bus is slower than the layers, forward waits for it: tensors that wait for the bus do not
        fill the memory. except_layer: its copies may go on; they are the newest.
        """
        while self.pending_copies and (except_layer is None or self.pending_copies[0][0] is not except_layer):
            torch.cuda.current_stream().wait_event(self.pending_copies.popleft()[2])

    def _fetch(self, layer: LayerTensors, packed: HostTensor | None = None) -> None:
        """Start to copy a layer's missing tensors back to the GPU.

        packed: a tensor to fetch in any case; backward may have unpacked it before (retain_graph).
        """
        expected = [each for ref in layer.tensors if (each := ref())]
        missing = [each for each in expected if each.on_device is None]
        if packed and packed not in expected:
            missing.append(packed)
        if not missing:
            return
        for each in missing:
            # Allocated on the current stream, which frees it after the layer. That stream may still be using
            # the memory for another tensor: the copies wait for it.
            each.on_device = torch.empty_like(each.host, device=each.device)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # no effect with None
            for each in missing:
                self._copy_to_device(each)
            if self.stream:
                layer.fetched = self.stream.record_event()

    def _copy_to_device(self, packed: HostTensor) -> None:
        assert packed.on_device is not None
        packed.on_device.copy_(packed.host, non_blocking=True)


class OffloadedLayer(ActivationWrapper):
    """A checkpointed decoder layer whose saved tensors in the shape of hidden states go to the host.

    Tensors that live only within the layer's forward or its recomputation never reach the hooks here.

    Args:
        layer: the checkpointed layer, or a GraphedLayer of one.
        host_activations: the model's store of offloaded tensors.
        offload_input: offload the layer's input.
        offload_last_output: offload what the layer saves beside its input: the last projection's output. Not
            while the layer saves MATMULS: then there is memory for it.
        first: whether it is the model's first layer, where a forward begins.
        last: whether it is the model's last layer.
    """

    def __init__(
        self,
        layer: ActivationWrapper,
        host_activations: HostActivations,
        *,
        offload_input: bool,
        offload_last_output: bool,
        first: bool,
        last: bool,
    ):
        super().__init__(layer)
        self.host_activations, self.first, self.last = host_activations, first, last
        self.offload_input, self.offload_last_output = offload_input, offload_last_output

    def forward(self, x: torch.Tensor, *args, **kwargs):
        """Return the layer's result for x [B, T, hidden]; what it saves in x's shape goes to the host."""
        layer = self._checkpoint_wrapped_module
        self.host_activations.begin_layer(self.first)
        # Backward never reaches frozen layers below the first trained one: nothing would fetch their inputs.
        if not x.requires_grad and not any(p.requires_grad for p in layer.parameters()):
            return layer(x, *args, **kwargs)

        offload_output = self.offload_last_output and layer.saved is not SavedActivations.MATMULS
        address, shape = x.data_ptr(), x.shape  # not x itself, which autograd would hold with the closure

        def pack(tensor: torch.Tensor) -> torch.Tensor | HostTensor:
            offload = self.offload_input if tensor.data_ptr() == address else offload_output
            is_like_x = tensor.shape == shape and tensor.is_floating_point()
            return self.host_activations.pack(tensor) if offload and is_like_x else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, self.host_activations.unpack):
            y = layer(x, *args, **kwargs)
        if self.last:
            self.host_activations.end_layers()
        return y
