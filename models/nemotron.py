"""Nemotron and Minitron: LayerNorm with factors 1 + weight, squared ReLU without a gate, partial rotation.

A decoder layer of transformers does not hand the bounds of packed rows on to its attention, so packed rows
are separated by masks. PEFT has no default targets for this family; ours are those of Llama.
"""

from transformers.models.nemotron.modeling_nemotron import NemotronForCausalLM, NemotronRotaryEmbedding

from models.family import ATTENTION, Family

FAMILY = Family(
    model_class=NemotronForCausalLM,
    rotary_class=NemotronRotaryEmbedding,
    linears=(*ATTENTION, "mlp.up_proj", "mlp.down_proj"),
    passes_row_bounds=False,
)
