"""Small tokenizers of the kinds of real models.

They have tokens that cross the boundary between a prompt and its answer, and characters of several tokens.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.make_checkpoint import byte_tokenizer

BYTES = byte_tokenizer()
SPECIAL = ["<s>", "</s>", "<unk>"]
PARIS = [("a", "r"), ("i", "s"), ("ar", "is")]  # merges of all BPE tokenizers


def _wrap(
    backend: Tokenizer, *post: processors.PostProcessor, text: str = "<s> $A"
) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for transformers. text: the template of a text, with BOS by default."""
    special = processors.TemplateProcessing(single=text, special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.post_processor = processors.Sequence([*post, special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _bpe(alphabet: list[str], merges: list[tuple[str, str]], **options) -> Tokenizer:
    vocabulary = [*SPECIAL, *alphabet, *map("".join, merges)]
    return Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges, **options))


def _byte_level(merges: list[tuple[str, str]], words: bool) -> Tokenizer:
    """Return byte-level BPE. words: split the text into words first."""
    backend = _bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), [*PARIS, *merges])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    return backend


def crossing() -> PreTrainedTokenizerFast:
    """Return byte-level BPE without word splitting: "\\nP" and " P" are one token anywhere."""
    return _wrap(_byte_level([("Ċ", "P"), ("Ġ", "P"), ("ĊP", "aris")], words=False))


def colon() -> PreTrainedTokenizerFast:
    """Return a tokenizer like `crossing`, with a token of a colon and the letter after it."""
    return _wrap(_byte_level([(":", "P"), (":P", "aris")], words=False))


def trimming() -> PreTrainedTokenizerFast:
    """Return one like Llama 3's: words with the space before them, and offsets without that space."""
    backend = _byte_level([("Ġ", "P"), ("ĠP", "aris"), ("Ġ", "Ġ")], words=True)
    return _wrap(backend, processors.ByteLevel(trim_offsets=True))


def ending() -> PreTrainedTokenizerFast:
    """Return a tokenizer that adds the EOS token itself."""
    return _wrap(_byte_level([("Ġ", "P"), ("ĠP", "aris")], words=True), text="<s> $A </s>")


def unigram() -> PreTrainedTokenizerFast:
    """Return SentencePiece's Unigram, which adds "▁" in front of the text and keeps all spaces."""
    letters = [(chr(i), -8.0) for i in range(33, 127)] + [("▁", -4.0), ("\n", -8.0)]
    byte_pieces = [(f"<0x{i:02X}>", -20.0) for i in range(256)]
    words = [("▁Paris", -5.0), ("\nPar", -5.0), ("is", -5.0)]
    vocabulary = [*((token, 0.0) for token in SPECIAL), *byte_pieces, *letters, *words]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    return _wrap(backend)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Return one like Llama 2's: BPE with "▁" before the text and for spaces; other characters as bytes."""
    alphabet = [f"<0x{i:02X}>" for i in range(256)] + [chr(i) for i in range(33, 127)] + ["▁"]
    merges = [*PARIS, ("▁", "P"), ("▁P", "aris")]
    backend = _bpe(alphabet, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _wrap(backend)


def chat_tokenizer(template: str, eos: str = "<|im_end|>"):
    """Return a tokenizer of bytes with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": eos})
    tokenizer.chat_template = template
    return tokenizer
