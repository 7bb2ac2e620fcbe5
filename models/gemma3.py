"""Gemma 3, text only (model_type gemma3_text): norms on queries and keys, several layers of sliding attention to
one of full attention, each kind with rotary tables of its own. Its scores have no cap: transformers ignores
attn_logit_softcapping here."""

from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3RotaryEmbedding

from models.family import Family
from models.gemma2 import SILENT, constants, logit_cap

FAMILY = Family(
    model_class=Gemma3ForCausalLM,
    rotary_class=Gemma3RotaryEmbedding,
    silent=SILENT,
    constants=constants,
    logit_cap=logit_cap,
)
