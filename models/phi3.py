"""Phi-3, Phi-3.5 and Phi-4: query, key and value in one linear, gate and up in another.

An adapter covers a whole fused linear, as PEFT's does. PEFT has no default targets for this family; ours is
the linear that holds queries and values. The 128k models have RoPE of type longrope (models/longrope.py).
"""

from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM, Phi3RotaryEmbedding

from models.family import Family

FAMILY = Family(
    model_class=Phi3ForCausalLM,
    rotary_class=Phi3RotaryEmbedding,
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    default_targets=("qkv_proj",),
)
