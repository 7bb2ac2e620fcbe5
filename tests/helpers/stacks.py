"""GPT-OSS's stacked experts: made from the parameters of single experts, and written in MXFP4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from files.names import CONFIG, INDEX, SINGLE_FILE

LINEARS = ("gate_proj", "up_proj", "down_proj")
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
EXPERTS = 6  # of the tiny model


def stack_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return GPT-OSS's weights by the names of its parameters in transformers."""
    state = dict(state)
    for path in sorted({name.partition(".experts.")[0] for name in state if ".experts." in name}):
        count = sum(name.startswith(f"{path}.experts.") for name in state) // 6

        def take(linear: str, kind: str, path: str = path, count: int = count) -> list[torch.Tensor]:
            return [state.pop(f"{path}.experts.{e}.{linear}.{kind}") for e in range(count)]

        for kind, ending in (("weight", ""), ("bias", "_bias")):
            gate, up, down = (take(linear, kind) for linear in LINEARS)
            both = []
            for one, other in zip(gate, up, strict=True):
                rows = torch.empty(2 * len(one), *one.shape[1:], dtype=one.dtype)
                rows[::2], rows[1::2] = one, other
                both.append(rows)
            for name, parts in (("gate_up_proj", both), ("down_proj", down)):
                state[f"{path}.experts.{name}{ending}"] = torch.stack(
                    [part.mT if part.dim() > 1 else part for part in parts]
                )
    return state


def quantize_to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (blocks [E, O, I / 32, 16], scales [E, O, I / 32]) of stacked weights [E, I, O], rounded."""
    groups = weight.float().mT.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).clamp_min(1e-30).log2().ceil()
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - MAGNITUDES).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8).contiguous(), (exponents + 127).to(torch.uint8).contiguous()


def save_mxfp4(base: Path, folder: Path) -> Path:
    """Write a checkpoint of GPT-OSS as the hub has it: experts in MXFP4, the rest in bf16."""
    tensors = {}
    for path in base.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantize_to_mxfp4(tensor)
            else:
                tensors[name] = tensor.to(torch.bfloat16)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config |= {"dtype": "bfloat16", "quantization_config": quantization}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def dequantized_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder, those in MXFP4 as transformers dequantizes them."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        blocks, scales = (tensors.pop(f"{name}{ending}") for ending in ("_blocks", "_scales"))
        tensors[name] = convert_moe_packed_tensors(blocks, scales)
    return tensors


def save_dequantized(mxfp4: Path, folder: Path) -> Path:
    """Write the 16-bit model of a folder in MXFP4."""
    shutil.copytree(mxfp4, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(dequantized_tensors(mxfp4), folder / SINGLE_FILE, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]
    (folder / CONFIG).write_text(json.dumps(config))
    return folder
