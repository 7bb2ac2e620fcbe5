"""--chat_template: a template in place of the tokenizer's own, and tokens for its markers.

The choice is a name of CHAT_TEMPLATES, whose file is in data/templates/, the path of a file, or the text of a
template, which config.yaml records.
"""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from data.chat import ChatTemplate
from data.chat_turns import HELLO, OPENINGS, PROBE, QUESTION_PROBE, TEMPLATE_ERRORS, make_answer, try_apply
from files.tokenizer import TokenizerDifferences, compare_with_files, read_tokenizer, save_to_texts
from options.config import CHAT_TEMPLATES
from options.errors import UserError, describe, join_names
from options.limits import MAX_TEMPLATE_BYTES, read_text

FOLDER = Path(__file__).parent / "templates"
TEMPLATE_CODE = re.compile(r"\{\{|\{%")
# Texts that get a token of their own: <|im_start|>, <|eot_id|>, and Gemma's.
MARKER = re.compile(r"<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_turn>")


def read_template(choice: str) -> str:
    """Return the text of the template that --chat_template names, after a check of its syntax.

    Raises UserError if the choice is no name, file or template, or if the text is no Jinja template.
    """
    origin, text = _find_text(choice)
    try:
        render_jinja_template(conversations=[[HELLO]], chat_template=text)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"{origin}: {_describe_error(e)}") from None
    except TEMPLATE_ERRORS:  # such as a template that needs BOS; `use_template` renders with a tokenizer
        pass
    return text


def _find_text(choice: str) -> tuple[str, str]:
    """Return (what an error begins with, the text of the template), without a check of its syntax."""
    path = str(FOLDER / f"{choice}.jinja") if choice in CHAT_TEMPLATES else os.path.expanduser(choice)
    # Path.is_file raises for a text that is too long for a name.
    if TEMPLATE_CODE.search(choice) and not os.path.isfile(path):
        return "--chat_template", choice
    origin = f"--chat_template {choice}"
    try:
        return origin, read_text(Path(path), MAX_TEMPLATE_BYTES)
    except UnicodeDecodeError:
        raise UserError(f"{origin}: not a UTF-8 text; expected a Jinja template") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        reason = getattr(e, "strerror", None) or e
        names = ", ".join(CHAT_TEMPLATES)
        raise UserError(f"{origin}: {reason}; expected {names}, or a file with a Jinja template") from None


def use_template(tokenizer: Any, choice: str, embedding_rows: int) -> list[str]:
    """Give a tokenizer the template that --chat_template names, and tokens for its markers.

    The new tokens get the first free ids, in the order in which the template writes them. There are none if
    the embedding has not enough rows for all. Returns remarks to print.

    Args:
        tokenizer: transformers' tokenizer, which is changed.
        choice: a name, file or text, as for `read_template`.
        embedding_rows: rows of the model's embedding.

    Raises UserError if the choice is no name, file or template, or if the template does not render a question
    and its answer.
    """
    origin, tokenizer.chat_template = _find_text(choice)
    text = _render_example(tokenizer, origin)
    return [*_describe_missing_bos(tokenizer, text), *_add_tokens(tokenizer, text, embedding_rows)]


def _render_example(tokenizer: Any, origin: str) -> str:
    """Return the text of a question, its answer, and the request for an answer. Raises UserError."""
    apply, reasons = ChatTemplate(tokenizer).apply, []
    for opening in OPENINGS:
        asked = [*opening[:-1], opening[-1] | {"content": QUESTION_PROBE}]
        try:
            text = apply([*asked, make_answer(PROBE)])
        except TEMPLATE_ERRORS as e:
            reasons.append(_describe_error(e))
            continue
        hidden = "the answer" if PROBE not in text else "the question" if QUESTION_PROBE not in text else ""
        if not hidden:
            return text + (try_apply(apply, asked, add_generation_prompt=True) or "")
        reasons.append(f"it does not show {hidden}")
    raise UserError(f"{origin}: does not render a conversation: {reasons[0]}")


def _describe_error(e: Exception) -> str:
    """Return an error of a template as one line, with the line of the template if that is known."""
    frames = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == "<template>"]
    line = e.lineno if isinstance(e, jinja2.TemplateSyntaxError) else frames[-1] if frames else None
    text = describe(e) if not isinstance(e, jinja2.TemplateError) else " ".join(str(e).split())
    return f"line {line}: {text}" if line else text


def _add_tokens(tokenizer: Any, text: str, embedding_rows: int) -> list[str]:
    """Add the markers in a rendered text to the tokenizer, if it lacks them and there is room for all.

    Returns a list with one remark on new ids, or on markers that are encoded as ordinary text, or an empty
    list.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    lacking = [marker for marker in dict.fromkeys(MARKER.findall(text)) if marker not in added]
    new = [marker for marker in lacking if marker not in vocabulary]
    first = max(vocabulary.values()) + 1
    if not lacking:
        return []
    # tokenizers counts ids from the number of tokens, which is too small for a vocabulary with gaps.
    if first + len(new) > embedding_rows or (new and first != len(tokenizer)):
        return [
            f"chat template: the tokenizer has no token for {join_names(lacking)}, and the model no room:"
            f" {embedding_rows:,} rows of the embedding for {first:,} ids. They are encoded as ordinary text"
        ]
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in lacking])
    ids = tokenizer.convert_tokens_to_ids(new)
    assert ids == [*range(first, first + len(new))], ids
    if not new:
        return []
    named = ", ".join(f"{token} ({i})" for token, i in zip(new, ids, strict=True))
    return [
        f"chat template: new tokens {named}, for which the base has unused rows of embedding and head; only"
        " a run that trains these learns them"
    ]


def _describe_missing_bos(tokenizer: Any, text: str) -> list[str]:
    """Return a list with one remark if the tokenizer begins texts with BOS, and the template does not."""
    bos = tokenizer.bos_token
    begins = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    if bos is None or not begins or text.startswith(bos):
        return []
    return [
        f"chat template: it does not begin with BOS ({bos}), as the tokenizer begins other texts;"
        " {{ bos_token }} at the start of a template writes it"
    ]


def read_trained_tokenizer(
    folder: Path, folder_name: str, chat_template: str | None, embedding_rows: int
) -> Any:
    """Return the tokenizer of a model's folder as a run with this --chat_template uses it.

    Args:
        folder, folder_name: as for `read_tokenizer`.
        chat_template: the option of the run; None = the tokenizer's own template.
        embedding_rows: rows of the model's embedding.

    Raises UserError as `read_tokenizer` and `use_template` do.
    """
    tokenizer = read_tokenizer(folder, folder_name)
    if chat_template is not None:
        use_template(tokenizer, chat_template, embedding_rows)
    return tokenizer


def compare_with_base(
    folder: Path, folder_name: str, tokenizer: Any, chat_template: str | None
) -> TokenizerDifferences:
    """Return how a run's tokenizer differs from its base's files, as `compare_with_files` does.

    With --chat_template all files of the tokenizer are among those to write into a result.

    Args:
        folder, folder_name: as for `read_tokenizer`.
        tokenizer: from `read_trained_tokenizer`, for this folder.
        chat_template: the option of the run.
    """
    if chat_template is None:
        return compare_with_files(folder, tokenizer)
    differences = compare_with_files(folder, read_tokenizer(folder, folder_name))
    return TokenizerDifferences(differences.remarks, differences.files | save_to_texts(tokenizer))
