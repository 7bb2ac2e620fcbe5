"""OLMo 1: Llama with LayerNorm that has neither weights nor biases, and a bound on queries, keys and values.

Where `clip_qkv` of the config is not null (8.0 in OLMo 1.7), transformers clips the results of these three
projections in place. PEFT has no default targets for this family; ours are Llama's.
"""

from transformers.models.olmo.modeling_olmo import OlmoForCausalLM, OlmoRotaryEmbedding

from models.family import ATTENTION, Family

FAMILY = Family(
    model_class=OlmoForCausalLM,
    rotary_class=OlmoRotaryEmbedding,
    changed_results=lambda config: () if config.clip_qkv is None else ATTENTION[:3],
)
