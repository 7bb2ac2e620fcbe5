"""Activation checkpointing of a decoder layer, and its compilation.

Four choices of what a layer's forward saves for its backward (`SavedActivations`): only the layer's input
(backward recomputes the forward), also the result of attention, also the results of matmuls (backward
recomputes the cheap rest), or everything. A compiled layer is one graph without breaks. There backward
recomputes only the results that it reads: not the last projection, a quarter of a layer.
"""

from __future__ import annotations

import contextlib
import enum
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import models.sinks  # registers its operator
import models.varlen  # noqa: F401 # registers its operators, and imports torch.nn.attention.varlen
import quantization.grouped_operators  # noqa: F401 # registers its operators
from launch.devices import triton_runs_on
from launch.signals import signals_blocked_for_children
from models.dora import without_norm_reuse
from models.family import Family

ops = torch.ops
ALWAYS_SAVED = {ops.fsdp_finetune.mark_saved.default}
ATTENTION = {
    ops.aten._scaled_dot_product_flash_attention.default,
    ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ops.aten._scaled_dot_product_efficient_attention.default,
    ops.aten._scaled_dot_product_cudnn_attention.default,
    ops.torch_attn._varlen_attn.default,  # for packed rows, and for windows shorter than a row
    ops.fsdp_finetune.attend_images.default,
    ops.fsdp_finetune.attend_with_sinks.default,
}
LINEAR = ops.fsdp_finetune.linear4bit.default
SAVE_OUTPUT = 11  # the index of its argument that asks for its result to be saved
MATMULS = {
    LINEAR,
    ops.fsdp_finetune.grouped_linear4bit.default,
    ops.fsdp_finetune.grouped_linear.default,
    ops.fsdp_finetune.project4bit.default,
    ops.aten.mm.default,
    ops.aten.addmm.default,
}
# A compiled layer's recomputation may round otherwise than its forward. The experts of a token must be the
# same in both. Not compiled, both are the same kernels, and routers change the result of topk in place.
ROUTING = {ops.aten.topk.default}


class SavedActivations(enum.Enum):
    """What a layer saves for backward, which recomputes the rest."""

    INPUT = "input"  # the layer's input
    ATTENTION = "attention"  # also the result of attention
    MATMULS = "matmuls"  # also the results of matmuls and attention
    ALL = "all"  # everything: no checkpointing


# `mark_saved` marks small tensors, DoRA's norms, as always saved. Without compilation, DoRALinear stores its
# norm itself. So INPUT needs no policy there: plain checkpointing inspects no operator and costs less.
_SAVED_OPERATORS = {
    SavedActivations.INPUT: frozenset(ALWAYS_SAVED),
    SavedActivations.ATTENTION: frozenset(ALWAYS_SAVED | ATTENTION),
    SavedActivations.MATMULS: frozenset(ALWAYS_SAVED | ATTENTION | MATMULS),
}


def _checkpoint_policy(saved_operators: frozenset, ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Return MUST_SAVE for `saved_operators` and a `linear4bit` that asks for it, else PREFER_RECOMPUTE."""
    requested = op is LINEAR and args[SAVE_OUTPUT]
    is_saved = requested or op in saved_operators
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpoint_contexts(saved_operators: frozenset):
    """Return contexts of (forward, recomputation), with which only `saved_operators`' results are saved."""
    return create_selective_checkpoint_contexts(partial(_checkpoint_policy, saved_operators))


def _eager_checkpoint_contexts(saved_operators: frozenset):
    """Return `_checkpoint_contexts` for an uncompiled layer, whose recomputation then reuses no DoRA norm."""
    forward, recomputation = _checkpoint_contexts(saved_operators)
    return forward, _CombinedContext(recomputation, without_norm_reuse())


class _CombinedContext(contextlib.ExitStack):
    """A context that enters all of the given contexts, in order."""

    def __init__(self, *contexts):
        super().__init__()
        self.contexts = contexts

    def __enter__(self):
        for context in self.contexts:
            self.enter_context(context)
        return self


def run_layer(layer: nn.Module, saved: SavedActivations, *args, **kwargs):
    """Return layer(*args, **kwargs), run so that it saves only the `saved` activations for backward.

    Args:
        layer: a decoder layer, or another module that CheckpointedModule wraps.
        saved: what forward saves; backward recomputes the rest.
        args, kwargs: the layer's own arguments.
    """
    if saved is SavedActivations.ALL:
        return layer(*args, **kwargs)
    compiling = torch.compiler.is_compiling()
    if saved is SavedActivations.INPUT and not compiling:
        return checkpoint(layer, *args, use_reentrant=False, **kwargs)
    make_contexts = _checkpoint_contexts if compiling else _eager_checkpoint_contexts
    saved_operators = _SAVED_OPERATORS[saved] | (ROUTING if compiling else set())
    contexts = partial(make_contexts, saved_operators)
    return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def should_compile(option: str, device: torch.device, family: Family) -> bool:
    """Return whether to compile the layers. option: --compile, of which auto asks device and family."""
    return option == "true" or (option == "auto" and triton_runs_on(device) and family.compiles)


def start_compile_workers(cpus: int) -> None:
    """Start at most `cpus` processes that compile for a GPU, with SIGTERM, SIGINT and SIGUSR1 blocked.

    By default torch starts one for each CPU of the machine, at most 32, in each rank.

    torch starts them at the first compilation. A SIGTERM to the whole process group, as timeout(1) and Slurm
    send it, would then end them, and the step would wait for their results forever (torch 2.11 and 2.13).
    """
    from torch._inductor import config  # takes a second, and only some runs need it
    from torch._inductor.async_compile import AsyncCompile

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        config.compile_threads = min(config.compile_threads or cpus, cpus)
    with signals_blocked_for_children():
        AsyncCompile.warm_pool()


def compile_run_layer(backend: str = "inductor", cpus: int = 1) -> Callable:
    """Return `run_layer` as a function that compiles at its first call. Layers that are alike share that.

    With GPUs, starts Inductor's processes, at most `cpus`.
    """
    if backend != "inductor":
        return torch.compile(run_layer, fullgraph=True, backend=backend)
    # Takes a second, and only some runs need it.
    from parallel.inductor_passes import JointGraphPass, PartitionedGraphPass

    if torch.cuda.is_available():
        start_compile_workers(cpus)
    # Without reuse, a buffer returns to the allocator after its last use. Inductor would hold it for a later
    # result of the same shape: one more of an MLP's widest activations at the moment of the peak.
    options: dict[str, Any] = {
        "allow_buffer_reuse": False,
        "joint_custom_post_pass": JointGraphPass(),
        "post_grad_custom_pre_pass": PartitionedGraphPass(),
    }
    return torch.compile(run_layer, fullgraph=True, backend=backend, options=options)


# One kind of layer is compiled anew for other saved activations, an input with or without a gradient, a fixed
# or variable length and number of rows, a single row, and attributes in which layers differ beside their
# parameters (some families alternate). The limit is higher than any of them should need.
MAX_GRAPHS_PER_KIND = 32


def raise_graph_limit(layers: list[CheckpointedModule]) -> None:
    """Let torch's compiler, in this process, make MAX_GRAPHS_PER_KIND graphs of each kind of these layers.

    Kinds differ in their parameters: --lora_target_modules may name other linears in each layer.
    """
    kinds = {
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        for layer in layers
    }
    config, limit = torch._dynamo.config, MAX_GRAPHS_PER_KIND * len(kinds)
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)


class CheckpointedModule(ActivationWrapper):
    """A decoder layer, a submodule of it, or the norm after the layers, with a choice of saved activations.

    Args:
        layer: the wrapped module.
        saved: what forward saves for backward; may change between steps.
        run: the result of `compile_run_layer`, or None to run without compilation.
    """

    def __init__(self, layer: nn.Module, saved: SavedActivations, run: Callable | None = None):
        super().__init__(layer)
        self.saved, self.run = saved, run or run_layer
        self.is_trained = any(p.requires_grad for p in layer.parameters())

    def forward(self, *args, **kwargs):
        """Run the layer, checkpointed if backward will reach it. Warns when no more graphs are compiled."""
        layer = self._checkpoint_wrapped_module
        if not torch.is_grad_enabled():  # evaluation has too many shapes: not worth a compilation
            return layer(*args, **kwargs)
        saved = self.saved
        if saved is not SavedActivations.ALL and not self.is_trained and not args[0].requires_grad:
            saved = SavedActivations.ALL  # backward never reaches frozen layers below the first trained one
        try:
            return self.run(layer, saved, *args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # before anything was computed
            limit = torch._dynamo.config.recompile_limit
            message = f"after {limit} compilations no more are made (--compile): some layers run uncompiled"
            warnings.warn(message, stacklevel=2)
            self.run = run_layer
            return run_layer(layer, saved, *args, **kwargs)
