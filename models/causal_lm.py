"""transformers' ForCausalLM classes with a forward that returns the loss (models/loss.py), not the logits.

Shapes: B sequences of a batch, T tokens of a sequence, H hidden features, K tokens of images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from data.batches import Batch
from data.image_batches import ImageBatch
from models.image_attention import image_attention_inputs
from models.loss import Head, capped_logits
from models.router_loss import count_tokens
from models.vision import ImageFeatures, Vision

if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object  # `summed_loss_class` adds the model's class


class LogitsOfImages(NamedTuple):
    """What a model returns for a batch with images and without targets.

    Attributes:
        logits: [B, kept positions, V].
        features: of the images, with which the same batch needs no tower when its sequences have grown.
    """

    logits: torch.Tensor
    features: ImageFeatures


class SummedLossMixin(Base):
    """A mixin for a ForCausalLM class. Its head must be one of `replace_head`."""

    vision: Vision | None = None  # of a model that is built with its vision parts
    router_loss_factor: float | None = None  # set by `report_routing` (models/router_loss.py)

    def forward(
        self,
        *args,
        attention_mask: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        row_lengths: torch.Tensor | None = None,
        images: ImageBatch | None = None,
        image_features: ImageFeatures | None = None,
        **kwargs,
    ):
        """Return the model's own output, or with targets this rank's summed cross-entropy (fp32 scalar).

        With images and without targets it returns LogitsOfImages.

        Args:
            args, kwargs: the model's own arguments.
            attention_mask: one of them, named here for `generate`, which reads the names.
            targets: [B, T]. The cross-entropy is summed over targets that are not IGNORE; all of these are at
                `target_positions`.
            target_positions: Batch.target_positions.
            row_lengths: Batch.lengths, for a rotary embedding that depends on them (models/longrope.py), and
                for the routers' auxiliary loss, which leaves out padding.
            images: the images of the batch, for a model with its vision parts. Without targets the arguments
                are those of the text model, without a cache, and logits_to_keep: [positions].
            image_features: their features, if they are known.
        """
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        decoder = self.get_decoder()  # the text model, also of a wrapper
        rotary: Any = getattr(decoder, "rotary_emb", None)
        if hasattr(rotary, "row_lengths"):
            rotary.row_lengths = row_lengths
        if getattr(decoder.config, "output_router_logits", False):
            # transformers would keep all logits, with hooks that no compiled layer can have.
            kwargs["output_router_logits"] = False
        if targets is None and images is None:
            return super().forward(*args, **kwargs)
        if targets is not None and self.router_loss_factor is not None and torch.is_grad_enabled():
            kwargs["counted_tokens"] = count_tokens(kwargs["input_ids"], row_lengths)
        kept = kwargs.pop("logits_to_keep", None)
        if images is not None:
            inputs, image_features = self.image_inputs(images, image_features, **kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name != "input_ids"} | inputs
        hidden = decoder(*args, use_cache=False, **kwargs).last_hidden_state
        head: Any = self.get_output_embeddings()
        if targets is not None:
            return head(hidden, targets, target_positions)
        assert image_features is not None
        z = head(hidden if kept is None else hidden[:, kept]) * head.scale
        return LogitsOfImages(capped_logits(z, head.softcap), image_features)

    def image_inputs(
        self, images: ImageBatch, features: ImageFeatures | None, input_ids: torch.Tensor, **inputs
    ) -> tuple[dict, ImageFeatures]:
        """Return (the text model's inputs that depend on images, the images' features).

        The inputs are embeddings, attention, and positions. Collective if the model is sharded.

        Args:
            images: the images of the batch.
            features: their features; None = the tower makes them.
            input_ids: Batch.ids.
            inputs: the other arguments of the text model.
        """
        assert self.vision is not None
        config = self.get_decoder().config
        bounds, sees_whole = inputs.get("cu_seq_lens_q"), self.vision.sees_whole_image
        # The id of an image's token may be beyond the vocabulary.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(images.owners > 0, 0))
        features = features or self.image_features(images, embeddings.dtype)
        flat = embeddings.flatten(0, 1).index_copy(0, images.positions, features.tokens)
        inputs = self.vision.text_inputs(config, images, features, inputs)
        inputs |= image_attention_inputs(config, images, bounds, sees_whole)
        return inputs | {"inputs_embeds": flat.view_as(embeddings)}, features

    def generation_inputs(self, images: ImageBatch) -> dict[str, torch.Tensor]:
        """Return the arguments by which transformers' `generate` takes the images of prompts."""
        assert self.vision is not None
        embedding: Any = self.get_input_embeddings()
        pixels = images.format.normalise(images.values, embedding.weight.dtype)
        return self.vision.forward_inputs(images, pixels)

    def image_features(self, images: ImageBatch, dtype: torch.dtype) -> ImageFeatures:
        """Return the tower's features of the images' tokens, in `dtype`; without a gradient if it is frozen.

        Collective if the model is sharded: all ranks gather the tower, and reduce its gradients if it is
        trained. So a rank without images brings a blank one, whose features are cut to none.
        """
        assert self.vision is not None
        pixels = images.format.normalise(images.values, dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision.is_trained(self)):
            features = self.vision.embed(self, images, pixels)
        return features.first(len(images.positions), dtype)


@cache
def summed_loss_class(
    model_class: type[PreTrainedModel], vision: Vision | None = None
) -> type[PreTrainedModel]:
    """Return a subclass of the same name whose forward returns the summed loss if it gets targets.

    It has the module's name of `model_class`, too: transformers renames tensors for its own classes only.
    vision: the vision parts that the model is built with; None without any.
    """
    contents: dict[str, Any] = {"__module__": model_class.__module__, "vision": vision}
    if vision is not None:
        contents["forward"] = _forward_with_arguments_of(model_class)
    return type(model_class.__name__, (SummedLossMixin, model_class), contents)


def _forward_with_arguments_of(model_class: type[PreTrainedModel]) -> Callable:
    """Return SummedLossMixin's forward with the signature of a class, in which `generate` finds images."""

    @wraps(model_class.forward)
    def forward(self, *args, **kwargs):
        return SummedLossMixin.forward(self, *args, **kwargs)

    return forward


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
