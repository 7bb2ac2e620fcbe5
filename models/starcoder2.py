"""StarCoder2: LayerNorm, biases everywhere, and an MLP of two linears without a gate.

PEFT has no default targets for this family; ours are those of Llama. The released configs set a dropout of
0.1 for attention's scores, for the results of attention and MLP (residual_dropout), and for the embeddings.
It acts in training, as in transformers.
"""

from transformers.models.starcoder2.modeling_starcoder2 import (
    Starcoder2ForCausalLM,
    Starcoder2RotaryEmbedding,
)

from models.family import ATTENTION, Family

FAMILY = Family(
    model_class=Starcoder2ForCausalLM,
    rotary_class=Starcoder2RotaryEmbedding,
    linears=(*ATTENTION, "mlp.c_fc", "mlp.c_proj"),
    outputs=("self_attn.o_proj", "mlp.c_proj"),
)
