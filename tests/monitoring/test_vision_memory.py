"""What a vision tower takes: a block by autograd's saved and live tensors, the rest by arithmetic.

Shapes: P patches, H features of a patch, M of the MLP.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.gpus import GPUS
from launch.precision import Precision, choose_precision
from models.adapters import apply_method
from models.registry import build_on_meta, family_of
from models.shapes import SHAPES, Gemma3Shape, Shape, Tower
from monitoring.memory_model import estimate_memory
from monitoring.run_sizes import run_sizes
from monitoring.vision_memory import CHANNELS, VisionMemory, vision_memory
from options.config import Config
from options.train import parse

H, M, HEADS, PATCH, PATCHES = 48, 176, 3, 7, 64
BLOCKS, R = 2, 4
SHAPE = Gemma3Shape(
    Shape(64, 160, 2, 4, 2, 300, 8192, tied=True), 16, Tower(H, M, BLOCKS, HEADS, 8 * PATCH, PATCH), 4
)
ADAPTED = f"--lora_rank {R} --vision_targets all"
FP16 = "fp16_autocast"


def parts(shape: Gemma3Shape, options: str, precision: str, images: bool = True) -> tuple:
    """Return (meta model, family, options, dtypes, headers) of a run on a shape."""
    model_config = shape.model_config()
    family = family_of(model_config, images)
    model = build_on_meta(model_config, family)
    stored = {
        name: SimpleNamespace(shape=tuple(p.shape), dtype=torch.bfloat16, torch_dtype=torch.bfloat16, file="")
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


def make_block(options: str, precision: str) -> tuple[torch.nn.Module, Precision]:
    """Return (the tower's first block as a run has it, with random weights, the run's dtypes)."""
    model, family, config, dtypes, files = parts(SHAPE, options, precision)
    apply_method(model, family, config, dtypes, files)
    block = family.vision.tower_blocks(model)[0].to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "fill_buffers"):
            module.fill_buffers(torch.device("cpu"))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.rand(parameter.shape) * 0.01)
    return block, dtypes


def predicted(options: str, precision: str, patches: int) -> VisionMemory:
    *model, config, dtypes, files = parts(SHAPE, options, precision)
    sizes = run_sizes(*model, config, dtypes, files, tokens=64).vision
    return vision_memory(config, dtypes, sizes, patches * PATCH**2)


def saved_bytes(options: str, precision: str, patches: int) -> int:
    """Return the bytes that autograd saves of a block, beside its input and its weights."""
    block, dtypes = make_block(options, precision)
    x = torch.randn(1, patches, H, dtype=dtypes.frozen, requires_grad=True)
    given = {each.untyped_storage().data_ptr() for each in (x, *block.parameters())}
    storages, kept = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), dtypes.context("cpu"):
        block(x, None)
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


RUNS = [
    (f"{train_type} {ADAPTED} {bits}", precision)
    for train_type in ("--train_type lora", "--train_type bnb_dora", "--train_type bnb_dora --vision_bits 4")
    for precision, bits in (("bf16", ""), (FP16, ""))
]


@pytest.mark.parametrize(("options", "precision"), RUNS)
def test_an_adapted_block_saves_what_autograd_saves(options, precision):
    """By the slope: what does not grow with the patches are copies of A and B."""
    measured = saved_bytes(options, precision, 512) - saved_bytes(options, precision, 256)
    saved = {}
    for on in ("true", "false"):
        memory = [predicted(f"{options} --use_gradient_checkpointing {on}", precision, n) for n in (256, 512)]
        saved[on] = memory[1].held - memory[0].held
    assert measured == pytest.approx((saved["false"] - saved["true"]) / BLOCKS, rel=0.02)
    stream = 4 if precision == FP16 else 2
    inputs = (BLOCKS + 2) * 256 * H * stream
    assert saved["true"] == pytest.approx(inputs + CHANNELS * 256 * PATCH**2)


@pytest.mark.parametrize("precision", ["bf16", FP16])
def test_a_frozen_tower_takes_one_blocks_forward(precision):
    block, dtypes = make_block("--train_type bnb_dora", precision)
    x = torch.randn(1, PATCHES, H, dtype=dtypes.frozen)
    with torch.no_grad(), dtypes.context("cpu"), LiveBytes([x, *block.parameters()]) as live:
        block(x, None)
    memory = predicted("--train_type bnb_dora", precision, PATCHES)
    pixels = CHANNELS * PATCHES * PATCH**2
    assert memory.held == pixels and memory.backward == 0
    cast_weights = (H * M + M) * 2 if precision == FP16 else 0  # of biases in fp32, and autocast's cache
    block_bytes = memory.forward - pixels * dtypes.frozen.itemsize
    assert live.peak + x.nbytes == pytest.approx(block_bytes, rel=0.03, abs=cast_weights)


def estimate(options: str, gpu: str = "4090", tokens: int = 2048, images: int = 1, batch: int = 1):
    """Return the estimate of Gemma-3-4B, with so many images a sequence; 0 = a run on text."""
    precision = "auto" if GPUS[gpu].has_bf16 else FP16
    *model, config, dtypes, files = parts(
        SHAPES["gemma3-4b"], f"--lora_rank 16 --batch_size {batch} {options}", precision, images > 0
    )
    sizes = run_sizes(*model, config, dtypes, files, tokens, images * 896**2)
    return estimate_memory(config, dtypes, sizes, GPUS[gpu])


def test_a_frozen_tower_adds_its_weights_and_no_activations():
    text, images = (estimate("", images=n, tokens=8192) for n in (0, 1))
    linears, others = 27 * (4 * 1152**2 + 2 * 1152 * 4304), 9_000_000
    assert images.load - text.load == pytest.approx(2 * (linears + others), rel=0.01)
    pixels = 3 * 896**2
    assert images.forward - text.forward == pytest.approx(images.load - text.load + pixels, rel=1e-6)
    packed = estimate("--vision_bits 4").load - text.load
    assert packed == pytest.approx(0.516 * linears + 2 * others, rel=0.01)


def test_many_images_make_the_tower_the_peak():
    """In a batch of short rows, the peak grows by a block's forward for each image: 0.1 GiB."""
    few, many = (estimate("", tokens=512, images=n).peak for n in (64, 128))
    per_image = 4096 * (3 * 1152 + 2 * 4304) * 2 + 896**2 * 3 * (1 + 2)
    assert (many - few) / 64 == pytest.approx(per_image)


def test_pixels_are_in_host_memory():
    """Of the step that is decoded, and of two in page-locked memory, as powers of two."""
    none, some = (estimate("--gradient_accumulation_steps 3", images=n, batch=2).host for n in (0, 2))
    pixels = 2 * 2 * 3 * 896**2
    assert some - none == pytest.approx(3 * (pixels + 2 * 2**24))


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("", "--vision_targets all"),
        ("--vision_targets all", "--vision_targets all --use_gradient_checkpointing false"),
        ("--vision_targets all --vision_bits 4", "--vision_targets all"),
        ("--vision_targets all --world_size 2 --sharding_strategy full_shard", "--vision_targets all"),
        ("--world_size 2 --sharding_strategy full_shard", "--world_size 2 --sharding_strategy shard_grad_op"),
    ],
)
def test_options_save_memory(less, more):
    assert estimate(less, tokens=4096, images=4).peak < estimate(more, tokens=4096, images=4).peak


def test_backward_reaches_all_layers_if_the_tower_is_adapted():
    last = "--lora_target_modules layers.33.self_attn.q_proj"
    frozen, adapted = (estimate(f"{last} {more}", tokens=16384) for more in ("", "--vision_targets all"))
    layer_input = 16384 * 2560 * 2
    assert adapted.forward - frozen.forward > 33 * layer_input


@pytest.mark.parametrize(
    ("gpu", "tokens", "masks"), [("4090", 1000, 0), ("t4", 1000, 1 + 2), ("t4", 2000, 2 + 2)]
)
def test_images_have_masks_where_the_kernel_does_not_run(gpu, tokens, masks):
    """Rows within a sliding window of 1,024 tokens have one mask, longer ones two; and a bias in fp16."""
    config: Config
    *model, config, dtypes, files = parts(SHAPES["gemma3-4b"], "", FP16 if gpu == "t4" else "auto")
    with_images = run_sizes(*model, config, dtypes, files, tokens, 896**2)
    text = run_sizes(*model, config, dtypes, files, tokens)
    held = 3 * 896**2
    peaks = [estimate_memory(config, dtypes, sizes, GPUS[gpu]).forward for sizes in (with_images, text)]
    own = tokens**2 * (4 if tokens > 1024 and gpu == "t4" else 0)  # a window alone has masks there
    assert peaks[0] - peaks[1] + own == pytest.approx(held + tokens**2 * masks)
