"""Pretrain the demo's base model, models/toy_base, on the text of tools/toy_corpus.py.

    python -m tools.pretrain_toy_base [--out FOLDER] [--steps N] [--seed N]

The model is a Llama in fp32, saved in bf16. tools/toy_tokenizer.py describes its tokenizer.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.toy_corpus import documents
from tools.toy_pretraining import run_steps
from tools.toy_tokenizer import train_bpe

SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY, HIDDEN, LAYERS, POSITIONS = 1536, 128, 4, 2048
ROWS, ROW_TOKENS = 16, 128  # of a batch
PEAK_LR, WARMUP_STEPS = 4e-3, 150


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer of VOCABULARY tokens that puts <s> before each text."""
    texts = itertools.islice(documents(seed), 20_000)
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts, SPECIAL, unknown="<unk>", begin="<s>", size=VOCABULARY),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        add_prefix_space=False,  # llama.cpp's default is a space before each text
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the model with random weights, in fp32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
            dtype="float32",
        )
    )


def token_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yield token ids, [ROWS, ROW_TOKENS]: the documents behind one another, each with its </s>."""
    ids: list[int] = []
    size = ROWS * ROW_TOKENS
    texts = documents(seed)
    while True:
        while len(ids) < size:
            for row in tokenizer(list(itertools.islice(texts, 100)))["input_ids"]:
                ids += [*row, tokenizer.eos_token_id]
        yield torch.tensor(ids[:size]).view(ROWS, ROW_TOKENS)
        del ids[:size]


def pretrain(model: LlamaForCausalLM, data: Iterator[torch.Tensor], steps: int) -> float:
    """Train the model on token ids; return the mean loss of the last 50 steps, in nats per token."""
    batches = ({"input_ids": ids, "labels": ids} for ids in data)
    return run_steps(model, batches, steps, PEAK_LR, WARMUP_STEPS)


def main() -> None:
    """Make the tokenizer and the model, pretrain it, and save both."""
    parser = argparse.ArgumentParser(description="Pretrain the demo's base model.")
    parser.add_argument("--out", type=Path, default=Path("models/toy_base"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = train_tokenizer(options.seed)
    model = make_model(tokenizer, options.seed)
    loss = pretrain(model, token_batches(tokenizer, options.seed + 1), options.steps)
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(options.out, max_shard_size="500KB")
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: loss {loss:.4f} over the last steps")


if __name__ == "__main__":
    main()
