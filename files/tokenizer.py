"""The tokenizer of a model's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from options.errors import UserError, describe
from options.limits import TOKENIZER_FILE, check_size

FILE, CONFIG, SPECIAL, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
VOCABULARY = ("vocab.json", "merges.txt")  # of byte-level BPE, without tokenizer.json


def read_tokenizer(folder: Path, named: str):
    """transformers' tokenizer, with no code of the folder's. named: the folder, as errors call it. Raises UserError for one
    that is missing, damaged or too large, or whose files leave open how it splits text."""
    for name in (FILE, CONFIG, TEMPLATE, SPECIAL, *VOCABULARY):
        check_size(folder / name, TOKENIZER_FILE)
    missing = _missing(folder)
    if missing:
        raise UserError(f"{named}: no usable tokenizer ({missing}); its files belong beside config.json")
    try:
        # mistral_format: else Mistral's package, where it is installed, reads tekken.json instead of tokenizer.json.
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, mistral_format=False
        )
    except Exception as e:  # the tokenizers library has no narrower one for a damaged tokenizer.json
        raise UserError(
            f"{named}: no usable tokenizer ({describe(e)}); its files belong beside config.json"
        ) from None


def _missing(folder: Path) -> str:
    """What a folder lacks for its tokenizer to be known; "" if nothing.

    Without tokenizer.json transformers converts tokenizer.model, in some classes to other tokens than SentencePiece's and
    without BOS; without tokenizer_config.json BOS and EOS are its class's, and added tokens are plain text.
    """
    has = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if FILE not in has and not {*VOCABULARY, CONFIG} <= has:
        found = next((name for name in ("tokenizer.model", "tekken.json", *VOCABULARY) if name in has), None)
        return f"there is no {FILE}" + (
            f", and {found} alone does not say how to split text" if found else ""
        )
    if not {CONFIG, SPECIAL} & has:
        return f"there is no {CONFIG}, so what its BOS, EOS and chat template are is unknown"
    return ""


@contextlib.contextmanager
def tokenizer_errors(named: str = "--model_name") -> Iterator[None]:
    """Raises UserError for what a tokenizer raises within."""
    try:
        yield
    except BaseException as e:
        # Of a tokenizer that contradicts itself the tokenizers library raises Exception, or panics, which is none.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{named}: its tokenizer fails ({describe(e)})") from None
