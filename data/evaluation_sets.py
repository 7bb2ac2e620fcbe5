"""The evaluation set of a run, split off the training data or read beside it, and the prompts of its samples.

Prepared with the training data, before any process with a GPU is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data.answers import answer_text, comparable
from data.chat import template_errors
from data.encoding import prompt_ids, without_empty_answers
from data.examples import Examples, read_examples
from data.formats import FORMATS, Rendered
from data.rows import TokenizedRows
from data.tokenizing import last_answer, tokenize
from options.config import Config
from options.data_files import file_suffix
from options.errors import UserError
from options.limits import MAX_LINE_BYTES, read_text

DEFAULT_PROMPTS = 3  # rows that samples are made of, unless --sample_prompts says otherwise
MOST_PROMPTS = 16  # rows of a dataset given as --sample_prompts
OPENING_WORDS = 8  # of a plain text, which has no question, as a prompt


@dataclass(frozen=True)
class Prompt:
    """A question as the model sees it.

    Args:
        text, ids: the prompt, and its tokens.
        answer: the row's own, as `comparable` makes it; "" if it has none.
        marker: a text that ends the model's answer, as in Rendered.
    """

    text: str
    ids: list[int]
    answer: str = ""
    marker: str | None = None


@dataclass(frozen=True)
class EvaluationData:
    """What a run is evaluated on.

    Args:
        rows: the evaluation set, or None.
        prompts: of samples; may be none.
        stops: token ids that end an answer.
        remarks: lines to print at start, on these and on the training data.
    """

    rows: TokenizedRows | None
    prompts: list[Prompt]
    stops: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()

    def largest_id(self) -> int:
        ids = [i for prompt in self.prompts for i in prompt.ids]
        return max([*ids, int(self.rows.tokens.max()) if self.rows else 0], default=0)

    def describe(self) -> str:
        if not self.rows:
            return ""
        return f"\nevaluation: {len(self.rows):,} rows, {int(self.rows.targets().sum()):,} learned tokens"


def prepare_sets(config: Config, tokenizer) -> tuple[Config, TokenizedRows, EvaluationData]:
    """Read the data of a run's options. Return (the options with the data's format in the place of auto, the
    training rows, what to evaluate on, still without stops). Raises UserError for anything wrong with the
    data, and if a set would be empty."""
    reading = (config.context_length, tokenizer, config.chat_date)
    examples = read_examples(config.dataset, config.dataset_format, config.dataset_samples, *reading)
    config = dataclasses.replace(config, dataset_format=examples.format)
    training, held, beside = _divide(config, examples.rendered, tokenizer)
    rows = tokenize(training, tokenizer, config.context_length, f"--dataset {config.dataset}")
    evaluation = None if held is None else tokenize(held, tokenizer, config.context_length, _origin(config))
    prompts = _sample_prompts(config, examples, held or training, tokenizer) if config.sample_every else []
    remarks = (*examples.remarks, *(f"evaluation {r}" for r in beside if r not in examples.remarks))
    return config, rows, EvaluationData(evaluation, prompts, remarks=remarks)


def read_beside(config: Config, dataset: str, samples: int, tokenizer) -> Examples:
    """Read rows to ask a model that was trained with the options `config`, in the format of its training if
    all of them have the columns for it, else in their own. Raises UserError for unusable data."""
    reading = (samples, config.context_length, tokenizer, config.chat_date)
    return read_examples(dataset, "auto", *reading, preferred=config.dataset_format)


def held_rows(config: Config, tokenizer) -> tuple[list[Rendered] | None, tuple[str, ...]]:
    """Return (the evaluation set of a run's options, as texts, or None if they name none; remarks on its
    rows). Raises UserError as `prepare_sets` does."""
    if not config.eval_share:
        return _divide(config, [], tokenizer)[1:]
    reading = (config.dataset_format, config.dataset_samples, config.context_length)
    examples = read_examples(config.dataset, *reading, tokenizer, config.chat_date)
    return _divide(config, examples.rendered, tokenizer)[1], examples.remarks


def _divide(
    config: Config, rendered: list[Rendered], tokenizer
) -> tuple[list[Rendered], list[Rendered] | None, tuple[str, ...]]:
    """(training rows, evaluation rows or None, remarks on these); rendered: the rows of --dataset."""
    if config.eval_share:
        training, held = _split(rendered, config.eval_share, config.seed)
        return training, held[: config.eval_samples] if config.eval_samples > 0 else held, ()
    if config.eval_dataset is None:
        return rendered, None, ()
    with named("--eval_dataset"):
        read = read_beside(config, config.eval_dataset, config.eval_samples, tokenizer)
    return rendered, read.rendered, read.remarks


def _origin(config: Config) -> str:
    """The option, with its value, that evaluation rows come from."""
    share, dataset = config.eval_share, config.eval_dataset
    return f"--eval_share {share}" if dataset is None else f"--eval_dataset {dataset}"


@contextlib.contextmanager
def named(option: str, instead: str = "--dataset") -> Iterator[None]:
    """Let errors of reading a dataset or a model name the option that gave it, in the place of `instead`."""
    try:
        yield
    except UserError as e:
        raise UserError(re.sub(rf"^{instead}(?=[ :])", option, str(e))) from None


def _split(rendered: list[Rendered], share: float, seed: int) -> tuple[list[Rendered], list[Rendered]]:
    """Return (rows to train on, rows to evaluate on), each in their order. Only the seed and the number of
    rows decide which ones."""
    count = round(share * len(rendered))
    if count in (0, len(rendered)):
        left = "evaluate" if count == 0 else "train"
        raise UserError(f"--eval_share {share}: of {len(rendered)} rows it leaves none to {left} on")
    # Another stream than those of the data order, which are made from (seed, epoch).
    generator = torch.Generator().manual_seed((seed * 1_000_003 - 1) % 2**63)
    held = set(torch.randperm(len(rendered), generator=generator)[:count].tolist())
    return [r for i, r in enumerate(rendered) if i not in held], [rendered[i] for i in sorted(held)]


def prompt_of(
    rendered: Rendered, tokenizer, context_length: int, stops: Collection[int] = ()
) -> Prompt | None:
    """Return what comes before the last answer of an example, and that answer; None if it has none. A plain
    text, all of which is learned, has no question: its first words are the prompt, and there is no answer.

    The answer is the text of its learned tokens up to the first of `stops`, as that of a generated answer is.
    """
    rendered = without_empty_answers(rendered, tokenizer)
    if not rendered.learned:
        return None
    text, marker = rendered.text[: rendered.last_answer[0]], rendered.marker
    answer = _reference(rendered, tokenizer, stops) if text else ""
    text = text or " ".join(rendered.text.split()[:OPENING_WORDS])
    ids = prompt_ids(text, tokenizer, rendered.special)
    return Prompt(text, ids[-context_length:], answer, marker) if ids else None


def _reference(rendered: Rendered, tokenizer, stops: Collection[int]) -> str:
    learned = last_answer(rendered, tokenizer)
    answer = comparable(answer_text(learned.ids, tokenizer, stops, rendered.marker))
    # A token that holds a character of the answer is learned, though it has the prompt's last one as well.
    prompt, tail = learned.prompt_overlap.strip(), learned.tail_overlap.strip()
    return answer.removeprefix(prompt).removesuffix(tail).strip()


def _sample_prompts(config: Config, examples: Examples, rows: list[Rendered], tokenizer) -> list[Prompt]:
    given = config.sample_prompts
    if given is not None and file_suffix(given) == ".txt":
        return _ask(_lines(Path(given).expanduser()), examples, tokenizer, config.context_length)
    if given is not None:
        with named("--sample_prompts"):
            rows = read_beside(config, given, MOST_PROMPTS, tokenizer).rendered
    made = (prompt_of(r, tokenizer, config.context_length) for r in rows)
    prompts = [p for p in made if p]
    if not prompts:
        raise UserError(f"--sample_prompts {given or ''}: no row has anything to ask")
    return prompts if given is not None else prompts[:DEFAULT_PROMPTS]


def _lines(path: Path) -> list[str]:
    try:
        lines = read_text(path, MAX_LINE_BYTES).split("\n")
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "not a UTF-8 text"
        raise UserError(f"--sample_prompts {path}: {reason}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--sample_prompts {path}: is empty")
    return lines


def _ask(questions: list[str], examples: Examples, tokenizer, context_length: int) -> list[Prompt]:
    """The questions, put as the training data puts its own."""
    form, prompts = FORMATS[examples.format], []
    for question in questions:
        row = form.asking(question, examples.context.markers)
        with template_errors(f"--sample_prompts: {question!r}"):
            text = form.prompt(row, examples.context)
        ids = prompt_ids(text, tokenizer, form.special)[-context_length:]
        prompts.append(Prompt(text, ids, marker=form.marker(examples.context)))
    return prompts
