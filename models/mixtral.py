"""Mixtral: Mistral with routed experts in all layers.

The files name an expert's linears w1, w3 and w2: gate, up and down. models/qwen3_moe.py says how experts are
quantized, and which linears get adapters. With router_jitter_noise in the config (the released ones have 0)
transformers multiplies the inputs of router and experts by random factors in training.
"""

from transformers import PreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralRotaryEmbedding

from models.family import ATTENTION, Family
from models.moe import replace_experts, select_linears


def match_checkpoint(text_model: PreTrainedModel) -> None:
    """Make a parameter of each of the files' tensors of experts."""
    replace_experts(text_model, lambda: MistralMLP(text_model.config))


FAMILY = Family(
    model_class=MixtralForCausalLM,
    rotary_class=MixtralRotaryEmbedding,
    linears=ATTENTION,
    select_linears=select_linears,
    outputs=("self_attn.o_proj", "mlp.experts.*.down_proj"),
    match_checkpoint=match_checkpoint,
)
