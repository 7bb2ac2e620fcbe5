"""Gemma 2: sliding and full attention in turn, soft caps on attention scores and logits, a scaled embedding.

Attention is transformers' eager one, the only one that applies the cap on scores: PyTorch's fused kernels
cannot, and transformers up to 5.17 silently drops the cap for them. The price is the [B, heads, T, T] scores
of one layer in memory: in bf16, 8 bytes each until backward.
"""

import torch
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM, Gemma2RotaryEmbedding

from models.family import Family

# The norms after attention and MLP; Gemma's multiply by 1 + weight.
IDENTITY_INIT = (("post_attention_layernorm", -1.0), ("post_feedforward_layernorm", -1.0))

# Activations of attention and MLP may be beyond fp16's largest number.
WIDE_LINEARS = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def constant_buffers(config: Gemma2Config) -> dict[str, torch.Tensor]:
    """Return {the buffer's name: sqrt(hidden_size) in fp32}, the factor of the embeddings.

    The load rounds it to the embedding's dtype, as transformers does.
    """
    return {"model.embed_tokens.embed_scale": torch.tensor(config.hidden_size**0.5)}


def logit_cap(config) -> float | None:
    """Return c of Gemma 2's and 3's logits c tanh(z / c), or None without a cap.

    Classes of other families ignore this value of a config.
    """
    return config.final_logit_softcapping


FAMILY = Family(
    model_class=Gemma2ForCausalLM,
    rotary_class=Gemma2RotaryEmbedding,
    identity_init=IDENTITY_INIT,
    attention="eager",
    wide_linears=WIDE_LINEARS,
    constant_buffers=constant_buffers,
    logit_cap=logit_cap,
)
