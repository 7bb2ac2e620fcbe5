"""Granite 3: Llama with four factors of the config, and logits that are divided by one of them.

transformers' layers apply embedding_multiplier, residual_multiplier (to what attention and MLP add to the
hidden states) and attention_multiplier (in place of 1 / sqrt(head_dim)). The loss does not use transformers'
forward, so the family names the factor of the logits. Some published configs, such as that of Granite 3.1 2B,
have attention_dropout 0.1, which acts in training (models/seed_oss.py says what it costs). PEFT has no
default targets for this family; ours are Llama's.
"""

from transformers.models.granite.modeling_granite import GraniteForCausalLM, GraniteRotaryEmbedding

from models.family import Family


def logit_scale(config) -> float:
    """Return the factor of the logits: Granite's larger models have 1 / 16, its smaller ones 1 / 8."""
    return 1 / config.logits_scaling


FAMILY = Family(
    model_class=GraniteForCausalLM,
    rotary_class=GraniteRotaryEmbedding,
    logit_scale=logit_scale,
)
