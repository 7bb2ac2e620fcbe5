"""Merge the adapter into the weights: read each from its file, merge it in fp32, and pass it to the writer.

LoRA:  W' = W + s B A DoRA:  W' = m * (W + s B A) / ||W + s B A||_row, m as in the adapter's file

s = `Config.lora_scaling`. W is the weight of the files (`original`), or the weight that training computed
with: packed and dequantized (`dequantized`). DoRA's norm is that of the base merged into, as in PEFT: over
the original base m is still the length of each row, and only the direction has the quantization error.

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
from files.saved_adapter import split_name
from files.tensors import PinnedBuffers
from finished.finished_run import Run
from launch.memory import empty_on_host
from models.adapters import choose_quantizers, packed_linears
from models.expert_adapters import PEFT_PATHS, split_peft_tensors
from models.moe import MEMBERS, member_names
from models.registry import build_on_meta
from models.vision_parts import vision_matrices
from options.errors import UserError
from quantization.dora_operators import TINY
from quantization.packing import pack_weight
from quantization.quantizers import PackedWeight, Quantizer

WHOLE = ("weight", "bias")  # ends of the names of an adapter's tensors that were trained in full


def merge_adapter(weight: torch.Tensor, tensors: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """Merge a linear's LoRA or DoRA adapter into its weight, in place; return the merged weight.

    A bare matrix [I, O] has B [I, R] and A [R, O] (LoRAProjector in models/gemma3.py). The sum is the same.

    Args:
        weight: W [O, I] fp32; it is overwritten.
        tensors: the adapter's tensors, by PEFT's names below the module.
        scaling: s.
    """
    a, b = (tensors[name].to(weight.device, torch.float32) for name in ("lora_A.weight", "lora_B.weight"))
    weight.addmm_(b, a, alpha=scaling)
    if "lora_magnitude_vector" in tensors:
        # The same floor as in training: a row of zeros remains zero.
        norm = torch.linalg.vector_norm(weight, dim=1).square_().clamp_min_(TINY).sqrt_()
        weight *= (tensors["lora_magnitude_vector"].to(weight.device, torch.float32) / norm)[:, None]
    return weight


def _take_expert_adapters(
    adapter: dict[str, torch.Tensor], rank: int, alternates: bool
) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """Yield {weight's name: tensors of its own adapter} for each stack of experts, and take these out.

    Args:
        adapter: {PEFT's name: tensor}, changed.
        rank: --lora_expert_rank; 0: there are none.
        alternates: whether gate and up alternate in B, as `StackedLoRA` says.
    """
    stacks: dict[str, dict[str, torch.Tensor]] = {}
    for name in list(adapter) if rank else ():
        module, key = split_name(name)
        if module.removesuffix(".base_layer").endswith(".experts"):
            stacks.setdefault(module, {})[key] = adapter.pop(name)
    for module, tensors in stacks.items():
        experts = module.removesuffix(".base_layer")
        stack = next(name for name, below in PEFT_PATHS.items() if f"{experts}{below}" == module)
        count = len(tensors["lora_A.weight"]) // rank
        a, b = split_peft_tensors(tensors, count, alternates and len(MEMBERS[stack]) > 1)
        rows = b.shape[1] // len(MEMBERS[stack])
        own = {}
        for i, member in enumerate(member_names(stack, count)):
            expert, part = divmod(i, len(MEMBERS[stack]))
            chosen = slice(part * rows, (part + 1) * rows)
            own[f"{experts}.{member}.weight"] = {
                "lora_A.weight": a[expert],
                "lora_B.weight": b[expert, chosen],
                **{name: tensor[expert, chosen] for name, tensor in tensors.items()},
            }
        yield own


def find_training_quantizers(run: Run) -> dict[str, Quantizer]:
    """Return {name of a weight that training packed: its quantizer}; {} if training packed none."""
    if not run.config.method.quantizer:
        return {}
    model = build_on_meta(run.model_config, run.family)
    names = packed_linears(model, run.family, run.config, run.files)
    quantizers = choose_quantizers(names, run.config, run.files)
    return {f"{name}.weight": quantizer for name, quantizer in quantizers.items()}


def make_merged_entries(
    run: Run,
    adapter: dict[str, torch.Tensor],
    dequantized: bool,
    dtype_of: Callable[[torch.dtype], torch.dtype],
    device: torch.device,
) -> dict[str, TensorEntry]:
    """Return {parameter's name: TensorEntry} of the merged model. Tensors are merged when written.

    Args:
        run: the opened RUN.
        adapter: as `read_adapter` returns it, or empty.
        dequantized: whether to merge into the weights that training computed with.
        dtype_of: maps a stored dtype (uint8: packed in its file) to the dtype to write.
        device: device that merges the weights.
    """
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    scalings: dict[str, float] = {}  # of weights of experts
    adapter = dict(adapter)
    for stack in _take_expert_adapters(adapter, run.config.lora_expert_rank, run.family.stacks_experts):
        adapters |= stack
        scalings |= dict.fromkeys(stack, run.config.expert_scaling)
    matrices = {name.rpartition(".")[0]: name for name in vision_matrices(run.family, run.config)}
    for name, tensor in adapter.items():
        module, key = split_name(name)
        target = f"{module}.{key}" if key in WHOLE else matrices.get(module, f"{module}.weight")
        adapters.setdefault(target, {})[key] = tensor
    if run.model_config.tie_word_embeddings:  # the files hold a tied weight once
        adapters.pop(f"{run.family.head}.weight", None)
    quantizers = find_training_quantizers(run) if dequantized else {}
    assert not run.files.packed or dequantized
    default = run.config.lora_scaling if adapter else 0.0
    buffers = PinnedBuffers(device.type) if device.type == "cuda" else None
    entries = file_entries(run.files)
    for name, entry in entries.items():
        # As transformers saves them: fixed parameters keep their dtype in a model of any other.
        dtype = entry.dtype if run.family.is_fixed(name) else dtype_of(entry.dtype)
        quantizer, tensors = quantizers.get(name), adapters.pop(name, None)
        trained = (tensors or {}).get(name.rpartition(".")[2])
        if trained is not None:  # in full: it replaces the base's
            make_trained = partial(_yield_trained_chunks, trained, name, dtype)
            entries[name] = TensorEntry(dtype, entry.shape, make_trained)
        elif quantizer or tensors:
            scaling = scalings.get(name, default)
            make = partial(_read_merged_weight, run.files, name, quantizer, tensors, scaling, device, buffers)
            entries[name] = TensorEntry(dtype, entry.shape, partial(_yield_merged_chunk, make, name, dtype))
        elif dtype != entry.dtype:
            pieces = partial(_yield_converted_chunks, run.files, name, dtype)
            entries[name] = dataclasses.replace(entry, dtype=dtype, chunks=pieces)
    assert not adapters, f"without a weight: {next(iter(adapters))}"
    return entries


def make_apart_entries(
    files: CheckpointFiles, dtype_of: Callable[[torch.dtype], torch.dtype], device: torch.device
) -> dict[str, TensorEntry]:
    """Return {name in the files: TensorEntry} of the parts that are not built: unchanged, but never packed.

    Args:
        files: files of the base.
        dtype_of, device: as for `make_merged_entries`.
    """
    if files.apart is None:
        return {}
    entries = file_entries(files.apart)
    for name, entry in entries.items():
        dtype = dtype_of(entry.dtype)
        if name in files.apart.packed:
            quantizer = files.apart.packed[name].quantizer
            make = partial(_read_merged_weight, files.apart, name, quantizer, None, 0.0, device, None)
            entries[name] = TensorEntry(dtype, entry.shape, partial(_yield_merged_chunk, make, name, dtype))
        elif dtype != entry.dtype:
            pieces = partial(_yield_converted_chunks, files.apart, name, dtype)
            entries[name] = dataclasses.replace(entry, dtype=dtype, chunks=pieces)
    return entries


def _read_merged_weight(
    files: CheckpointFiles,
    name: str,
    quantizer: Quantizer | None,
    tensors: dict[str, torch.Tensor] | None,
    scaling: float,
    device: torch.device,
    buffers: PinnedBuffers | None,
) -> torch.Tensor:
    """Return a weight in fp32 on the device: read, dequantized if training packed it, its adapter merged.

    Args:
        files: files of the base.
        name: name of the weight.
        quantizer: how training packed it, or None.
        tensors: its adapter's tensors, or None.
        scaling: s.
        device: device that computes.
        buffers: page-locked buffers for reading, or None.
    """
    stored = files.read(name, buffers).to(device)
    if isinstance(stored, torch.Tensor):
        check_finite(files.tensor_origin(name), stored)
    source = pack_weight(
        files.tensor_origin(name), stored, quantizer
    )  # from the stored dtype, as in training
    if isinstance(source, PackedWeight):
        assert quantizer is not None
        packed = source.codes, source.scales, quantizer.table(device)
        weight = quantizer.dequantize(*packed, files.tensors[name].shape, torch.float32)
    else:
        weight = source.to(torch.float32)
    return merge_adapter(weight, tensors, scaling) if tensors else weight


@torch.no_grad()
def _yield_merged_chunk(make: Callable[[], torch.Tensor], name: str, dtype: torch.dtype) -> Iterator:
    yield _as_bytes(_check_range(make().to(dtype), name))


@torch.no_grad()
def _yield_converted_chunks(files: CheckpointFiles, name: str, dtype: torch.dtype) -> Iterator:
    """Convert a tensor to `dtype` in chunks, since an embedding is larger than any linear."""
    tensor = files.read(name)
    assert isinstance(tensor, torch.Tensor)
    flat = tensor.view(-1)
    for chunk in flat.split(CHUNK_BYTES // flat.dtype.itemsize):
        check_finite(files.tensor_origin(name), chunk)
        yield _as_bytes(_check_range(chunk.to(dtype), name))


def _yield_trained_chunks(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> Iterator:
    """Convert a weight of the adapter's file to `dtype` in chunks."""
    for chunk in tensor.view(-1).split(CHUNK_BYTES // tensor.dtype.itemsize):
        yield _as_bytes(_check_range(chunk.to(dtype), name))


def _as_bytes(tensor: torch.Tensor):
    if tensor.is_cuda:  # copy to page-locked memory, which torch reuses for the next tensor
        tensor = empty_on_host(tensor, "cuda").copy_(tensor)
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _check_range(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the tensor. Raises UserError if it holds NaN or infinity: its dtype could not hold a value."""
    if not is_finite(tensor):
        remedy = "; choose bfloat16 or float32" if tensor.dtype == torch.float16 else ""
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name}: has values that {dtype} cannot hold{remedy}")
    return tensor
