"""What a vision tower takes on a GPU: for images of a micro-batch, while it runs and until its backward ends.

A frozen tower runs without a gradient: it saves nothing, and takes the activations of one block at a time.
An adapted one saves the input of each block, or without gradient checkpointing what its backward reads. Its
blocks are not compiled. The counts are of the blocks of SigLIP; those of Qwen-VL have the same parts.

Shapes: P patches of a micro-batch's images.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.precision import Precision
from options.config import Config

CHANNELS = 3  # of a pixel, a byte each until the GPU normalises them


@dataclass(frozen=True)
class VisionSizes:
    """The sizes of a tower.

    Attributes:
        hidden: features of a patch.
        mlp: features within the MLP of a block.
        heads: attention heads.
        blocks: their number.
        patch: pixels of a patch's side.
        weights: bytes of tower and projector.
        is_packed: whether its linears have 4 bits.
        branches: adapted linears of a block; 0 if the blocks are frozen.
        is_trained: whether any vision part is trained.
    """

    hidden: int
    mlp: int
    heads: int
    blocks: int
    patch: int
    weights: int
    is_packed: bool
    branches: int
    is_trained: bool


@dataclass(frozen=True)
class VisionMemory:
    """Bytes on a GPU for the images of a micro-batch.

    Attributes:
        held: from the tower's forward to the end of the micro-batch: pixels, and what backward reads.
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
    # Where the MLP's two activations are: also the block's input, its sum with attention, and their norm.
    forward = n_pixels * stream + 3 * block_input + 2 * patches * sizes.mlp * width + dequantized
    held = n_pixels
    if not sizes.branches:
        return VisionMemory(held, forward)
    saved = patches * _saved_bytes(config, precision, sizes)
    # The gradient of the result, and those of the MLP's activation by the base's weight and by A.
    is_one_operator = sizes.is_packed and config.method.adapter == "lora"
    backward = block_input + patches * sizes.mlp * width * (1 if is_one_operator else 2) + dequantized
    inputs = (sizes.blocks + 2) * block_input  # also of the last norm and of the projector
    if config.use_gradient_checkpointing:
        return VisionMemory(held + inputs, forward, saved + backward)
    return VisionMemory(held + inputs + sizes.blocks * saved, forward, backward)


def _saved_bytes(config: Config, precision: Precision, sizes: VisionSizes) -> float:
    """Return the bytes that an adapted block saves of each patch for its backward, beside its input."""
    width, stream = precision.matmul_dtype.itemsize, precision.frozen.itemsize
    hidden, mlp = sizes.hidden, sizes.mlp
    # The results of two norms; query, key and value, and what attention returns; fc1's result and GELU's.
    saved = 6 * hidden + 2 * mlp + sizes.branches * config.lora_rank  # and A x of each adapter
    if stream > width:  # query, key and value cast their input, each for itself
        saved += 2 * hidden
    if config.method.adapter == "dora":  # outputs, which the gradients of magnitudes need
        saved += 5 * hidden + mlp
    # The sum of input and attention; the softmax's two numbers.
    return saved * width + hidden * stream + 8 * sizes.heads


def pixel_bytes(config: Config, pixels: int) -> int:
    """Return the bytes of a micro-batch's pixels before they are normalised. pixels: of a sequence."""
    return config.batch_size * pixels * CHANNELS
