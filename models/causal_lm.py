"""transformers' ForCausalLM classes with a forward that returns the loss instead of the logits (models/loss.py)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data.batches import Batch
from models.loss import Head

if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object  # `with_summed_loss` adds the model


class SummedLoss(Base):
    """Comes before a ForCausalLM class among the bases. Its head is one that `put_head` put there."""

    def forward(
        self,
        *args,
        targets: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        row_lengths: torch.Tensor | None = None,
        **kwargs,
    ):
        """As the class's own; or with targets [B, T], the cross-entropy summed over those that are not IGNORE,
        all of which are at `places`. places, row_lengths: as Batch.places and Batch.lengths, the latter for a rotary
        embedding that goes by them (models/longrope.py)."""
        rotary: Any = getattr(self.base_model, "rotary_emb", None)
        if hasattr(rotary, "row_lengths"):
            rotary.row_lengths = row_lengths
        if targets is None:
            return super().forward(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return self.get_output_embeddings()(hidden, targets, target_positions)


@cache
def with_summed_loss(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(model_class.__name__, (SummedLoss, model_class), {})


def put_head(model: nn.Module, name: str, scale: float, cap: float | None) -> None:
    """Puts a Head in the place of the linear of that dotted name; its weight stays the same parameter. scale, cap:
    as Family.logit_scale and logit_cap."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        head = Head(linear.in_features, linear.out_features, bias=linear.bias is not None)
    head.weight, head.bias, head.scale, head.softcap = linear.weight, linear.bias, scale, cap
    model.set_submodule(name, head)


def loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the batch's targets, in fp32."""
    # No attention mask: padding is on the right, where causal attention never looks, and has no targets. Packed
    # rows say where they begin and end.
    return model(**batch.inputs(), targets=batch.targets, target_positions=batch.target_positions)
