"""Make a random-weight checkpoint of a named shape, to measure speed and memory without a download.

    python -m benchmarks.make_checkpoint FOLDER [SHAPE]     # tiny, 1b, 8b (16 GB, default) or 70b (141 GB)
    python -m benchmarks.make_checkpoint FOLDER gemma3-4b   # 8.6 GB; it takes images
    python -m benchmarks.make_checkpoint FOLDER 30b-a3b empty   # Qwen3-30B-A3B, with routed experts
    python -m benchmarks.make_checkpoint FOLDER SHAPE empty # sparse files, which benchmarks.limited fills

Weights are normal(0, 0.02), drawn on the GPU if there is one, and written in shards of about 4 GB. The
tokenizer knows the 256 bytes, BOS and EOS; and with images, the three tokens that Gemma 3 shows them by.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from files.names import INDEX, PROCESSOR_FILES
from files.tensors import write_header
from models.registry import build_on_meta, family_of
from models.shapes import SHAPES, Gemma3Shape

SHARD_BYTES = 4 * 10**9
STD = 0.02
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


def _split_into_shards(shapes: dict[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    """Yield {name: shape} of one shard after the other, each just above SHARD_BYTES."""
    shard = {}
    for name, dims in shapes.items():
        shard[name] = dims
        if sum(2 * d.numel() for d in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_empty(path: Path, shard: dict[str, torch.Size]) -> None:
    """Write a safetensors file of bf16 tensors whose bytes are a hole: it takes no room on the disk."""
    tensors = {name: torch.empty(dims, dtype=torch.bfloat16, device="meta") for name, dims in shard.items()}
    with path.open("wb") as file:
        n_bytes = write_header(file, tensors)
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
    """Write a checkpoint of SHAPES[shape] with random weights; empty: sparse files in their place."""
    sizes = SHAPES[shape]
    config = sizes.model_config()
    model = build_on_meta(config, family_of(config, images=isinstance(sizes, Gemma3Shape)))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_split_into_shards(shapes), 1):
        file = f"model-{number:05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        if empty:
            write_empty(folder / file, shard)
            continue
        tensors = {}
        for name, dims in shard.items():
            values = torch.ones(dims, device=device, dtype=torch.bfloat16)
            if len(dims) > 1:
                values.normal_(0, STD, generator=generator)
            tensors[name] = values.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if empty:
        (folder / EMPTY).touch()
    total = sum(2 * dims.numel() for dims in shapes.values())
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
    make_checkpoint(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "8b", sys.argv[3:] == ["empty"])
