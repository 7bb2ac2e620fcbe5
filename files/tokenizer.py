"""The tokenizer of a model's folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from options.errors import UserError, describe
from options.limits import TOKENIZER_FILE, check_size


def read_tokenizer(folder: Path, named: str):
    """transformers' tokenizer, with no code of the folder's. named: the folder, as errors call it. Raises UserError for one
    that is missing, damaged or too large."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        check_size(folder / name, TOKENIZER_FILE)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # the tokenizers library has no narrower one for a damaged tokenizer.json
        found = (folder / "tokenizer.json").is_file()
        reason = describe(e) if found else "there is no tokenizer.json"
        raise UserError(
            f"{named}: no usable tokenizer ({reason}); its files belong beside config.json"
        ) from None


def checked_call(tokenizer, texts: list[str], named: str = "--model_name", **options):
    """The tokenizer's result for the texts. Raises UserError if it fails."""
    try:
        return tokenizer(texts, verbose=False, **options)
    except BaseException as e:
        # Of a tokenizer that contradicts itself the tokenizers library raises Exception, or panics, which is none.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{named}: its tokenizer fails ({describe(e)})") from None
