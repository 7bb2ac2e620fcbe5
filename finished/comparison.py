"""Answers of several models to the same prompts: how long each took, and how well it matches a reference."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.generation.streamers import BaseStreamer

from data.answers import normalize_answer
from data.images import ImageRef
from finished.text_scores import TEXT_METRICS
from options.evaluate import PACKAGES


@dataclass(frozen=True)
class TimedAnswer:
    """An answer and its times, in seconds from the encoded prompt, whose images are still to be read.

    Attributes:
        text, tokens, ended: as in Answer.
        first_token_seconds: until the first token is on the host.
        seconds: until the last one is.
    """

    text: str
    tokens: int
    ended: bool
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """The speed after the first token, which is that of the prompt; None if there is no other token."""
        return tokens_per_second([self])


class AnswerTimer(BaseStreamer):
    """Measure the times of an answer. `generate` passes it the prompt, then each token, on the host."""

    def __init__(self):
        self._start = time.perf_counter()
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the time of the prompt or the next token."""
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has come."""

    def read(self) -> dict[str, float]:
        """Return the times of a TimedAnswer. The answer must have come."""
        tokens = self._times[1:] or [time.perf_counter()]
        return {"first_token_seconds": tokens[0] - self._start, "seconds": tokens[-1] - self._start}


@dataclass(frozen=True)
class ComparedPrompt:
    """A prompt and the answers of all models to it.

    Attributes:
        given: the prompt as it was given, a text or a row.
        rendered: its text in the template of training.
        question: the part of it that a table shows.
        images: that it shows.
        reference: the answer in its row, as scores compare it; "" = there is none.
        answers: {model: answer}.
    """

    given: str | dict
    rendered: str
    question: str
    images: Sequence[ImageRef]
    reference: str
    answers: dict[str, TimedAnswer]

    def to_json(self) -> dict:
        """Return the prompt's fields, without the answers, as --json prints them."""
        images = {"images": [ref.path for ref in self.images]} if self.images else {}
        return {"prompt": self.given, "rendered": self.rendered, **images}

    def matches(self, model: str) -> bool | None:
        """Return whether a model's answer is the reference; None if there is no reference."""
        return normalize_answer(self.answers[model].text) == self.reference if self.reference else None


@dataclass(frozen=True)
class Comparison:
    """All that a table shows.

    Attributes:
        settings: {what: how the answers were made}.
        names: {model: name to show}, in the order of columns.
        prompts: the prompts with their answers.
    """

    settings: Mapping[str, object]
    names: Mapping[str, str]
    prompts: Sequence[ComparedPrompt]

    @property
    def has_references(self) -> bool:
        return any(prompt.reference for prompt in self.prompts)

    def averages(self, model: str) -> dict[str, float | None]:
        """Return {measure: a model's mean over all prompts}, and its scores over those with a reference.

        `tokens_per_second` weighs each token the same. `cut` counts the answers that --max_new_tokens ended,
        `scored` the prompts with a reference.
        """
        answers = [prompt.answers[model] for prompt in self.prompts]
        count = len(answers)
        values: dict[str, float | None] = {
            "first_token_seconds": sum(a.first_token_seconds for a in answers) / count,
            "seconds": sum(a.seconds for a in answers) / count,
            "tokens": sum(a.tokens for a in answers) / count,
            "tokens_per_second": tokens_per_second(answers),
            "cut": sum(not a.ended for a in answers),
        }
        scored = [prompt for prompt in self.prompts if prompt.reference]
        if scored:
            values["scored"] = len(scored)
        texts = [normalize_answer(prompt.answers[model].text) for prompt in scored]
        for name, metric in TEXT_METRICS.items():
            if scored and _is_installed(name):
                values |= metric(texts, [prompt.reference for prompt in scored])
        return values


def tokens_per_second(answers: Sequence[TimedAnswer]) -> float | None:
    """Return tokens per second after the first token of each answer; None if no answer has two tokens."""
    tokens = sum(a.tokens - 1 for a in answers)
    seconds = sum(a.seconds - a.first_token_seconds for a in answers)
    return tokens / seconds if tokens and seconds > 0 else None


def _is_installed(metric: str) -> bool:
    """Return whether the package of a metric is there: an older environment may lack it."""
    module, _ = PACKAGES.get(metric, ("", ""))
    return not module or importlib.util.find_spec(module) is not None
