"""The data that a run is evaluated on: the evaluation set and the prompts of its samples, tokenized."""

from __future__ import annotations

from dataclasses import dataclass

from data.image_format import ImageFormat
from data.images import ImageRef
from data.rows import TokenizedRows

MAX_QUESTION_CHARS = 120  # of a prompt that is printed beside its answer


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it.

    Attributes:
        text: the prompt.
        ids: its token ids.
        answer: the row's own answer, from `normalize_answer`; "" if it has none.
        marker: a text that ends the model's answer, as in Rendered.
        question_header: the text that begins a question, as in Format.
        images: for which a placeholder stands in the text, and tokens in the ids.
    """

    text: str
    ids: list[int]
    answer: str = ""
    marker: str | None = None
    question_header: str = ""
    images: tuple[ImageRef, ...] = ()

    def describe(self) -> str:
        """Return the prompt from its last question on, in one line, shortened in the middle if it is long."""
        start = self.text.rfind(self.question_header) if self.question_header else 0
        question = " ".join(self.text[max(start, 0) :].split())
        if len(question) <= MAX_QUESTION_CHARS:
            return question
        half = (MAX_QUESTION_CHARS - len(" ... ")) // 2
        return f"{question[:half]} ... {question[-half:]}"


@dataclass(frozen=True)
class EvaluationData:
    """The data that a run is evaluated on.

    Attributes:
        rows: the evaluation set, or None.
        prompts: the prompts of samples; may be empty.
        stop_ids: token ids that end an answer.
        remarks: lines to print at start, on this data and on the training data.
        image_format: how the model takes images; None = it takes none.
    """

    rows: TokenizedRows | None
    prompts: list[Prompt]
    stop_ids: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    image_format: ImageFormat | None = None

    @property
    def has_images(self) -> bool:
        """Whether a row or a prompt has an image."""
        return bool(self.rows and self.rows.images.refs) or any(prompt.images for prompt in self.prompts)

    def largest_id(self, image_id: int = -1) -> int:
        """Return the largest token id of all rows and prompts; 0 if there are none.

        image_id: the id that stands for a part of an image, which does not count.
        """
        ids = [i for prompt in self.prompts for i in prompt.ids if i != image_id]
        return max([*ids, self.rows.largest_id() if self.rows else 0], default=0)

    def describe(self) -> str:
        """Return lines on the evaluation set, each after a line break; "" if there is none."""
        if not self.rows:
            return ""
        rows = self.rows
        counts = ((rows.dropped, "dropped"), (rows.cut, "cut at the context length"))
        left_out = "".join(f", {count:,} {what}" for count, what in counts if count)
        counted = f"{len(rows):,} rows{left_out}, {int(rows.targets().sum()):,} learned tokens"
        return "".join(f"\nevaluation: {line}" for line in (counted, *rows.describe_reasons()))
