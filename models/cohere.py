"""Cohere (Command R, Aya): attention and MLP in parallel, LayerNorm without bias, scaled logits.

- One norm precedes attention and MLP, and both results are added to the hidden states at once.
- `use_qk_norm` of the config (Command R+) gives each head of queries and keys a norm.
- Head and embedding are tied.
- PEFT has no default targets for this family; ours are those of Llama.

Cohere2 (models/cohere2.py) has sliding windows, too.
"""

from transformers.models.cohere.modeling_cohere import CohereForCausalLM, CohereRotaryEmbedding

from models.cohere2 import logit_scale
from models.family import Family

FAMILY = Family(
    model_class=CohereForCausalLM,
    rotary_class=CohereRotaryEmbedding,
    logit_scale=logit_scale,
)
