"""Llama 1, 2 and 3 (rope scaling of 3.1 and later is read from the config by the rotary class)."""

from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=LlamaForCausalLM, rotary_class=LlamaRotaryEmbedding)
