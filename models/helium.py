"""Helium: Llama whose queries and keys are rotated by pairs of neighbouring features.

Its RMSNorm multiplies by the weight in fp32, before it rounds. Both are in transformers' forward; modules and
names are those of Llama. PEFT has no default targets for this family; ours are Llama's.
"""

from transformers.models.helium.modeling_helium import HeliumForCausalLM, HeliumRotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=HeliumForCausalLM, rotary_class=HeliumRotaryEmbedding)
