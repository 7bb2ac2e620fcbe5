"""How the model is spread over the GPUs: activation checkpointing and offload, units, shards - in that order,
here only.

A *unit* is what FSDP2 gathers for one forward or backward and frees again. By default a decoder layer is one:
its 4-bit codes, scales, norms and adapters travel in a single all-gather. A frozen embedding and a frozen head are
no units: they are dealt out by rows of the vocabulary and never gathered (models/loss.py). Where they are trained they
are units of their own; left in the root they would stay gathered from forward to the end of backward (2 GiB
each for a 128k vocabulary and 8,192 hidden units). Tied and trained, they are one parameter that is needed at both
ends, and stay in the root.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedModel

from launch.memory import can_pin
from models.dora import DoRALinear
from models.family import Family
from models.loss import Head, freeze_embedding, shard_vocabulary
from parallel.activation_checkpointing import CheckpointedModule, SavedActivations, raise_graph_limit
from parallel.activation_offload import HostActivations, OffloadedLayer
from parallel.copy_engines import make_copies
from quantization.layer import Linear4bit


@dataclass(frozen=True)
class Strategy:
    """A --sharding_strategy. replicas: who holds a copy of the whole model - "one" (all ranks together),
    "groups" (each group of --hybrid_shard_size ranks) or "ranks" (each); keep: parameters stay gathered from
    forward to backward, which saves an all-gather and costs the memory of the whole model."""

    replicas: str
    keep: bool

    def shards(self, world: int, group_size: int) -> int:
        """Ranks that share one copy. group_size: --hybrid_shard_size."""
        return {"one": world, "groups": group_size, "ranks": 1}[self.replicas]


STRATEGIES = {
    "full_shard": Strategy("one", keep=False),
    "shard_grad_op": Strategy("one", keep=True),
    "hybrid_full_shard": Strategy("groups", keep=False),
    "hybrid_shard_grad_op": Strategy("groups", keep=True),
    "ddp": Strategy("ranks", keep=False),  # nothing is sharded: "gathering" copies one unit at a time
}

# --wrap_policy: the modules inside a decoder layer that are units of their own, by dotted name; what is left of
# the layer (norms) stays the layer's unit. More units: less memory gathered at a time, more and smaller
# all-gathers.
WRAP_POLICIES: dict[str, Callable[[Family], tuple[str, ...]]] = {
    "layer": lambda family: (),
    "sublayer": lambda family: family.sublayers,
}


def make_mesh(device_type: str, world: int, strategy: str, group_size: int) -> DeviceMesh:
    """1-D, of the ranks that share one copy; or 2-D, [copies, ranks of a copy], gradients being summed over
    the first and scattered over the second. group_size: ranks of a copy, for the hybrid strategies."""
    size = STRATEGIES[strategy].shards(world, group_size)
    assert world % size == 0
    if size == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def offload_policy(wanted: bool, device_type: str) -> OffloadPolicy:
    """Of --use_cpu_offload. Pinned host memory, which copies can overlap with, where the system grants it."""
    if not wanted:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=can_pin(device_type))


def _keep_last_output(layer: nn.Module, family: Family, offload: OffloadPolicy) -> bool:
    """Has the layer's last projection keep its output, if it is one of DoRA's and 4-bit: its magnitude's gradient
    needs it, while nothing else would compute it again. Not where parameters are in host memory, which is what runs short
    then; the GPU, which waits for them, has time to compute."""
    if isinstance(offload, CPUOffloadPolicy):
        return False
    last = layer.get_submodule(family.outputs[-1])
    if not isinstance(last, DoRALinear) or not isinstance(last.base, Linear4bit):
        return False
    last.saves_output = True
    return True


def _wholly_trained(module: nn.Module) -> bool:
    return all(p.requires_grad for p in module.parameters())


def embedding_on_host(model: PreTrainedModel, family: Family) -> bool:
    """Whether the embedding may stay in host memory: nothing but look-ups needs it. It is a GiB, and a micro-batch needs
    some rows."""
    return (
        not model.config.tie_word_embeddings
        and not model.get_submodule(family.embedding).weight.requires_grad
    )


def wrap(
    model: PreTrainedModel,
    family: Family,
    mesh: DeviceMesh,
    *,
    strategy: Strategy,
    units: tuple[str, ...],
    cast: torch.dtype | None,
    offload: OffloadPolicy,
    keep: SavedActivations,
    run: Callable | None,
    offload_activations: bool,
) -> None:
    """Shards a meta model in place. Its parameters become DTensors, still on meta.

    units: names inside a layer, as WRAP_POLICIES gives them. cast: the dtype in which units are gathered
    whose parameters are all trained, in another dtype; all other units are gathered bit by bit as they are,
    which packed weights need (adapters cast themselves). keep: what each decoder layer keeps for backward;
    the rest is recomputed there (non-reentrant). run: compiles a layer (`compiler`), or None.
    offload_activations: the layers' inputs, which recomputation needs, are kept on the host.
    """
    host_activations = HostActivations()
    # Of units within a layer, whose results are views. The warning is about in-place changes of them, which no
    # model of transformers makes, and tests/test_matrix.py would show.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    layers = family.decoder_layers(model)
    ignored: set[nn.Parameter] = set()
    # One GPU needs no FSDP, whose gathering would be copying, unless it casts or offloads.
    casts = cast is not None and any(_wholly_trained(layer) for layer in layers)
    sharded = mesh.size() > 1 or casts or isinstance(offload, CPUOffloadPolicy)

    def shard(module: nn.Module) -> None:
        if not sharded:
            return
        policy = MixedPrecisionPolicy(
            param_dtype=cast if _wholly_trained(module) else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=not strategy.keep,
            ignored_params=ignored,
        )

    for i, layer in enumerate(layers):
        for name in units:
            if run:  # FSDP's hooks lie between units, and would break the graph of a whole layer
                layer.set_submodule(
                    name, CheckpointedModule(layer.get_submodule(name), SavedActivations.ALL, run)
                )
            shard(layer.get_submodule(name))
        # The wrapper goes inside the unit: recomputation must find the layer gathered, not gather again.
        layers[i] = recomputed = CheckpointedModule(layer, keep, None if units else run)
        kept = (
            bool(run)
            and not units
            and keep is SavedActivations.INPUT
            and _keep_last_output(layer, family, offload)
        )
        if offload_activations or kept:
            ends = {"first": i == 0, "last": i == len(layers) - 1}
            layers[i] = OffloadedLayer(
                recomputed,
                host_activations,
                offload_input=offload_activations,
                offload_last_output=kept,
                **ends,
            )
        shard(layers[i])
    # Looked up in any case: a family with another name for it would fail only where it is compiled, on GPUs. Not compiled it
    # would go through the hidden states in fp32, a dozen times in backward.
    norm = model.get_submodule(family.norm)
    if run:
        model.set_submodule(family.norm, CheckpointedModule(norm, SavedActivations.ALL, run))
        raise_graph_limit([m for m in model.modules() if isinstance(m, CheckpointedModule)])
    head, embedding = model.get_submodule(family.head), model.get_submodule(family.embedding)
    assert isinstance(head, Head) and isinstance(embedding, nn.Embedding)
    head.compiled = run is not None
    frozen = [m for m in (embedding, head) if not m.weight.requires_grad and sharded]
    tied = model.config.tie_word_embeddings
    for modules in [frozen] if tied and frozen else [[m] for m in frozen]:
        shard_vocabulary(modules, mesh)
    ignored |= {m.weight for m in frozen if isinstance(m.weight, nn.Parameter)}
    if mesh.device_type == "cuda" and embedding_on_host(model, family):
        freeze_embedding(embedding).on_host = True
    if not tied:
        for end in (embedding, head):
            if end not in frozen:
                shard(end)
    shard(model)
    copies = make_copies(mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if copies:
                # They have the methods of torch's classes, which are private.
                module.set_custom_all_gather(copies[0])  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(copies[1])  # type: ignore[arg-type]
            # The loss is already divided by the step's tokens over all ranks: gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward reduces gradients over the ranks (--no_sync)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
