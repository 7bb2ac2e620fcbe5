"""The weights of a trained model, one at a time: each read from its file, merged in fp32, and given to the writer.

LoRA:  W' = W + s B A
DoRA:  W' = m * (W + s B A) / ||W + s B A||_row, m as the adapter's file has it

s = lora_alpha / R. Two bases W: the weights of the files (`original`), or what training computed with, packed
and unpacked again (`dequantized`). DoRA's norm is of the base that is merged into, as in PEFT: over the original
base m stays the length of each row, and only the direction has the quantization error in it.

Shapes: O output features, I input features, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from checkpoints.model_writer import CHUNK_BYTES, TensorEntry, file_entries
from files.finite import check_finite, is_finite
from files.model_folder import CheckpointFiles
from files.tensors import PinnedBuffers
from finished.finished_run import PREFIX, Run
from launch.memory import empty_on_host
from models.adapters import choose_quantizers, packed_linears
from models.registry import build_on_meta
from options.errors import UserError
from quantization.operators import TINY
from quantization.quantizers import PackedWeight, Quantizer, pack_weight


def merged_weight(weight: torch.Tensor, tensors: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """W' [O, I] fp32. weight: W [O, I] fp32, which is overwritten; tensors: the layer's, by PEFT's names below it."""
    a, b = (tensors[name].to(weight.device, torch.float32) for name in ("lora_A.weight", "lora_B.weight"))
    weight.addmm_(b, a, alpha=scaling)
    if "lora_magnitude_vector" in tensors:
        # The floor is training's: a row of zeros stays one.
        norm = torch.linalg.vector_norm(weight, dim=1).square_().clamp_min_(TINY).sqrt_()
        weight *= (tensors["lora_magnitude_vector"].to(weight.device, torch.float32) / norm)[:, None]
    return weight


def packed_in_training(run: Run) -> dict[str, Quantizer]:
    """{weight: how training packed it} of every tensor that training did not compute with as it is in its file."""
    if not run.config.method.quantizer:
        return {}
    names = packed_linears(build_on_meta(run.model_config, run.family), run.family, run.config)
    quantizers = choose_quantizers(names, run.config, run.files)
    return {f"{name}.weight": quantizer for name, quantizer in quantizers.items()}


def merged_entries(
    run: Run,
    adapter: dict[str, torch.Tensor],
    dequantized: bool,
    dtype_of: Callable[[torch.dtype], torch.dtype],
    device: torch.device,
) -> dict[str, TensorEntry]:
    """Every tensor of the merged model, in the files' order. adapter: as `read_adapter` gives it, or empty;
    dtype_of: the dtype to write what is stored in the given one (uint8: packed in its file); device: where the
    weights are merged."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter.items():
        path, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        layers.setdefault(f"{path}.weight", {})[f"lora_{part}"] = tensor
    quantizers = packed_in_training(run) if dequantized else {}
    assert not run.files.packed or dequantized
    scaling = run.config.lora_alpha / run.config.lora_rank if adapter else 0.0
    buffers = PinnedBuffers(device.type) if device.type == "cuda" else None
    entries = file_entries(run.files)
    for name, entry in entries.items():
        dtype, quantizer, tensors = dtype_of(entry.dtype), quantizers.get(name), layers.pop(name, None)
        if quantizer or tensors:
            make = partial(_weight, run.files, name, quantizer, tensors, scaling, device, buffers)
            entries[name] = TensorEntry(dtype, entry.shape, partial(_pieces, make, name, dtype))
        elif dtype != entry.dtype:
            pieces = partial(_converted, run.files, name, dtype)
            entries[name] = dataclasses.replace(entry, dtype=dtype, chunks=pieces)
    assert not layers, f"without a weight: {next(iter(layers))}"
    return entries


def _weight(
    files: CheckpointFiles,
    name: str,
    quantizer: Quantizer | None,
    tensors: dict[str, torch.Tensor] | None,
    scaling: float,
    device: torch.device,
    buffers: PinnedBuffers | None,
) -> torch.Tensor:
    """One weight of the merged model: [O, I] fp32 on the device."""
    stored = files.read(name, buffers).to(device)
    if isinstance(stored, torch.Tensor):
        check_finite(files.tensor_origin(name), stored)
    source = pack_weight(
        files.tensor_origin(name), stored, quantizer
    )  # from the stored dtype, as in training
    if isinstance(source, PackedWeight):
        assert quantizer is not None
        parts = source.codes, source.scales, quantizer.table(device)
        weight = quantizer.dequantize(*parts, files.tensors[name].shape, torch.float32)
    else:
        weight = source.to(torch.float32)
    return merged_weight(weight, tensors, scaling) if tensors else weight


@torch.no_grad()
def _pieces(make: Callable[[], torch.Tensor], name: str, dtype: torch.dtype) -> Iterator:
    yield _as_bytes(_fits(make().to(dtype), name))


@torch.no_grad()
def _converted(files: CheckpointFiles, name: str, dtype: torch.dtype) -> Iterator:
    """A tensor that is only stored in another dtype: row by row, since an embedding is larger than any linear."""
    tensor = files.read(name)
    assert isinstance(tensor, torch.Tensor)
    flat = tensor.view(-1)
    for part in flat.split(CHUNK_BYTES // flat.dtype.itemsize):
        check_finite(files.tensor_origin(name), part)
        yield _as_bytes(_fits(part.to(dtype), name))


def _as_bytes(tensor: torch.Tensor):
    if tensor.is_cuda:  # into page-locked memory, which torch uses again for the next one
        tensor = empty_on_host(tensor, "cuda").copy_(tensor)
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _fits(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Raises UserError for what the dtype cannot hold."""
    if not is_finite(tensor):
        how = "; choose bfloat16 or float32" if tensor.dtype == torch.float16 else ""
        raise UserError(
            f"{name}: has values that {str(tensor.dtype).removeprefix('torch.')} cannot hold{how}"
        )
    return tensor
