"""Make a random-weight checkpoint of a named shape, to measure speed and memory without a download.

    python -m benchmarks.make_checkpoint FOLDER [SHAPE]     # tiny, 1b, 8b (16 GB, default) or 70b (141 GB)
    python -m benchmarks.make_checkpoint FOLDER gemma3-4b   # 8.6 GB; it takes images
    python -m benchmarks.make_checkpoint FOLDER gpt-oss-20b # 13.8 GB; routed experts, stacked in MXFP4
    python -m benchmarks.make_checkpoint FOLDER 30b-a3b empty   # Qwen3-30B-A3B, with routed experts
    python -m benchmarks.make_checkpoint FOLDER SHAPE empty # sparse files, which benchmarks.limited fills

Weights are normal(0, 0.02), drawn on the GPU if there is one, and written in shards of about 4 GB. The
tokenizer knows the 256 bytes, BOS and EOS; and with images, the three tokens that Gemma 3 shows them by.
MXFP4's codes are random, with an exponent that gives the weights about the same size.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from files.expert_stacks import BIAS, BLOCK, BLOCKS, PACKED_BYTES, SCALES, STACKS, stack_name, stacked_shape
from files.names import INDEX, PROCESSOR_FILES
from files.tensors import write_header
from launch.program import print_error
from models.registry import build_on_meta, family_of
from models.shapes import SHAPES, Gemma3Shape, GptOssShape
from options.errors import UserError

SHARD_BYTES = 4 * 10**9
STD = 0.02
MXFP4_STD = 2.93  # of MXFP4's sixteen numbers, with the exponent 0
EMPTY = "empty"  # a file that marks the folder's shards as sparse
# Gemma 3's tokens of images. Their ids begin after those of the byte tokenizer (models/shapes.py).
IMAGE_TOKENS = ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the 256 bytes, BOS (256) and EOS (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def stack_in_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as GPT-OSS's files hold them: experts are stacked (files/expert_stacks.py).

    tensors: {name: parameter}, each linear of each expert one parameter; without memory, as the result.
    """
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        stacks.setdefault(stack_name(name) if ".experts." in name else name, []).append(tensor)
    stored = {}
    for name, members in stacks.items():
        parts = STACKS.get(name.rpartition(".")[2])
        if parts is None:
            stored[name] = members[0]
            continue
        shape = stacked_shape(tuple(members[0].shape), len(members), len(parts))
        if len(shape) == 2:  # biases
            stored[name] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            continue
        experts, inputs, outputs = shape
        blocks = torch.empty(
            experts, outputs, inputs // BLOCK, PACKED_BYTES, dtype=torch.uint8, device="meta"
        )
        stored |= {name + BLOCKS: blocks, name + SCALES: blocks[..., 0]}
    return stored


def make_values(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random values on the CPU, and ones for norms and sinks of attention.

    tensor: of the same shape and dtype, without memory.
    """
    values = torch.ones(tensor.shape, device=generator.device, dtype=tensor.dtype)
    if name.endswith(BLOCKS):
        values.random_(0, 256, generator=generator)
    elif name.endswith(SCALES):
        values.fill_(BIAS + round(math.log2(STD / MXFP4_STD)))
    elif tensor.dim() > 1 or name.endswith("bias"):
        values.normal_(0, STD, generator=generator)
    return values.cpu()


def _split_into_shards(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield {name: tensor} of one shard after the other, each just above SHARD_BYTES."""
    shard = {}
    for name, tensor in tensors.items():
        shard[name] = tensor
        if sum(each.nbytes for each in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_empty(path: Path, shard: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file of tensors whose bytes are a hole: it takes no room on the disk."""
    with path.open("wb") as file:
        n_bytes = write_header(file, shard)
        file.truncate(file.tell() + n_bytes)


def write_image_settings(folder: Path, shape: Gemma3Shape) -> None:
    """Write how Gemma 3's processor makes pixels of images, as files on the hub say it."""
    side = shape.tower.side
    settings = {
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": shape.image_tokens,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": side, "width": side},
    }
    (folder / PROCESSOR_FILES[0]).write_text(json.dumps(settings))


def make_checkpoint(folder: Path, shape: str, empty: bool = False) -> None:
    """Write a checkpoint of SHAPES[shape] with random weights; empty: sparse files in their place.

    Raises UserError for an empty one of GPT-OSS, since benchmarks.limited cannot fill stacks.
    """
    sizes = SHAPES[shape]
    config = sizes.model_config()
    model = build_on_meta(config, family_of(config, images=isinstance(sizes, Gemma3Shape)))
    tensors: dict[str, torch.Tensor] = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    if isinstance(sizes, GptOssShape):
        if empty:
            raise UserError(f"{shape}: its stacks of experts cannot be left empty")
        tensors = stack_in_mxfp4(tensors)
        config.quantization_config = {"quant_method": "mxfp4"}
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_split_into_shards(tensors), 1):
        file = f"model-{number:05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        if empty:
            write_empty(folder / file, shard)
            continue
        values = {name: make_values(name, tensor, generator) for name, tensor in shard.items()}
        save_file(values, folder / file, metadata={"format": "pt"})
    if empty:
        (folder / EMPTY).touch()
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    config.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if isinstance(sizes, Gemma3Shape):
        tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_TOKENS})
        write_image_settings(folder, sizes)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {total / 1e9:.1f} GB")


if __name__ == "__main__":
    try:
        make_checkpoint(
            Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "8b", sys.argv[3:] == ["empty"]
        )
    except UserError as e:
        sys.exit(print_error(e, verbose=False))
