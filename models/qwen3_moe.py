"""Qwen3-MoE: Qwen3 with routed experts, in all layers or in those that the config lists.

- All linears of all experts are quantized. transformers' own 4-bit models keep experts dense, so they are not
  the base of training here.
- Adapters go on attention only (`all`): PEFT has no module for a single expert under transformers 5, so it
  could not load an adapter there.
- The router stays dense, and frozen under adapters.
- `full` trains everything, with the tokens' loss alone, as transformers does unless output_router_logits is
  set.
- PEFT has no default targets for this family; ours are those of Qwen3.
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


def select_linears(layer: nn.Module) -> tuple[str, ...]:
    """Return the linears of attention and of all experts, or of the plain MLP in a layer without experts.

    mlp_only_layers and decoder_sparse_step of the config select the layers without experts.
    """
    if not isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
        return ATTENTION + GATED_MLP
    projections = [linear.removeprefix("mlp.") for linear in GATED_MLP]
    experts = layer.mlp.experts
    assert isinstance(experts, Experts)
    return ATTENTION + tuple(f"mlp.experts.{i}.{p}" for i in range(len(experts)) for p in projections)


def match_checkpoint(model: PreTrainedModel) -> None:
    """Replace transformers' stacked experts by lists of MLPs, whose parameters are the files' tensors."""
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
    select_linears=select_linears,
    outputs=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj"),
    match_checkpoint=match_checkpoint,
    compiles=False,  # the numbers of rows per expert depend on the data
)
