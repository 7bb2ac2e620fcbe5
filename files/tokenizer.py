"""The tokenizer of a model's folder: transformers' tokenizer, and its differences from tokenizer.json."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from files.names import (
    CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_TEXTS,
    VOCABULARY,
)
from files.special_tokens import check_eos, check_special_tokens, read_optional_json
from options.errors import UserError, describe
from options.limits import MAX_TOKENIZER_BYTES, check_size

# Texts to compare two tokenizers on; the shortest one that they split differently is shown.
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
CONVERSION_HINT = (
    f": make {TOKENIZER_JSON} of it with the model's {TOKENIZER_CONFIG} beside it, where sentencepiece and"
    " protobuf are installed, by transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder),"
    " and compare its tokens with SentencePiece's, since some of transformers' classes make others"
)


def read_tokenizer(folder: Path, folder_name: str):
    """Return transformers' tokenizer for a folder, without running code of the folder.

    Args:
        folder: the model's folder.
        folder_name: name of the folder in error messages.

    Raises:
        UserError: the tokenizer is missing, damaged or too large, or its files do not define how it splits
            text or its EOS token.
    """
    for name in TOKENIZER_TEXTS:
        check_size(folder / name, MAX_TOKENIZER_BYTES)
    missing = _describe_missing_files(folder)
    if missing:
        raise UserError(f"{folder_name}: no usable tokenizer ({missing}); its files belong beside {CONFIG}")
    try:
        # mistral_format: otherwise Mistral's package, if installed, reads tekken.json instead.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, mistral_format=False
        )
    except Exception as e:  # the tokenizers library raises it for a damaged tokenizer.json
        raise UserError(
            f"{folder_name}: no usable tokenizer ({describe(e)}); its files belong beside {CONFIG}"
        ) from None
    check_eos(folder, tokenizer, folder_name)
    return tokenizer


def _describe_missing_files(folder: Path) -> str:
    """Return which file a folder lacks to define its tokenizer, for an error message; "" if none.

    Without tokenizer.json transformers converts tokenizer.model, in some classes to other tokens than
    SentencePiece's and without BOS. Without tokenizer_config.json BOS and EOS are the class's defaults, and
    added tokens are plain text.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if TOKENIZER_JSON not in names and not {*VOCABULARY, TOKENIZER_CONFIG} <= names:
        found = next((name for name in (SENTENCEPIECE, "tekken.json", *VOCABULARY) if name in names), None)
        unknown = f", and {found} alone does not say how to split text" if found else ""
        return f"there is no {TOKENIZER_JSON}{unknown}{CONVERSION_HINT if found == SENTENCEPIECE else ''}"
    if not {TOKENIZER_CONFIG, SPECIAL_TOKENS} & names:
        return f"there is no {TOKENIZER_CONFIG}, so what its BOS, EOS and chat template are is unknown"
    return ""


@contextlib.contextmanager
def convert_tokenizer_errors(tokenizer) -> Iterator[None]:
    """Turn exceptions of the tokenizer within the context into UserError that names its folder."""
    try:
        yield
    except BaseException as e:
        # For inconsistent files the library raises Exception, or PanicException, which is a BaseException.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer fails ({describe(e)})") from None


@dataclass
class TokenizerDifferences:
    """Differences between transformers' tokenizer and the files of its folder.

    Attributes:
        remarks: lines to print.
        files: {name: text} to write into a folder of the trained model instead of the base's files, so that
            every program sees the tokens of training there.
    """

    remarks: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def compare_with_files(folder: Path, tokenizer) -> TokenizerDifferences:
    """Return how transformers' tokenizer differs from its files, on TEXTS, added and special tokens, flags.

    Some of transformers' classes (Llama's, Qwen2's, Gemma's) read only vocabulary and merges from
    tokenizer.json, and define the normalizer and pre-tokenizer themselves. Training uses transformers'
    tokenizer, since PEFT, vLLM, lm-evaluation-harness and transformers itself use the same one. The returned
    `files` make programs that read tokenizer.json use it too.

    Raises UserError if a tokenizer fails, or no file gives its EOS an id.
    """
    differences = TokenizerDifferences()
    if not tokenizer.is_fast:  # refused where rows are tokenized
        return differences
    kind = type(tokenizer).__name__
    if not (folder / TOKENIZER_CONFIG).is_file():
        template = "" if tokenizer.chat_template else ", and there is no chat template"
        differences.remarks.append(
            f"tokenizer: no {TOKENIZER_CONFIG}; BOS and EOS are those of {SPECIAL_TOKENS}{template}"
        )
    json_tokenizer = _read_tokenizer_json(folder / TOKENIZER_JSON, tokenizer)
    if json_tokenizer is None:
        differences.remarks.append(
            f"tokenizer: no {TOKENIZER_JSON}; transformers builds {kind} out of {' and '.join(VOCABULARY)}."
            f" Saved and exported models get its {TOKENIZER_JSON}"
        )
        differences.files[TOKENIZER_JSON] = tokenizer.backend_tokenizer.to_str(pretty=True)
    elif example := _describe_difference(json_tokenizer, tokenizer):
        differences.remarks.append(
            f"tokenizer: transformers' {kind} splits text differently from {TOKENIZER_JSON} {example}."
            f" Training uses transformers'; saved and exported models get a matching {TOKENIZER_JSON}"
        )
        differences.files[TOKENIZER_JSON] = tokenizer.backend_tokenizer.to_str(pretty=True)
    differences.remarks += check_special_tokens(folder, json_tokenizer, tokenizer)
    _compare_flags(folder / TOKENIZER_CONFIG, tokenizer, differences)
    return differences


def _read_tokenizer_json(path: Path, tokenizer) -> Tokenizer | None:
    """Return the tokenizer of tokenizer.json alone, without transformers; None if there is no file.

    tokenizer: of the same folder, which UserError names if the file cannot be used.
    """
    if not path.is_file():
        return None
    with convert_tokenizer_errors(tokenizer):
        file = Tokenizer.from_file(str(path))
        file.no_padding()
        file.no_truncation()
    return file


def _describe_difference(json_tokenizer: Tokenizer, tokenizer) -> str:
    """Return the settings in which two tokenizers differ, with an example; "" if their tokens are equal."""
    with convert_tokenizer_errors(tokenizer):
        added = {
            *tokenizer.get_added_vocab(),
            *(token.content for token in json_tokenizer.get_added_tokens_decoder().values()),
        }
        texts = [*TEXTS, *(f"a{token}b {token} c\n{token}" for token in sorted(added))]
        ids_in_use = tokenizer(texts, verbose=False)["input_ids"]
        ids_of_file = [encoding.ids for encoding in json_tokenizer.encode_batch(texts)]
        differing = [(t, a, b) for t, a, b in zip(texts, ids_in_use, ids_of_file, strict=True) if a != b]
        if not differing:
            return ""
        text, ours, theirs = min(differing, key=lambda each: len(each[0]))
        used, written = (json.loads(each.to_str()) for each in (tokenizer.backend_tokenizer, json_tokenizer))
        keys = ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens")
        settings = ", ".join(key for key in keys if used[key] != written[key])
        pairs = zip([*ours, None], [*theirs, None], strict=False)
        first = next(i for i, (our_id, their_id) in enumerate(pairs) if our_id != their_id)
        tokens = [
            " ".join(repr(each.id_to_token(i)) for i in ids[first : first + 3]) or "nothing"
            for each, ids in ((tokenizer.backend_tokenizer, ours), (json_tokenizer, theirs))
        ]
    settings = settings or "split_special_tokens, or another setting of tokenizer_config.json"
    return f"({settings}): {text!r} is {tokens[0]} instead of {tokens[1]}"


def _compare_flags(path: Path, tokenizer, differences: TokenizerDifferences) -> None:
    """Add to `differences` a remark and a corrected text if add_bos_token or add_eos_token is wrong.

    path: of tokenizer_config.json. transformers ignores its flags and uses tokenizer.json;
    llama.cpp's converter uses the flags.
    """
    config = read_optional_json(path)
    with convert_tokenizer_errors(tokenizer):
        ids = tokenizer("a", verbose=False)["input_ids"]
    added = {
        "add_bos_token": ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": ids[-1:] == [tokenizer.eos_token_id],
    }
    wrong = [
        name for name, does in added.items() if isinstance(config.get(name), bool) and config[name] != does
    ]
    for name in wrong:
        token = "BOS" if name == "add_bos_token" else "EOS"
        adds = token if added[name] else f"no {token}"
        differences.remarks.append(
            f"tokenizer: {TOKENIZER_CONFIG} says {name}: {str(config[name]).lower()}, but the tokenizer adds"
            f" {adds}, as in training. Saved and exported models get a matching {TOKENIZER_CONFIG}"
        )
    if wrong:
        corrected = config | {name: added[name] for name in wrong}
        differences.files[TOKENIZER_CONFIG] = json.dumps(corrected, indent=2, ensure_ascii=False) + "\n"


def save_to_texts(tokenizer) -> dict[str, str]:
    """Return {name: text} of the files that define a tokenizer with its chat template.

    They are transformers' own, but for flags of tokenizer_config.json that contradict the tokenizer.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        paths = [folder / name for name in TOKENIZER_TEXTS]
        texts = {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}
        corrected = TokenizerDifferences()
        _compare_flags(folder / TOKENIZER_CONFIG, tokenizer, corrected)
    return texts | corrected.files
