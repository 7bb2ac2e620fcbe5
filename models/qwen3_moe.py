"""Qwen3-MoE: Qwen3 with routed experts, in all layers or in those that the config chooses.

All linears of all experts are quantized (transformers' own 4-bit models leave experts as they are, so they
are not the base that was trained on). Adapters go on attention only (`all`): PEFT has no module for one
expert under transformers 5, so it could not load an adapter there. The router stays dense, and frozen under
adapters; `full` trains everything, with the loss of the tokens alone, as transformers does unless
output_router_logits is set. PEFT has no default for this family; ours is that of Qwen3.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
)

from models.family import ATTENTION, GATED_MLP, Family
from models.moe import Experts


def linears_of(layer: nn.Module) -> tuple[str, ...]:
    """Attention and all experts, or the plain MLP of the layers that mlp_only_layers and decoder_sparse_step say."""
    if not isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
        return ATTENTION + GATED_MLP
    parts = [linear.removeprefix("mlp.") for linear in GATED_MLP]
    experts = layer.mlp.experts
    assert isinstance(experts, Experts)
    return ATTENTION + tuple(f"mlp.experts.{i}.{p}" for i in range(len(experts)) for p in parts)


def as_stored(model: PreTrainedModel) -> None:
    config = model.config
    for layer in model.model.layers:
        if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
            layer.mlp.experts = Experts(  # type: ignore[assignment]
                lambda: Qwen3MoeMLP(config, config.moe_intermediate_size),
                config.num_experts,
                config.num_experts_per_tok,
            )


FAMILY = Family(
    model_class=Qwen3MoeForCausalLM,
    rotary_class=Qwen3MoeRotaryEmbedding,
    linears=ATTENTION,
    linears_of=linears_of,
    outputs=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj"),
    as_stored=as_stored,
    compiles=False,  # how many rows an expert gets is known only when it gets them
)
