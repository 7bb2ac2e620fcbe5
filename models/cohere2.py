"""Cohere2 (Command R7B, Command A): attention and MLP in parallel, LayerNorm without bias, scaled logits.

- One norm precedes attention and MLP, and both results are added to the hidden states at once.
- Three layers of four have a sliding window and rotate queries and keys. The others see the whole row, and do
  not rotate.
- Head and embedding are tied.
- PEFT has no default targets for this family; ours are those of Llama.
"""

from transformers import PretrainedConfig
from transformers.models.cohere2.modeling_cohere2 import Cohere2ForCausalLM, Cohere2RotaryEmbedding

from models.family import Family


def logit_scale(config: PretrainedConfig) -> float:
    """Return the factor of the logits."""
    return config.logit_scale


FAMILY = Family(
    model_class=Cohere2ForCausalLM,
    rotary_class=Cohere2RotaryEmbedding,
    logit_scale=logit_scale,
)
