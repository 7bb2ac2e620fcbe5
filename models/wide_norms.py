"""Norms behind attention and MLP in fp32 under autocast to fp16, for families that have such norms.

Under autocast to fp16 the residual stream is fp32: the embedding's weights are, and a sum of fp32 and fp16 is
fp32. A norm behind a projection gets fp16, though, and transformers returns a norm's result in the dtype of
its input. In Gemma the weights of these norms are what makes the stream large, beyond fp16's 65,504: the
result is infinite before it is added. With an fp32 input it is fp32.

This keeps the stream finite. It is enough where norms also precede attention and MLP, and make what they read
small again (Gemma, GLM-4). Where none do (OLMo, EXAONE 4), the linears that read the stream must be wide, too
(models/wide_linears.py).
"""

from __future__ import annotations

import torch
from torch import nn

from models.family import Family


def widen_norms(model: nn.Module, family: Family) -> None:
    """Let the norms that `family.identity_init` names cast fp16 inputs to fp32 if their weights are fp32."""
    for layer in family.decoder_layers(model):
        modules = dict(layer.named_modules())
        for name, _ in family.identity_init:
            if name in modules:
                modules[name].register_forward_pre_hook(_cast_input)


def _cast_input(norm: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    """Return the arguments in fp32, or None to leave them as they are (a forward pre-hook)."""
    has_wide_weight = all(parameter.dtype == torch.float32 for parameter in norm.parameters())
    return (args[0].float(),) if has_wide_weight and args[0].dtype == torch.float16 else None
