"""Spreads the model over the GPUs: activation checkpointing and offload, then units, then shards.

No other file does this, so the order is fixed here.

A *unit* is what FSDP2 gathers for one forward or backward and frees again. By default each decoder layer is a
unit: one all-gather carries its 4-bit codes, scales, norms and adapters. The embedding and the head depend on
training:

    frozen             no unit; sharded by rows of the vocabulary and never gathered (models/loss.py)
    trained            a unit each; as parts of the root unit they would stay gathered from forward to the end
                       of backward (2 GiB each for a 128k vocabulary and 8,192 hidden units)
    trained and tied   in the root unit: one parameter, needed at both ends of the model

Of a vision tower each block is a unit, and so are the rest of the tower and the projector. They are gathered
in a micro-batch in which any rank has an image; a rank without one brings a blank image
(models/causal_lm.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedModel

from launch.memory import try_page_locking
from launch.ranks import gather_from_ranks
from models.dora import DoRALinear
from models.family import Family
from models.loss import Head, freeze_embedding, shard_vocabulary
from models.router_loss import RoutedLayer
from options.strategies import STRATEGIES, Strategy
from parallel.activation_checkpointing import CheckpointedModule, SavedActivations, raise_graph_limit
from parallel.activation_offload import HostActivations, OffloadedLayer
from parallel.copy_engines import make_copy_collectives
from parallel.layer_graphs import GraphedLayer, LayerGraphs
from quantization.layer import Linear4bit

# --wrap_policy: the dotted names of the modules inside a decoder layer that are units. The rest of the layer
# (its norms) stays in the layer's unit. More units: less memory gathered at a time, but more and smaller
# all-gathers.
WRAP_POLICIES: dict[str, Callable[[Family], tuple[str, ...]]] = {
    "layer": lambda family: (),
    "sublayer": lambda family: family.sublayers,
}
# A trial asks for page-locked memory in pieces of this size: torch rounds each request up to a power of two.
PIECE_BYTES = 2**26


def make_mesh(device_type: str, world: int, strategy: str, group_size: int) -> DeviceMesh:
    """Return the device mesh of a --sharding_strategy.

    1-D [ranks] if all ranks share one copy; otherwise 2-D [copies, ranks of a copy]: gradients are summed
    over the first dimension and scattered over the second.

    Args:
        device_type: "cuda" or "cpu".
        world: number of ranks.
        strategy: a key of STRATEGIES.
        group_size: ranks of a copy, a divisor of `world`; only the hybrid strategies use it.
    """
    size = STRATEGIES[strategy].ranks_per_copy(world, group_size)
    assert world % size == 0
    if size == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def make_offload_policy(
    enabled: bool, model: nn.Module, mesh: DeviceMesh, other_bytes: int = 0
) -> OffloadPolicy:
    """Return FSDP's policy for --use_cpu_offload, `enabled` or not; pins host memory where possible.

    Collective. Copies from pinned memory overlap with computation. FSDP pins shard by shard in the first
    forward, and a refusal would end the run there. So the whole amount is tried here, on all ranks at the
    same time: those of one host share its limit. FSDP pins gradients in each backward, so what else may hold
    pinned memory then counts, too.

    Args:
        enabled: --use_cpu_offload.
        model: The model before it is sharded; it may be on meta.
        mesh: The result of `make_mesh`.
        other_bytes: Pinned bytes that the run will ask for elsewhere on this rank.
    """
    if not enabled:
        return OffloadPolicy()
    if mesh.device_type != "cuda":
        return CPUOffloadPolicy(pin_memory=False)
    pieces = [PIECE_BYTES] * -(-other_bytes // PIECE_BYTES)
    with try_page_locking([*_offloaded_sizes(model, mesh), *pieces]) as allowed:
        return CPUOffloadPolicy(pin_memory=all(gather_from_ranks(allowed, mesh.size())))


def _offloaded_sizes(model: nn.Module, mesh: DeviceMesh) -> list[int]:
    """Return the bytes of each tensor that offload may pin on a rank.

    These are the shards and, for each trained one, its gradient and a checkpoint's copies of it and of Adam's
    two moments.
    """
    n_shards, sizes = mesh.size(mesh.ndim - 1), []
    for parameter in model.parameters():
        rows = -(-parameter.shape[0] // n_shards)
        size = rows * (parameter.numel() // parameter.shape[0]) * parameter.itemsize
        sizes += [size] * (5 if parameter.requires_grad else 1)
    return sizes


def _save_last_output(layer: nn.Module, family: Family, offload: OffloadPolicy) -> bool:
    """Let a 4-bit DoRA last projection save its output, unless parameters are offloaded. Return if it does.

    The gradient of its magnitude needs the output, and nothing else recomputes it. Not with parameters in
    host memory: then host memory is scarce, and the GPU, which waits for parameters, has time to recompute.
    """
    has_experts = any("*" in output for output in family.outputs)  # the last output is not a single linear's
    if isinstance(offload, CPUOffloadPolicy) or has_experts:
        return False
    last = layer.get_submodule(family.outputs[-1])
    if not isinstance(last, DoRALinear) or not isinstance(last.base, Linear4bit):
        return False
    last.saves_output = True
    return True


def _is_fully_trained(module: nn.Module, fixed: set[nn.Parameter]) -> bool:
    return all(p.requires_grad for p in module.parameters() if p not in fixed)


def _checkpoint_tower(blocks: nn.ModuleList, saved: SavedActivations) -> None:
    """Let the blocks of a vision tower save what `saved` says, if they are trained. Frozen ones save nothing.

    They are not compiled: their share of the time is small, and each number of images would be a new shape.
    """
    for i, block in enumerate(blocks):
        if not _is_frozen(block):
            blocks[i] = CheckpointedModule(block, saved)


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def needs_units(mesh: DeviceMesh, casts: bool, offloads: bool) -> bool:
    """Return whether the model is sharded. One GPU needs that only to cast or to offload.

    Otherwise its gathering would only copy.
    """
    return mesh.size() > 1 or casts or offloads


def can_keep_embedding_on_host(model: PreTrainedModel, family: Family) -> bool:
    """Return whether the embedding may stay in host memory: it is neither trained nor tied to the head.

    It takes about a GiB, and a micro-batch needs few of its rows.
    """
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
    gather_dtype: torch.dtype | None,
    offload: OffloadPolicy,
    saved_activations: SavedActivations,
    compiled_run: Callable | None,
    graphs: LayerGraphs | None,
    offload_activations: bool,
) -> None:
    """Add recomputation, offload and FSDP units to a meta model, in place. It stays on meta.

    Its parameters become DTensors, unless one GPU has nothing to cast or to offload.

    Args:
        strategy: One of STRATEGIES (options/strategies.py).
        units: Names of modules inside a layer, from WRAP_POLICIES.
        gather_dtype: The dtype in which fully trained units are gathered, if it is not their own. All other
            units are gathered bit by bit, which packed weights need; adapters cast themselves.
        offload: The result of `make_offload_policy`.
        saved_activations: What each decoder layer saves for backward; the rest is recomputed (non-reentrant).
        compiled_run: Runs a layer compiled (made in parallel/activation_checkpointing.py); None: not
            compiled.
        graphs: Replays compiled layers that are units; None: does not.
        offload_activations: Keep the layers' inputs, which recomputation needs, in host memory.
    """
    host_activations = HostActivations()
    # Units inside a layer return views. The warning is about changing them in place, which no transformers
    # model does; tests/test_matrix.py would show it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    layers = family.decoder_layers(model)
    has_router_loss = getattr(model, "router_loss_factor", None) is not None
    if graphs and has_router_loss:
        graphs.report("layers with an auxiliary loss of routers run without graphs")
    layer_run = None if units else compiled_run
    if graphs and not layer_run:
        graphs.report("layers that are not compiled as a whole run without graphs")
    head, embedding = model.get_submodule(family.head), model.get_submodule(family.embedding)
    assert isinstance(head, Head) and isinstance(embedding, nn.Embedding)
    tied = model.config.tie_word_embeddings
    # Sharded, they would be cast with the weights of a layer that is trained.
    fixed = {p for name, p in model.named_parameters() if family.is_fixed(name)}
    ignored = set(fixed)
    casts = gather_dtype is not None and any(_is_fully_trained(part, fixed) for part in (embedding, *layers))
    sharded = needs_units(mesh, casts, isinstance(offload, CPUOffloadPolicy))

    def shard(module: nn.Module, casts_all: bool = False) -> None:
        """Make a module an FSDP unit if the model is sharded.

        casts_all: cast the unit's frozen parameters, too, all of which are in gather_dtype already.
        """
        if not sharded:
            return
        policy = MixedPrecisionPolicy(
            param_dtype=gather_dtype if casts_all or _is_fully_trained(module, fixed) else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=strategy.reshard_after_forward,
            ignored_params=ignored,
        )

    for i, layer in enumerate(layers):
        for name in units:
            if compiled_run:  # unit by unit: FSDP's hooks between units would break the graph of a layer
                layer.set_submodule(
                    name, CheckpointedModule(layer.get_submodule(name), SavedActivations.ALL, compiled_run)
                )
            shard(layer.get_submodule(name))
        # The wrapper is inside the unit: recomputation must find the layer gathered, not gather it again.
        recomputed: ActivationWrapper = CheckpointedModule(layer, saved_activations, layer_run)
        if graphs and layer_run and not has_router_loss:  # a replay has one result
            recomputed = GraphedLayer(recomputed, graphs)
        layers[i] = recomputed
        recomputes_all = saved_activations is SavedActivations.INPUT
        saves_output = bool(layer_run) and recomputes_all and _save_last_output(layer, family, offload)
        if offload_activations or saves_output:
            ends = {"first": i == 0, "last": i == len(layers) - 1}
            layers[i] = OffloadedLayer(
                recomputed,
                host_activations,
                offload_input=offload_activations,
                offload_last_output=saves_output,
                **ends,
            )
        shard(layers[i])
        if has_router_loss:
            layers[i] = RoutedLayer(layers[i])
    # Looked up even if it is not compiled, so that a wrong name in a family fails without a GPU too. Not
    # compiled, the norm would read the hidden states in fp32 a dozen times in backward.
    norm = model.get_submodule(family.norm)
    if compiled_run:
        model.set_submodule(family.norm, CheckpointedModule(norm, SavedActivations.ALL, compiled_run))
        raise_graph_limit([m for m in model.modules() if isinstance(m, CheckpointedModule)])
    if vision := family.built_vision():
        _checkpoint_tower(vision.tower_blocks(model), saved_activations)
        for module in (*vision.tower_blocks(model), *map(model.get_submodule, vision.parts)):
            shard(module)
    head.compiled = compiled_run is not None
    if graphs:
        head.memory = graphs.loss_memory
    frozen = [m for m in (embedding, head) if not m.weight.requires_grad and sharded]
    for modules in [frozen] if tied and frozen else [[m] for m in frozen]:
        shard_vocabulary(modules, mesh)
    ignored |= {m.weight for m in frozen if isinstance(m.weight, nn.Parameter)}
    if mesh.device_type == "cuda" and can_keep_embedding_on_host(model, family):
        freeze_embedding(embedding).on_host = True
    if not tied:
        for end in (embedding, head):
            if end not in frozen:
                shard(end)
    # With tied weights that are trained, the root unit has these, and the last norm. The vision parts, which
    # are frozen, are not in it.
    text = [p for name, p in model.named_parameters() if not family.is_of_vision(name)]
    trains_text = all(p.requires_grad or p in fixed for p in text)
    shard(model, casts_all=(tied and not frozen) or trains_text)
    _configure_communication(model, mesh)


def _configure_communication(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let FSDP units use the GPUs' copy engines where possible, and sum gradients, not average them."""
    copies = make_copy_collectives(mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if copies:
                # Typed as torch's private classes, whose methods they have.
                module.set_custom_all_gather(copies[0])  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(copies[1])  # type: ignore[arg-type]
            # The loss is already divided by the step's tokens on all ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, enabled: bool, has_images: bool = False) -> None:
    """Set whether backward, from the next one on, reduces gradients over the ranks (--no_sync).

    FSDP fails if reduction is off in a unit that was never gathered, and without images the vision parts are
    not. So theirs stays on then: it reduces what earlier micro-batches left there, if anything.

    Args:
        model: the result of `wrap`.
        enabled: whether gradients are reduced.
        has_images: whether the next forward gathers the vision parts: any rank's micro-batch has an image.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(enabled)
    vision = getattr(model, "vision", None)
    for part in vision.parts if vision and not enabled and not has_images else ():
        unit = model.get_submodule(part)
        assert isinstance(unit, FSDPModule)
        unit.set_requires_gradient_sync(True)
