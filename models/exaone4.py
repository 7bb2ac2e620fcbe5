"""EXAONE 4: norms as in OLMo 2, but on each head's queries and keys, and two kinds of layers in large models.

The 32B model has three layers of sliding attention before one of full attention, which does not rotate
queries and keys (NoPE). The 1.2B model has full attention with RoPE everywhere. PEFT has no default targets
for this family; ours are Llama's.
"""

from transformers.models.exaone4.modeling_exaone4 import Exaone4ForCausalLM, Exaone4RotaryEmbedding

from models.family import Family
from models.olmo2 import IDENTITY_INIT, WIDE_LINEARS

FAMILY = Family(
    model_class=Exaone4ForCausalLM,
    rotary_class=Exaone4RotaryEmbedding,
    identity_init=IDENTITY_INIT,
    wide_linears=WIDE_LINEARS,
)
