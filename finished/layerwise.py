"""Compute a model's logits with one submodule in memory at a time.

For comparing models after training, in fp32. A submodule is a decoder layer, the embedding, the head, a
vision part, or a module next to them. The model's forward calls them in order; hooks load each one's weights
before and drop them after.

Shapes: B rows, T tokens, P positions of them, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from data.image_batches import ImageBatch
from files.model_folder import CheckpointFiles
from finished.finished_run import Run, select_module_tensors
from launch.precision import Precision
from models.adapters import apply_method, choose_quantizers, packed_linears
from models.family import Family
from models.longrope import make_rotary
from models.lora import LowRankModule
from models.registry import build_on_meta
from parallel.shards import fill_part, fill_shard
from quantization.layer import (
    ConvertingModule,
    convert_tensor,
    locate_tensor,
    part_of,
    quantize_linears,
    quantizer_for,
)
from quantization.packing import pack_weight

FP32_PRECISION = Precision(torch.float32, torch.float32)


@dataclass(frozen=True)
class LogitInputs:
    """What a model reads, and where its logits are wanted.

    Attributes:
        ids: [B, T] int64, padded on the right.
        images: those of the rows, for a model with its vision parts; None = they have none.
        positions: [P] int64, of the T tokens.
    """

    ids: torch.Tensor
    images: ImageBatch | None
    positions: torch.Tensor


def trained_logits(
    run: Run, adapter: dict[str, torch.Tensor], inputs: LogitInputs, device: torch.device
) -> torch.Tensor:
    """Compute the logits of the base, packed as in training, with its adapter.

    Returns [B, P, V] fp32 on the CPU, at the positions of the inputs.

    Args:
        run: the opened RUN.
        adapter: as `read_adapter` returns it; {} for a run without an adapter.
        inputs: what the model reads.
        device: device to compute on.
    """
    model = build_on_meta(run.model_config, run.family)
    apply_method(model, run.family, run.config, FP32_PRECISION, run.files)
    return _compute_logits(model, run.family, run.files, adapter, inputs, device)


def plain_logits(
    config: PretrainedConfig,
    family: Family,
    files: CheckpointFiles,
    inputs: LogitInputs,
    device: torch.device,
) -> torch.Tensor:
    """Compute the logits of a model without packing or adapter, as `trained_logits` returns them.

    Args:
        config: the model's config.
        family: its family.
        files: its weights.
        inputs: what the model reads.
        device: device to compute on.
    """
    model = build_on_meta(config, family).to(torch.float32)  # type: ignore[arg-type]
    return _compute_logits(model, family, files, {}, inputs, device)


def packed_logits(run: Run, inputs: LogitInputs, device: torch.device) -> torch.Tensor:
    """Compute the logits of `run.files` without an adapter, packed as training packed its base.

    This is a merged model that is quantized again. Returns logits as `trained_logits` does.
    """
    model = build_on_meta(run.model_config, run.family).to(torch.float32)  # type: ignore[arg-type]
    names = packed_linears(model, run.family, run.config, run.files)
    quantize_linears(model, choose_quantizers(names, run.config, run.files), torch.float32)
    return _compute_logits(model, run.family, run.files, {}, inputs, device)


def compare_logits(
    a: torch.Tensor, b: torch.Tensor, positions: torch.Tensor, lengths: list[int]
) -> tuple[float, float]:
    """Return (largest |a - b|, largest |a|) of logits at `positions`, as far as they are within each row."""
    rows = [(x[positions < n], y[positions < n]) for x, y, n in zip(a, b, lengths, strict=True)]
    difference = max((x - y).abs().max().item() for x, y in rows)
    return difference, max(x.abs().max().item() for x, _ in rows)


@torch.no_grad()
def _compute_logits(
    model: PreTrainedModel,
    family: Family,
    files: CheckpointFiles,
    adapter: dict[str, torch.Tensor],
    inputs: LogitInputs,
    device: torch.device,
) -> torch.Tensor:
    """Run a model of the meta device; hooks load each submodule before it runs and drop it afterwards."""
    model.requires_grad_(False).eval()
    with device:
        model.set_submodule(family.rotary, make_rotary(family, model.config))
    tied = {f"{family.head}.weight": f"{family.embedding}.weight"} if model.config.tie_word_embeddings else {}
    for path in _submodule_paths(model, family):
        submodule = model.get_submodule(path)
        load = partial(_load_submodule, model, path, family, files, adapter, device, tied)
        submodule.register_forward_pre_hook(lambda *_, load=load: load())
        submodule.register_forward_hook(_unload_submodule)
    given = {"input_ids": inputs.ids.to(device), "logits_to_keep": inputs.positions.to(device)}
    if inputs.images is None:
        return model(use_cache=False, **given).logits.float().cpu()
    images = inputs.images.map_tensors(lambda tensor: tensor.to(device))
    return model(images=images, **given).logits.float().cpu()


def _unload_submodule(submodule: nn.Module, *_) -> None:
    submodule.to("meta")


def _submodule_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the paths of submodules that together hold every parameter once. A tied head is one of them.

    A vision part is one: it is not larger than an embedding.
    """
    layers = range(len(family.decoder_layers(model)))
    parts = [family.embedding, *(f"{family.layers}.{i}" for i in layers), family.head]
    parts += family.unused if family.has_images else ()
    within = tuple(f"{path}." for path in parts)
    for name, _ in model.named_parameters():
        if not name.startswith(within):
            parts.append(name.rpartition(".")[0])
    return list(dict.fromkeys(parts))


def _load_submodule(
    model: PreTrainedModel,
    path: str,
    family: Family,
    files: CheckpointFiles,
    adapter: dict[str, torch.Tensor],
    device: torch.device,
    tied: dict[str, str],
) -> None:
    """Move the submodule `path` to the device; fill it with constants, the files' weights and the adapter.

    tied: {weight that is not in the files: the weight whose tensor it shares}.
    """
    submodule, prefix = model.get_submodule(path), f"{path}."
    submodule.to_empty(device=device)
    for module in submodule.modules():
        if isinstance(module, ConvertingModule):
            module.fill_buffers(device)
    for name, content in family.all_constant_buffers(model.config).items():
        if name.startswith(prefix):
            model.get_buffer(name).copy_(content)
    params, filled = dict(submodule.named_parameters()), set()
    stored = {name: name for name in files.tensors} | tied
    for name, source in stored.items():
        if name.startswith(prefix):
            parent, module, last = locate_tensor(model, name)
            weight = files.read(source).to(device)
            tensor = pack_weight(files.tensor_origin(source), weight, quantizer_for(module, last))
            for key, full in convert_tensor(module, last, tensor).items():
                part, key = part_of(module, last, key), f"{parent}.{key}".removeprefix(prefix)
                fill_part(params[key], part, full)
                filled.add(key)
    for name, module in submodule.named_modules(prefix=path):
        if isinstance(module, LowRankModule):
            module.set_peft_tensors(select_module_tensors(module.peft_path(name), adapter), fill_shard)
            filled |= {
                f"{name}.{key}".removeprefix(prefix)
                for key in ("lora_A", "lora_B", "magnitude_change")
                if hasattr(module, key)
            }
    own = select_module_tensors(path, adapter)
    for key in own.keys() & params.keys():  # an embedding or a head that was trained beside the adapter
        fill_shard(params[key], own[key])
    assert filled == set(params), f"not filled: {sorted(set(params) - filled)[:3]}"
