"""The training loss without the logits: the head's matmul and the cross-entropy in chunks of tokens, and the
gradient of both at once, while a chunk's logits are there.

Where the head is frozen, its shards stay where they are: each rank computes the logits of its own part of the
vocabulary for the tokens of all ranks, and the softmax is put together from the parts. What travels is hidden
states, not the head (2 GiB for a vocabulary of 128k and 8,192 hidden units), and only those of a chunk are gathered
at a time: the same slice of every rank's tokens. All ranks that share a head must therefore bring equally many tokens
(data/batches.py). The embedding is looked up likewise.

Only tokens that are learned take part: the others, a prompt's and padding, have no loss, and the head would compute
as much for each as for a learned one.

Shapes: N tokens of this rank, P of these that take part, W ranks that share the vocabulary, V vocabulary, S rows of it
on this rank (maybe none), H hidden features, C tokens of a chunk, of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from data.rows import IGNORE
from launch.devices import triton_runs_on
from quantization.operators import compute_dtype

# torch 2.13 has new names for them, and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Of a chunk: large enough for the matmuls' full speed, small beside anything else. Not compiled, there are copies in
# fp32 as well, and the chunk is a quarter of it.
LOGITS_BYTES = 2**28

# Of the hidden states in fp32, which more than one rank exchange at a time, however many ranks they are.
HIDDEN_BYTES = 2**26

# By which fp16's gradients by the logits, at most 1, are formed larger: the loss's scale is not known before backward,
# and what is below 6e-8 would be lost. Those of a token by its logits sum up to 2 at most, so that by its hidden state
# the gradient overflows only with a weight of the head above 127.
FP16_FACTOR = 2.0**8


# Tokens that matmuls compute together: a chunk of whole ones wastes nothing.
TILE = 128


def ranks_of_a_copy(mesh: DeviceMesh) -> DeviceMesh:
    """Of a mesh of wrapping.make_mesh: the ranks that this one shares a copy of the model with, 1-D."""
    return mesh if mesh.ndim == 1 else mesh["shard"]


class VocabularyShard:
    """The rows [first, first + S) of a vocabulary, and the ranks that hold the others. size: W."""

    def __init__(self, weight: Tensor):
        """weight: a whole [V, H], or a DTensor whose rows are dealt out as FSDP does."""
        self.group, self.rank, self.size, self.rows = None, 0, 1, weight
        if isinstance(weight, DTensor):
            shards = ranks_of_a_copy(weight.device_mesh)
            self.group, self.rank, self.size = shards.get_group(), shards.get_local_rank(), shards.size()
            self.rows = weight.to_local()
        self.most = -(-weight.shape[0] // self.size)  # rows of the ranks that have most
        self.first = self.most * self.rank

    def gather(self, x: Tensor) -> Tensor:
        """[N, ...] of every rank -> [W N, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        all_gather(out, x.contiguous(), group=self.group)
        return out

    def scatter_sum(self, x: Tensor) -> Tensor:
        """[W N, ...], partial sums for the tokens of every rank -> [N, ...], the whole sums for this one's."""
        if self.size == 1:
            return x
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        reduce_scatter(out, x, group=self.group)
        return out

    def slices(self, n: int, most: int) -> Iterator[slice]:
        """Of N = n tokens of every rank, the same on all: each holds at most `most` tokens of all ranks together, or
        one of each."""
        size = max(most // self.size, 1)
        size -= size % TILE if size > TILE else 0
        return (slice(i, i + size) for i in range(0, n, size))

    def local(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(row of each token here, whether it is here). The row of others is some row."""
        index = tokens - self.first
        here = (index >= 0) & (index < len(self.rows))
        return index.clamp(0, max(len(self.rows) - 1, 0)), here


def shard_vocabulary(modules: Sequence[nn.Embedding | Head], mesh: DeviceMesh) -> None:
    """Deals out the rows of the one frozen weight [V, H], on meta, that the modules share, or that the one module
    has: FSDP's layout, but never gathered for a forward."""
    weight, count = modules[0].weight, mesh.size(mesh.ndim - 1)
    rows = -(-weight.shape[0] // count)
    first = min(rows * mesh.get_local_rank(mesh.ndim - 1), weight.shape[0])
    local = weight.data[first : first + rows].clone()
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    sharded = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
    parameter = nn.Parameter(sharded, requires_grad=False)
    for module in modules:
        module.weight = parameter
        if isinstance(module, nn.Embedding):
            freeze(module)


def freeze(embedding: nn.Embedding) -> FrozenEmbedding:
    """The same module as a FrozenEmbedding. A class before nn.Embedding, as fully_shard does it: what the module's own
    class adds, stays (Gemma scales what is looked up)."""
    own = type(embedding)
    if not isinstance(embedding, FrozenEmbedding):
        bases = (FrozenEmbedding,) if own is nn.Embedding else (own, FrozenEmbedding)
        embedding.__class__ = type(own.__name__, bases, {})
    assert isinstance(embedding, FrozenEmbedding)
    return embedding


class FrozenEmbedding(nn.Embedding):
    """An embedding that is not trained. Its weight may be dealt out by `shard_vocabulary`: then every rank looks all
    tokens up in its own rows. And these may lie in host memory, where a GPU reads just what it looks up."""

    on_host = False  # set by wrapping.py, for the load

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H], on the device of ids."""
        shard = VocabularyShard(self.weight)
        if shard.size == 1:
            return look_up(shard.rows, ids.flatten()).view(*ids.shape, -1)
        index, here = shard.local(shard.gather(ids.flatten()[None]))  # [W, N]
        width = self.weight.shape[1]
        embedded = torch.empty(ids.numel(), width, dtype=self.weight.dtype, device=ids.device)
        for at in shard.slices(len(embedded), HIDDEN_BYTES // (4 * width)):
            # Exact in any dtype: all ranks but one add zeros.
            found = look_up(shard.rows, index[:, at].flatten(), here[:, at].flatten())
            embedded[at] = shard.scatter_sum(found)
        return embedded.view(*ids.shape, -1)


def look_up(rows: Tensor, index: Tensor, here: Tensor | None = None) -> Tensor:
    """rows[index], with zeros where not `here`: [N, H] on index's device, wherever the rows [S, H] are."""
    if not len(rows):
        return torch.zeros(len(index), rows.shape[1], dtype=rows.dtype, device=index.device)
    if not rows.is_cuda and triton_runs_on(index.device) and rows.is_pinned():
        from models.gather_kernel import gather  # Triton comes with torch's CUDA builds only

        return gather(rows, index, here)
    found = F.embedding(index.to(rows.device), rows).to(index.device)
    return found if here is None else found.masked_fill_(~here[:, None], 0)


class Head(nn.Linear):
    """The output projection. With targets it gives the loss instead of the logits."""

    compiled = False  # set by wrapping.py
    scale = 1.0  # set by models/causal_lm.py
    softcap: float | None = None  # set by models/causal_lm.py

    def forward(
        self, x: Tensor, targets: Tensor | None = None, target_positions: Tensor | None = None
    ) -> Tensor:
        """Logits [.., V]; or, with targets [..], the cross-entropy summed over those that are not IGNORE, fp32.
        scale and softcap: s and c of logits c tanh(s z / c); without targets the model's own forward applies them.
        places [P]: where these targets are in x as one line of tokens, each once, and maybe others; None: all of it."""
        if targets is None:
            weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
            return F.linear(x, weight.to(x.device), self.bias)
        assert self.bias is None
        dtype = compute_dtype(x)
        x = x.flatten(0, -2)
        if self.scale != 1:
            x = x * self.scale
        shard = VocabularyShard(self.weight)
        rows = shard.rows.to(x.device, dtype, non_blocking=True)
        with torch.autocast(x.device.type, enabled=False):
            settings = target_positions, shard, self.softcap, self.compiled
            return _SummedLoss.apply(x.to(dtype), rows, targets.flatten(), *settings)


def _logits(z: Tensor, softcap: float | None) -> Tensor:
    return z.float() if softcap is None else softcap * torch.tanh(z.float() / softcap)


def _statistics(z: Tensor, index: Tensor, here: Tensor, softcap: float | None) -> Tensor:
    """Of the logits [C, S] of some rows of the vocabulary: their largest, the sum of the exponentials relative to it,
    and the target's logit where it is here, else 0: [C, 3] fp32."""
    if not z.shape[1]:
        return torch.tensor([-torch.inf, 0, 0], device=z.device).expand(len(z), 3)
    logits = _logits(z, softcap)
    largest = logits.amax(1)
    total = (logits - largest[:, None]).exp().sum(1)
    return torch.stack([largest, total, logits.gather(1, index[:, None])[:, 0] * here], 1)


def _gradient(z: Tensor, index: Tensor, here: Tensor, lse: Tensor, softcap: float | None) -> Tensor:
    """The derivative of the loss of learned tokens by z: softmax - one-hot, and the cap's. [C, S] in z's dtype, in
    fp16 times FP16_FACTOR. lse [C]: the logarithm of the softmax's denominator; infinite where nothing is learned."""
    logits = _logits(z, softcap)
    columns = torch.arange(z.shape[1], device=z.device)
    one_hot = (columns == index[:, None]) & here[:, None]
    gradient = (logits - lse[:, None]).exp() - one_hot.float()
    if softcap is not None:
        gradient = gradient * (1 - (logits / softcap).square())
    if z.dtype == torch.float16:
        gradient = gradient * FP16_FACTOR
    return gradient.to(z.dtype)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Rounded once to gradient's dtype. factor: fp32, without a dimension."""
    return (gradient.float() * factor).to(gradient.dtype)


# By whether they are compiled: then each is one pass over the logits, instead of several in fp32. The number of tokens
# becomes a variable when it first changes; that of columns, by which each element's place is divided, never does.
KERNELS = {
    False: (_statistics, _gradient, _scaled),
    True: (torch.compile(_statistics), torch.compile(_gradient), torch.compile(_scaled)),
}


class _SummedLoss(torch.autograd.Function):
    """(x [N, H], rows [S, H], targets [N], ...) -> the sum over this rank's targets; the gradients of x and, where
    the head is trained, of its weight."""

    @staticmethod
    def forward(ctx, x, rows, targets, target_positions, shard: VocabularyShard, softcap, compiled: bool):
        of_x, of_rows = ctx.needs_input_grad[:2]
        assert not (of_rows and shard.size > 1), "a head that is trained is gathered"
        statistics, gradient, ctx.scaled = KERNELS[compiled and len(rows) > 0]
        ctx.fp16 = fp16 = x.dtype == torch.float16
        if target_positions is None:
            target_positions = torch.arange(len(x), device=x.device)
        targets = shard.gather(targets[target_positions][None])  # [W, P]
        losses = torch.zeros(len(target_positions), dtype=torch.float32, device=x.device)
        grad_x = torch.zeros_like(x) if of_x else None
        grad_rows = torch.zeros_like(rows, dtype=torch.float32) if of_rows else None
        n_bytes = LOGITS_BYTES if compiled else LOGITS_BYTES // 4
        most = n_bytes // (shard.most * x.element_size())  # the same on all ranks, which exchange
        if shard.size > 1:
            most = min(most, HIDDEN_BYTES // (4 * x.shape[1]))
        for at in shard.slices(len(target_positions), most):
            states, chunk = shard.gather(x[target_positions[at]]), targets[:, at].flatten()
            tokens, here = shard.local(chunk)
            mine = here & (known := chunk != IGNORE)
            z = F.linear(states, rows)
            largest, total, picked = shard.gather(statistics(z, tokens, mine, softcap)[None]).unbind(2)
            top = largest.amax(0)
            lse = top + (total * (largest - top).exp()).sum(0).log()
            losses[at] = torch.where(known, lse - picked.sum(0), 0).view(shard.size, -1)[shard.rank]
            if of_x or of_rows:
                z = gradient(z, tokens, mine, lse.masked_fill(~known, torch.inf), softcap)
            if grad_x is not None:  # in 16 bits the sum over ranks would be rounded for each
                part = z @ rows if shard.size == 1 else shard.scatter_sum((z @ rows).float())
                grad_x[target_positions[at]] = part.to(x.dtype)
            if grad_rows is not None:
                # A sum over tokens has no such bound, so the factor is taken out before.
                grad_rows += z.t() @ (states / FP16_FACTOR if fp16 else states)
        ctx.save_for_backward(grad_x, grad_rows)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        of_x, of_rows = ctx.saved_tensors
        share = grad / FP16_FACTOR if ctx.fp16 else grad
        return (
            None if of_x is None else ctx.scaled(of_x, share),
            None if of_rows is None else of_rows * grad,
            *[None] * 5,
        )
