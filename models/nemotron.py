"""Nemotron and Minitron: LayerNorm with factors 1 + weight, squared ReLU without a gate, partial rotation.

A decoder layer of transformers does not hand the bounds of packed rows on to its attention, so packed rows
are separated by masks. PEFT has no default targets for this family; ours are those of Llama.
"""

import torch
from transformers import PreTrainedModel
from transformers.models.nemotron.modeling_nemotron import (
    NemotronForCausalLM,
    NemotronLayerNorm1P,
    NemotronRotaryEmbedding,
)

from models.family import ATTENTION, Family


class WideLayerNorm1P(NemotronLayerNorm1P):
    """transformers' norm, in the dtype of its input under autocast too.

    Under autocast on a GPU, transformers' norm casts its input to 16 bits. The residual stream is fp32 there,
    and in fp16 infinite beyond 65,504.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input)


def widen_norms(text_model: PreTrainedModel) -> None:
    """Replace each norm of a meta model by a WideLayerNorm1P."""
    for name, module in list(text_model.named_modules()):
        if isinstance(module, NemotronLayerNorm1P):
            text_model.set_submodule(name, WideLayerNorm1P(torch.Size(module.normalized_shape), module.eps))


FAMILY = Family(
    model_class=NemotronForCausalLM,
    rotary_class=NemotronRotaryEmbedding,
    linears=(*ATTENTION, "mlp.up_proj", "mlp.down_proj"),
    match_checkpoint=widen_norms,
    passes_row_bounds=False,
)
