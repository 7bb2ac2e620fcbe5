"""Keeps what checkpointed layers save in host memory, copied while the GPU computes.

With activation checkpointing all that stays of a layer between its forward and its backward is its input,
[B, T, hidden]. Here that input is copied to the host on a stream of its own during forward; in backward each
layer's input is fetched while the layer after it is computed, so that neither direction is waited for unless
the bus is slower than a layer. So is the output of the last projection, which DoRA's magnitude needs in backward
and nothing else does: to compute it again would be a quarter of a layer's forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

from recompute import Keep, Recomputed

SMALLEST = 2**16  # bytes: below it a copy costs more than it saves


@dataclass
class Stashed:
    """One tensor on the host. before: what was stashed just before it, and will be wanted just after it."""

    host: torch.Tensor
    device: torch.device
    before: Stashed | None
    fetched: torch.Tensor | None = None


class HostStash:
    """The tensors of one model that are on the host, in the order in which forward made them."""

    def __init__(self):
        self.last: Stashed | None = None
        self.stream: torch.cuda.Stream | None = None

    # What torch calls for a tensor that is saved for backward, and when backward wants it.
    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Stashed:
        if tensor.nbytes < SMALLEST:
            return tensor
        if not tensor.is_cuda:  # nothing to overlap: the same bookkeeping with plain copies
            host = tensor.clone()
        else:
            self.stream = self.stream or torch.cuda.Stream(tensor.device)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.stream)  # its memory is not given out again before the copy is done
        self.last = Stashed(host, tensor.device, self.last)
        return self.last

    def unpack(self, kept: torch.Tensor | Stashed) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self._fetch(kept)
        tensor, kept.fetched = kept.fetched, None
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
            tensor.record_stream(torch.cuda.current_stream())
        if kept.before:
            self._fetch(kept.before)  # while this layer is computed
        self.last = kept.before  # backward goes from the last to the first; then a new forward begins
        return tensor

    def _fetch(self, kept: Stashed) -> None:
        if kept.fetched is not None:
            return
        if not self.stream:
            kept.fetched = kept.host.to(kept.device)
            return
        with torch.cuda.stream(self.stream):
            kept.fetched = kept.host.to(kept.device, non_blocking=True)


class Offloaded(ActivationWrapper):
    """Around a decoder layer that is checkpointed: what autograd saves of it in hidden states' shape goes to the
    host: with `inputs`, the layer's input; with `results`, what a layer that keeps NOTHING else keeps nevertheless. The
    tensors that live only within the layer's forward or its recomputation are not seen here.

    first: whether it is the model's first layer, where a forward begins.
    """

    def __init__(self, layer: Recomputed, stash: HostStash, *, inputs: bool, results: bool, first: bool):
        super().__init__(layer)
        self.stash, self.inputs, self.results, self.first = stash, inputs, results, first

    def forward(self, x: torch.Tensor, *args, **kwargs):
        layer = self._checkpoint_wrapped_module
        if self.first:
            self.stash.last = None
        # Backward never comes to frozen layers below the first trained one, and would never fetch their inputs.
        if not x.requires_grad and not any(p.requires_grad for p in layer.parameters()):
            return layer(x, *args, **kwargs)

        results = self.results and layer.keep is Keep.NOTHING  # else there is memory for them

        def pack(tensor: torch.Tensor) -> torch.Tensor | Stashed:
            wanted = self.inputs if tensor.data_ptr() == x.data_ptr() else results
            like_x = tensor.shape == x.shape and tensor.is_floating_point()
            return self.stash.pack(tensor) if wanted and like_x else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, self.stash.unpack):
            return layer(x, *args, **kwargs)
