"""fp16 with a residual stream beyond fp16's numbers, as in Gemma: nothing overflows under autocast."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.helpers.logits import IDS
from tests.helpers.parity import arguments
from tests.helpers.runs import train_run

SCALE = 40_000  # of the norms behind attention and MLP, whose results are then above 65,504


def save_overflowing(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint, with large norms behind attention and MLP."""
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "layernorm" in name and ".post_" in name:
                tensors[name] = (1 + tensors[name]) * SCALE - 1
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("gemma3", 4), *(pytest.param(kind, 200, marks=pytest.mark.slow) for kind in ("gemma2", "gemma3"))],
)
def test_no_step_is_bad(kind, steps, checkpoints, short_rows, one_rank, tmp_path):
    """transformers' plain fp16 is NaN with these weights; under autocast the first loss is that of fp32."""
    overflowing = save_overflowing(checkpoints(kind), tmp_path / kind)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(overflowing, dtype=torch.float16)(input_ids=IDS)
    assert plain.logits.isnan().any()
    args = arguments(overflowing, short_rows, "bnb_dora")
    args += ["--max_steps", str(steps), "--num_epochs", "100", "--batch_size", "2", "--context_length", "64"]
    fp16 = one_rank(train_run, [*args, "--precision", "fp16_autocast"])[0]
    assert len(fp16[0]) == steps and all(map(math.isfinite, fp16[0]))
    assert sum(norm is None for norm in fp16[2]) <= 4  # the first, until the loss's scale is found
    assert all(tensor.isfinite().all() for tensor in fp16[1].values())
    fp32 = one_rank(train_run, [*args, "--max_steps", "1"])[0]
    assert fp16[0][0] == pytest.approx(fp32[0][0], rel=1e-2)
