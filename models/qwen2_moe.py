"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 with routed experts, and one that all tokens share.

The shared expert's result is multiplied by the sigmoid of its gate, a linear of one output. Its linears are
quantized, and get adapters if --lora_target_modules names them (shared_expert.down_proj); `all` means those
of attention. Its gate stays dense, like the router. models/qwen3_moe.py says the rest.

A config may give every other layer a sliding window (use_sliding_window; the released ones do not).
transformers' attention does not get the window, so only masks apply it.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeForCausalLM,
    Qwen2MoeMLP,
    Qwen2MoeRotaryEmbedding,
)

from models import moe, qwen3_moe
from models.family import ATTENTION, Family


def match_checkpoint(text_model: PreTrainedModel) -> None:
    """Make the experts' parameters the files' tensors."""
    config = text_model.config
    moe.replace_experts(text_model, lambda: Qwen2MoeMLP(config, config.moe_intermediate_size))


def select_linears(layer: nn.Module) -> tuple[str, ...]:
    """Return the linears of attention, of all experts and of the shared one, or those of a plain MLP."""
    return ATTENTION + moe.mlp_linears(layer, shared="shared_expert")


FAMILY = Family(
    model_class=Qwen2MoeForCausalLM,
    rotary_class=Qwen2MoeRotaryEmbedding,
    linears=ATTENTION,
    select_linears=select_linears,
    outputs=(*qwen3_moe.FAMILY.outputs, "mlp.shared_expert.down_proj"),
    match_checkpoint=match_checkpoint,
    passes_window=False,
)
