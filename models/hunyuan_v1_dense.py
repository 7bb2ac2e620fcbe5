"""HunYuan dense models (0.5B to 7B): Llama with a norm on each query and key, behind their rotation.

Qwen3 and others have such norms before the rotation. The released configs have RoPE of type dynamic with a
fixed `alpha`, which stretches the base once; `rotary_class` reads it. PEFT has no default targets for this
family; ours are Llama's.
"""

from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import (
    HunYuanDenseV1ForCausalLM,
    HunYuanDenseV1RotaryEmbedding,
)

from models.family import Family

FAMILY = Family(model_class=HunYuanDenseV1ForCausalLM, rotary_class=HunYuanDenseV1RotaryEmbedding)
