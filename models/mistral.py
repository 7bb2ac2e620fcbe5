"""Mistral 7B and similar models. models/attention.py handles a sliding window of the config."""

from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralRotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=MistralForCausalLM, rotary_class=MistralRotaryEmbedding)
