"""Keeps what checkpointed layers save in host memory, copied while the GPU computes.

With activation checkpointing all that stays of a layer between its forward and its backward is its input,
[B, T, hidden]. Here that input is copied to the host on a stream of its own during forward; in backward each
layer's input is fetched while the layer after it is computed, so that neither direction is waited for unless
the bus is slower than a layer. So is the output of the last projection, which DoRA's magnitude needs in backward
and nothing else does: to compute it again would be a quarter of a layer's forward.

In which order backward asks for the tensors of one layer is its own business (a compiled layer: all at once). What
is fetched together, and ahead, is therefore a layer's.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

from parallel.activation_checkpointing import Keep, Recomputed

SMALLEST = 2**16  # bytes: below it a copy costs more than it saves


@dataclass(eq=False)
class Layer:
    """What one layer has on the host. tensors: those that backward has not had yet, as far as autograd still holds
    them; before: the layer whose tensors will be wanted next; ready: when all that was fetched is there."""

    before: Layer | None
    tensors: list[weakref.ref[Stashed]] = field(default_factory=list)
    ready: torch.cuda.Event | None = None


@dataclass(eq=False)
class Stashed:
    """One tensor on the host."""

    host: torch.Tensor
    device: torch.device
    layer: Layer
    fetched: torch.Tensor | None = None


class HostStash:
    """The tensors of one model that are on the host, by layer, in the order in which forward came to them."""

    def __init__(self):
        self.last: Layer | None = None
        self.stream: torch.cuda.Stream | None = None
        # What is on its way to the host: (the layer that it is of, itself, when it is there).
        self.leaving: deque[tuple[Layer, torch.Tensor, torch.cuda.Event]] = deque()

    def begin(self, first: bool) -> None:
        """To be called where a layer begins. first: the model's first one."""
        if first:
            self.last = None
        self._let_go(self.last)  # of which the copies have this layer's time
        if self.last is None or self.last.tensors:  # a layer that stashed nothing is passed over
            self.last = Layer(self.last)

    def end(self) -> None:
        """To be called where the last layer ends: the head and the loss need memory of their own."""
        self._let_go(self.last)

    # What torch calls for a tensor that is saved for backward, and when backward wants it.
    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Stashed:
        if tensor.nbytes < SMALLEST:
            return tensor
        assert self.last is not None
        if not tensor.is_cuda:  # nothing to overlap: the same bookkeeping with plain copies
            host = tensor.clone()
        else:
            self.stream = self.stream or torch.cuda.Stream(tensor.device)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
                self.leaving.append((self.last, tensor, self.stream.record_event()))
        kept = Stashed(host, tensor.device, self.last)
        self.last.tensors.append(weakref.ref(kept))
        return kept

    def unpack(self, kept: torch.Tensor | Stashed) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        layer = kept.layer
        self._let_go()
        self._fetch(layer, kept)
        tensor, kept.fetched = kept.fetched, None
        assert tensor is not None
        layer.tensors = [ref for ref in layer.tensors if ref() not in (None, kept)]
        if self.stream:
            # Not for the stream, which may have begun with the layer before.
            assert layer.ready is not None
            torch.cuda.current_stream().wait_event(layer.ready)
        if layer.before:
            self._fetch(layer.before)  # while this layer is computed
        return tensor

    def _let_go(self, but: Layer | None = None) -> None:
        """Has the GPU wait until what is leaving has left, and frees that; not what is of the layer `but`. Where the bus is
        slower than the layers forward waits for it, and does not fill the memory with what waits for the bus."""
        while self.leaving and (but is None or self.leaving[0][0] is not but):
            torch.cuda.current_stream().wait_event(self.leaving.popleft()[2])

    def _fetch(self, layer: Layer, also: Stashed | None = None) -> None:
        """Begins to copy back what is not there of a layer's tensors. also: one of them that backward may have had
        before (retain_graph)."""
        wanted = [kept for ref in layer.tensors if (kept := ref())]
        missing = [kept for kept in wanted if kept.fetched is None]
        if also and also not in wanted:
            missing.append(also)
        if not missing:
            return
        for kept in missing:
            # The current stream's memory, to which it comes back when the layer lets go of it. That stream may be using
            # it for something else yet.
            kept.fetched = torch.empty_like(kept.host, device=kept.device)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # of None: no more than a block
            for kept in missing:
                self._copy(kept)
            if self.stream:
                layer.ready = self.stream.record_event()

    def _copy(self, kept: Stashed) -> None:
        assert kept.fetched is not None
        kept.fetched.copy_(kept.host, non_blocking=True)


class Offloaded(ActivationWrapper):
    """Around a decoder layer that is checkpointed: what autograd saves of it in hidden states' shape goes to the
    host: with `inputs`, the layer's input; with `results`, what a layer that keeps NOTHING else keeps nevertheless. The
    tensors that live only within the layer's forward or its recomputation are not seen here.

    first, last: whether it is the model's first layer, where a forward begins, or its last.
    """

    def __init__(
        self, layer: Recomputed, stash: HostStash, *, inputs: bool, results: bool, first: bool, last: bool
    ):
        super().__init__(layer)
        self.stash, self.inputs, self.results = stash, inputs, results
        self.first, self.last = first, last

    def forward(self, x: torch.Tensor, *args, **kwargs):
        layer = self._checkpoint_wrapped_module
        self.stash.begin(self.first)
        # Backward never comes to frozen layers below the first trained one, and would never fetch their inputs.
        if not x.requires_grad and not any(p.requires_grad for p in layer.parameters()):
            return layer(x, *args, **kwargs)

        results = self.results and layer.keep is Keep.NOTHING  # else there is memory for them
        address, shape = x.data_ptr(), x.shape  # not x itself, which autograd would keep with the function

        def pack(tensor: torch.Tensor) -> torch.Tensor | Stashed:
            wanted = self.inputs if tensor.data_ptr() == address else results
            like_x = tensor.shape == shape and tensor.is_floating_point()
            return self.stash.pack(tensor) if wanted and like_x else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, self.stash.unpack):
            y = layer(x, *args, **kwargs)
        if self.last:
            self.stash.end()
        return y
