"""The description of what a family with images has beside its text model.

It names the types of data/ in texts only: models/family.py, which nearly everything imports, imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ImageFeatures:
    """What the tower makes of a batch's images.

    Attributes:
        tokens: [K, H]; the embeddings that replace those of the image tokens. Of a blank image, which has no
            token, they are more than K.
        by_layer: [K, H] each; added to the hidden states of the image tokens after the first layers
            (Qwen3-VL's deepstack).
    """

    tokens: torch.Tensor
    by_layer: tuple[torch.Tensor, ...] = ()

    def first(self, count: int, dtype: torch.dtype) -> ImageFeatures:
        """Return the features of the first tokens, in a dtype."""
        tokens, *by_layer = (each[:count].to(dtype) for each in (self.tokens, *self.by_layer))
        return ImageFeatures(tokens, tuple(by_layer))


@dataclass(frozen=True)
class TowerBlock:
    """What the forward of a tower's block makes of each patch, for the model of memory. The defaults: SigLIP.

    H stands for the features of a patch, M for those within the MLP.

    Attributes:
        attention: H that backward reads: results of the two norms; query, key and value, and what attention
            returns. A fused linear for the three keeps its result beside the rotated ones, and attention to
            images apart its results beside the joined one.
        mlp: M that backward reads: results of linears and of the activation, and of a gate's product.
        live_mlp: M that are alive at a time in the MLP.
        mlp_outputs: M that come out of linears.
        casts: H of further copies under autocast, where linears with the same input cast it for themselves.
        has_rotary: whether queries and keys are rotated, in fp32.
        has_fp32_norms: whether norms read an fp32 copy of their input.
        kept, kept_fp32: H that the tower's forward holds to its end: SigLIP's embeddings of patches, in the
            dtype of the hidden states; Qwen3-VL's positions, in fp32.
        ends: hidden states after the last block that backward reads: those of a last norm, of a projector.
    """

    attention: int = 6
    mlp: int = 2
    live_mlp: int = 2
    mlp_outputs: int = 1
    casts: int = 2
    has_rotary: bool = False
    has_fp32_norms: bool = False
    kept: int = 1
    kept_fp32: int = 0
    ends: int = 2


@dataclass(frozen=True)
class Vision:
    """The vision parts of a wrapper. Names are dotted and absolute, if nothing else is said.

    Attributes:
        parts: the modules beside the text model: the tower, and the projector from it to the text model.
        blocks: the list of the tower's blocks.
        linears: the linears of a block that `--vision_targets all` adapts and `--vision_bits 4` packs,
            relative to it.
        projector: the linears between tower and text model that `--vision_targets projector` adapts. * stands
            for each module of a list.
        embed: (model, ImageBatch, its pixels as `ImageFormat.normalise` returns them) -> ImageFeatures.
        read_format: (config, model folder) -> ImageFormat. Raises UserError.
        forward_inputs: (ImageBatch, its pixels as `ImageFormat.normalise` returns them) -> the arguments by
            which transformers' own forward takes the images, beside input_ids and attention_mask.
        matrices: {parameter: adapt} of the projector's bare matrices, which are no linear's weights; LoRA can
            adapt them, too. adapt(its module, rank, alpha, dtype of A and B) -> a LowRankModule in its place.
        config: name of the tower's config in the wrapper's.
        constant_buffers: returns {name: full contents} of the buffers that no file holds. Gets the wrapper's
            config.
        text_inputs: (config, ImageBatch, ImageFeatures, inputs of the text model) -> these inputs, with those
            that depend on the images of a batch, such as positions of three axes.
        feature_layers: (config) -> number of the text model's first layers after which `by_layer` is added.
        block: what a block of the tower makes of a patch.
        sees_whole_image: whether the tokens of an image see each other both ways.
    """

    parts: tuple[str, ...]
    blocks: str
    linears: tuple[str, ...]
    projector: tuple[str, ...]
    embed: Callable[..., ImageFeatures]
    read_format: Callable[..., Any]
    forward_inputs: Callable[..., dict[str, torch.Tensor]]
    matrices: Mapping[str, Callable[..., nn.Module]] = field(default_factory=dict, hash=False)
    config: str = "vision_config"
    constant_buffers: Callable[[Any], dict[str, torch.Tensor]] = lambda config: {}
    text_inputs: Callable[[Any, Any, ImageFeatures, dict], dict] = lambda *given: given[-1]
    feature_layers: Callable[[Any], int] = lambda config: 0
    block: TowerBlock = TowerBlock()
    sees_whole_image: bool = False

    def tower_blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return the tower's blocks, in order."""
        blocks = model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def block_linears(self, model: nn.Module) -> Iterator[str]:
        """Yield the names of the linears of all blocks."""
        for i in range(len(self.tower_blocks(model))):
            for linear in self.linears:
                yield f"{self.blocks}.{i}.{linear}"

    def projector_linears(self, model: nn.Module) -> Iterator[str]:
        """Yield the names of the linears that `projector` stands for."""
        for pattern in self.projector:
            path, star, rest = pattern.partition(".*.")
            if not star:
                yield pattern
                continue
            modules = model.get_submodule(path)
            assert isinstance(modules, nn.ModuleList)
            for i in range(len(modules)):
                yield f"{path}.{i}.{rest}"

    def unit_of(self, name: str) -> str:
        """Return the FSDP unit, a block or a part, of a tensor or module of the vision parts.

        Raises StopIteration for another name.
        """
        below = name.removeprefix(f"{self.blocks}.")
        if below != name:
            return f"{self.blocks}.{below.partition('.')[0]}"
        return next(part for part in self.parts if name.startswith(f"{part}."))

    def is_trained(self, model: nn.Module) -> bool:
        """Return whether a parameter of the parts is trained."""
        parts = (model.get_submodule(part) for part in self.parts)
        return any(p.requires_grad for part in parts for p in part.parameters())
