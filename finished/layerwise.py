"""Logits of a model that need not fit anywhere: each part is read, computed with and dropped again.

For comparing models after training, in fp32. A part is a decoder layer, the embedding, the head, or a module
beside them; transformers' own forward calls them in order, and hooks around each bring its weights and drop them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from files.model_folder import CheckpointFiles
from finished.finished_run import Run, tensors_of
from launch.precision import Precision
from models.adapters import apply_method, choose_quantizers, packed_linears
from models.family import Family
from models.longrope import make_rotary
from models.lora import LoRALinear
from models.registry import build_on_meta
from parallel.shards import fill_shard
from quantization.layer import ConvertingModule, convert_tensor, quantize_linears, quantizer_for
from quantization.quantizers import pack_weight

FP32 = Precision(torch.float32, torch.float32)


def trained_logits(run: Run, adapter: dict[str, torch.Tensor], ids: torch.Tensor, device: torch.device):
    """Of the model that training had, packed as it was: [B, T, V] fp32 on the CPU. ids: [B, T]."""
    model = build_on_meta(run.model_config, run.family)
    apply_method(model, run.family, run.config, FP32, run.files)
    return _logits(model, run.family, run.files, adapter, ids, device)


def plain_logits(
    config: PretrainedConfig,
    family: Family,
    files: CheckpointFiles,
    ids: torch.Tensor,
    device: torch.device,
):
    """The same of a model whose files hold all of it."""
    model = build_on_meta(config, family).to(torch.float32)  # type: ignore[arg-type]
    return _logits(model, family, files, {}, ids, device)


def packed_logits(run: Run, ids: torch.Tensor, device: torch.device):
    """The same of run.files alone, packed as training packed its base: a merged model that is quantized again."""
    model = build_on_meta(run.model_config, run.family).to(torch.float32)  # type: ignore[arg-type]
    names = packed_linears(model, run.family, run.config)
    quantize_linears(model, choose_quantizers(names, run.config, run.files), torch.float32)
    return _logits(model, run.family, run.files, {}, ids, device)


def compare(a: torch.Tensor, b: torch.Tensor, lengths: list[int]) -> tuple[float, float]:
    """(largest difference, largest logit of a) over the first `lengths` positions of each row."""
    rows = [(x[:n], y[:n]) for x, y, n in zip(a, b, lengths, strict=True)]
    return (
        max((x - y).abs().max().item() for x, y in rows),
        max(x.abs().max().item() for x, _ in rows),
    )


@torch.no_grad()
def _logits(model: PreTrainedModel, family: Family, files, adapter, ids, device) -> torch.Tensor:
    model.requires_grad_(False).eval()
    with device:
        model.set_submodule(family.rotary, make_rotary(family, model.config))
    tied = {f"{family.head}.weight": f"{family.embedding}.weight"} if model.config.tie_word_embeddings else {}
    for path in _parts(model, family):
        part = model.get_submodule(path)
        load = partial(_load, model, path, family, files, adapter, device, tied)
        part.register_forward_pre_hook(lambda *_, load=load: load())
        part.register_forward_hook(_drop)
    return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def _drop(part: nn.Module, *_) -> None:
    part.to("meta")


def _parts(model: nn.Module, family: Family) -> list[str]:
    """Paths of modules that together hold every parameter, each once; a tied head by itself."""
    layers = range(len(family.decoder_layers(model)))
    parts = [family.embedding, *(f"{family.layers}.{i}" for i in layers), family.head]
    within = tuple(f"{path}." for path in parts)
    for name, _ in model.named_parameters():
        if not name.startswith(within):
            parts.append(name.rpartition(".")[0])
    return list(dict.fromkeys(parts))


def _load(
    model, path: str, family: Family, files, adapter, device: torch.device, tied: dict[str, str]
) -> None:
    part, prefix = model.get_submodule(path), f"{path}."
    part.to_empty(device=device)
    for module in part.modules():
        if isinstance(module, ConvertingModule):
            module.fill_buffers(device)
    for name, content in family.constant_buffers(model.config).items():
        if name.startswith(prefix):
            model.get_buffer(name).copy_(content)
    params, filled = dict(part.named_parameters()), set()
    stored = {name: name for name in files.tensors} | tied
    for name, source in stored.items():
        if name.startswith(prefix):
            where, _, last = name.rpartition(".")
            module = model.get_submodule(where)
            tensor = pack_weight(
                files.tensor_origin(source), files.read(source).to(device), quantizer_for(module, last)
            )
            for key, full in convert_tensor(module, last, tensor).items():
                key = f"{where}.{key}".removeprefix(prefix)
                fill_shard(params[key], full)
                filled.add(key)
    for name, module in part.named_modules(prefix=path):
        if isinstance(module, LoRALinear):
            module.set_peft_tensors(tensors_of(name, adapter))
            filled |= {
                f"{name}.{key}".removeprefix(prefix)
                for key in ("lora_A", "lora_B", "magnitude_change")
                if hasattr(module, key)
            }
    assert filled == set(params), f"not filled: {sorted(set(params) - filled)[:3]}"
