"""Makes a random-weight Llama checkpoint of a named shape, for measuring speed and memory without a download.

    python -m benchmarks.make_checkpoint FOLDER [SHAPE]     # tiny, 1b, 8b (16 GB, default) or 70b (141 GB)

Weights are normal(0, 0.02), drawn on the GPU if there is one, written in shards of eight layers' size; the
tokenizer knows the 256 bytes, BOS and EOS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.shapes import SHAPES

SHARD_BYTES = 4 * 10**9


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def make_checkpoint(folder: Path, shape: str) -> None:
    size = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=256,
        eos_token_id=257,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map, tensors, number = {}, {}, 1
    for i, (name, dims) in enumerate(shapes.items(), 1):
        values = torch.ones(dims, device=device, dtype=torch.bfloat16)
        if len(dims) == 2:
            values.normal_(0, 0.02, generator=generator)
        tensors[name] = values.cpu()
        if i == len(shapes) or sum(t.nbytes for t in tensors.values()) > SHARD_BYTES:
            file = f"model-{number:05d}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            tensors, number = {}, number + 1
    total = sum(2 * dims.numel() for dims in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    print(f"{folder}: {total / 1e9:.1f} GB")


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "8b")
