"""A batch of token ids, and losses and logits of models on it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

import train
from data.batches import Batch
from data.rows import IGNORE
from launch import precision
from models.family import unwrapped_name
from tests.helpers.auto_classes import load_transformers_model
from tests.helpers.runs import set_up

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


def loss_and_logits(rank_info, args, random_adapters: bool = True) -> tuple[float, torch.Tensor]:
    """Set up a run; return (its loss sum, its logits) on IDS."""
    _, model = set_up(rank_info, args, random_adapters)
    targets = IDS.roll(-1, 1)
    targets[:, -1] = IGNORE
    with torch.no_grad():
        loss = train.loss_sum(model.eval(), Batch(IDS, targets)).item()
        return loss, model(input_ids=IDS, use_cache=False).logits.clone()


def summed_cross_entropy(logits: torch.Tensor) -> float:
    """Return the summed cross-entropy of IDS, each token predicted from those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").item()


def transformers_logits(folder: Path) -> torch.Tensor:
    """Return the logits of transformers' model on IDS, in fp32; fails if the weights do not fit."""
    model, report = load_transformers_model(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    # transformers 5.17 loads experts of MXFP4 in bf16, whatever `dtype` says.
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS).logits


def set_up_in_bf16(rank_info, args):
    """Return (job, model) in the dtypes of a GPU with bf16."""
    original, precision.has_bf16_gpu = precision.has_bf16_gpu, lambda: True
    try:
        return set_up(rank_info, args, random_adapters=False)
    finally:
        precision.has_bf16_gpu = original


def fixed_parameters(job, model) -> dict[str, torch.Tensor]:
    """Return {name: copy} of the parameters that no train type trains."""
    parameters = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
    return {name: p.detach().clone() for name, p in parameters.items() if job.family.is_fixed(name)}


def bf16_logits_and_buffers(rank_info, args):
    """Return (logits, {name: buffer}) of a model in the dtypes of a GPU with bf16."""
    job, model = set_up_in_bf16(rank_info, args)
    buffers = {unwrapped_name(name): buffer.clone() for name, buffer in model.named_buffers()}
    buffers |= fixed_parameters(job, model)
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.clone(), buffers
