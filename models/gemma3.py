"""Gemma 3, text only (model_type gemma3_text): norms on queries and keys, sliding and full attention.

Several layers of sliding attention come before one of full attention; each kind has rotary tables of its own.
Scores have no cap: transformers ignores attn_logit_softcapping here.
"""

from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3RotaryEmbedding

from models.family import Family
from models.gemma2 import IDENTITY_INIT, constant_buffers, logit_cap

FAMILY = Family(
    model_class=Gemma3ForCausalLM,
    rotary_class=Gemma3RotaryEmbedding,
    identity_init=IDENTITY_INIT,
    constant_buffers=constant_buffers,
    logit_cap=logit_cap,
)
