"""StableLM: LayerNorm, rotation of a quarter of each head's features, and parts that the config switches on.

- `use_qkv_bias` (StableLM 2 1.6B): biases on queries, keys and values.
- `qk_layernorm` (StableLM 2 12B): a norm for each head of queries and keys.
- `use_parallel_residual` (StableLM 2 12B): attention and MLP read the same norm, and both results are added
  at once. Otherwise they follow one another, as in Llama.

A decoder layer of transformers does not hand the bounds of packed rows on to its attention, so packed rows
are separated by masks.
"""

from transformers.models.stablelm.modeling_stablelm import StableLmForCausalLM, StableLmRotaryEmbedding

from models.family import Family

FAMILY = Family(
    model_class=StableLmForCausalLM,
    rotary_class=StableLmRotaryEmbedding,
    passes_row_bounds=False,
)
