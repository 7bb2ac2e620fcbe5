"""Train the tokenizers of the embedded models.

They are BPE like that of Llama 2, with a byte for each character that they lack. Words, digits and spaces are
tokens of their own, so a word is the same token at the start of a line and after a space.
"""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPACE = "▁"  # sentencepiece's sign for a space
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train_bpe(texts: Iterable[str], special: Sequence[str], unknown: str, begin: str, size: int) -> Tokenizer:
    """Return a BPE tokenizer that puts `begin` before each text.

    Args:
        texts: what its pieces are learned from.
        special: its first tokens; they are not marked as special yet.
        unknown, begin: two of these.
        size: the most tokens that it has.
    """
    learned = json.loads(_learn_pieces(texts, size - len(special) - len(BYTES)).to_str())["model"]
    pieces = [*special, *BYTES, *sorted(learned["vocab"], key=learned["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token=unknown,
            byte_fallback=True,
        )
    )
    _set_splitting(tokenizer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, pieces.index(begin))]
    )
    return tokenizer


def _learn_pieces(texts: Iterable[str], size: int) -> Tokenizer:
    """Return a BPE tokenizer of the texts' characters and merges, without special tokens and bytes."""
    learner = Tokenizer(models.BPE())
    _set_splitting(learner)
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return learner


def _set_splitting(tokenizer: Tokenizer) -> None:
    """Split texts into words, digits, spaces, line breaks and punctuation; merges stay inside of these."""
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    parts = Regex(rf"\p{{L}}+|\p{{N}}|\n+|{SPACE}|[^\p{{L}}\p{{N}}\n{SPACE}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(parts, "isolated")
