"""What --adapter decides about conversations: the chat template, the tokens of its markers, empty thoughts.

The files beside the adapter say how it was trained: those of a RUN with --chat_template, or those that TRL
and others save. Without them the base's own template was used.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data.template_choice import default_template, read_template, read_trained_tokenizer
from files.base_model import STRUCTURE_KEY
from files.names import CHAT_TEMPLATE, OPTIONS, TOKENIZER_CONFIG, TOKENIZER_JSON
from files.saved_adapter import SavedAdapter
from files.special_tokens import read_optional_json
from files.tokenizer import read_tokenizer
from options.config import Config
from options.errors import UserError, join_names
from options.limits import MAX_TEMPLATE_BYTES, read_text
from options.yaml_file import read_options_file


@dataclasses.dataclass(frozen=True)
class AdoptedTemplate:
    """What the files beside an adapter decided.

    Attributes:
        config: the options with it.
        is_adapters: whether --chat_template is the text that the adapter was trained with.
        remarks: lines to print at start.
    """

    config: Config
    is_adapters: bool
    remarks: tuple[str, ...]


def adopt_template(config: Config, adapter: SavedAdapter, base: Path, embedding_rows: int) -> AdoptedTemplate:
    """Return the options with the adapter's chat template and --empty_thinking where they are not given.

    A template or --empty_thinking that is given may differ; a remark says so.

    Args:
        config: the run's options.
        adapter: the adapter.
        base: folder of the model.
        embedding_rows: rows of the model's embedding.

    Raises UserError if the adapter's template cannot be used, or if the run would encode it in other tokens.
    """
    where, folder = f"--adapter {adapter.name}", adapter.path.parent
    recorded = _read_recorded_options(adapter)
    config, remarks = _adopt_empty_thinking(config, recorded, where)
    saved = _read_saved_template(folder)
    tokenizer = read_tokenizer(base, f"--model_name {base}")
    own, given = default_template(tokenizer.chat_template), config.chat_template
    if given is not None:
        trained_on = saved or (own if recorded.get("dataset_format") == "chat" else None)
        is_adapters = saved is not None and read_template(given) == saved
        if trained_on is not None and read_template(given) != trained_on:
            whose = "that beside it" if saved else "the base's"
            remarks.append(f"--chat_template: another template than the adapter was trained with ({whose})")
        if not is_adapters:
            return AdoptedTemplate(config, False, tuple(remarks))
    elif saved not in (None, own):
        config = dataclasses.replace(config, chat_template=saved)
        remarks.append(f"{where}: its chat template is used (--chat_template changes it)")
    try:
        tokenizer = read_trained_tokenizer(base, f"--model_name {base}", config.chat_template, embedding_rows)
    except UserError as e:
        raise UserError(f"{where}: its chat template{str(e).removeprefix('--chat_template')}") from None
    if (folder / TOKENIZER_JSON).is_file():
        remarks += _compare_tokenizers(folder, tokenizer, saved or own or "", where)
    return AdoptedTemplate(config, saved is not None and config.chat_template == saved, tuple(remarks))


def _read_recorded_options(adapter: SavedAdapter) -> dict[str, Any]:
    """Return the options in config.yaml of a RUN of this program; {} for other adapters. Raises UserError."""
    path = adapter.path.parent / OPTIONS
    if STRUCTURE_KEY not in adapter.metadata or not path.is_file():
        return {}
    try:
        return read_options_file(str(path))
    except UserError as e:
        raise UserError(f"--adapter {adapter.name}: {str(e).removeprefix('--config ')}") from None


def _adopt_empty_thinking(config: Config, recorded: dict[str, Any], where: str) -> tuple[Config, list[str]]:
    """Return (the options with the RUN's --empty_thinking in place of auto, remarks).

    Args:
        config: the run's options.
        recorded: those of the adapter's RUN, or {}.
        where: names the adapter.
    """
    # A run on other rows than conversations records auto. Versions without the option learned empty thoughts.
    was_chat = recorded.get("dataset_format") == "chat"
    trained = recorded.get("empty_thinking", "learn" if was_chat else "auto")
    if trained not in ("prompt", "learn") or config.empty_thinking == trained:
        return config, []
    if config.empty_thinking == "auto":
        remark = f"{where}: was trained with --empty_thinking {trained}, which is used"
        return dataclasses.replace(config, empty_thinking=trained), [remark]
    remark = f"--empty_thinking {config.empty_thinking}: the adapter was trained with {trained}"
    return config, [remark]


def _read_saved_template(folder: Path) -> str | None:
    """Return the chat template that an adapter's folder holds; None = it holds none. Raises UserError.

    Older versions of transformers write it into tokenizer_config.json.
    """
    path = folder / CHAT_TEMPLATE
    if not path.is_file():
        return default_template(read_optional_json(folder / TOKENIZER_CONFIG).get("chat_template"))
    try:
        return read_text(path, MAX_TEMPLATE_BYTES)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or 'not a UTF-8 text'}") from None


def _compare_tokenizers(folder: Path, tokenizer: Any, template: str, where: str) -> list[str]:
    """Return a remark on tokens of the adapter's tokenizer that the run's has not, or with another id.

    Raises UserError if the template writes one of them: the adapter learned other ids than the run would use.

    Args:
        folder: the adapter's folder, with a tokenizer.
        tokenizer: that of the run.
        template: the chat template of the adapter.
        where: names the adapter.
    """
    theirs, vocabulary = read_tokenizer(folder, where), tokenizer.get_vocab()
    changed = {token: i for token, i in theirs.get_vocab().items() if vocabulary.get(token) != i}
    written = {token for token in changed if token in template}
    for name in ("bos_token", "eos_token"):
        token = getattr(theirs, name)
        if token is not None and token != getattr(tokenizer, name):
            changed[token] = theirs.convert_tokens_to_ids(token)
            written |= {token} if name in template else set()
    if not changed:
        return []
    shown = sorted(written or changed, key=lambda token: changed[token])
    named = join_names([f"{token} ({changed[token]})" for token in shown])
    if written:
        raise UserError(
            f"{where}: its chat template writes {named}, which {tokenizer.name_or_path} does not encode so;"
            " name a copy of the model with the adapter's tokenizer files in it: --model_name"
        )
    return [
        f"{where}: its tokenizer has {named}, which {tokenizer.name_or_path} does not encode so; rows with"
        " these texts get other tokens than those that it was trained with"
    ]
