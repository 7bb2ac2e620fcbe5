"""Named shapes of Llama's architecture, for plans and measurements without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of one model.

    Attributes:
        hidden: features of a token.
        mlp: features within the MLP.
        layers: decoder layers.
        heads, kv_heads: attention heads of queries, and of keys and values.
        vocabulary: known tokens.
        context: most tokens of a row.
        tied: whether the head is the embedding.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    tied: bool = False

    def parameters(self) -> int:
        """Count the weights: embedding, head unless it is tied, two norms per layer and a final norm."""
        kv = self.hidden // self.heads * self.kv_heads
        layer = 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.mlp + 2 * self.hidden
        vocabulary = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * layer + vocabulary + self.hidden

    def model_config(self) -> LlamaConfig:
        """Return transformers' config of a model of this shape, in bf16."""
        from transformers import LlamaConfig  # slow to import, and not needed to list the shapes

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            bos_token_id=256,
            eos_token_id=257,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )


# 1b and 3b: Llama 3.2; 7b and 13b: Llama 2; 8b and 70b: Llama 3; 405b: Llama 3.1. 14b and 32b: Qwen2.5's
# instruct models without their biases; their base models have 131,072 tokens.
SHAPES = {
    "tiny": Shape(64, 160, 4, 4, 2, 300, 8192),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, 131072),  # with a head of its own
    "3b": Shape(3072, 8192, 28, 24, 8, 128256, 131072, tied=True),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000, 4096),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, 8192),
    "13b": Shape(5120, 13824, 40, 40, 40, 32000, 4096),
    "14b": Shape(5120, 13824, 48, 40, 8, 152064, 32768),
    "32b": Shape(5120, 27648, 64, 40, 8, 152064, 32768),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256, 8192),
    "405b": Shape(16384, 53248, 126, 128, 8, 128256, 131072),
}
