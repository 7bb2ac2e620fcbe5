"""The columns in which rows come, and how they become the columns that a format renders.

A format of data/formats.py has one or more schemas. The first one has the columns that the format renders.
Rows of the others are converted into these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from data.sharegpt import rename_message_keys
from options.errors import UserError, join_names
from options.exact_json import describe_json_type, number_text


class Auto(Enum):
    """When --dataset_format auto recognises a schema."""

    ALWAYS = "always"
    WITH_TEMPLATE = "if the tokenizer has a chat template"
    WITHOUT_TEMPLATE = "if the tokenizer has no chat template"
    NEVER = "never"


@dataclass(frozen=True)
class Schema:
    """Columns in which the rows of a format may come.

    Attributes:
        required: columns without which a row is refused.
        optional: other columns that are read.
        answer_column: the column that holds the answer and nothing else.
        convert: convert(values, error_prefix) returns the row in the columns that the format renders.
        has_texts: whether its columns hold texts; else messages, of which `convert` takes any value.
        is_list: whether a required column must hold a list, which tells it from a schema of texts.
        excluded: columns that no row of this schema has.
        auto: when it is recognised.
        note: what the columns hold or have, for docs/data.md; "" = texts.
        learned: what is learned of a row, for docs/data.md; "" = as the format says.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    answer_column: str | None = None
    convert: Callable[[dict, str], dict] = lambda values, _error_prefix: values
    has_texts: bool = True
    is_list: bool = False
    excluded: tuple[str, ...] = ()
    auto: Auto = Auto.ALWAYS
    note: str = ""
    learned: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return *self.required, *self.optional

    def fits(self, row: Mapping, needs_answer: bool = True) -> bool:
        """Return whether a row has content in the required columns. The answer may be empty.

        It is not enough that the columns are there: tables give every row all columns. needs_answer: whether
        the column of the answer must be there.
        """
        for column in self.required:
            is_answer = column == self.answer_column
            if column not in row:
                if needs_answer or not is_answer:
                    return False
            elif not is_answer and not has_content(row[column]):
                return False
        if any(row.get(column) is not None for column in self.excluded):
            return False
        return not self.is_list or any(isinstance(row.get(column), list) for column in self.required)

    def count_columns(self, row: Mapping) -> int:
        """Return how many columns of a row that hold something are read."""
        return sum(has_content(row.get(column)) for column in self.columns)

    def read(
        self,
        row: Mapping,
        error_prefix: str,
        needs_answer: bool = True,
        renamed: Mapping[str, str] = MappingProxyType({}),
    ) -> dict:
        """Return a row in the columns that the format renders. Texts are checked, messages are not.

        Args:
            row: {column: value}.
            error_prefix: begins each error.
            needs_answer: as in `fits`.
            renamed: {a column: what the data calls it, and why}, for errors.

        Raises UserError for columns that are missing or unusable.
        """
        needed = self.required if needs_answer else [c for c in self.required if c != self.answer_column]
        missing = [column for column in needed if row.get(column) is None]
        if missing:
            names = ", ".join(renamed.get(column, column) for column in missing)
            columns = f"columns {names} are" if len(missing) > 1 else f"column {names} is"
            found = [str(column) for column in row if row[column] is not None and column not in renamed]
            content = f"; columns with content: {join_columns(found)}" if found else ""
            has_others = needs_answer and not {*missing} <= {*renamed} and not {*found} <= {*self.columns}
            remedy = "; --columns says which to read as these (docs/data.md)" if has_others else ""
            raise UserError(f"{error_prefix}: {columns} missing or empty{content}{remedy}")
        values = {column: row.get(column) for column in self.columns}
        if self.has_texts:
            values = {column: _check_text(value, column, error_prefix) for column, value in values.items()}
        return self.convert(values, error_prefix)


def has_content(value: Any) -> bool:
    """Return whether a value is neither empty nor blank."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value != [] and value != {}


def join_columns(columns: Iterable[str]) -> str:
    """Join the names of columns for a message; the empty name, of pandas' index, is written in words."""
    return join_names([column or "a column without a name" for column in columns])


def _check_text(value: Any, column: str, error_prefix: str) -> str:
    """Return the text of a cell; "" for None. Raises UserError if it is neither a text nor a number."""
    if value is None:
        return ""  # an optional column
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UserError(
            f"{error_prefix}: column {column} holds a {type(value).__name__}, not a text (docs/data.md)"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{error_prefix}: column {column} holds {value} as a number; leave the row out, or write a text"
        )
    return value if isinstance(value, str) else number_text(value)


def find_schema(row: Mapping, schemas: Iterable[Schema], needs_answer: bool = True) -> Schema | None:
    """Return the first schema that fits a row; None if none does.

    Without needs_answer, a row that has no answer gets the schema that reads the most of its columns.
    Otherwise a column beside the question, such as `context`, would be lost to an earlier schema.
    """
    schemas = [*schemas]
    found = next((schema for schema in schemas if schema.fits(row)), None)
    if found or needs_answer:
        return found
    fitting = [schema for schema in schemas if schema.fits(row, needs_answer=False)]
    return max(fitting, key=lambda schema: schema.count_columns(row), default=None)


def match_schemas(rows: Sequence[Mapping], schemas: Sequence[Schema]) -> list[Schema]:
    """Return the schema of each row.

    A row that fits none gets that of the first row that fits one, so that `Schema.read` says what it lacks.
    """
    found = [find_schema(row, schemas) for row in rows]
    default = next(filter(None, found), schemas[0])
    return [schema or default for schema in found]


# Conversions into the columns of the chat format


def _read_messages(values: dict, error_prefix: str) -> dict:
    messages = rename_message_keys(values["messages"], error_prefix)
    return {"messages": _put_system_first(values["system"], messages), "tools": values["tools"]}


def _read_conversation(values: dict, error_prefix: str) -> dict:
    """Convert ShareGPT's columns."""
    given = values["conversations"]
    messages = rename_message_keys(given, error_prefix)
    if not isinstance(messages, list) or not messages:
        what = "empty" if messages == [] else describe_json_type(given)
        raise UserError(
            f"{error_prefix}: conversations is {what}; expected a list of messages (docs/data.md)"
        )
    return {"messages": _put_system_first(values["system"], messages), "tools": values["tools"]}


def _put_system_first(system: Any, messages: Any) -> Any:
    """Return messages that begin with the text of a column `system`, unless they have a system message.

    Messages that are no list stay as they are, since `check_messages` reports them.
    """
    if not has_content(system) or not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    has_own = first.get("role") in ("system", "developer")
    return messages if has_own else [{"role": "system", "content": system}, *messages]


def _join_completion(values: dict, error_prefix: str) -> dict:
    """Convert TRL's prompt and completion, two lists of messages. Only the completion is learned."""
    parts = {}
    for column in ("prompt", "completion"):
        messages = [] if values[column] is None else rename_message_keys(values[column], error_prefix)
        if not isinstance(messages, list):
            raise UserError(
                f"{error_prefix}: column {column} is {describe_json_type(messages)}; prompt and completion"
                " must both be texts, or both lists of messages (docs/data.md)"
            )
        parts[column] = messages
    prompt = [
        {**m, "train": False} if isinstance(m, Mapping) and m.get("role") == "assistant" else m
        for m in parts["prompt"]
    ]
    messages = _put_system_first(values["system"], [*prompt, *parts["completion"]])
    return {"messages": messages, "tools": values["tools"]}


def _make_turns(question: str, answer: str, more: str = "", joined: str = "") -> Callable[[dict, str], dict]:
    """Return a conversion of texts to a user's turn and the assistant's, after a `system` if there is one.

    Args:
        question, answer: the columns of the turns.
        more: a column that joins the question if it is not blank.
        joined: the question then: a format string of these two columns.
    """

    def convert(values: dict, _error_prefix: str) -> dict:
        """Return {"messages": two or three messages}."""
        asked = joined.format_map(values) if more and values[more].strip() else values[question]
        turns = [("system", values["system"])] if values["system"].strip() else []
        turns += [("user", asked), ("assistant", values[answer])]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    return convert


def _rename(**columns: str) -> Callable[[dict, str], dict]:
    """Return a conversion that only renames. columns: {the format's name: the schema's name}."""
    return lambda values, _error_prefix: {ours: values[theirs] for ours, theirs in columns.items()}


# Columns of a question and its answer that are no format's own, in the order of recognition.
PAIRS = (
    Schema(("prompt", "response"), answer_column="response"),
    Schema(("query", "answer"), answer_column="answer"),
    Schema(("query", "response"), answer_column="response"),
    Schema(("question", "response"), answer_column="response", excluded=("answer",)),
    Schema(("input", "output"), answer_column="output", excluded=("instruction",)),
)
ALPACA_COLUMNS = Schema(("instruction", "output"), ("input",), "output")
QA_COLUMNS = Schema(("question", "answer"), ("context",), "answer")
COMPLETION_COLUMNS = Schema(("prompt", "completion"), (), "completion")
TEXT_COLUMN = Schema(("text",))


def _convert_pairs(pairs: Iterable[Schema], auto: Auto, question: str, answer: str) -> list[Schema]:
    """Return schemas of pairs that are renamed to the columns `question` and `answer` of a format."""
    return [
        replace(
            pair,
            optional=(),
            auto=auto,
            convert=_rename(**{question: pair.required[0], answer: pair.required[1]}),
        )
        for pair in pairs
    ]


def _convert_to_chat(pair: Schema, auto: Auto, joined: str = "") -> Schema:
    """Return a schema of texts that become two turns, and an optional column `system`.

    joined: as in `_make_turns`; its `more` is the optional column of the pair.
    """
    question, answer = pair.required
    convert = _make_turns(question, answer, "".join(pair.optional), joined)
    optional, learned = (*pair.optional, "system"), "the answer, and the token that ends its turn"
    return replace(pair, optional=optional, auto=auto, convert=convert, learned=learned)


CHAT_SCHEMAS = (
    Schema(
        ("messages",),
        ("system", "tools"),
        convert=_read_messages,
        has_texts=False,
        note="objects with `role` and `content`, or ShareGPT's `from` and `value`",
    ),
    Schema(
        ("conversations",),
        ("system", "tools"),
        convert=_read_conversation,
        has_texts=False,
        note="objects with ShareGPT's `from` and `value`, or `role` and `content`",
    ),
    Schema(
        ("prompt", "completion"),
        ("system", "tools"),
        "completion",
        _join_completion,
        has_texts=False,
        is_list=True,
        note="both lists of messages",
        learned="each turn of the assistant in `completion`, with the token that ends it",
    ),
    *(_convert_to_chat(pair, Auto.WITH_TEMPLATE) for pair in PAIRS),
    _convert_to_chat(COMPLETION_COLUMNS, Auto.NEVER),
    _convert_to_chat(ALPACA_COLUMNS, Auto.NEVER, "{instruction}\n{input}"),
    _convert_to_chat(QA_COLUMNS, Auto.NEVER, "{context}\n\n{question}"),
)
QA_SCHEMAS = (
    QA_COLUMNS,
    *_convert_pairs(PAIRS, Auto.WITHOUT_TEMPLATE, "question", "answer"),
    *_convert_pairs([COMPLETION_COLUMNS], Auto.NEVER, "question", "answer"),
)
COMPLETION_SCHEMAS = (
    COMPLETION_COLUMNS,
    *_convert_pairs([*PAIRS, QA_COLUMNS], Auto.NEVER, "prompt", "completion"),
)
