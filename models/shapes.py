"""Named shapes of models, for plans and measurements without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Gemma3Config, GptOssConfig, LlamaConfig, Qwen3MoeConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of one model of Llama's architecture.

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

    def common_settings(self) -> dict[str, Any]:
        """Return the settings of a config that models of all architectures share: sizes, tokens and bf16."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.context,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "dtype": "bfloat16",
        }

    def model_config(self) -> LlamaConfig:
        """Return transformers' config of a model of this shape, in bf16."""
        from transformers import LlamaConfig  # slow to import, and not needed to list the shapes

        return LlamaConfig(
            **self.common_settings(),
            intermediate_size=self.mlp,
            rms_norm_eps=1e-5,
            architectures=["LlamaForCausalLM"],
        )


@dataclass(frozen=True)
class MixtureShape:
    """Sizes of a Qwen3-MoE, all of whose layers have routed experts.

    Attributes:
        text: its sizes; `mlp` is that of one expert.
        head_dim: features of an attention head.
        experts, experts_per_token: experts of a layer, and those of a token.
    """

    text: Shape
    head_dim: int
    experts: int
    experts_per_token: int

    def parameters(self) -> int:
        """Count the weights: a layer has a router, two norms, and one each of queries and keys."""
        text, width = self.text, self.head_dim
        attention = 2 * text.hidden * width * (text.heads + text.kv_heads)
        experts = self.experts * (3 * text.hidden * text.mlp + text.hidden)
        layer = attention + experts + 2 * text.hidden + 2 * width
        return text.layers * layer + 2 * text.vocabulary * text.hidden + text.hidden

    def model_config(self) -> Qwen3MoeConfig:
        """Return transformers' config of a model of this shape, in bf16."""
        from transformers import Qwen3MoeConfig  # slow to import, and not needed to list the shapes

        text = self.text
        return Qwen3MoeConfig(
            **text.common_settings(),
            intermediate_size=3 * text.hidden,
            moe_intermediate_size=text.mlp,
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            norm_topk_prob=True,
            head_dim=self.head_dim,  # type: ignore[call-arg] # some versions do not declare it
            architectures=["Qwen3MoeForCausalLM"],
        )


@dataclass(frozen=True)
class GptOssShape:
    """Sizes of a GPT-OSS.

    Attributes:
        text: its sizes; `mlp` is that of one expert.
        head_dim: features of an attention head.
        experts: those of a layer; a token goes to four.
    """

    text: Shape
    head_dim: int
    experts: int

    def parameters(self) -> int:
        """Count the weights: all linears but the head have biases, and each head of queries has a sink."""
        text, width = self.text, self.head_dim
        queries, keys = width * text.heads, width * text.kv_heads
        attention = (text.hidden + 1) * (queries + 2 * keys) + (queries + 1) * text.hidden + text.heads
        expert = 2 * (text.hidden + 1) * text.mlp + (text.mlp + 1) * text.hidden
        layer = attention + self.experts * (expert + text.hidden + 1) + 2 * text.hidden
        return text.layers * layer + 2 * text.vocabulary * text.hidden + text.hidden

    def model_config(self) -> GptOssConfig:
        """Return transformers' config of a model of this shape, in bf16."""
        from transformers import GptOssConfig  # slow to import, and not needed to list the shapes

        text = self.text
        return GptOssConfig(
            **text.common_settings(),
            intermediate_size=text.mlp,
            num_local_experts=self.experts,
            head_dim=self.head_dim,
            architectures=["GptOssForCausalLM"],
        )


@dataclass(frozen=True)
class Tower:
    """Sizes of a SigLIP tower, which makes an embedding of each patch of an image.

    Attributes:
        hidden: features of a patch.
        mlp: features within the MLP.
        layers: blocks.
        heads: attention heads.
        side: pixels of an image's side.
        patch: pixels of a patch's side.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    side: int
    patch: int

    def parameters(self) -> int:
        """Count the weights: patches and positions, blocks with biases and two norms, and a final norm."""
        embeddings = self.hidden * (3 * self.patch**2 + 1 + (self.side // self.patch) ** 2)
        attention, mlp = 4 * self.hidden * (self.hidden + 1), 2 * self.hidden * self.mlp
        block = attention + mlp + self.mlp + self.hidden + 4 * self.hidden
        return embeddings + self.layers * block + 2 * self.hidden


@dataclass(frozen=True)
class Gemma3Shape:
    """Sizes of a Gemma 3 that takes images.

    Attributes:
        text: of the text model, whose head is the embedding.
        head_dim: features of an attention head.
        tower: of the vision tower.
        image_tokens: tokens of an image.
    """

    text: Shape
    head_dim: int
    tower: Tower
    image_tokens: int = 256

    def parameters(self) -> int:
        """Count the weights: a layer has four norms, and one each of queries and keys."""
        text, width = self.text, self.head_dim
        attention = 2 * text.hidden * width * (text.heads + text.kv_heads)
        layer = attention + 3 * text.hidden * text.mlp + 4 * text.hidden + 2 * width
        projector = self.tower.hidden * (text.hidden + 1)
        vocabulary = text.vocabulary * text.hidden
        return text.layers * layer + vocabulary + text.hidden + projector + self.tower.parameters()

    def model_config(self) -> Gemma3Config:
        """Return transformers' config of a model of this shape, in bf16."""
        from transformers import Gemma3Config  # slow to import, and not needed to list the shapes

        text, tower = self.text, self.tower
        return Gemma3Config(
            text_config=text.common_settings()
            | {
                "intermediate_size": text.mlp,
                "head_dim": self.head_dim,
                "query_pre_attn_scalar": self.head_dim,
                "sliding_window": 1024,
                "pad_token_id": 0,
            },
            vision_config={
                "hidden_size": tower.hidden,
                "intermediate_size": tower.mlp,
                "num_hidden_layers": tower.layers,
                "num_attention_heads": tower.heads,
                "image_size": tower.side,
                "patch_size": tower.patch,
                "vision_use_head": False,
                "dtype": "bfloat16",
            },
            mm_tokens_per_image=self.image_tokens,
            boi_token_index=258,
            image_token_index=259,
            eoi_token_index=260,
            dtype="bfloat16",
            architectures=["Gemma3ForConditionalGeneration"],
        )


# 1b and 3b: Llama 3.2; 7b and 13b: Llama 2; 8b and 70b: Llama 3; 405b: Llama 3.1. 14b and 32b: Qwen2.5's
# instruct models without their biases; their base models have 131,072 tokens. 30b-a3b is Qwen3's.
# gpt-oss-20b and gpt-oss-120b are OpenAI's, gemma3-4b is google/gemma-3-4b.
SHAPES: dict[str, Shape | MixtureShape | GptOssShape | Gemma3Shape] = {
    "tiny": Shape(64, 160, 4, 4, 2, 300, 8192),
    "thin": Shape(256, 896, 32, 8, 2, 1024, 8192),  # the layers of 8b, whose kernels take no time
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, 131072),  # with a head of its own
    "3b": Shape(3072, 8192, 28, 24, 8, 128256, 131072, tied=True),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000, 4096),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, 8192),
    "13b": Shape(5120, 13824, 40, 40, 40, 32000, 4096),
    "14b": Shape(5120, 13824, 48, 40, 8, 152064, 32768),
    "32b": Shape(5120, 27648, 64, 40, 8, 152064, 32768),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256, 8192),
    "405b": Shape(16384, 53248, 126, 128, 8, 128256, 131072),
    "tiny-moe": MixtureShape(Shape(64, 48, 4, 4, 2, 300, 8192), 16, 8, 2),
    "30b-a3b": MixtureShape(Shape(2048, 768, 48, 32, 4, 151936, 40960), 128, 128, 8),
    "30b-a3b-12": MixtureShape(Shape(2048, 768, 12, 32, 4, 151936, 40960), 128, 128, 8),  # 12 of 48 layers
    "gpt-oss-20b": GptOssShape(Shape(2880, 2880, 24, 64, 8, 201088, 131072), 64, 32),
    "gpt-oss-120b": GptOssShape(Shape(2880, 2880, 36, 64, 8, 201088, 131072), 64, 128),
    "tiny-gemma3": Gemma3Shape(
        Shape(64, 160, 4, 4, 2, 300, 8192, tied=True), 16, Tower(32, 48, 2, 2, 28, 7), 4
    ),
    "gemma3-4b": Gemma3Shape(
        Shape(2560, 10240, 34, 8, 4, 262208, 131072, tied=True), 256, Tower(1152, 4304, 27, 16, 896, 14)
    ),
}
# Those of models that take images.
IMAGE_SHAPES = tuple(name for name, shape in SHAPES.items() if isinstance(shape, Gemma3Shape))
