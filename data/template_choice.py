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
from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from data.chat import ChatTemplate
from data.chat_turns import HELLO, OPENINGS, PROBE, QUESTION_PROBE, TEMPLATE_ERRORS, make_answer, try_apply
from data.messages import REASONING
from files.tokenizer import TokenizerDifferences, compare_with_files, read_tokenizer, save_to_texts
from options.config import CHAT_TEMPLATES
from options.errors import UserError, describe, join_names
from options.exact_json import parse_json
from options.limits import MAX_TEMPLATE_BYTES, MAX_TEMPLATE_FILE_BYTES, read_text

FOLDER = Path(__file__).parent / "templates"
TEMPLATE_CODE = re.compile(r"\{\{|\{%")
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can write and UTF-8 cannot
# Texts that get a token of their own: <|im_start|>, Gemma 4's <turn|>, DeepSeek's wide bars, Gemma's markers.
MARKER = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]?>|<[^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_turn>")
# Parts of a conversation that have markers of their own in some templates, and that others refuse.
SYSTEM = {"role": "system", "content": "Be kind."}
FUNCTION = {"name": "f", "description": "F.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "1"}
THINKING = {"role": "assistant", "content": "Yo", **dict.fromkeys(REASONING, "Hm.")}


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
        return "--chat_template", _read_json_template(choice, "", "--chat_template")
    origin = f"--chat_template {choice}"
    try:
        text = read_text(Path(path), MAX_TEMPLATE_FILE_BYTES)
    except UnicodeDecodeError:
        raise UserError(f"{origin}: not a UTF-8 text; expected a Jinja template") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        reason = getattr(e, "strerror", None) or e
        names = ", ".join(CHAT_TEMPLATES)
        raise UserError(f"{origin}: {reason}; expected {names}, or a file with a Jinja template") from None
    text = _read_json_template(text, path, origin)
    if len(text.encode()) > MAX_TEMPLATE_BYTES:
        raise UserError(f"{origin}: has more than {MAX_TEMPLATE_BYTES:,} bytes, the most that a template has")
    return origin, text


def _read_json_template(text: str, path: str, origin: str) -> str:
    """Return the template in the text of chat_template.json or tokenizer_config.json; other texts unchanged.

    Raises UserError if a JSON object, or a file named .json, has no template.
    """
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) and not path.lower().endswith(".json"):
        return text
    template = value.get("chat_template") if isinstance(value, dict) else None
    if isinstance(template, list):  # named templates
        template = default_template(template)
    if not isinstance(template, str) or SURROGATE.search(template):
        raise UserError(
            f"{origin}: expected a Jinja template, or a JSON object whose key chat_template holds one, or a"
            " list of templates of which one is named default"
        )
    return template


def default_template(templates: Any) -> str | None:
    """Return the template for rows without tools of a tokenizer that has one, several by name, or none."""
    if isinstance(templates, list):
        pairs = [each for each in templates if isinstance(each, dict)]
        templates = {each.get("name"): each.get("template") for each in pairs}
    text = templates.get("default") if isinstance(templates, dict) else templates
    return text if isinstance(text, str) else None


def use_template(tokenizer: Any, choice: str, embedding_rows: int, remedy: str = "") -> list[str]:
    """Give a tokenizer the template that --chat_template names, and tokens for its markers.

    The new tokens get the first free ids, in the order in which the template writes them. There are none if
    the embedding has not enough rows for all. Returns remarks to print.

    Args:
        tokenizer: transformers' tokenizer, which is changed.
        choice: a name, file or text, as for `read_template`.
        embedding_rows: rows of the model's embedding.
        remedy: the end of the remark on new tokens: which runs learn them.

    Raises UserError if the choice is no name, file or template, or if the template does not render a question
    and its answer.
    """
    origin, tokenizer.chat_template = _find_text(choice)
    text = _render_example(tokenizer, origin)
    return [*_describe_missing_bos(tokenizer, text), *_add_tokens(tokenizer, text, embedding_rows, remedy)]


def _render_example(tokenizer: Any, origin: str) -> str:
    """Return the text of a question and its answer, followed by those of conversations of all other kinds.

    The others are left out where the template refuses them. Raises UserError if it refuses the first.
    """
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
            text += try_apply(apply, asked, add_generation_prompt=True) or ""
            return text + _render_other_parts(tokenizer, asked)
        reasons.append(f"it does not show {hidden}")
    raise UserError(f"{origin}: does not render a conversation: {reasons[0]}")


def _render_other_parts(tokenizer: Any, asked: list[dict]) -> str:
    """Return the texts of conversations with a system prompt, thoughts, tools, calls and results.

    asked: messages that the template accepts, a user's last.
    """
    chat, answer = ChatTemplate(tokenizer), make_answer("Yo")
    conversations: list[tuple[list[dict], list[dict] | None]] = [
        ([*asked, answer, HELLO, answer], None),
        ([SYSTEM, *(message for message in asked if message["role"] != "system"), answer], None),
        ([*asked, THINKING], None),
        ([*asked, answer], [TOOL]),
        ([*asked, CALLING], [TOOL]),
        ([*asked, CALLING, RESULT, answer], [TOOL]),
    ]
    texts = (try_apply(chat.apply, chat.fit_messages(m), tools=tools) for m, tools in conversations)
    return "".join(filter(None, texts))


def _describe_error(e: Exception) -> str:
    """Return an error of a template as one line, with the line of the template if that is known."""
    frames = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == "<template>"]
    line = e.lineno if isinstance(e, jinja2.TemplateSyntaxError) else frames[-1] if frames else None
    text = describe(e) if not isinstance(e, jinja2.TemplateError) else " ".join(str(e).split())
    return f"line {line}: {text}" if line else text


def _add_tokens(tokenizer: Any, text: str, embedding_rows: int, remedy: str) -> list[str]:
    """Add the markers in a rendered text to the tokenizer, if it lacks them and there is room for all.

    Returns a list with one remark on new ids, or on markers that are encoded as ordinary text, or an empty
    list. The parameters are those of `use_template`, but `text`.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    lacking = [marker for marker in dict.fromkeys(MARKER.findall(text)) if marker not in added]
    new = [marker for marker in lacking if marker not in vocabulary]
    if not lacking:
        return []
    tokens = [AddedToken(marker, special=True, normalized=False) for marker in lacking]
    ids = _find_new_ids(tokenizer, tokens, new)
    if ids is None or max(ids, default=0) >= embedding_rows:
        last = max(vocabulary.values())
        reason = f"the model no room: {embedding_rows:,} rows of the embedding for {last + 1:,} ids"
        if ids is None:
            reason = (
                f"can take none, since its ids have a gap: {len(vocabulary):,} tokens, ids up to {last:,}"
            )
        return [
            f"chat template: the tokenizer has no token for {join_names(lacking)}, and {reason}. They are"
            f" encoded as ordinary text{_describe_stop_string(text, lacking)}"
        ]
    tokenizer.add_tokens(tokens)
    assert tokenizer.convert_tokens_to_ids(new) == ids
    if not new:
        return []
    named = ", ".join(f"{token} ({i})" for token, i in zip(new, ids, strict=True))
    return [
        f"chat template: new tokens {named}, for which the base has unused rows of embedding and head{remedy}"
    ]


def _find_new_ids(tokenizer: Any, tokens: list[AddedToken], new: list[str]) -> list[int] | None:
    """Return the ids that a tokenizer gives new tokens; None if a gap in its ids makes them unusable.

    Without a gap they are the next ids. With one, the tokenizers library counts from the number of the
    model's tokens, or from the largest id of an added token. Such an id may be that of another token, and it
    may change when tokenizer.json is read again. So it is tried on copies.

    Args:
        tokenizer: transformers' tokenizer.
        tokens: all tokens to add.
        new: the texts of those that are not in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    first = max(vocabulary.values()) + 1
    if first == len(tokenizer):
        return [*range(first, first + len(new))]
    trial = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    before = trial.get_vocab()
    trial.add_tokens(tokens)
    read_again = Tokenizer.from_str(trial.to_str())
    ids, later = ([each.get_vocab()[token] for token in new] for each in (trial, read_again))
    stay = ids == later and before == vocabulary
    return ids if stay and not {*vocabulary.values()}.intersection(ids) else None


def _describe_stop_string(text: str, lacking: list[str]) -> str:
    """Return the end of a remark if the marker that closes an answer is no token; else "".

    Args:
        text: rendered conversations; the answer of the first is PROBE.
        lacking: the markers in it that are no tokens.
    """
    closing = MARKER.match(text.partition(PROBE)[2].lstrip())
    if not closing or closing[0] not in lacking:
        return ""
    return f", so no token ends an answer: give servers {closing[0]} as a stop string (docs/serving.md)"


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
