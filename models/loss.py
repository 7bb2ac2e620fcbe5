"""The training loss without full logits: head and cross-entropy in chunks of tokens, and their gradients.

The gradient of a chunk is formed together with its loss, while the chunk's logits are in memory.

If the head is frozen, its shards are not gathered. Each rank computes the logits of its own part of the
vocabulary for the tokens of all ranks, and the softmax is combined from the parts. Hidden states travel
instead of the head (2 GiB for a vocabulary of 128k and 8,192 hidden features), and only those of one chunk at
a time: the same slice of every rank's tokens. So all ranks that share a head must bring equally many tokens
(data/batches.py). The embedding lookup works the same way.

Only learned tokens take part. The others, prompts and padding, have no loss, and would cost the head as much
as learned ones.

Shapes: B sequences of a batch, T tokens of a sequence, N tokens of this rank, P of these that take part, W
ranks that share the vocabulary, V vocabulary, S rows of it on this rank (maybe none), H hidden features, C
tokens of a chunk, of all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from data.rows import IGNORE
from launch.devices import triton_runs_on
from quantization.operator_registry import compute_dtype

# torch 2.13 has new names for them, and warns about the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Bytes of a chunk's logits: enough for the matmuls' full speed, and little compared with everything else.
# Code that is not compiled also makes fp32 copies, so its chunk is a quarter of this.
LOGITS_BYTES = 2**28

# Bytes of the hidden states in fp32 that several ranks exchange at a time, for any number of ranks.
HIDDEN_BYTES = 2**26

# fp16's gradients of the logits, at most 1, are multiplied by this, because the loss's scale is not known
# before backward, and values below 6e-8 would be lost. The absolute gradients of a token's logits sum up to
# at most 2, so the gradient of its hidden state overflows only if a weight of the head is above 127.
FP16_FACTOR = 2.0**8

# Tokens that matmuls compute together: a chunk of whole tiles wastes nothing.
TILE = 128


def shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the 1-D mesh of the ranks that share one copy of the model: `mesh`, or its dimension "shard"."""
    return mesh if mesh.ndim == 1 else mesh["shard"]


class VocabularyShard:
    """This rank's rows of a vocabulary, [first_row, first_row + S), and the ranks that hold the others.

    Attributes:
        rows: [S, H], this rank's rows.
        first_row: index of the first of them.
        max_rows: S of the ranks that have most rows.
        group, rank, n_ranks: the process group, this rank in it, and W.
    """

    def __init__(self, weight: Tensor):
        """weight: a full [V, H], or a DTensor whose rows are sharded as FSDP does."""
        self.group, self.rank, self.n_ranks, self.rows = None, 0, 1, weight
        if isinstance(weight, DTensor):
            mesh = shard_mesh(weight.device_mesh)
            self.group, self.rank, self.n_ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
            self.rows = weight.to_local()
        self.max_rows = -(-weight.shape[0] // self.n_ranks)
        self.first_row = self.max_rows * self.rank

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every rank's x [N, ...], concatenated in the order of ranks: [W N, ...]. Collective."""
        if self.n_ranks == 1:
            return x
        out = x.new_empty(self.n_ranks * x.shape[0], *x.shape[1:])
        all_gather(out, x.contiguous(), group=self.group)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this rank's part [N, ...] of the sum over ranks of their x [W N, ...]. Collective."""
        if self.n_ranks == 1:
            return x
        out = x.new_empty(x.shape[0] // self.n_ranks, *x.shape[1:])
        reduce_scatter(out, x, group=self.group)
        return out

    def chunk_slices(self, n_tokens: int, max_chunk_tokens: int) -> Iterator[slice]:
        """Return slices that cut this rank's n_tokens into chunks, the same on all ranks.

        A chunk holds at most `max_chunk_tokens` tokens of all ranks together, or one token of each rank.
        """
        size = max(max_chunk_tokens // self.n_ranks, 1)
        size -= size % TILE if size > TILE else 0
        return (slice(i, i + size) for i in range(0, n_tokens, size))

    def find_rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (index in `rows` of each token's row, bool tensor: whether this rank has that row).

        Without it the index is arbitrary, but valid.
        """
        index = token_ids - self.first_row
        is_local = (index >= 0) & (index < len(self.rows))
        return index.clamp(0, max(len(self.rows) - 1, 0)), is_local


def shard_vocabulary(modules: Sequence[nn.Embedding | Head], mesh: DeviceMesh) -> None:
    """Shard the modules' shared frozen meta weight [V, H] by rows, in place; embeddings: FrozenEmbedding.

    The layout is FSDP's, but the weight is never gathered for a forward.
    """
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
            freeze_embedding(module)


def freeze_embedding(embedding: nn.Embedding) -> FrozenEmbedding:
    """Make the embedding a FrozenEmbedding, in place, and return it; its weight and requires_grad stay.

    The module's own class comes first, as with fully_shard, so its additions stay (Gemma scales its
    embeddings).
    """
    cls = type(embedding)
    if not isinstance(embedding, FrozenEmbedding):
        bases = (FrozenEmbedding,) if cls is nn.Embedding else (cls, FrozenEmbedding)
        embedding.__class__ = type(cls.__name__, bases, {})
    assert isinstance(embedding, FrozenEmbedding)
    return embedding


class FrozenEmbedding(nn.Embedding):
    """An embedding that is not trained, and may be sharded by `shard_vocabulary`.

    With shards, every rank looks up the tokens of all ranks in its own rows. The rows may be in host memory,
    where a GPU reads only the rows that it needs.
    """

    on_host = False  # set by wrapping.py, for the load

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, H] of ids [B, T], on their device. Collective if sharded."""
        shard = VocabularyShard(self.weight)
        if shard.n_ranks == 1:
            return look_up_rows(shard.rows, ids.flatten()).view(*ids.shape, -1)
        index, is_local = shard.find_rows(shard.all_gather(ids.flatten()[None]))  # [W, N]
        width = self.weight.shape[1]
        embedded = torch.empty(ids.numel(), width, dtype=self.weight.dtype, device=ids.device)
        for chunk in shard.chunk_slices(len(embedded), HIDDEN_BYTES // (4 * width)):
            # Exact in any dtype: all ranks but one add zeros.
            found = look_up_rows(shard.rows, index[:, chunk].flatten(), is_local[:, chunk].flatten())
            embedded[chunk] = shard.reduce_scatter(found)
        return embedded.view(*ids.shape, -1)


def look_up_rows(rows: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return rows[index], with zeros where the mask is False: [N, H] on index's device.

    The rows [S, H] may be on any device.
    """
    if not len(rows):
        return torch.zeros(len(index), rows.shape[1], dtype=rows.dtype, device=index.device)
    if not rows.is_cuda and triton_runs_on(index.device) and rows.is_pinned():
        from models.gather_kernel import gather_rows  # Triton comes with torch's CUDA builds only

        return gather_rows(rows, index, mask)
    found = F.embedding(index.to(rows.device), rows).to(index.device)
    return found if mask is None else found.masked_fill_(~mask[:, None], 0)


class Head(nn.Linear):
    """The output projection. With targets it returns the loss instead of the logits."""

    compiled = False  # set by wrapping.py
    # Makes the context in which the loss's logits are allocated; set by wrapping.py.
    memory: Callable[[], contextlib.AbstractContextManager] = staticmethod(contextlib.nullcontext)
    scale = 1.0  # set by models/causal_lm.py
    softcap: float | None = None  # set by models/causal_lm.py

    def forward(
        self, x: Tensor, targets: Tensor | None = None, target_positions: Tensor | None = None
    ) -> Tensor:
        """Return the logits [.., V], or with targets this rank's summed cross-entropy in fp32.

        Collective if the weight is sharded. The bias, if there is one, is full on each rank: FSDP gathers it.

        The loss's logits are c tanh(s z / c) with z = W x + bias, the head's scale s and the softcap c.
        Without targets neither is applied: the model's own forward does it.

        Args:
            x: [.., H].
            targets: [..]. The loss is summed over targets that are not IGNORE.
            target_positions: [P], positions of these targets in the flattened x, each once, and maybe
                other positions. None: all.
        """
        if targets is None:
            weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
            return F.linear(x, weight.to(x.device), self.bias)
        dtype = compute_dtype(x)
        x = x.flatten(0, -2)
        if self.scale != 1:
            x = x * self.scale
        shard = VocabularyShard(self.weight)
        rows = shard.rows.to(x.device, dtype, non_blocking=True)
        bias = None
        if self.bias is not None:
            bias = self.scale * self.bias[shard.first_row : shard.first_row + len(rows)].to(x.device, dtype)
        with torch.autocast(x.device.type, enabled=False):
            settings = target_positions, shard, self.softcap, self.compiled, self.memory
            return _SummedLoss.apply(x.to(dtype), rows, bias, targets.flatten(), *settings)


def capped_logits(z: Tensor, softcap: float | None) -> Tensor:
    """Return the logits c tanh(z / c) in fp32, of the cap c; z without one."""
    return z.float() if softcap is None else softcap * torch.tanh(z.float() / softcap)


def _softmax_statistics(z: Tensor, index: Tensor, is_local: Tensor, softcap: float | None) -> Tensor:
    """Return [C, 3] fp32 of this rank's z [C, S]: largest logit, sum of exp(logit - largest), target's logit.

    The target's logit is 0 if this rank does not have it.
    """
    if not z.shape[1]:
        return torch.tensor([-torch.inf, 0, 0], device=z.device).expand(len(z), 3)
    logits = capped_logits(z, softcap)
    largest = logits.amax(1)
    total = (logits - largest[:, None]).exp().sum(1)
    return torch.stack([largest, total, logits.gather(1, index[:, None])[:, 0] * is_local], 1)


def _logit_gradient(z: Tensor, index: Tensor, is_local: Tensor, lse: Tensor, softcap: float | None) -> Tensor:
    """Return the loss's gradient of z, in fp16 times FP16_FACTOR: [C, S] in z's dtype.

    It is (softmax - one-hot) times the cap's. lse [C]: logarithm of the softmax's denominator; infinite for
    tokens without a target.
    """
    logits = capped_logits(z, softcap)
    columns = torch.arange(z.shape[1], device=z.device)
    one_hot = (columns == index[:, None]) & is_local[:, None]
    gradient = (logits - lse[:, None]).exp() - one_hot.float()
    if softcap is not None:
        gradient = gradient * (1 - (logits / softcap).square())
    if z.dtype == torch.float16:
        gradient = gradient * FP16_FACTOR
    return gradient.to(z.dtype)


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return gradient * factor, rounded once to gradient's dtype. factor: an fp32 scalar."""
    return (gradient.float() * factor).to(gradient.dtype)


def _compile_late(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the compiled kernel. Its first call imports the compiler, which takes a second."""

    @cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(kernel)

    return lambda *args: compiled()(*args)


# Keys: whether the kernels are compiled. Compiled, each is one pass over the logits instead of several in
# fp32. The number of tokens becomes a variable when it first changes. The number of columns, which divides
# each element's offset, never does.
KERNELS = {
    False: (_softmax_statistics, _logit_gradient, _scale),
    True: (_compile_late(_softmax_statistics), _compile_late(_logit_gradient), _compile_late(_scale)),
}


class _SummedLoss(torch.autograd.Function):
    """(x [N, H], rows [S, H], bias [S], targets [N], ...) -> the loss, summed over this rank's targets.

    Differentiable with respect to x and, if the head is trained, to its weight and bias.
    """

    @staticmethod
    def forward(
        ctx, x, rows, bias, targets, target_positions, shard: VocabularyShard, softcap, compiled, memory
    ):
        """Return the loss, and save its gradients for backward. Collective if the head is sharded.

        Args:
            x: [N, H], in the compute dtype.
            rows: [S, H], this rank's rows of the head's weight, on x's device and in its dtype.
            bias: [S], the bias of these rows, in the same dtype; or None.
            targets: [N] int64, IGNORE for tokens that are not learned.
            target_positions: [P], as for `Head.forward`; None: all.
            shard: the ranks that hold the other rows of the head.
            softcap: c of the logits c tanh(z / c); None without a cap.
            compiled: whether to use the compiled KERNELS.
            memory: makes the context in which the logits are allocated.
        """
        needs_grad_x, needs_grad_rows, needs_grad_bias = ctx.needs_input_grad[:3]
        assert not (needs_grad_rows and shard.n_ranks > 1), "a head that is trained is gathered"
        statistics, gradient, ctx.scale = KERNELS[compiled and len(rows) > 0]
        ctx.fp16 = fp16 = x.dtype == torch.float16
        if target_positions is None:
            target_positions = torch.arange(len(x), device=x.device)
        targets = shard.all_gather(targets[target_positions][None])  # [W, P]
        losses = torch.zeros(len(target_positions), dtype=torch.float32, device=x.device)
        grad_x = torch.zeros_like(x) if needs_grad_x else None
        grad_rows = torch.zeros_like(rows, dtype=torch.float32) if needs_grad_rows else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_grad_bias else None
        n_bytes = LOGITS_BYTES if compiled else LOGITS_BYTES // 4
        max_tokens = n_bytes // (
            shard.max_rows * x.element_size()
        )  # equal on all ranks: each chunk is collective
        if shard.n_ranks > 1:
            max_tokens = min(max_tokens, HIDDEN_BYTES // (4 * x.shape[1]))

        def add_chunk(chunk: slice) -> None:
            """Add a chunk of tokens to the loss and to the gradients; its logits are free afterwards."""
            states = shard.all_gather(x[target_positions[chunk]])  # [C, H]
            chunk_targets = targets[:, chunk].flatten()  # [C]
            index, is_local = shard.find_rows(chunk_targets)
            is_learned = chunk_targets != IGNORE
            has_target = is_local & is_learned
            z = F.linear(states, rows, bias)  # [C, S]
            all_statistics = shard.all_gather(statistics(z, index, has_target, softcap)[None])  # [W, C, 3]
            largest, total, target_logit = all_statistics.unbind(2)
            top = largest.amax(0)
            lse = top + (total * (largest - top).exp()).sum(0).log()
            chunk_losses = torch.where(is_learned, lse - target_logit.sum(0), 0)
            losses[chunk] = chunk_losses.view(shard.n_ranks, -1)[shard.rank]
            if any(ctx.needs_input_grad):
                z = gradient(z, index, has_target, lse.masked_fill(~is_learned, torch.inf), softcap)
            if grad_x is not None:  # in 16 bits the sum over ranks would be rounded for each
                part = z @ rows if shard.n_ranks == 1 else shard.reduce_scatter((z @ rows).float())
                grad_x[target_positions[chunk]] = part.to(x.dtype)
            if grad_rows is not None:
                # A sum over tokens has no bound like that of FP16_FACTOR, so the factor is divided out first.
                grad_rows.add_(z.t() @ (states / FP16_FACTOR if fp16 else states))
            if grad_bias is not None:
                grad_bias.add_(z.sum(0, dtype=torch.float32))

        with memory():
            for chunk in shard.chunk_slices(len(target_positions), max_tokens):
                add_chunk(chunk)
        ctx.save_for_backward(grad_x, grad_rows, grad_bias)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        """Return forward's gradients of x, rows and bias, times `grad`, the fp32 scalar of the loss."""
        grad_x, grad_rows, grad_bias = ctx.saved_tensors
        factor = grad / FP16_FACTOR if ctx.fp16 else grad
        return (
            None if grad_x is None else ctx.scale(grad_x, factor),
            None if grad_rows is None else grad_rows * grad,
            None if grad_bias is None else grad_bias * factor,
            *[None] * 6,
        )
