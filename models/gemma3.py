"""Gemma 3: norms on queries and keys, sliding and full attention.

Several layers of sliding attention come before one of full attention; each kind has rotary tables of its own.
Scores have no cap: transformers ignores attn_logit_softcapping here.

The models of 270M and 1B are a text model alone (model_type gemma3_text). The larger ones are a wrapper
(gemma3) with a vision tower and a projector. They are trained on text, which needs neither: the two are not
loaded.
"""

from dataclasses import replace

from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3RotaryEmbedding,
)

from models.family import Family, wrap_family
from models.gemma2 import IDENTITY_INIT, WIDE_LINEARS, constant_buffers, logit_cap

FAMILY = Family(
    model_class=Gemma3ForCausalLM,
    rotary_class=Gemma3RotaryEmbedding,
    identity_init=IDENTITY_INIT,
    wide_linears=WIDE_LINEARS,
    constant_buffers=constant_buffers,
    logit_cap=logit_cap,
)

WRAPPER = wrap_family(
    # transformers ignores final_logit_softcapping here
    {"gemma3_text": replace(FAMILY, logit_cap=lambda config: None)},
    Gemma3ForConditionalGeneration,
    unused=("model.vision_tower", "model.multi_modal_projector"),
)
