"""GLM-4 (0414): partial rotation, gate and up in one linear, norms before and after attention and MLP.

Half of a head's features are rotated, in neighbouring pairs. An adapter covers the whole fused linear of gate
and up, as PEFT's does. PEFT has no default targets for this family; ours are those of Llama.
"""

from transformers.models.glm4.modeling_glm4 import Glm4ForCausalLM, Glm4RotaryEmbedding

from models.family import ATTENTION, Family

FAMILY = Family(
    model_class=Glm4ForCausalLM,
    rotary_class=Glm4RotaryEmbedding,
    linears=(*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"),
    # post_attention_layernorm precedes the MLP, as in Llama: it is none of these.
    identity_init=(("post_self_attn_layernorm", 0.0), ("post_mlp_layernorm", 0.0)),
)
