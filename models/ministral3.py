"""Ministral 3, text only (model_type ministral3): Mistral whose queries grow with their positions.

After its rotation, the query of a token at position p of its row is multiplied by
1 + beta log(1 + floor(p / L)): beta is llama_4_scaling_beta of the config's rope_parameters, and L is
original_max_position_embeddings (16,384). So tokens before L are Mistral's. A packed row counts its own
positions. PEFT has no default targets for this family; ours are Mistral's.
"""

from transformers import PreTrainedModel
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3ForCausalLM,
    Ministral3RotaryEmbedding,
)

from models.family import Family

SCALING_KEYS = ("llama_4_scaling_beta", "original_max_position_embeddings")


def check_scaling(text_model: PreTrainedModel) -> None:
    """Raise ValueError for a config without the scaling's values, which only a forward would miss."""
    for key in SCALING_KEYS:
        if text_model.config.rope_parameters.get(key) is None:
            raise ValueError(f"rope_parameters has no {key}")


FAMILY = Family(
    model_class=Ministral3ForCausalLM,
    rotary_class=Ministral3RotaryEmbedding,
    match_checkpoint=check_scaling,
)
