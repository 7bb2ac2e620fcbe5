"""Vision towers of tiny models, alone, with random weights, and what autograd saves of them.

Shapes: P patches, H features of a patch, M of the MLP.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

from launch.precision import Precision, choose_precision
from models.adapters import apply_method
from models.registry import build_on_meta, family_of
from models.shapes import Gemma3Shape, Shape, Tower
from options.train import parse

H, M, HEADS, PATCH, PATCHES = 48, 176, 3, 7, 64
BLOCKS = 2
SHAPE = Gemma3Shape(
    Shape(64, 160, 2, 4, 2, 300, 8192, tied=True), 16, Tower(H, M, BLOCKS, HEADS, 8 * PATCH, PATCH), 4
)

TEXT = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "bos_token_id": 256, "eos_token_id": 257, "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2]},
}  # fmt: skip
TOWER = {
    "hidden_size": H, "intermediate_size": M, "depth": BLOCKS, "num_heads": HEADS, "patch_size": PATCH,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 64,
}  # fmt: skip
QWEN_3 = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
QWEN_2_5 = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
SHAPES_OF = {
    "gemma3": SHAPE,
    "qwen3_vl": SimpleNamespace(
        model_config=lambda: Qwen3VLConfig(text_config=dict(TEXT), vision_config=TOWER | QWEN_3)
    ),
    "qwen2_5_vl": SimpleNamespace(
        model_config=lambda: Qwen2_5_VLConfig(text_config=dict(TEXT), vision_config=TOWER | QWEN_2_5)
    ),
}


def parts(shape, options: str, precision: str, images: bool = True) -> tuple:
    """Return (meta model, family, options, dtypes, headers) of a run; shape has a model_config()."""
    model_config = shape.model_config()
    family = family_of(model_config, images)
    model = build_on_meta(model_config, family)
    stored = {
        name: SimpleNamespace(
            shape=tuple(p.shape),
            dtype=torch.bfloat16,
            torch_dtype=torch.bfloat16,
            nbytes=2 * p.numel(),
            file="",
        )
        for name, p in model.named_parameters()
    }
    files = SimpleNamespace(tensors=stored, packed={}, prequantized=False, folder="")
    fixed = [
        "--model_name",
        "x",
        "--images",
        str(images).lower(),
        "--world_size",
        "1",
        "--sharding_strategy",
        "ddp",
    ]
    config, _ = parse([*fixed, *options.split()])
    return model, family, config, choose_precision(precision, True, True), files


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Return a meta module on the CPU with random weights."""
    module.to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "fill_buffers"):
            part.fill_buffers(torch.device("cpu"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape) * 0.01)
    return module


def make_block(kind: str, options: str, precision: str) -> tuple[torch.nn.Module, Precision]:
    """Return (the tower's first block as a run has it, with random weights, the run's dtypes)."""
    model, family, config, dtypes, files = parts(SHAPES_OF[kind], options, precision)
    apply_method(model, family, config, dtypes, files)
    return fill(family.vision.tower_blocks(model)[0]), dtypes


def block_inputs(kind: str, x: torch.Tensor) -> tuple[dict, list[torch.Tensor]]:
    """Return (a block's arguments beside x [1, P, H], those that are shared by all blocks): two images."""
    if kind == "gemma3":
        return {"hidden_states": x, "attention_mask": None}, []
    angles = [torch.randn(x.shape[1], H // HEADS) for _ in range(2)]
    bounds = torch.tensor([0, x.shape[1] // 2, x.shape[1]])
    return {"hidden_states": x[0], "cu_seqlens": bounds, "position_embeddings": tuple(angles)}, angles


def make_images(kind: str, count: int) -> tuple[SimpleNamespace, torch.Tensor]:
    """Return (so many images of PATCHES patches, their normalised pixels in bf16)."""
    side = 8 * PATCH
    values = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    if kind == "gemma3":
        return SimpleNamespace(values=values, grids=()), values.to(torch.bfloat16)
    patches = torch.zeros(count * PATCHES, 3 * 2 * PATCH**2, dtype=torch.bfloat16)
    return SimpleNamespace(values=values, grids=((8, 8),) * count), patches


def make_vision_parts(kind: str, options: str) -> tuple:
    """Return (a model whose vision parts have random weights, its family, dtypes) in bf16."""
    model, family, config, dtypes, files = parts(SHAPES_OF[kind], options, "bf16")
    apply_method(model, family, config, dtypes, files)
    for part in family.vision.parts:
        fill(model.get_submodule(part))
    for name, content in family.vision.constant_buffers(model.config).items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, content)
    return model.eval(), family, dtypes


def bytes_saved_by(forward: Callable, known: list[torch.Tensor], dtypes: Precision) -> int:
    """Return the bytes that autograd saves in a forward, beside known tensors."""
    given = {each.untyped_storage().data_ptr() for each in known}
    storages, kept = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), dtypes.context("cpu"):
        forward()
    return sum(size for pointer, size in storages.items() if pointer not in given)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, but for views of `given`, and their peak."""

    def __init__(self, given):
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.alive.values()))
        return result
