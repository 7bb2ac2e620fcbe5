"""Prepare the evaluation set of a run and the prompts of its samples, together with the training data.

The evaluation set is split off the training data, or is a dataset of its own. All is prepared before any
process with a GPU is started.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from data.chat import convert_template_errors
from data.columns import ColumnNames
from data.dataset_names import split_mixture, split_name
from data.encoding import drop_empty_answers, encode_prompt
from data.evaluation_data import EvaluationData, Prompt
from data.examples import Examples
from data.formats import FORMATS, Rendered
from data.held_rows import split_fold, split_sets
from data.image_format import ImageFormat
from data.image_texts import check_placeholders, expand_images
from data.mixtures import join_evenly, read_each_row_once, read_mixture
from data.reading import ReadingOptions
from data.rows import TokenizedRows
from data.sources import find_recipe
from data.tokenizing import (
    decode_last_answer,
    describe_joined_prompts,
    describe_unknown_tokens,
    tokenize,
    tokenize_sets,
)
from options.config import Config
from options.data_files import file_suffix
from options.errors import UserError, reword_errors
from options.limits import MAX_LINE_BYTES, read_text

DEFAULT_PROMPTS = 3  # number of rows that are the prompts of samples, without --sample_prompts
MAX_PROMPTS = 16  # number of rows used of a dataset that is given as --sample_prompts
OPENING_WORDS = 8  # number of words of a plain text, which has no question, that are its prompt


def prepare_sets(
    config: Config, tokenizer, image_format: ImageFormat | None = None
) -> tuple[Config, TokenizedRows, EvaluationData]:
    """Read and tokenize a run's data. Return (changed options, training rows, evaluation data).

    In the options what was found replaces auto: the data's format, and --empty_thinking. Sets of the hub have
    their commits. The evaluation data is still without stop_ids. Raises UserError for anything wrong with the
    data, and if a set would be empty. image_format: how the model takes images; None = it takes none.
    """
    mixture = read_mixture(config.dataset, ReadingOptions.from_config(config, tokenizer, image_format))
    config = dataclasses.replace(
        config, dataset=mixture.name, dataset_format=mixture.format, empty_thinking=mixture.empty_thinking
    )
    sets, evaluation_set = _select_rows(config, mixture.sets, tokenizer, image_format)
    rows = tokenize_sets(sets, mixture.shares, tokenizer, config.context_length, image_format)
    training = join_evenly(sets)
    evaluation, prompts = None, list[Prompt]()
    eval_remarks: tuple[str, ...] = ()
    remarks = [*mixture.remarks, *_describe_tokens(rows, training, tokenizer)]
    if evaluation_set is not None:
        option, rendered = _name_evaluation_option(config), evaluation_set.rendered
        evaluation = tokenize(rendered, tokenizer, config.context_length, option, image_format)
        eval_remarks = (*evaluation_set.remarks, *_describe_tokens(evaluation, rendered, tokenizer))
        if config.eval_dataset is not None:
            config = dataclasses.replace(config, eval_dataset=evaluation_set.name)
    if config.sample_every:
        shown = evaluation_set.rendered if evaluation_set else training
        config, prompts = _make_sample_prompts(config, mixture.sets[0], shown, tokenizer, image_format)
    remarks += [f"evaluation {remark}" for remark in eval_remarks if remark not in remarks]
    return (
        config,
        rows,
        EvaluationData(evaluation, prompts, remarks=tuple(remarks), image_format=image_format),
    )


def _describe_tokens(rows: TokenizedRows, rendered: list[Rendered], tokenizer) -> list[str]:
    """Return remarks on the tokens of a set. rendered: its rows as texts."""
    return [*describe_unknown_tokens(rows.tokens, tokenizer), *describe_joined_prompts(rendered, tokenizer)]


def optional_columns(config: Config) -> ColumnNames:
    """Return the names for columns that a run's options and recipes give, for data that may lack them.

    Of a mixture's recipes the first that names a column counts. Raises UserError for a recipe that is gone.
    """
    columns = ColumnNames.from_options(config.columns, config.text_column, must_exist=False)
    for share in split_mixture(config.dataset):
        columns = columns.over(ColumnNames.from_recipe(_recipe_columns(share.name)))
    return columns


def _recipe_columns(dataset: str) -> Mapping[str, str]:
    """Return the names of the recipe of one set; none for data without a recipe, which may be gone."""
    try:
        return find_recipe(dataset)[0].columns
    except UserError as e:
        if file_suffix(split_name(dataset).base) != ".toml":
            return {}
        raise UserError(
            f"{e}; it has the names of columns of the run, which --columns gives as well"
        ) from None


def read_in_trained_format(
    config: Config,
    dataset: str,
    samples: int,
    tokenizer,
    columns: ColumnNames | None = None,
    needs_answer: bool = True,
    image_format: ImageFormat | None = None,
) -> Examples:
    """Read and render rows of `dataset`, to evaluate a model trained with the options `config`.

    They are rendered in the format of its training if that fits all of them, else in their own format.

    Args:
        config: the options, with the format that the training data was rendered in.
        dataset: whatever --dataset takes, without weights.
        samples: number of rows to use; -1 = as the recipe says.
        tokenizer: provides the chat template.
        columns: the data's names for columns; None = those of the training, where the data has them.
        needs_answer, image_format: as in ReadingOptions.

    Raises UserError for unusable data.
    """
    options = dataclasses.replace(
        ReadingOptions.from_config(config, tokenizer, image_format),
        format="auto",
        preferred=config.dataset_format,
        samples=samples,
        columns=optional_columns(config) if columns is None else columns,
        needs_answer=needs_answer,
    )
    return read_each_row_once(dataset, options)


def read_evaluation_rows(
    config: Config, tokenizer, image_format: ImageFormat | None = None
) -> tuple[list[Rendered] | None, tuple[str, ...]]:
    """Return (the evaluation set of a run's options as texts, or None if there is none; remarks on its rows).

    Raises UserError as `prepare_sets` does. image_format: as there.
    """
    sets: list[Examples] = []
    remarks: tuple[str, ...] = ()
    if config.eval_share or config.eval_fold:
        options = ReadingOptions.from_config(config, tokenizer, image_format)
        mixture = read_mixture(config.dataset, options)
        sets, remarks = mixture.sets, mixture.remarks
    evaluation = _select_rows(config, sets, tokenizer, image_format)[1]
    return (evaluation.rendered, remarks + evaluation.remarks) if evaluation else (None, ())


def _select_rows(
    config: Config, sets: list[Examples], tokenizer, image_format: ImageFormat | None
) -> tuple[list[list[Rendered]], Examples | None]:
    """Return (training rows of each set, evaluation set or None). Raises UserError.

    sets: the sets of --dataset. image_format: as for `prepare_sets`.
    """
    rendered = [examples.rendered for examples in sets]
    if config.eval_share or config.eval_fold:
        names = [examples.name for examples in sets]
        if config.eval_fold:
            training, evaluation_rows = split_fold(rendered, names, config.eval_fold, config.seed)
        else:
            training, evaluation_rows = split_sets(rendered, names, config.eval_share, config.seed)
        samples = config.eval_samples if config.eval_samples > 0 else None
        held = dataclasses.replace(
            sets[0], rendered=join_evenly(evaluation_rows, names)[:samples], remarks=()
        )
        return training, held
    if config.eval_dataset is None:
        return rendered, None
    with rename_option_in_errors("--eval_dataset"):
        samples = config.eval_samples
        examples = read_in_trained_format(
            config, config.eval_dataset, samples, tokenizer, image_format=image_format
        )
    return rendered, examples


def _name_evaluation_option(config: Config) -> str:
    """Return the option that evaluates, with its value: --eval_dataset, --eval_fold or --eval_share."""
    names = ("eval_dataset", "eval_fold", "eval_share")
    return next(f"--{name} {value}" for name in names if (value := getattr(config, name)))


def rename_option_in_errors(new: str, old: str = "--dataset") -> AbstractContextManager[None]:
    """Return a context in which UserErrors that begin with the option `old` begin with `new` instead."""
    return reword_errors(lambda text: re.sub(rf"^{old}(?=[ :])", new, text))


def make_row_prompt(
    rendered: Rendered,
    tokenizer,
    context_length: int,
    stop_ids: Collection[int] = (),
    image_format: ImageFormat | None = None,
) -> Prompt | None:
    """Return the prompt of an example, the text before its last answer; None if it has no answer or no token.

    A plain text, all of which is learned, has no question: its first words are the prompt, without an answer.
    The answer is the text of its learned tokens, decoded like a generated answer.

    Args:
        rendered: the example.
        tokenizer: encodes the prompt and decodes the answer; one that returns offsets (is_fast).
        context_length: maximum number of tokens of the prompt; the last ones are kept.
        stop_ids: token ids that end the answer; it is cut before the first of them.
        image_format: how the model takes images. One that is too long for context_length, and has images, is
            None.
    """
    rendered = drop_empty_answers(rendered, tokenizer)
    if not rendered.learned:
        return None
    text, marker = rendered.text[: rendered.last_answer_range[0]], rendered.marker
    answer = decode_last_answer(rendered, tokenizer, stop_ids) if text else ""
    text = text or " ".join(rendered.text.split()[:OPENING_WORDS])
    prompt = _encode_row_prompt(rendered, text, tokenizer, context_length, image_format)
    return dataclasses.replace(prompt, answer=answer, marker=marker) if prompt else None


def _encode_row_prompt(
    rendered: Rendered, text: str, tokenizer, context_length: int, image_format: ImageFormat | None
) -> Prompt | None:
    """Return a text of an example as a prompt with its images; None if it has no token.

    text: the beginning of the example's text. The other arguments are those of `make_row_prompt`.
    """
    count = text.count(image_format.placeholder) if image_format else 0
    asked = dataclasses.replace(rendered, text=text, learned=[], images=rendered.images[:count])
    ids = encode_prompt(expand_images(asked, image_format).text, tokenizer, rendered.add_special_tokens)
    if not ids or (count and len(ids) > context_length):
        return None
    return Prompt(text, ids[-context_length:], images=tuple(asked.images))


def _make_bare_prompt(
    rendered: Rendered, tokenizer, context_length: int, image_format: ImageFormat | None
) -> Prompt | None:
    """Return an example of which nothing is learned as a prompt; None if it has an answer or no text.

    Arguments as for `make_row_prompt`.
    """
    if rendered.learned or not rendered.text.strip():
        return None
    prompt = _encode_row_prompt(rendered, rendered.text, tokenizer, context_length, image_format)
    return dataclasses.replace(prompt, marker=rendered.marker) if prompt else None


def _make_sample_prompts(
    config: Config,
    examples: Examples,
    rows: list[Rendered],
    tokenizer,
    image_format: ImageFormat | None,
) -> tuple[Config, list[Prompt]]:
    """Return (options with the commit of --sample_prompts, the prompts of a run's samples).

    They are those of --sample_prompts, else of the first of `rows`.

    Args:
        config: the run's options.
        examples: the training data, for the form of questions in a text file.
        rows: examples of the evaluation set or the training data.
        tokenizer, image_format: as for `make_row_prompt`.

    Raises UserError if there is no prompt, or --sample_prompts cannot be used.
    """
    source = config.sample_prompts
    if source is not None and file_suffix(source) == ".txt":
        questions = _read_questions(Path(source).expanduser())
        return config, _make_question_prompts(
            questions, examples, tokenizer, config.context_length, image_format
        )
    if source is not None:
        with rename_option_in_errors("--sample_prompts"):
            examples = read_in_trained_format(
                config, source, MAX_PROMPTS, tokenizer, needs_answer=False, image_format=image_format
            )
        config, rows = dataclasses.replace(config, sample_prompts=examples.name), examples.rendered
    header = FORMATS[examples.format].question_header(examples.context)
    length = config.context_length
    candidates = [make_row_prompt(r, tokenizer, length, image_format=image_format) for r in rows]
    if source is not None:
        bare = [_make_bare_prompt(r, tokenizer, length, image_format) for r in rows]
        candidates = [prompt or other for prompt, other in zip(candidates, bare, strict=True)]
    prompts = [dataclasses.replace(prompt, question_header=header) for prompt in candidates if prompt]
    if not prompts:
        raise UserError(f"--sample_prompts {source or ''}: no row has anything to ask")
    return config, prompts if source is not None else prompts[:DEFAULT_PROMPTS]


def _read_questions(path: Path) -> list[str]:
    """Return the lines with text of a text file. Raises UserError if it is missing, unreadable or empty."""
    try:
        lines = read_text(path, MAX_LINE_BYTES).split("\n")
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "not a UTF-8 text"
        raise UserError(f"--sample_prompts {path}: {reason}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--sample_prompts {path}: is empty")
    return lines


def _make_question_prompts(
    questions: list[str],
    examples: Examples,
    tokenizer,
    context_length: int,
    image_format: ImageFormat | None = None,
) -> list[Prompt]:
    """Return questions as prompts, of at most context_length tokens, in the format of the training data.

    Raises UserError if the chat template refuses one, or its text means an image. image_format: how the model
    takes images; None = it takes none.
    """
    form, prompts = FORMATS[examples.format], []
    for question in questions:
        row = form.make_prompt_row(question, examples.context.markers)
        with convert_template_errors(f"--sample_prompts: {question!r}"):
            text = form.prompt(row, examples.context)
        if image_format:
            check_placeholders(text, 0, image_format, f"--sample_prompts: {question!r}")
        ids = encode_prompt(text, tokenizer, form.add_special_tokens)[-context_length:]
        marker, header = form.marker(examples.context), form.question_header(examples.context)
        prompts.append(Prompt(text, ids, marker=marker, question_header=header))
    return prompts
