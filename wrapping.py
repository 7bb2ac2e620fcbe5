"""How the model is spread over the GPUs: units, dtypes, activation checkpointing - in that order, here only.

A *unit* is what FSDP2 gathers for one forward or backward and frees again. Per decoder layer there is one:
its 4-bit codes, scales, norms and adapters travel in a single all-gather. The embedding and the head are
units of their own; left in the root they would stay gathered from forward to the end of backward (2 GiB
each for a 128k vocabulary and 8,192 hidden units). Tied, they are one parameter that is needed at both
ends, and stay in the root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from models.family import Family


@dataclass(frozen=True)
class Dtypes:
    """compute: of activations and frozen weights; trained: of what the optimizer updates. Gradients are
    reduced in fp32 always."""

    compute: torch.dtype
    trained: torch.dtype


def choose_dtypes(precision: str, bf16_gpu: bool) -> Dtypes:
    """The dtypes of --precision on this hardware. bf16_gpu: training on GPUs that compute in bf16."""
    if precision == "bf16":
        return Dtypes(torch.bfloat16, torch.bfloat16)
    if precision == "auto" and bf16_gpu:
        return Dtypes(torch.bfloat16, torch.float32)
    return Dtypes(torch.float32, torch.float32)


def wrap(
    model: nn.Module, family: Family, mesh: DeviceMesh, compute: torch.dtype, checkpointing: bool
) -> None:
    """Shards a meta model in place over a 1-D mesh. Its parameters become DTensors, still on meta.

    compute: the dtype of the layers' arithmetic. checkpointing: recompute each decoder layer in backward
    (non-reentrant).
    """

    def shard(unit: nn.Module) -> None:
        # A unit that is trained as a whole holds the optimizer's dtype, and is gathered in the one that it
        # computes with. Any other may hold packed weights, of which no bit may change: it is gathered as it
        # is, and its adapters cast themselves.
        cast = compute if all(p.requires_grad for p in unit.parameters()) else None
        policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)

    layers = model.get_submodule(family.layers)
    for i, layer in enumerate(layers):
        # The wrapper goes inside the unit: recomputation must find the layer gathered, not gather again.
        layers[i] = checkpoint_wrapper(layer) if checkpointing else layer
        shard(layers[i])
    if not model.config.tie_word_embeddings:
        shard(model.get_submodule(family.embedding))
        shard(model.get_submodule(family.head))
    shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the step's tokens over all ranks: gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
