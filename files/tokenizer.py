"""The tokenizer of a model's folder: transformers' own, and how it differs from what tokenizer.json says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from files.names import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY,
)
from files.special_tokens import check_eos, read_if_there, remarks_on_special_tokens
from options.errors import UserError, describe
from options.limits import MAX_TOKENIZER_BYTES, check_size

# What two tokenizers are compared on; the shortest that they split differently is shown.
TEXTS = (
    *("a", " ", "\n", " a", "  a", "a  b", "\n\n\n", "a\n b", "\t\ta", "a \r\n", "don't", "A b", "a.b"),
    *("1234", "x_1 = 2", "(a)!?", "e\u0301", "\u00e9", "\ufb01n", "\u00bd", "\uff21", "\u201ca\u201d"),
    *("a\u00a0b", "a\u200db", "\U0001f642", "\u2764\ufe0f"),
    "The quick brown fox can't jump over the lazy dogs; it's 1969.",
    "  two spaces   three\n\n\nlines\t\ttabs \r\n end ",
    "def f(x_1, *args):\n    return [x_1 ** 2 for i in range(10)]  # CamelCase UPPER\n",
    "12345 6789.01 +49-170-1234567 1,000,000 x10^9",
    'https://example.com/a_b?c=%20d&e=f#g <b>x</b> {"a": [1, null]}',
    "Größe, façade, naïve",
    "Привет, мир! Ёлка.",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界！今天是2024年。",
    "こんにちは、世界",
    "안녕하세요 세계",
)  # fmt: skip

SENTENCEPIECE = "tokenizer.model"
CONVERSION = (
    f": make {TOKENIZER_JSON} of it with the model's {TOKENIZER_CONFIG} beside it, where sentencepiece and"
    " protobuf are installed, by transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder),"
    " and compare its tokens with SentencePiece's, since some of transformers' classes make others"
)


def read_tokenizer(folder: Path, named: str):
    """transformers' tokenizer, with no code of the folder's. named: the folder, as errors call it.

    Raises UserError for one that is missing, damaged or too large, or whose files leave open how it splits
    text or what its EOS is.
    """
    for name in (TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE, SPECIAL_TOKENS, ADDED_TOKENS, *VOCABULARY):
        check_size(folder / name, MAX_TOKENIZER_BYTES)
    missing = _missing(folder)
    if missing:
        raise UserError(f"{named}: no usable tokenizer ({missing}); its files belong beside {CONFIG}")
    try:
        # mistral_format: else Mistral's package, where installed, reads tekken.json in its place.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, mistral_format=False
        )
    except Exception as e:  # the tokenizers library has no narrower one for a damaged tokenizer.json
        raise UserError(
            f"{named}: no usable tokenizer ({describe(e)}); its files belong beside {CONFIG}"
        ) from None
    check_eos(folder, tokenizer, named)
    return tokenizer


def _missing(folder: Path) -> str:
    """What a folder lacks for its tokenizer to be known; "" if nothing.

    Without tokenizer.json transformers converts tokenizer.model, in some classes to other tokens than
    SentencePiece's and without BOS. Without tokenizer_config.json BOS and EOS are its class's, and added
    tokens are plain text.
    """
    has = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if TOKENIZER_JSON not in has and not {*VOCABULARY, TOKENIZER_CONFIG} <= has:
        found = next((name for name in (SENTENCEPIECE, "tekken.json", *VOCABULARY) if name in has), None)
        unknown = f", and {found} alone does not say how to split text" if found else ""
        return f"there is no {TOKENIZER_JSON}{unknown}{CONVERSION if found == SENTENCEPIECE else ''}"
    if not {TOKENIZER_CONFIG, SPECIAL_TOKENS} & has:
        return f"there is no {TOKENIZER_CONFIG}, so what its BOS, EOS and chat template are is unknown"
    return ""


@contextlib.contextmanager
def tokenizer_errors(tokenizer) -> Iterator[None]:
    """Raises UserError, which names the tokenizer's folder, for what the tokenizer raises within."""
    try:
        yield
    except BaseException as e:
        # For a tokenizer that contradicts itself the library raises Exception, or panics, which is none.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer fails ({describe(e)})") from None


@dataclass
class TokenizerUse:
    """How the tokenizer in use differs from its folder's files.

    remarks: lines to tell.
    files: {name: text} that a folder of what was trained needs instead, so that every program sees the tokens
        of training there.
    """

    remarks: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def compare_with_files(folder: Path, tokenizer) -> TokenizerUse:
    """Compares transformers' tokenizer with the files that it was read from, on TEXTS and its added tokens.

    Also tells of special and added tokens that the files do not have.

    Some of transformers' classes (Llama's, Qwen2's, Gemma's) take vocabulary and merges from tokenizer.json,
    and write the normalizer and pre-tokenizer themselves. Training uses transformers' tokenizer: PEFT, vLLM,
    lm-evaluation-harness and transformers itself see the same one. `files` make the others, which read
    tokenizer.json, see it too.

    Raises UserError if a tokenizer fails, or no file gives its EOS an id.
    """
    use = TokenizerUse()
    if not tokenizer.is_fast:  # refused where rows are tokenized
        return use
    kind = type(tokenizer).__name__
    if not (folder / TOKENIZER_CONFIG).is_file():
        template = "" if tokenizer.chat_template else ", and there is no chat template"
        use.remarks.append(
            f"tokenizer: no {TOKENIZER_CONFIG}; BOS and EOS are those of {SPECIAL_TOKENS}{template}"
        )
    file = _read_file(folder / TOKENIZER_JSON, tokenizer)
    if file is None:
        use.remarks.append(
            f"tokenizer: no {TOKENIZER_JSON}; transformers builds {kind} out of {' and '.join(VOCABULARY)}."
            f" Saved and exported models get its {TOKENIZER_JSON}"
        )
        use.files[TOKENIZER_JSON] = tokenizer.backend_tokenizer.to_str(pretty=True)
    elif difference := _difference(file, tokenizer):
        use.remarks.append(
            f"tokenizer: transformers' {kind} splits text otherwise than {TOKENIZER_JSON} says {difference}."
            f" Training uses transformers'; saved and exported models get a {TOKENIZER_JSON} that says so"
        )
        use.files[TOKENIZER_JSON] = tokenizer.backend_tokenizer.to_str(pretty=True)
    use.remarks += remarks_on_special_tokens(folder, file, tokenizer)
    _compare_flags(folder / TOKENIZER_CONFIG, tokenizer, use)
    return use


def _read_file(path: Path, tokenizer) -> Tokenizer | None:
    """What tokenizer.json says by itself; None without that file. Raises UserError."""
    if not path.is_file():
        return None
    with tokenizer_errors(tokenizer):
        file = Tokenizer.from_file(str(path))
        file.no_padding()
        file.no_truncation()
    return file


def _difference(file: Tokenizer, tokenizer) -> str:
    """ "" if both make the same tokens, else in what they differ, with an example."""
    with tokenizer_errors(tokenizer):
        added = {
            *tokenizer.get_added_vocab(),
            *(token.content for token in file.get_added_tokens_decoder().values()),
        }
        texts = [*TEXTS, *(f"a{token}b {token} c\n{token}" for token in sorted(added))]
        used = tokenizer(texts, verbose=False)["input_ids"]
        written = [encoding.ids for encoding in file.encode_batch(texts)]
        differing = [(t, a, b) for t, a, b in zip(texts, used, written, strict=True) if a != b]
        if not differing:
            return ""
        text, ours, theirs = min(differing, key=lambda each: len(each[0]))
        parts = _parts(json.loads(tokenizer.backend_tokenizer.to_str()), json.loads(file.to_str()))
        first = next(
            i
            for i, pair in enumerate(zip([*ours, None], [*theirs, None], strict=False))
            if pair[0] != pair[1]
        )
        shown = [
            " ".join(repr(made.id_to_token(i)) for i in ids[first : first + 3]) or "nothing"
            for made, ids in ((tokenizer.backend_tokenizer, ours), (file, theirs))
        ]
    where = ", ".join(parts) or "split_special_tokens, or another setting of tokenizer_config.json"
    return f"({where}): {text!r} is {shown[0]} instead of {shown[1]}"


def _parts(used: dict, written: dict) -> list[str]:
    """The keys of tokenizer.json that differ."""
    names = ["normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens"]
    return [name for name in names if used[name] != written[name]]


def _compare_flags(path: Path, tokenizer, use: TokenizerUse) -> None:
    """add_bos_token and add_eos_token of tokenizer_config.json: transformers takes them from tokenizer.json,
    llama.cpp's converter believes them."""
    raw = read_if_there(path)
    with tokenizer_errors(tokenizer):
        ids = tokenizer("a", verbose=False)["input_ids"]
    added = {
        "add_bos_token": ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": ids[-1:] == [tokenizer.eos_token_id],
    }
    wrong = [name for name, does in added.items() if isinstance(raw.get(name), bool) and raw[name] != does]
    for name in wrong:
        token = "BOS" if name == "add_bos_token" else "EOS"
        adds = token if added[name] else f"no {token}"
        use.remarks.append(
            f"tokenizer: {TOKENIZER_CONFIG} says {name}: {str(raw[name]).lower()}, but the tokenizer adds"
            f" {adds}, as in training. Saved and exported models get a {TOKENIZER_CONFIG} that says so"
        )
    if wrong:
        use.files[TOKENIZER_CONFIG] = (
            json.dumps(raw | {name: added[name] for name in wrong}, indent=2, ensure_ascii=False) + "\n"
        )
