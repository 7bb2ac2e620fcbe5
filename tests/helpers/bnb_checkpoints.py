"""Checkpoints packed by bitsandbytes, and loads in which nothing may be quantized."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file

import train
from quantization.hqq import HQQ
from quantization.nf4 import NF4
from tests.helpers.runs import make_job

DENSE = "model.layers.1.mlp.down_proj.weight"  # the one linear that stays unpacked
# Ends of the names of linears, of experts, routers and gates of shared experts too.
LINEARS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight", "gate.weight")
QLORA = ["--train_type", "qlora"]


def pack_like_the_hub(
    base: Path, folder: Path, double: bool = True, storage=torch.uint8, **quantization
) -> dict:
    """Write `base` like a `*-bnb-4bit` repository, with every linear but DENSE packed by bitsandbytes.

    Of a wrapper linears of the vision tower are packed, too, as transformers does it. Returns the weights
    dequantized by bitsandbytes.
    """
    folder.mkdir()
    options = {"blocksize": 64, "quant_type": "nf4"} | quantization
    expected, stored = {}, {}
    for name, tensor in {k: v for f in base.glob("*.safetensors") for k, v in load_file(f).items()}.items():
        expected[name], stored[name] = tensor, tensor
        if name.endswith(LINEARS) and not name.endswith(DENSE.removeprefix("model.")):
            codes, state = bnb.quantize_4bit(
                tensor, compress_statistics=double, quant_storage=storage, **options
            )
            stored[name] = codes
            stored |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
            # A single row, as `reference` of tests/quantization/test_quantizers.py says.
            state.shape = torch.Size([1, tensor.numel()])
            expected[name] = bnb.dequantize_4bit(codes, state).view(tensor.shape)
    save_file(stored, folder / "model.safetensors")
    for path in base.glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, folder)
    set_quantization_config(
        folder, load_in_4bit=True, quant_method="bitsandbytes", bnb_4bit_use_double_quant=double
    )
    return expected


def set_quantization_config(folder: Path, **quantization) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def fail_to_quantize(*_):
    raise AssertionError("quantized again")


def without_quantizing(rank_info, function, *args):
    """Return function(rank_info, *args), called while quantizing anything fails."""
    originals = NF4.quantize, HQQ.quantize
    NF4.quantize = HQQ.quantize = fail_to_quantize
    try:
        return function(rank_info, *args)
    finally:
        NF4.quantize, HQQ.quantize = originals


def make_single_rank_job(folder, alpaca_file, *more) -> train.Job:
    """Check a run of one rank up to its start."""
    rank_info = dataclasses.make_dataclass("RankInfo", ["world"])(1)
    return make_job(rank_info, ["--model_name", folder, "--dataset", alpaca_file, *more])
