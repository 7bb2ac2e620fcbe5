"""What a decoder layer keeps from its forward for its backward, and its compilation.

Three degrees: nothing but the layer's input (gradient checkpointing: the forward is run again in backward), also
what is dear to compute (the results of matmuls and attention; the cheap rest is run again), or everything.
Compiled, a layer is one graph without breaks, and only that part of its forward is run again whose results the
backward reads: not the last projection, a quarter of a layer.
"""

from __future__ import annotations

import contextlib
import enum
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operator
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from launch.devices import triton_runs_on
from launch.signals import signals_blocked_for_children
from models.dora import without_norm_reuse
from models.family import Family
from quantization.layer import Linear4bit

ops = torch.ops
MARKED = {ops.fsdp_finetune.kept.default}
ATTENTION = {
    ops.aten._scaled_dot_product_flash_attention.default,
    ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ops.aten._scaled_dot_product_efficient_attention.default,
    ops.aten._scaled_dot_product_cudnn_attention.default,
    ops.torch_attn._varlen_attn.default,  # of packed rows, and of windows shorter than a line
}
LINEAR = ops.fsdp_finetune.linear4bit.default
MATMULS = {LINEAR, ops.fsdp_finetune.project4bit.default, ops.aten.mm.default, ops.aten.addmm.default}


class Keep(enum.Enum):
    NOTHING = "nothing"
    RESULTS = "results"
    ALL = "all"


def _policy(kept: frozenset, ctx, op, *args, **kwargs) -> CheckpointPolicy:
    asked = op is LINEAR and args[-1]  # `linear4bit`'s keep
    return CheckpointPolicy.MUST_SAVE if asked or op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(kept: frozenset):
    return create_selective_checkpoint_contexts(partial(_policy, kept))


def _contexts_not_compiled(kept: frozenset):
    first, second = _contexts(kept)
    return first, _Both(second, without_norm_reuse())


class _Both(contextlib.ExitStack):
    """Two contexts as one."""

    def __init__(self, *contexts):
        super().__init__()
        self.contexts = contexts

    def __enter__(self):
        for context in self.contexts:
            self.enter_context(context)
        return self


# What is marked is small (DoRA's norms) and kept always. Not compiled, DoRALinear itself sees to that, and plain
# checkpointing, which looks at no operator, costs less.
_KEPT = {Keep.NOTHING: frozenset(MARKED), Keep.RESULTS: frozenset(MARKED | ATTENTION | MATMULS)}


def _run(layer: nn.Module, keep: Keep, *args, **kwargs):
    if keep is Keep.ALL:
        return layer(*args, **kwargs)
    compiling = torch.compiler.is_compiling()
    if keep is Keep.NOTHING and not compiling:
        return checkpoint(layer, *args, use_reentrant=False, **kwargs)
    contexts = partial(_contexts if compiling else _contexts_not_compiled, _KEPT[keep])
    return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def compiles(wanted: str, device: torch.device, family: Family) -> bool:
    """Whether the layers are compiled, of --compile."""
    return wanted == "true" or (wanted == "auto" and triton_runs_on(device) and family.compiles)


def start_workers() -> None:
    """Starts the processes that compile for a GPU, which torch does at the first compilation. There a SIGTERM that the
    whole process group gets, as timeout(1) and Slurm send it, would end them, and the step would wait for their results
    for ever (torch 2.11 and 2.13)."""
    from torch._inductor.async_compile import AsyncCompile  # takes a second, for what only some runs need

    with signals_blocked_for_children():
        AsyncCompile.warm_pool()


def compiler(backend: str = "inductor") -> Callable:
    """What compiles the layers of a model: those that are alike share a compilation."""
    if backend != "inductor":
        return torch.compile(_run, fullgraph=True, backend=backend)
    from parallel.inductor_passes import (  # takes a second, for what only some runs need
        DividedGraphs,
        LayerGraphs,
    )

    if torch.cuda.is_available():
        start_workers()
    # What is not used any more goes back to the allocator at once. Inductor would keep it for a later result of the same
    # shape: of an MLP's widest activations one more would be there at the moment that needs most memory.
    options: dict[str, Any] = {
        "allow_buffer_reuse": False,
        "joint_custom_post_pass": LayerGraphs(),
        "post_grad_custom_pre_pass": DividedGraphs(),
    }
    return torch.compile(_run, fullgraph=True, backend=backend, options=options)


# Of one kind of layer: by degree, input with and without a gradient, fixed or variable length and number of rows, a
# single row, and what layers differ in beside their parameters (some families alternate). More than it should need.
GRAPHS = 32


def allow_graphs(layers: list[Recomputed]) -> None:
    """Lets the compiler make GRAPHS of each kind of layer. Kinds differ in their parameters: --lora_target_modules may
    name other linears in each layer."""
    kinds = {
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        for layer in layers
    }
    config, most = torch._dynamo.config, GRAPHS * len(kinds)
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)


class Recomputed(ActivationWrapper):
    """Around a decoder layer, a part of it, or the norm after the layers. keep: may be changed between steps; run:
    `compiler()`'s result, or None."""

    def __init__(self, layer: nn.Module, keep: Keep, run: Callable | None = None):
        super().__init__(layer)
        self.keep, self.run = keep, run or _run
        self.trained = any(p.requires_grad for p in layer.parameters())

    def forward(self, *args, **kwargs):
        layer = self._checkpoint_wrapped_module
        if not torch.is_grad_enabled():  # evaluation, in whatever shapes: not worth a compilation
            return layer(*args, **kwargs)
        keep = self.keep
        if keep is not Keep.ALL and not self.trained and not args[0].requires_grad:
            keep = Keep.ALL  # backward never comes to frozen layers below the first trained one
        try:
            return self.run(layer, keep, *args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # before anything was computed
            limit = torch._dynamo.config.recompile_limit
            told = f"after {limit} compilations no more are made (--compile): some layers run as they are"
            warnings.warn(told, stacklevel=2)
            self.run = _run
            return _run(layer, keep, *args, **kwargs)


class ActivationBudget:
    """Chooses the layers that keep RESULTS, so that these take no more than a given memory: the last ones, whose
    activations backward frees first.

    gib: of this rank, or -1 for what is free after the second step, less a tenth of the GPU. tokens: of the largest
    micro-batch; itemsize: of what matmuls result in.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        device: torch.device,
        *,
        gib: float,
        tokens: int,
        itemsize: int,
    ):
        layers = [m for m in model.modules() if isinstance(m, Recomputed)]
        self.layers = [m for m in layers if m.keep is Keep.NOTHING]
        self.bytes = [tokens * itemsize * _result_features(m, family) for m in self.layers]
        self.device, self.automatic, self.steps = device, gib == -1, 0
        if gib > 0:
            self._spend(int(gib * 2**30))

    def decides(self) -> bool:
        """Whether the step that is done is the one that shows what is free."""
        return self.automatic and self.steps == 1

    def after_step(self, peak_gib: float) -> None:
        """To be called after every step with the most that was allocated in it. The second one, with the optimizer's
        states, shows what is free."""
        if self.decides() and self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            ours = free + torch.cuda.memory_reserved(self.device)
            self._spend(int(ours - peak_gib * 2**30 - total / 10))
        self.steps += 1

    def _spend(self, budget: int) -> None:
        for layer, n_bytes in zip(reversed(self.layers), reversed(self.bytes), strict=True):
            budget -= n_bytes
            if budget < 0:
                break
            layer.keep = Keep.RESULTS

    def describe(self) -> str:
        kept = [n for layer, n in zip(self.layers, self.bytes, strict=True) if layer.keep is Keep.RESULTS]
        return f"{len(kept)} of {len(self.layers)} layers keep their results: at most {sum(kept) / 2**30:.2f} GiB"


def _result_features(layer: nn.Module, family: Family) -> int:
    """What one token's results of the layer's linears and of its attention take, in elements."""
    linears = [m for m in layer.modules() if isinstance(m, (nn.Linear, Linear4bit))]
    attention = next(m for m in layer.get_submodule(family.outputs[0]).modules() if m in linears)
    return sum(m.out_features for m in linears) + attention.in_features
