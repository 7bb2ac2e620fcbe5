"""The auxiliary loss of routers, which keeps experts in even use: transformers' load_balancing_loss_func.

It is equations 4 to 6 of Switch Transformers (https://arxiv.org/abs/2101.03961), for K experts per token and
all routed layers together:

    loss = E * sum over e of f_e P_e
    f_e  = how often expert e is chosen, divided by N. It has no gradient.
    P_e  = the sum of the router's probabilities of e, divided by N

N counts the pairs (token, routed layer); padding does not count. Even use gives K. A run has this loss where
the model's config sets output_router_logits; it is added times router_aux_loss_coef.

f, P and N are those of a micro-batch of all ranks, as of one large batch. So the choices are summed over the
ranks. The loss is linear in P, so with f and N of all ranks the ranks' shares of it add up, and so do their
gradients.

A layer returns its sums beside its result, so activation checkpointing and compilation treat them as any
other result. transformers' own forwards run: `_Substitute` only gives them another function for one child.

Shapes: T tokens of a batch on this rank, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from transformers import PreTrainedModel

from files.config_parts import router_loss_factor, text_config
from models.family import Family
from models.routers import router_name


def count_tokens(ids: Tensor, row_lengths: Tensor | None) -> Tensor:
    """Return fp32 [T]: 1 for each token of a batch, 0 for padding.

    ids: Batch.ids; row_lengths: Batch.lengths, or None without padding.
    """
    if row_lengths is None:
        return torch.ones(ids.numel(), device=ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device)
    # Packed rows have a length for each position, which is 0 in padding; others are padded at the end.
    is_token = row_lengths > (positions if row_lengths.shape[1] == 1 else 0)
    return is_token.flatten().float()


def routing_sums(logits: Tensor, top_k: int, counted: Tensor) -> Tensor:
    """Return fp32 [2, E]: how often each expert is chosen, and the sum of its probabilities.

    The choices are those of transformers' loss, the largest probabilities in the logits' dtype.

    Args:
        logits: [T, E] of a router.
        top_k: K.
        counted: result of `count_tokens`.
    """
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities, dtype=torch.float32)
    chosen = chosen.scatter(1, probabilities.detach().topk(top_k).indices, 1.0)
    return (torch.stack([chosen, probabilities.float()]) * counted[:, None]).sum(1)


class _Substitute:
    """A module as its class's forward sees it, with a function in the place of one child."""

    def __init__(self, module: nn.Module, child: str, function: Callable):
        self.module, self.child, self.function = module, child, function

    def __getattr__(self, name: str) -> Any:
        return self.function if name == self.child else getattr(self.module, name)

    def forward(self, *args, **kwargs):
        """Call the module. GradientCheckpointingLayer of transformers reads this before it runs a layer."""
        return self.module(*args, **kwargs)


@cache
def _reporting_block(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a block of experts that returns (its result, `routing_sums`) if tokens count."""

    def forward(self, hidden_states: Tensor, counted: Tensor | None = None):
        if counted is None:
            return cls.forward(self, hidden_states)
        name, sums = router_name(self), []
        router = getattr(self, name)

        def route(*args):
            logits, *rest = router(*args)
            sums.append(routing_sums(logits, router.top_k, counted))
            return logits, *rest

        return cls.forward(_Substitute(self, name, route), hidden_states), sums[0]

    return type(f"Reporting{cls.__name__}", (cls,), {"forward": forward})


@cache
def _reporting_layer(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a decoder layer that returns (its result, its block's sums) if tokens count."""

    def forward(self, *args, counted_tokens: Tensor | None = None, **kwargs):
        if counted_tokens is None or not hasattr(self.mlp, "experts"):
            return cls.forward(self, *args, **kwargs)
        sums = []

        def mlp(hidden_states: Tensor):
            result, found = self.mlp(hidden_states, counted_tokens)
            sums.append(found)
            return result

        return cls.forward(_Substitute(self, "mlp", mlp), *args, **kwargs), sums[0]

    return type(f"Reporting{cls.__name__}", (cls,), {"forward": forward})


def report_routing(model: PreTrainedModel, family: Family) -> None:
    """Let the layers of a model return their routers' sums in training, if its config asks for the loss.

    The block of experts must be a layer's `mlp`, and its router must return its logits first.
    """
    factor, layers = router_loss_factor(model.config), family.decoder_layers(model)
    if factor is None or not any(hasattr(layer.mlp, "experts") for layer in layers):
        return
    model.router_loss_factor = factor  # type: ignore[assignment]
    for layer in layers:
        block = layer.mlp
        if hasattr(block, "experts"):
            block.__class__ = _reporting_block(type(block))  # type: ignore[arg-type] # hashable
        layer.__class__ = _reporting_layer(type(layer))  # type: ignore[arg-type]


class RoutedLayer(ActivationWrapper):
    """A decoder layer, wrapped in all else, whose sums are kept here until the loss takes them.

    It is outside of the FSDP unit, which must see the sums as a result: their gradient gathers the unit, too.
    """

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.sums: Tensor | None = None

    def forward(self, *args, **kwargs):
        """Return the layer's own result."""
        result = self._checkpoint_wrapped_module(*args, **kwargs)
        if not isinstance(result, tuple):
            return result
        result, self.sums = result
        return result


class NoRouterLoss:
    """The loss of a model without an auxiliary loss."""

    def add_to(self, loss: Tensor, parts: int) -> Tensor:
        """Return the loss that backward begins with."""
        return loss

    def pop_step(self) -> Tensor | None:
        """Return this rank's share of the step's auxiliary loss, without its factor; None without one."""
        return None


class RouterLoss(NoRouterLoss):
    """The auxiliary loss of a model's routers, the mean over the micro-batches of an optimizer step.

    Args:
        model: from `wrap`.
        factor: result of `router_loss_factor`.
    """

    def __init__(self, model: PreTrainedModel, factor: float):
        self.layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
        self.factor, self.top_k = factor, text_config(model.config).num_experts_per_tok
        self.of_step: Tensor | None = None

    def add_to(self, loss: Tensor, parts: int) -> Tensor:
        """Return a micro-batch's loss and this rank's share of the auxiliary loss of its forward. Collective.

        Waits for nothing on a GPU.

        Args:
            loss: this rank's share of the loss of the tokens.
            parts: micro-batches of the optimizer step.
        """
        found = []
        for layer in self.layers:
            if layer.sums is not None:  # a layer with a plain MLP has none
                found.append(layer.sums)
            layer.sums = None
        chosen, probabilities = torch.stack(found).double().sum(0)
        chosen = chosen.detach()
        dist.all_reduce(chosen)
        rows = chosen.sum() / self.top_k  # N
        share = (chosen * probabilities).sum() * len(chosen) / rows.square() / parts
        self.of_step = share.detach() + (0 if self.of_step is None else self.of_step)
        return loss + self.factor * share.float()

    def pop_step(self) -> Tensor | None:
        share, self.of_step = self.of_step, None
        return share


def make_router_loss(model: PreTrainedModel) -> NoRouterLoss:
    """Return the auxiliary loss of a model's routers, or none. model: from `wrap`."""
    factor = getattr(model, "router_loss_factor", None)
    return NoRouterLoss() if factor is None else RouterLoss(model, factor)
