"""What a vision tower takes on a GPU: for images of a micro-batch, while it runs and until its backward ends.

A frozen tower runs without a gradient: it saves nothing, and takes the activations of one block at a time.
An adapted one saves the input of each block, or without gradient checkpointing what its backward reads. Its
blocks are not compiled. `TowerBlock` (models/vision.py) says what a family's block makes.

The tower takes all images of a micro-batch at once. So they are counted as those of its fullest sequence, for
each of its sequences.

Shapes: P patches of a micro-batch's images.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.precision import Precision
from models.vision import TowerBlock
from options.config import Config

CHANNELS = 3  # of a pixel, a byte each until the GPU normalises them
FP32 = 4  # bytes
# fp32 copies that are alive while keys are rotated: the queries and keys, before and after, and two products.
ROTARY_COPIES = 6


@dataclass(frozen=True)
class VisionSizes:
    """The sizes of a tower.

    Attributes:
        hidden: features of a patch.
        mlp: features within the MLP of a block.
        heads: attention heads.
        blocks: their number.
        patch: pixels of a patch's side.
        frames: equal frames as which the tower takes an image.
        merge: merge x merge patches become one token in a merger (Qwen-VL).
        output: features of a token.
        feature_layers: of the text model's layers, those that get features of their own.
        block: what a block makes of a patch.
        weights: bytes of tower and projector.
        is_packed: whether its linears have 4 bits.
        branches: adapted linears of a block; 0 if the blocks are frozen.
        mergers: adapted mergers, of two linears each.
        is_trained: whether any vision part is trained.
    """

    hidden: int
    mlp: int
    heads: int
    blocks: int
    patch: int
    frames: int
    merge: int
    output: int
    feature_layers: int
    block: TowerBlock
    weights: int
    is_packed: bool
    branches: int
    mergers: int
    is_trained: bool


@dataclass(frozen=True)
class VisionMemory:
    """Bytes on a GPU for the images of a micro-batch.

    Attributes:
        held: from the tower's forward to the end of the micro-batch: pixels, features for layers of the text
            model, and what backward reads.
        forward: most while the tower computes, beside `held`.
        backward: most while its backward computes, beside `held`; 0 if it is frozen.
    """

    held: float = 0
    forward: float = 0
    backward: float = 0


def vision_memory(
    config: Config, precision: Precision, sizes: VisionSizes | None, pixels: int
) -> VisionMemory:
    """Return what the images of a micro-batch take.

    Args:
        config: the run's options.
        precision: its dtypes.
        sizes: of the tower; None = the model is built without.
        pixels: of the resized images of a sequence.
    """
    if sizes is None or not pixels:
        return VisionMemory()
    width, stream = precision.matmul_dtype.itemsize, precision.frozen.itemsize
    n_pixels = pixel_bytes(config, pixels)
    patches = config.batch_size * pixels / sizes.patch**2
    block_input = patches * sizes.hidden * stream
    dequantized = sizes.hidden * sizes.mlp * width if sizes.is_packed else 0
    block, angles = sizes.block, _angle_bytes(sizes, patches)
    # In the MLP: also the block's input, its sum with attention, and their norm.
    live = 3 * block_input + block.live_mlp * patches * sizes.mlp * width + dequantized
    if block.has_rotary:  # with the block's input, its norm, queries, keys and values
        copies = ROTARY_COPIES * patches * sizes.hidden * FP32
        live = max(live, 2 * block_input + 3 * patches * sizes.hidden * width + copies)
    kept = block.kept * block_input + block.kept_fp32 * patches * sizes.hidden * FP32
    forward = n_pixels * stream * sizes.frames + angles + kept + live
    of_tokens = patches / sizes.merge**2 * sizes.output * stream
    held = n_pixels + sizes.feature_layers * of_tokens
    held += sizes.mergers * patches * _merger_bytes(config, precision, sizes)
    if not sizes.branches:
        return VisionMemory(held, forward)
    held += angles
    saved = patches * _saved_bytes(config, precision, sizes)
    # The gradient of the result, and those of the MLP's activation by the base's weight and by A.
    is_one_operator = sizes.is_packed and config.method.adapter == "lora"
    backward = block_input + patches * sizes.mlp * width * (1 if is_one_operator else 2) + dequantized
    inputs = (sizes.blocks + block.ends) * block_input
    if config.use_gradient_checkpointing:
        return VisionMemory(held + inputs, forward, saved + backward)
    if block.has_fp32_norms and stream < FP32:  # the norms save copies in their place, which `saved` has
        inputs = 0
    return VisionMemory(held + inputs + sizes.blocks * saved, forward, backward)


def _saved_bytes(config: Config, precision: Precision, sizes: VisionSizes) -> float:
    """Return the bytes that an adapted block saves of each patch for its backward, beside its input."""
    width, stream = precision.matmul_dtype.itemsize, precision.frozen.itemsize
    hidden, mlp = sizes.hidden, sizes.mlp
    block = sizes.block
    saved = block.attention * hidden + block.mlp * mlp + sizes.branches * config.lora_rank  # A x of adapters
    if stream > width:
        saved += block.casts * hidden
    if config.method.adapter == "dora":  # outputs, which the gradients of magnitudes need
        saved += 5 * hidden + block.mlp_outputs * mlp
    # The sum of input and attention, or copies of both of the norms' inputs; the softmax's two numbers.
    inputs = 2 * FP32 if block.has_fp32_norms and stream < FP32 else stream
    return saved * width + hidden * inputs + 8 * sizes.heads


def _merger_bytes(config: Config, precision: Precision, sizes: VisionSizes) -> float:
    """Return the bytes that an adapted merger saves of each patch: it is not checkpointed.

    A token has the features of its patches, merge x merge x hidden, until the second linear.
    """
    width, patches_of_token = precision.matmul_dtype.itemsize, sizes.merge**2
    saved = 3 * sizes.hidden + 2 * config.lora_rank / patches_of_token  # both inputs, and that of GELU
    if config.method.adapter == "dora":
        saved += sizes.hidden + sizes.output / patches_of_token
    # The norm of an adapted tower's result reads a copy of it.
    has_copy = sizes.block.has_fp32_norms and sizes.branches and precision.frozen.itemsize < FP32
    return saved * width + (FP32 * sizes.hidden if has_copy else 0)


def _angle_bytes(sizes: VisionSizes, patches: float) -> float:
    """Return the bytes of the cosines and sines that rotate the patches, in fp32, for all blocks."""
    return 2 * FP32 * patches * sizes.hidden / sizes.heads if sizes.block.has_rotary else 0


def pixel_bytes(config: Config, pixels: int) -> int:
    """Return the bytes of a micro-batch's pixels before they are normalised. pixels: of a sequence."""
    return config.batch_size * pixels * CHANNELS
