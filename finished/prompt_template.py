"""The prompt template of a run, and where an answer to its prompts ends.

Shapes: P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer

from data.chat import convert_template_errors
from data.columns import ColumnNames
from data.encoding import encode_prompt
from data.formats import FORMATS, Format, RenderContext
from data.image_store import IMAGE_COLUMNS
from data.images import ImageRef
from data.messages import replace_system
from data.schemas import Schema, find_schema
from finished.prompt_images import PromptImages, without_dataset_option
from options.errors import UserError
from options.generate import Prompt


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as a text.

    Attributes:
        origin: where it came from, for messages.
        text: up to the answer, with a placeholder for each image.
        images: in the order of their placeholders.
    """

    origin: str
    text: str
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as a model takes it.

    Attributes:
        ids: [P] token ids.
        images: whose tokens are among them, in order.
    """

    ids: list[int]
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True)
class PromptTemplate:
    """How a run's training wrote its prompts.

    Attributes:
        format: format of the run's rows.
        columns: the training data's names for columns, which rows of prompts may have, too.
        context: the tokenizer and what else rendering needs.
        max_positions: tokens that the model can attend to.
        stop_ids: tokens that end an answer.
        marker: text that ends an answer, or None.
        images: how prompts show images.
    """

    format: Format
    columns: ColumnNames
    context: RenderContext
    max_positions: int
    stop_ids: frozenset[int]
    marker: str | None
    images: PromptImages = field(default_factory=PromptImages)

    @property
    def tokenizer(self) -> Any:
        return self.context.tokenizer

    def make_row(self, text: str) -> dict:
        """Make a row of this format from a question alone."""
        return self.format.make_prompt_row(text, self.context.markers)

    def match_row(self, row: dict) -> tuple[dict, list[Schema]]:
        """Return (the row with the format's names for its columns, the schemas that it may have)."""
        [row], renamed = self.columns.rename([row], "--prompts")
        named = {*renamed.names} - {*IMAGE_COLUMNS}
        fitting = [schema for schema in self.format.schemas if set(schema.columns) >= named]
        return row, fitting or [*self.format.schemas]

    def render(self, prompt: Prompt, system: str | None = None) -> RenderedPrompt:
        """Render the prompt's text up to the answer, as in training, and find its images.

        system: the system prompt, in place of the row's; None = the row's. Raises UserError for a row without
        a question, and for an image that cannot be used.
        """
        row, refs = self.read_row(prompt)
        return self.render_shown(row, refs, prompt.origin, system)

    def read_row(self, prompt: Prompt) -> tuple[dict, list[ImageRef]]:
        """Return (the prompt's row in the columns of the format, which shows its images; these).

        Raises UserError as `render` does.
        """
        if isinstance(prompt.content, str):
            refs = self.images.find_named(prompt.image_paths, "--image_path")
            return self.show_question(prompt.content, refs, prompt.origin), refs
        with without_dataset_option():
            row, schemas = self.match_row(prompt.content)
            row, given = self.images.take_columns(row, prompt.folder, prompt.origin)
            values = _read_row(row, schemas, prompt.origin)
            return self.images.show_row(values, given, self.format, prompt.folder, prompt.origin)

    def show_question(self, text: str, images: Sequence[ImageRef], origin: str) -> dict:
        """Return the row of a question that shows these images. Raises UserError if it cannot."""
        row = _read_row(*self.match_row(self.make_row(text)), origin)
        return self.images.show_named(row, images, self.format, origin)

    def render_shown(
        self, row: dict, images: Sequence[ImageRef], origin: str, system: str | None = None
    ) -> RenderedPrompt:
        """Render a row in the columns of the format, whose question shows its images already.

        Args:
            row: {column: value}.
            images: in the order in which it shows them.
            origin: where the prompt came from.
            system: as for `render`.

        Raises UserError for a row without a question.
        """
        row = self.format.check(row, origin)
        if not row[self.format.prompt_column]:
            raise UserError(f"{origin}: {self.format.prompt_column} is empty")
        if system is not None:
            row = row | {"messages": replace_system(row["messages"], system)}
        with convert_template_errors(origin):
            text = self.format.prompt(row, self.context)
            text.encode()
        return RenderedPrompt(origin, text, tuple(images))

    def find_question(self, prompt: RenderedPrompt) -> str:
        """Return the end of a prompt from its last question on."""
        header = self.format.question_header(self.context)
        return prompt.text[max(prompt.text.rfind(header), 0) if header else 0 :].strip()

    def check_system(self) -> None:
        """Raise UserError unless prompts can have a system prompt."""
        if self.format is not FORMATS["chat"]:
            raise UserError("only conversations have a system prompt, which the run's format is not")
        self.context.chat.check_system()

    def encode(self, prompt: RenderedPrompt) -> EncodedPrompt:
        """Tokenize a prompt.

        Raises UserError if it leaves no room for an answer, or means other images than its own.
        """
        text = self.images.expand(prompt.text, prompt.images, prompt.origin)
        ids = encode_prompt(text, self.tokenizer, self.format.add_special_tokens)
        if not ids:
            raise UserError(f"{prompt.origin}: is empty")
        self.images.check_tokens(ids, prompt.images, prompt.origin)
        if len(ids) >= self.max_positions:
            raise UserError(
                f"{prompt.origin}: takes {len(ids):,} tokens; the model has {self.max_positions:,} positions"
            )
        return EncodedPrompt(ids, prompt.images)


def _read_row(row: dict, schemas: Sequence[Schema], origin: str) -> dict:
    """Return a row in the columns of its format. Raises UserError if it has not those of a question."""
    schema = find_schema(row, schemas, needs_answer=False) or schemas[0]
    return schema.read(row, origin, needs_answer=False)


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: its text.
        tokens: number of generated tokens.
        ended: whether the model ended it, rather than max_new_tokens.
    """

    text: str
    tokens: int
    ended: bool


class MarkerCriterion(StoppingCriteria):
    """Stop an answer where the next question's marker begins: training dialogues have no EOS there.

    start: position where the answers of all rows begin.
    """

    def __init__(self, tokenizer, marker: str, start: int):
        self.tokenizer, self.marker, self.start = tokenizer, marker, start

    def __call__(self, ids: torch.Tensor, _scores, **_) -> torch.Tensor:
        last = ids[:, max(self.start, ids.shape[1] - 2 * len(self.marker)) :]
        found = [self.marker in self.tokenizer.decode(row) for row in last]
        return torch.tensor(found, device=ids.device)


class AnswerStreamer(TextStreamer):
    """Pass on an answer's text as it is generated, up to the stop token or marker.

    write: called with each chunk of text.
    """

    def __init__(self, template: PromptTemplate, write: Callable[[str], None]):
        super().__init__(template.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.template, self.write, self.pending, self.is_finished = template, write, "", False

    def put(self, value: torch.Tensor) -> None:
        """Take the next token of the answer; skip stop tokens."""
        if self.next_tokens_are_prompt or int(value) not in self.template.stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the text up to the marker; hold back what may be the marker's beginning."""
        marker = self.template.marker
        self.pending += text
        if marker and marker in self.pending:
            self.pending, self.is_finished = (
                "" if self.is_finished else self.pending.partition(marker)[0],
                True,
            )
            stream_end = True
        elif self.is_finished:
            self.pending = ""
        n_held_back = 0 if stream_end or not marker else _count_marker_start(self.pending, marker)
        self.write(self.pending[: len(self.pending) - n_held_back])
        self.pending = self.pending[len(self.pending) - n_held_back :]


def _count_marker_start(text: str, marker: str) -> int:
    """Count the characters at the end of `text` that may be the beginning of the marker."""
    return next(n for n in range(min(len(text), len(marker)), -1, -1) if text.endswith(marker[:n]))
