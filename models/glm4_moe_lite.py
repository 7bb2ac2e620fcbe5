"""GLM-4.7-Flash (glm4_moe_lite): latent attention, routed experts with a biased router, and a shared expert.

Attention is DeepSeek's multi-head latent attention (arXiv 2405.04434, section 2.1). Two pairs of linears with
a norm between them take the place of q_proj, and of k_proj and v_proj:

    queries = q_b_proj(norm(q_a_proj(x)))
    latent, rotated = kv_a_proj_with_mqa(x).split(...)      the rotated features are the same in all heads
    keys without rotated features, values = kv_b_proj(norm(latent))

A head of queries and keys has qk_nope_head_dim + qk_rope_head_dim features, of which the last are rotated. A
head of values has v_head_dim. The released model has 256 of both.

Layers but the first (mlp_layer_types) have routed experts and a shared expert, without a gate. The router
(arXiv 2412.19437, section 2.1.2) takes sigmoids as scores. It chooses topk_group of n_group groups, and then
the experts, by score + e_score_correction_bias; their weights are the scores alone. Pretraining moved the
bias to balance the experts. It has no gradient: transformers keeps it as a buffer, in fp32 in any model. Here
it is a fixed parameter, and stays as it is in `full`, too.

Released files hold a layer behind the last, which predicts further tokens (num_nextn_predict_layers).

models/qwen3_moe.py says how experts are quantized, and models/qwen2_moe.py how a shared expert is. `default`
means the linears that make queries, keys and values; PEFT has no default for this family.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import (
    Glm4MoeLiteForCausalLM,
    Glm4MoeLiteMLP,
    Glm4MoeLiteRotaryEmbedding,
)

from models.family import Family
from models.moe import mlp_linears, replace_experts

LATENT_ATTENTION = (
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
)
ROUTER_BIAS = "e_score_correction_bias"


def match_checkpoint(text_model: PreTrainedModel) -> None:
    """Make the experts' weights and the routers' biases parameters, by the names of the files' tensors.

    Raises ValueError for a config that transformers accepts, and that has no forward here.
    """
    config = text_model.config
    _check_config(config)
    replace_experts(text_model, lambda: Glm4MoeLiteMLP(config, config.moe_intermediate_size))
    for module in list(text_model.modules()):
        if ROUTER_BIAS in dict(module.named_buffers(recurse=False)):
            bias = nn.Parameter(torch.empty_like(getattr(module, ROUTER_BIAS)), requires_grad=False)
            delattr(module, ROUTER_BIAS)
            module.register_parameter(ROUTER_BIAS, bias)


def _check_config(config: Any) -> None:
    """Raise ValueError for values that transformers' forward cannot compute, or that are not trained here."""
    if config.q_lora_rank is None:
        raise ValueError("q_lora_rank null: queries without a latent are not supported")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads {config.num_key_value_heads}: latent attention has as many as"
            f" num_attention_heads, {config.num_attention_heads}"
        )
    if config.n_shared_experts < 1:
        raise ValueError(f"n_shared_experts {config.n_shared_experts}: must be positive")
    experts, groups, chosen = config.n_routed_experts, config.n_group, config.topk_group
    if groups < 1 or experts % groups or experts // groups < 2:
        raise ValueError(f"n_group {groups}: must divide the {experts} experts into groups of two or more")
    if not 1 <= chosen <= groups:
        raise ValueError(f"topk_group {chosen}, of {groups} groups of experts")
    if config.num_experts_per_tok > chosen * experts // groups:
        raise ValueError(
            f"{config.num_experts_per_tok} experts per token, of {chosen * experts // groups} in topk_group"
            f" {chosen}"
        )


def select_linears(layer: nn.Module) -> tuple[str, ...]:
    """Return the linears of attention, of all experts and of the shared one, or those of a plain MLP."""
    return LATENT_ATTENTION + mlp_linears(layer, shared="shared_experts")


FAMILY = Family(
    model_class=Glm4MoeLiteForCausalLM,
    rotary_class=Glm4MoeLiteRotaryEmbedding,
    linears=LATENT_ATTENTION,
    default_targets=("q_b_proj", "kv_b_proj"),
    select_linears=select_linears,
    outputs=(
        "self_attn.o_proj",
        "mlp.down_proj",
        "mlp.experts.*.down_proj",
        "mlp.shared_experts.down_proj",
    ),
    match_checkpoint=match_checkpoint,
    fixed_parameters=(f"mlp.gate.{ROUTER_BIAS}",),
    extra_layers=lambda config: getattr(config, "num_nextn_predict_layers", None) or 0,
    head_sizes=lambda config: (config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim),
)
