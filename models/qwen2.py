"""Qwen2 and Qwen2.5: query, key and value carry biases; small ones tie the head to the embedding."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2RotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=Qwen2ForCausalLM, rotary_class=Qwen2RotaryEmbedding)
