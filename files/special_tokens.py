"""Special and added tokens of a tokenizer, compared with the files of its folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tokenizers import Tokenizer

from files.names import ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER_CONFIG, TOKENIZER_JSON, VOCABULARY
from options.errors import UserError
from options.limits import MAX_TOKENIZER_BYTES, read_json

ADDED_DECODER = "added_tokens_decoder"  # key of tokenizer_config.json: {id: token}


def check_eos(folder: Path, tokenizer, folder_name: str) -> None:
    """Raise UserError, which begins with `folder_name`, if no file of the folder names the EOS token.

    Otherwise every row would end in the default of transformers' class, whatever the model was trained with.
    """
    settings = _read_special_tokens(folder)
    if "eos_token" in settings:
        return
    kind, eos = type(tokenizer).__name__, tokenizer.eos_token
    default = f", and transformers' {kind} would take {eos!r}" if eos else ""
    problem = (
        f"{TOKENIZER_CONFIG} has no eos_token"
        if ADDED_DECODER in settings
        else f"eos_token is in neither {TOKENIZER_CONFIG} nor {SPECIAL_TOKENS}"
    )
    raise UserError(
        f"{folder_name}: no usable tokenizer ({problem}{default}); write the EOS token that the model was"
        f" trained with into {TOKENIZER_CONFIG}"
    )


def _read_special_tokens(folder: Path) -> dict:
    """Return the merged keys of tokenizer_config.json and special_tokens_map.json. Raises UserError.

    Like transformers, this reads special_tokens_map.json only if tokenizer_config.json has no
    added_tokens_decoder.
    """
    config = read_optional_json(folder / TOKENIZER_CONFIG)
    return config if ADDED_DECODER in config else config | read_optional_json(folder / SPECIAL_TOKENS)


def read_optional_json(path: Path) -> dict:
    """Read the JSON object of a tokenizer's file; return {} if there is no such file. Raises UserError."""
    return read_json(path, MAX_TOKENIZER_BYTES) if path.is_file() else {}


def check_special_tokens(folder: Path, json_tokenizer: Tokenizer | None, tokenizer) -> list[str]:
    """Return remarks on added tokens that the tokenizer has and its files lack; UserError for such an EOS.

    They cover a BOS that no file names, tokens that tokenizer.json lacks, and tokens whose id is in no file.

    Args:
        folder: the tokenizer's folder.
        json_tokenizer: the tokenizer of tokenizer.json alone; None if there is no such file.
        tokenizer: transformers' tokenizer.

    Raises:
        UserError: no file gives the EOS token its id, so the model cannot have been trained on it.
    """
    remarks = []
    kind, ids = type(tokenizer).__name__, tokenizer.get_added_vocab()
    if tokenizer.bos_token and "bos_token" not in _read_special_tokens(folder):
        remarks.append(f"tokenizer: no file says bos_token; it is {kind}'s default, {tokenizer.bos_token!r}")
    if json_tokenizer:
        ids_in_file = {token: json_tokenizer.token_to_id(token) for token in ids}
    else:
        ids_in_file = read_optional_json(folder / VOCABULARY[0])
    lacking = {token: i for token, i in ids.items() if ids_in_file.get(token) != i}
    listed = _read_added_tokens(folder)
    unlisted = {token: i for token, i in lacking.items() if listed.get(token) != i}
    if tokenizer.eos_token in unlisted:
        raise UserError(
            f"{tokenizer.name_or_path}: the EOS token {tokenizer.eos_token!r} has the id"
            f" {tokenizer.eos_token_id} only in transformers' {kind}, in no file of the tokenizer. The model"
            " was not trained on it, and every row would end in it. Name the model's own EOS token in"
            f" {TOKENIZER_CONFIG}, or add this one to {TOKENIZER_JSON}"
        )
    if json_tokenizer and (elsewhere := lacking.keys() - unlisted.keys()):
        remarks.append(
            f"tokenizer: {TOKENIZER_JSON} lacks {_format_tokens(elsewhere, tokenizer)}, which {kind} adds as"
            f" {TOKENIZER_CONFIG} or {ADDED_TOKENS} says"
        )
    if unlisted:
        remarks.append(
            f"tokenizer: no file gives {_format_tokens(unlisted, tokenizer)} this id; {kind} adds such tokens"
            " by itself, and the model was probably not trained on them"
        )
    return remarks


def _read_added_tokens(folder: Path) -> dict[str, int]:
    """Return {added token: id} of tokenizer_config.json or, if it lists none, of added_tokens.json."""
    config = read_optional_json(folder / TOKENIZER_CONFIG)
    if ADDED_DECODER not in config:
        return read_optional_json(folder / ADDED_TOKENS)
    return {token["content"]: int(i) for i, token in config[ADDED_DECODER].items()}


def _format_tokens(tokens: Collection[str], tokenizer) -> str:
    """Return one text of added tokens, sorted by id, each with its roles (eos_token, ...) and id."""
    ids, roles = tokenizer.get_added_vocab(), tokenizer.special_tokens_map
    return ", ".join(
        f"{token!r} ({', '.join([*(name for name, t in roles.items() if t == token), f'id {ids[token]}'])})"
        for token in sorted(tokens, key=ids.__getitem__)
    )
