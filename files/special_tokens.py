"""Special and added tokens of a tokenizer, compared with what the files of its folder say of them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tokenizers import Tokenizer

from files.names import ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER_CONFIG, TOKENIZER_JSON, VOCABULARY
from options.errors import UserError
from options.limits import MAX_TOKENIZER_BYTES, read_json

ADDED_DECODER = "added_tokens_decoder"  # of tokenizer_config.json: {id: token}


def check_eos(folder: Path, tokenizer, named: str) -> None:
    """Raises UserError if no file says what EOS is: every row would end in the default of transformers' class,
    whatever the model was trained with."""
    described = _special_tokens(folder)
    if "eos_token" in described:
        return
    kind, eos = type(tokenizer).__name__, tokenizer.eos_token
    default = f", and transformers' {kind} would take {eos!r}" if eos else ""
    silent = (
        f"{TOKENIZER_CONFIG} has no eos_token"
        if ADDED_DECODER in described
        else f"eos_token is in neither {TOKENIZER_CONFIG} nor {SPECIAL_TOKENS}"
    )
    raise UserError(
        f"{named}: no usable tokenizer ({silent}{default}); write the EOS token that the model was trained with"
        f" into {TOKENIZER_CONFIG}"
    )


def _special_tokens(folder: Path) -> dict:
    """What the files say of special tokens. As transformers does, reads special_tokens_map.json only where
    tokenizer_config.json has no added_tokens_decoder. Raises UserError."""
    config = read_if_there(folder / TOKENIZER_CONFIG)
    return config if ADDED_DECODER in config else config | read_if_there(folder / SPECIAL_TOKENS)


def read_if_there(path: Path) -> dict:
    """The JSON object of one of a tokenizer's files; {} without that file. Raises UserError."""
    return read_json(path, MAX_TOKENIZER_BYTES) if path.is_file() else {}


def remarks_on_special_tokens(folder: Path, file: Tokenizer | None, tokenizer) -> list[str]:
    """Lines on a BOS that no file names, on tokens that tokenizer.json lacks, and on tokens to which no file
    gives the id that they have. file: tokenizer.json by itself; None if there is none.

    Raises UserError if EOS is one of the last: the model cannot have been trained on it.
    """
    told = []
    kind, used = type(tokenizer).__name__, tokenizer.get_added_vocab()
    if tokenizer.bos_token and "bos_token" not in _special_tokens(folder):
        told.append(f"tokenizer: no file says bos_token; it is {kind}'s default, {tokenizer.bos_token!r}")
    written = (
        {token: file.token_to_id(token) for token in used} if file else read_if_there(folder / VOCABULARY[0])
    )
    extra = {token: i for token, i in used.items() if written.get(token) != i}
    listed = _listed_tokens(folder)
    invented = {token: i for token, i in extra.items() if listed.get(token) != i}
    if tokenizer.eos_token in invented:
        raise UserError(
            f"{tokenizer.name_or_path}: no file of its tokenizer gives the EOS token {tokenizer.eos_token!r} the"
            f" id {tokenizer.eos_token_id} that {kind} gives it: the model was not trained on it, and every row"
            f" would end in it; name the model's own in {TOKENIZER_CONFIG}, or put this one into {TOKENIZER_JSON}"
        )
    if file and (elsewhere := extra.keys() - invented.keys()):
        told.append(
            f"tokenizer: {TOKENIZER_JSON} lacks {_listing(elsewhere, tokenizer)}, which {kind} adds as"
            f" {TOKENIZER_CONFIG} or {ADDED_TOKENS} says"
        )
    if invented:
        told.append(
            f"tokenizer: no file gives {_listing(invented, tokenizer)} this id; {kind} adds such tokens by"
            " itself, and the model was probably not trained on them"
        )
    return told


def _listed_tokens(folder: Path) -> dict[str, int]:
    """{added token: its id} as tokenizer_config.json lists them, or, in its place, added_tokens.json."""
    config = read_if_there(folder / TOKENIZER_CONFIG)
    if ADDED_DECODER not in config:
        return read_if_there(folder / ADDED_TOKENS)
    return {token["content"]: int(i) for i, token in config[ADDED_DECODER].items()}


def _listing(tokens: Collection[str], tokenizer) -> str:
    """The tokens in the order of their ids, each with its id and what it is."""
    ids, roles = tokenizer.get_added_vocab(), tokenizer.special_tokens_map
    return ", ".join(
        f"{token!r} ({', '.join([*(name for name, t in roles.items() if t == token), f'id {ids[token]}'])})"
        for token in sorted(tokens, key=ids.__getitem__)
    )
