"""Qwen3-MoE: Qwen3 with routed experts, in all layers or in those that the config names.

mlp_only_layers and decoder_sparse_step of the config name the layers with a plain MLP. Of all mixtures here:

- All linears of all experts are quantized. transformers' own 4-bit models keep experts dense, so they are not
  the base of training here.
- Adapters go on attention only (`all`); those of experts have an option of their own, --lora_expert_rank.
- The router stays dense, and frozen under adapters without --train_router.
- `full` trains everything. models/router_loss.py has the auxiliary loss of the routers.
- PEFT has no default targets for this family; ours are those of Qwen3.
"""

from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeRotaryEmbedding,
)

from models.family import ATTENTION, Family
from models.moe import replace_experts, select_linears


def match_checkpoint(text_model: PreTrainedModel) -> None:
    """Make the experts' parameters the files' tensors."""
    config = text_model.config
    replace_experts(text_model, lambda: Qwen3MoeMLP(config, config.moe_intermediate_size))


FAMILY = Family(
    model_class=Qwen3MoeForCausalLM,
    rotary_class=Qwen3MoeRotaryEmbedding,
    linears=ATTENTION,
    select_linears=select_linears,
    outputs=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj"),
    match_checkpoint=match_checkpoint,
)
