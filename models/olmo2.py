"""OLMo 2: norms behind attention and MLP instead of before them, and norms on whole queries and keys.

The norm of queries (and that of keys) takes all heads of a token together. PEFT has no default targets for
this family; ours are Llama's.
"""

from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM, Olmo2RotaryEmbedding

from models.family import ATTENTION, GATED_MLP, Family

# Both norms multiply by their weight.
IDENTITY_INIT = (("post_attention_layernorm", 0.0), ("post_feedforward_layernorm", 0.0))

# No norm makes the residual stream smaller before attention and MLP. Where it is beyond fp16's largest
# number, so may be all that follows, up to the norms.
WIDE_LINEARS = ATTENTION + GATED_MLP

FAMILY = Family(
    model_class=Olmo2ForCausalLM,
    rotary_class=Olmo2RotaryEmbedding,
    identity_init=IDENTITY_INIT,
    wide_linears=WIDE_LINEARS,
)
