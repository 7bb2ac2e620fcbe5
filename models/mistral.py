"""Mistral 7B and its kin; a sliding window, where the config has one, is a matter of models/attention.py."""

from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralRotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=MistralForCausalLM, rotary_class=MistralRotaryEmbedding)
