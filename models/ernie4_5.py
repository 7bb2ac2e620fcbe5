"""ERNIE 4.5 dense models (0.3B): Llama that rotates pairs of neighbouring features, in fp32.

`use_bias` of the config gives every linear a bias; the released ones have none, and tie head and embedding.
PEFT has no default targets for this family; ours are Llama's.
"""

from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5ForCausalLM, Ernie4_5RotaryEmbedding

from models.family import Family

FAMILY = Family(model_class=Ernie4_5ForCausalLM, rotary_class=Ernie4_5RotaryEmbedding)
