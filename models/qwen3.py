"""Qwen3 (dense): norms on each head's queries and keys, which are not quantized; no biases."""

from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=Qwen3ForCausalLM, rotary_class=Qwen3RotaryEmbedding)
