"""transformers' ForCausalLM classes with a forward that returns the loss (models/loss.py), not the logits.

Shapes: B sequences of a batch, T tokens of a sequence.
"""

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
    Base = object  # `summed_loss_class` adds the model's class


class SummedLossMixin(Base):
    """A mixin for a ForCausalLM class. Its head must be one of `replace_head`."""

    def forward(
        self,
        *args,
        attention_mask: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        row_lengths: torch.Tensor | None = None,
        **kwargs,
    ):
        """Return the model's own output, or with targets this rank's summed cross-entropy (fp32 scalar).

        Args:
            args, kwargs: the model's own arguments.
            attention_mask: one of them, named here for `generate`, which reads the names.
            targets: [B, T]. The cross-entropy is summed over targets that are not IGNORE; all of these are at
                `target_positions`.
            target_positions: Batch.target_positions.
            row_lengths: Batch.lengths, for a rotary embedding that depends on them (models/longrope.py).
        """
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        decoder = self.get_decoder()  # the text model, also of a wrapper
        rotary: Any = getattr(decoder, "rotary_emb", None)
        if hasattr(rotary, "row_lengths"):
            rotary.row_lengths = row_lengths
        if targets is None:
            return super().forward(*args, **kwargs)
        hidden = decoder(*args, use_cache=False, **kwargs).last_hidden_state
        return self.get_output_embeddings()(hidden, targets, target_positions)


@cache
def summed_loss_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of the same name whose forward returns the summed loss if it gets targets.

    It has the module's name of `model_class`, too: transformers renames tensors for its own classes only.
    """
    module = {"__module__": model_class.__module__}
    return type(model_class.__name__, (SummedLossMixin, model_class), module)


def replace_head(model: nn.Module, name: str, scale: float, cap: float | None) -> None:
    """Replace the nn.Linear at the dotted path `name` by a Head with the same weight and bias parameters.

    Args:
        model: the model, changed in place.
        name: path of the head, such as lm_head.
        scale: value of Family.logit_scale: the factor of the logits.
        cap: value of Family.logit_cap: c of the logits c tanh(z / c); None = no cap.
    """
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        head = Head(linear.in_features, linear.out_features, bias=linear.bias is not None)
    head.weight, head.bias, head.scale, head.softcap = linear.weight, linear.bias, scale, cap
    model.set_submodule(name, head)


def loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy summed over this rank's batch, an fp32 scalar. Collective if sharded."""
    # No attention mask: padding is on the right, where causal attention never looks, and has no targets.
    # Batches of packed rows hold the rows' bounds.
    return model(**batch.model_inputs(), targets=batch.targets, target_positions=batch.target_positions)
