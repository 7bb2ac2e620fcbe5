"""Checkpoints that are packed by bitsandbytes, and loads in which nothing may be quantized."""

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

DENSE = "model.layers.1.mlp.down_proj.weight"  # one that the makers of the checkpoint left alone
QLORA = ["--train_type", "qlora"]


def pack_like_the_hub(
    base: Path, folder: Path, double: bool = True, storage=torch.uint8, **quantization
) -> dict:
    """Writes `base` as `*-bnb-4bit` repositories are: every linear but DENSE by bitsandbytes' own functions, in
    its own serialization. Returns the weights that it stands for, dequantized by bitsandbytes."""
    folder.mkdir()
    options = {"blocksize": 64, "quant_type": "nf4"} | quantization
    expected, stored = {}, {}
    for name, tensor in {k: v for f in base.glob("*.safetensors") for k, v in load_file(f).items()}.items():
        expected[name], stored[name] = tensor, tensor
        if name.endswith("_proj.weight") and name != DENSE:
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
    describe(folder, load_in_4bit=True, quant_method="bitsandbytes", bnb_4bit_use_double_quant=double)
    return expected


def describe(folder: Path, **quantization) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def never(*_):
    raise AssertionError("quantized again")


def without_quantizing(rank_info, function, *args):
    """function(place, *args) where quantizing anything fails."""
    originals = NF4.quantize, HQQ.quantize
    NF4.quantize = HQQ.quantize = never
    try:
        return function(rank_info, *args)
    finally:
        NF4.quantize, HQQ.quantize = originals


def check(folder, alpaca_file, *more) -> train.Job:
    """A run that goes on to its start, of one rank."""
    rank_info = dataclasses.make_dataclass("RankInfo", ["world"])(1)
    return make_job(rank_info, ["--model_name", folder, "--dataset", alpaca_file, *more])
