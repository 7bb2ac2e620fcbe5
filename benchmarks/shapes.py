"""Named shapes of benchmark models, all of Llama's architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of one model."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def parameters(self) -> int:
        """Count the weights: untied embedding and head, two norms per layer and a final norm."""
        kv = self.hidden // self.heads * self.kv_heads
        layer = 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


SHAPES = {
    "tiny": Shape(64, 160, 4, 4, 2, 300),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "14b": Shape(5120, 13824, 48, 40, 8, 152064),
    "32b": Shape(5120, 27648, 64, 40, 8, 152064),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256),
}
