"""OLMo 3: OLMo 2, with three layers of sliding attention before one of full attention.

Each kind of layer has rotary tables of its own: RoPE is scaled (yarn) in layers of full attention only. PEFT
has no default targets for this family; ours are Llama's.
"""

from transformers.models.olmo3.modeling_olmo3 import Olmo3ForCausalLM, Olmo3RotaryEmbedding

from models.family import Family
from models.olmo2 import IDENTITY_INIT, WIDE_LINEARS

FAMILY = Family(
    model_class=Olmo3ForCausalLM,
    rotary_class=Olmo3RotaryEmbedding,
    identity_init=IDENTITY_INIT,
    wide_linears=WIDE_LINEARS,
)
