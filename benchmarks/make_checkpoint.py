"""Make a random-weight Llama checkpoint of a named shape, to measure speed and memory without a download.

    python -m benchmarks.make_checkpoint FOLDER [SHAPE]     # tiny, 1b, 8b (16 GB, default) or 70b (141 GB)
    python -m benchmarks.make_checkpoint FOLDER SHAPE empty # sparse files, which benchmarks.limited fills

Weights are normal(0, 0.02), drawn on the GPU if there is one, and written in shards of about 4 GB. The
tokenizer knows the 256 bytes, BOS and EOS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from files.names import INDEX
from files.tensors import write_header
from models.shapes import SHAPES

SHARD_BYTES = 4 * 10**9
STD = 0.02
EMPTY = "empty"  # a file that marks the folder's shards as sparse


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


def make_checkpoint(folder: Path, shape: str, empty: bool = False) -> None:
    """Write a checkpoint of SHAPES[shape] with random weights; empty: sparse files in their place."""
    config = SHAPES[shape].model_config()
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
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
            if len(dims) == 2:
                values.normal_(0, STD, generator=generator)
            tensors[name] = values.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if empty:
        (folder / EMPTY).touch()
    total = sum(2 * dims.numel() for dims in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    print(f"{folder}: {total / 1e9:.1f} GB")


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "8b", sys.argv[3:] == ["empty"])
