"""What a vision tower takes: its blocks by autograd's saved and live tensors, the rest by arithmetic.

Shapes: P patches, H features of a patch, M of the MLP.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from launch.gpus import GPUS
from models.shapes import SHAPES
from monitoring.memory_model import estimate_memory
from monitoring.run_sizes import run_sizes
from monitoring.vision_memory import CHANNELS, VisionMemory, vision_memory
from options.config import Config
from tests.helpers.products import products
from tests.helpers.towers import (
    BLOCKS,
    PATCH,
    PATCHES,
    SHAPES_OF,
    H,
    LiveBytes,
    M,
    block_inputs,
    bytes_saved_by,
    make_block,
    make_images,
    make_vision_parts,
    parts,
)

R = 4
ADAPTED = f"--lora_rank {R} --vision_targets all"
FP16 = "fp16_autocast"


def predicted(
    options: str, precision: str, patches: int, kind: str = "gemma3", batch: int = 1
) -> VisionMemory:
    options = f"{options} --batch_size {batch}"
    *model, config, dtypes, files = parts(SHAPES_OF[kind], options, precision)
    sizes = run_sizes(*model, config, dtypes, files, tokens=64).vision
    return vision_memory(config, dtypes, sizes, patches * PATCH**2)


def saved_bytes(kind: str, options: str, precision: str, patches: int) -> int:
    """Return the bytes that autograd saves of a block, beside its input, its weights and the angles."""
    block, dtypes = make_block(kind, options, precision)
    x = torch.randn(1, patches, H, dtype=dtypes.frozen, requires_grad=True)
    inputs, angles = block_inputs(kind, x)
    return bytes_saved_by(lambda: block(**inputs), [x, *angles, *block.parameters()], dtypes)


TYPES = ["--train_type lora", "--train_type bnb_dora", "--train_type bnb_dora --vision_bits 4"]
RUNS = products(
    SHAPES_OF,
    TYPES,
    ["bf16", FP16],
    always=[
        *(("gemma3", train_type, precision) for train_type in TYPES for precision in ("bf16", FP16)),
        *((kind, *run) for kind in SHAPES_OF for run in ((TYPES[0], "bf16"), (TYPES[1], FP16))),
    ],
)


@pytest.mark.parametrize(("kind", "train_type", "precision"), RUNS)
def test_an_adapted_block_saves_what_autograd_saves(kind, train_type, precision):
    """By the slope: what does not grow with the patches are copies of A and B."""
    options = f"{train_type} {ADAPTED}"
    measured = saved_bytes(kind, options, precision, 512) - saved_bytes(kind, options, precision, 256)
    saved = {}
    for on in ("true", "false"):
        words = f"{options} --use_gradient_checkpointing {on}"
        memory = [predicted(words, precision, n, kind) for n in (256, 512)]
        saved[on] = memory[1].held - memory[0].held
    stream = 4 if precision == FP16 else 2
    inputs = (BLOCKS + (2 if kind == "gemma3" else 1)) * 256 * H * stream
    kept = 0 if kind == "qwen2_5_vl" and stream == 2 else inputs  # its norms save copies instead
    of_blocks = saved["false"] - kept - (saved["true"] - inputs)
    assert measured == pytest.approx(of_blocks / BLOCKS, rel=0.02)
    if kind == "gemma3":
        assert saved["true"] == pytest.approx(inputs + CHANNELS * 256 * PATCH**2)


def backward_peak(kind: str, options: str, precision: str, patches: int) -> int:
    """Return the most bytes alive in the backward of a block that was just recomputed.

    The block's result, which is alive here, stands for its gradient, which is not counted.
    """
    block, dtypes = make_block(kind, options, precision)
    x = torch.randn(1, patches, H, dtype=dtypes.frozen, requires_grad=True)
    inputs, angles = block_inputs(kind, x)
    with LiveBytes([x, *angles, *block.parameters()]) as live:
        with dtypes.context("cpu"):
            result = block(**inputs)
        result = result[0] if isinstance(result, tuple) else result
        live.peak = 0
        result.backward(torch.ones_like(result))
    return live.peak - result.nbytes


@pytest.mark.parametrize(("kind", "train_type", "precision"), RUNS)
def test_backward_of_an_adapted_block(kind, train_type, precision):
    options = f"{train_type} {ADAPTED}"
    found = backward_peak(kind, options, precision, 512) - backward_peak(kind, options, precision, 256)
    memory = [predicted(options, precision, patches, kind) for patches in (256, 512)]
    assert found == pytest.approx(memory[1].backward - memory[0].backward, rel=0.06)


@pytest.mark.parametrize("kind", SHAPES_OF)
@pytest.mark.parametrize("precision", ["bf16", FP16])
def test_a_frozen_tower_takes_one_blocks_forward(precision, kind):
    block, dtypes = make_block(kind, "--train_type bnb_dora", precision)
    x = torch.randn(1, PATCHES, H, dtype=dtypes.frozen)
    inputs, angles = block_inputs(kind, x)
    with torch.no_grad(), dtypes.context("cpu"), LiveBytes([x, *angles, *block.parameters()]) as live:
        block(**inputs)
    memory = predicted("--train_type bnb_dora", precision, PATCHES, kind)
    pixels = CHANNELS * PATCHES * PATCH**2
    assert memory.backward == 0
    cast_weights = (H * M + M) * 2 if precision == FP16 else 0  # of biases in fp32, and autocast's cache
    block_bytes = memory.forward - pixels * dtypes.frozen.itemsize * (1 if kind == "gemma3" else 2)
    kept = {"gemma3": x.nbytes, "qwen3_vl": PATCHES * H * 4, "qwen2_5_vl": 0}[kind]  # by the whole tower
    block_bytes -= kept + sum(each.nbytes for each in angles)
    assert live.peak + x.nbytes == pytest.approx(block_bytes, rel=0.03, abs=cast_weights)


@pytest.mark.parametrize("kind", SHAPES_OF)
def test_a_frozen_tower_takes_all_images_of_a_micro_batch(kind):
    """From normalised pixels to features. Two rows with two images each are four images at once."""
    model, family, _ = make_vision_parts(kind, "--train_type bnb_dora")
    images, pixels = make_images(kind, 4)
    known = [pixels, *model.parameters(), *model.buffers()]
    with torch.no_grad(), LiveBytes(known) as live:
        family.vision.embed(model, images, pixels)
    memory = predicted("--train_type bnb_dora", "bf16", 2 * PATCHES, kind, batch=2)
    assert memory.held >= images.values.nbytes
    found = live.peak + pixels.nbytes
    assert found == pytest.approx(memory.held - images.values.nbytes + memory.forward, rel=0.03)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("train_type", ["lora", "dora"])
@pytest.mark.parametrize("targets", ["projector", "all"])
def test_adapted_mergers_save_what_autograd_saves(kind, train_type, targets):
    """The whole tower, without gradient checkpointing, is measured by the slope, as a block is.

    The tolerance: the first block's norm saves nothing, since its input needs no gradient, but is counted.
    """
    options = f"--lora_rank {R} --vision_targets {targets} --train_type {train_type}"
    model, family, dtypes = make_vision_parts(kind, options)
    saved, expected = [], []
    for count in (2, 4):
        images, pixels = make_images(kind, count)
        known = [pixels, *model.parameters(), *model.buffers()]
        embed = partial(family.vision.embed, model, images, pixels)
        saved.append(bytes_saved_by(embed, known, dtypes))
        words = f"{options} --use_gradient_checkpointing false"
        memory = predicted(words, "bf16", count * PATCHES, kind)
        features = 64 * 2 * count * PATCHES // 4 if kind == "qwen3_vl" else 0  # held for the text model
        expected.append(memory.held - images.values.nbytes - features)
    assert saved[1] - saved[0] == pytest.approx(expected[1] - expected[0], rel=0.04)


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


@pytest.mark.parametrize("workers", [1, 4])
def test_the_load_is_the_peak_of_a_small_batch(workers):
    """The embedding arrives while each other thread holds a packed MLP weight. On a T4 a second embedding
    in fp32, which is allocated before, takes more."""
    embedding, packed = 262208 * 2560, 0.516 * 2560 * 10240
    options = f"--train_type qlora --loading_workers {workers}"
    bf16, fp16 = (estimate(options, gpu, tokens=520) for gpu in ("4090", "t4"))
    assert bf16.peak - bf16.load == pytest.approx(2 * embedding + (workers - 1) * packed, rel=1e-4)
    assert fp16.peak - fp16.load == 4 * embedding


def test_many_images_make_the_tower_the_peak():
    """In a batch of short rows, the peak grows by a block's forward for each image: 0.1 GiB."""
    few, many = (estimate("", tokens=512, images=n).peak for n in (64, 128))
    per_image = 4096 * (4 * 1152 + 2 * 4304) * 2 + 896**2 * 3 * (1 + 2)
    assert (many - few) / 64 == pytest.approx(per_image)


def test_pixels_are_in_host_memory():
    """One step is decoded, and two are in page-locked memory, rounded up to powers of two."""
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
