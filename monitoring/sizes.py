"""What a run's memory depends on: bytes of its weights, widths of its layers, length of its rows.

run_sizes.py computes them. Shapes: T tokens of the longest sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from launch.memory import format_bytes
from monitoring.layer_memory import LayerWidths
from monitoring.vision_memory import VisionSizes

STATE_BYTES_8BIT = 2.03  # per trained weight: two 8-bit codes, and two fp32 scales for 256 weights


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a whole model's weights, by kind.

    Attributes:
        codes: packed weights.
        scales: the quantizer's scales.
        unquantized: embedding, head, norms and all else that is neither packed nor trained.
        trained: adapters, new blocks, or everything.
    """

    codes: int = 0
    scales: int = 0
    unquantized: int = 0
    trained: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        parts = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        return " + ".join(f"{name} {format_bytes(n)}" for name, n in parts.items())


@dataclass(frozen=True)
class RunSizes:
    """The sizes of a run's model and data; with the options they determine its memory.

    Attributes:
        tokens: T.
        vocabulary: V.
        layers: number of decoder layers.
        saved_layers: those that backward reaches: from the first one with a trained weight.
        widths: of a layer.
        branches: adapted linears of a layer.
        weights: bytes of the whole model.
        unit: bytes of the largest unit that is gathered at a time.
        trained_unit: trained bytes of the unit that has most of them.
        trains_layers: whether layers' own weights are trained, not only adapters.
        vocabulary_bytes: bytes of the embedding or the head if they are trained, else 0.
        tied: bytes of the embedding if it is the head, too, else 0.
        on_host: bytes of the embedding if it is in host memory, else 0.
        page_locked: bytes of this rank's weights in page-locked host memory: the embedding or, with
            --use_cpu_offload, all. torch rounds each tensor up to a power of two.
        largest_tensor: bytes of the largest weight that is not packed, in the dtype of the run.
        largest_in_file: bytes of the same in its file.
        largest_read: bytes of the largest other weight, embedding and head aside, once the load has read it:
            packed if the run packs it, else as in its file.
        vision: of the vision tower; None if the model is built without.
        pixels: of the resized images of the sequence that has most of them.
    """

    tokens: int
    vocabulary: int
    layers: int
    saved_layers: int
    widths: LayerWidths
    branches: int
    weights: WeightBytes
    unit: int
    trained_unit: int
    trains_layers: bool
    vocabulary_bytes: int
    tied: int
    on_host: int
    page_locked: int
    largest_tensor: int
    largest_in_file: int
    largest_read: int
    vision: VisionSizes | None = None
    pixels: int = 0


def round_up_to_power(n_bytes: int) -> int:
    """Return the bytes that torch page-locks for a tensor: a power of two."""
    return 1 << max(n_bytes - 1, 0).bit_length()


def optimizer_state_bytes(optimizer: str, trained: float, itemsize: int) -> float:
    """Return the bytes of an optimizer's states, wherever they are.

    Args:
        optimizer: a value of --optimizer.
        trained: bytes of the trained weights.
        itemsize: bytes of one of them.
    """
    if optimizer == "sgd":
        return 0.0
    if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        return STATE_BYTES_8BIT * trained / itemsize
    return 2 * trained
