"""Pretrain the demo's base model, models/toy_base, on the text of tools/toy_corpus.py.

    python -m tools.pretrain_toy_base [--out FOLDER] [--steps N] [--seed N]

The tokenizer is a BPE like that of Llama 2, with a byte for each character that it lacks. Words, digits and
spaces are tokens of their own, so a word is the same token at the start of a line and after a space. The
model is a Llama in fp32, saved in bf16.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.toy_corpus import documents

SPACE = "▁"  # sentencepiece's sign for a space
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
VOCABULARY, HIDDEN, LAYERS, POSITIONS = 1536, 128, 4, 2048
ROWS, ROW_TOKENS = 16, 128  # of a batch
PEAK_LR, WARMUP_STEPS = 4e-3, 150


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer of VOCABULARY tokens that puts <s> before each text."""
    learned = json.loads(_learn_pieces(itertools.islice(documents(seed), 20_000)).to_str())["model"]
    pieces = [*SPECIAL, *BYTES, *sorted(learned["vocab"], key=learned["vocab"].get)]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    _set_splitting(backend)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", pieces.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        add_prefix_space=False,  # llama.cpp's default is a space before each text
    )


def _learn_pieces(texts: Iterator[str]) -> Tokenizer:
    """Return a BPE tokenizer of the texts' characters and merges, without special tokens and bytes."""
    learner = Tokenizer(models.BPE())
    _set_splitting(learner)
    size = VOCABULARY - len(SPECIAL) - len(BYTES)
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return learner


def _set_splitting(tokenizer: Tokenizer) -> None:
    """Split texts into words, digits, spaces, line breaks and punctuation; merges stay inside of these."""
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    parts = Regex(rf"\p{{L}}+|\p{{N}}|\n+|{SPACE}|[^\p{{L}}\p{{N}}\n{SPACE}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(parts, "isolated")


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


def lr_factor(step: int, steps: int) -> float:
    """Return the learning rate of a step relative to its peak: linear warm-up, then a cosine down to 0."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def pretrain(model: LlamaForCausalLM, data: Iterator[torch.Tensor], steps: int) -> float:
    """Train the model; return the mean loss of the last 50 steps, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    losses, start = [], time.monotonic()
    for step, ids in enumerate(itertools.islice(data, steps)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {losses[-1]:.4f} {time.monotonic() - start:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


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
