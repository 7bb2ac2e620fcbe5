"""Phi-1, Phi-1.5 and Phi-2: attention and MLP in parallel, biases everywhere, the head's included.

One LayerNorm precedes attention and MLP, and both results are added to the hidden states at once. A part of a
head's features is rotated. Phi-2's config sets dropout of 0.1 on both results; it acts in training, as in
transformers.
"""

from transformers.models.phi.modeling_phi import PhiForCausalLM, PhiRotaryEmbedding

from models.family import Family

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense")

FAMILY = Family(
    model_class=PhiForCausalLM,
    rotary_class=PhiRotaryEmbedding,
    linears=(*ATTENTION, "mlp.fc1", "mlp.fc2"),
    default_targets=("q_proj", "v_proj", "fc1", "fc2"),
    outputs=("self_attn.dense", "mlp.fc2"),
    norm="model.final_layernorm",
)
