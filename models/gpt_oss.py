"""GPT-OSS: routed experts in all layers, and attention sinks.

- A sink is a learned logit of each head, which takes part in the softmax over the keys, and whose share of it
  goes nowhere (models/sinks.py).
- The layers alternate between a sliding window and full attention. All linears have biases, and so has the
  router, which softmaxes the chosen experts' scores alone.
- An expert clamps gate and up (swiglu_limit, 7 in the released models):

      gate = min(x Wg + bg, limit)    up = clamp(x Wu + bu, -limit, limit)
      y = ((up + 1) gate sigmoid(alpha gate)) Wd + bd    alpha = 1.702

- The files stack experts, in 16 bits or MXFP4 (files/expert_stacks.py). MXFP4 is dequantized when it is read,
  and then packed as the train type says.

models/qwen3_moe.py says how experts are quantized, and which linears get adapters: those of attention. Sinks
stay as they are under adapters, and `full` trains them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM, GptOssRotaryEmbedding

from models.family import ATTENTION, Family
from models.moe import replace_experts, select_linears


class ClampedProduct(nn.Module):
    """What an expert computes between its linears; alpha, limit: as above."""

    def __init__(self, alpha: float, limit: float):
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class GptOssExpert(nn.Module):
    """One expert: [rows, H] -> [rows, H].

    Args:
        hidden: H.
        intermediate: features between the linears.
        alpha, limit: as above.
    """

    def __init__(self, hidden: int, intermediate: int, alpha: float, limit: float):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate)
        self.up_proj = nn.Linear(hidden, intermediate)
        self.down_proj = nn.Linear(intermediate, hidden)
        self.product = ClampedProduct(alpha, limit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.product(self.gate_proj(x), self.up_proj(x)))


def match_checkpoint(text_model: PreTrainedModel) -> None:
    """Make a linear of each expert's part of the stacks."""
    config = text_model.config
    theirs = next(text_model.get_submodule("layers").children()).mlp.experts  # type: ignore[union-attr]
    # Versions of transformers differ in whether the config or the class decides these two.
    sizes = (config.hidden_size, config.intermediate_size, theirs.alpha, theirs.limit)  # type: ignore[union-attr]
    replace_experts(text_model, partial(GptOssExpert, *sizes))  # type: ignore[arg-type]


FAMILY = Family(
    model_class=GptOssForCausalLM,
    rotary_class=GptOssRotaryEmbedding,
    linears=ATTENTION,
    select_linears=select_linears,
    outputs=("self_attn.o_proj", "mlp.experts.*.down_proj"),
    match_checkpoint=match_checkpoint,
    stacks_experts=True,
)
