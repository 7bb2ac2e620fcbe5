"""Random weights of a model's shapes, in place of its files: what a trial of its memory and speed trains.

Each shape is packed once, on the device. So a model of any size is filled in seconds, without reading its
files, and all numbers are of the usual size: an adapter's step is finite.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedModel

from files.weight_headers import WeightHeaders
from launch.ranks import RankInfo
from models.family import Family, unwrapped_name
from parallel.shards import fill_part
from quantization.layer import convert_tensor, locate_tensor, part_of, quantizer_for
from quantization.packing import pack_weight
from quantization.quantizers import PackedWeight, Quantizer
from quantize_layers import allocate, fill_initial_values

STD = 0.02  # of a weight, as pretraining begins with


def fill_with_samples(
    model: PreTrainedModel,
    family: Family,
    files: WeightHeaders,
    rank_info: RankInfo,
    param_device: torch.device,
    seed: int,
    *_: Any,
) -> None:
    """Allocate a meta model and fill it as `load_weights` does, but with random weights. Not collective.

    Args:
        model, family, rank_info, param_device, seed: as for `load_weights`.
        files: only the names, shapes and dtypes of its tensors are used.

    Raises AssertionError if a parameter was not filled.
    """
    allocate(model, family, rank_info.device, param_device)
    params = {unwrapped_name(name): p for name, p in model.named_parameters()}
    alike: dict[tuple, list[str]] = defaultdict(list)  # tensors that may have the same content
    for name, stored in files.tensors.items():
        path, module, attribute = locate_tensor(model, name)
        is_vector, quantizer = len(stored.shape) == 1, quantizer_for(module, attribute)
        alike[tuple(stored.shape), str(stored.dtype), quantizer, is_vector].append(name)
    filled = set()
    generator = torch.Generator(rank_info.device).manual_seed(seed)
    for (shape, _dtype, quantizer, _is_vector), names in alike.items():
        dtype = files.tensors[names[0]].dtype
        sample = make_sample(shape, dtype, quantizer, generator)
        for name in names:
            path, module, attribute = locate_tensor(model, name)
            for key, content in convert_tensor(module, attribute, sample).items():
                fill_part(params[f"{path}.{key}"], part_of(module, attribute, key), content)
                filled.add(f"{path}.{key}")
        del sample
    filled |= fill_initial_values(model, params, seed)
    assert filled == set(params), f"not filled: {sorted(set(params) - filled)[:3]}"
    if rank_info.device.type == "cuda":
        torch.cuda.empty_cache()  # of the samples, which a real load does not make


def make_sample(
    shape: tuple[int, ...], dtype: Any, quantizer: Quantizer | None, generator: torch.Generator
) -> torch.Tensor | PackedWeight:
    """Return a random weight, packed if there is a quantizer; ones for a vector, which may be a norm's.

    Args:
        shape: of the weight.
        dtype: of the weight in its file; a text for one that is packed there.
        quantizer: None = it stays as it is.
        generator: on the device of the result.
    """
    device = generator.device
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        dtype = torch.bfloat16
    if quantizer and dtype not in quantizer.dtypes:
        dtype = quantizer.dtypes[0]
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    weight = torch.empty(shape, dtype=dtype, device=device).normal_(0, STD, generator=generator)
    return pack_weight("a random weight", weight, quantizer)
