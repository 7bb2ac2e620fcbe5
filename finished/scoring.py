"""The scores of one model: its loss on rows, and its answers beside the rows' own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from data.answers import decode_answer, normalize_answer
from data.evaluation_data import Prompt
from data.image_format import ImageFormat
from data.rows import TokenizedRows
from finished.prompt_images import read_image_arguments
from finished.prompt_template import MarkerCriterion
from finished.text_scores import TEXT_METRICS
from launch.ranks import RankInfo
from models.causal_lm import loss_sum
from models.family import longrope_threshold
from options.evaluate import Options
from training.evaluation import group_rows, mean_loss, perplexity


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: list[int],
    batch_size: int,
    make_criterion: Callable[[int], StoppingCriteria] | None = None,
    read_images: Callable[[list[int], int], dict[str, torch.Tensor]] = lambda indices, width: {},
) -> list[list[int]]:
    """Return the token ids of the greedy answer to each prompt, without the stop token that ends it.

    Uses transformers' generate with its cache. Prompts of similar length share a batch, padded on the left.

    Args:
        model: the model; its generation config is not used.
        prompts: token ids of each prompt.
        max_new_tokens: limit for each answer.
        stop_ids: tokens that end an answer.
        batch_size: prompts per batch.
        make_criterion: maps the position where a batch's answers start to one more stopping criterion.
        read_images: maps the indices of a batch's prompts and its number of tokens to the arguments of
            `generate` for their images.
    """
    device = next(model.parameters()).device
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    for batch in itertools.chain(
        *group_rows(lengths, batch_size, longrope_threshold(model.config), max_growth=max_new_tokens)
    ):
        row_indices = batch.tolist()
        width = len(prompts[row_indices[0]])
        ids = torch.zeros(len(row_indices), width, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(row_indices):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        # PreTrainedModel has no generate(); the concrete classes inherit it from GenerationMixin.
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            generation_config=options,
            stopping_criteria=StoppingCriteriaList([make_criterion(width)] if make_criterion else []),
            **read_images(row_indices, width),
        )
        for i, answer in zip(row_indices, output[:, width:].tolist(), strict=True):
            answers[i] = list(itertools.takewhile(lambda token: token not in stop_ids, answer))
    return answers


@dataclass(frozen=True)
class EvaluationInputs:
    """Inputs that both models are scored on.

    Attributes:
        rows: rows for the loss; None if perplexity is not requested.
        prompts: prompts to answer, with their references.
        image_format: how the model takes the prompts' images; None = it takes none.
        too_long: number of rows that are no prompt, since with their images they take more than the context.
    """

    rows: TokenizedRows | None
    prompts: list[Prompt]
    image_format: ImageFormat | None = None
    too_long: int = 0


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model.

    Attributes:
        values: {metric: value}, None if undefined.
        answers: text of each answer, as it is compared.
        truncated: number of answers cut at --max_new_tokens.
    """

    values: dict[str, float | None]
    answers: list[str]
    truncated: int


def score_model(
    model: PreTrainedModel,
    metrics: Sequence[str],
    inputs: EvaluationInputs,
    options: Options,
    tokenizer,
    stop_ids: list[int],
) -> ModelScores:
    """Compute the named metrics of one model; generates the answers if a text metric is among them.

    Args:
        model: the loaded model, which computes on the device of its parameters.
        metrics: names of the requested metrics.
        inputs: from `prepare_inputs`, for the same metrics.
        options: options of the command: batch size and longest answer.
        tokenizer: decodes the answers.
        stop_ids: tokens that end an answer.
    """
    values: dict[str, float | None] = {}
    answers, truncated = [], 0
    rank_info = RankInfo(0, 1, 0, 1, next(model.parameters()).device)
    if inputs.rows is not None:
        loss = mean_loss(model, inputs.rows, options.batch_size, loss_sum, rank_info, contextlib.nullcontext)
        values["perplexity"] = perplexity(loss)
    if inputs.prompts:
        marker = inputs.prompts[0].marker  # all rows have one format
        make_criterion = partial(MarkerCriterion, tokenizer, marker) if marker else None
        lengths = (options.max_new_tokens, stop_ids, options.batch_size)
        asked = [(prompt.ids, prompt.images) for prompt in inputs.prompts]

        def read_images(indices: list[int], width: int) -> dict[str, torch.Tensor]:
            """Return the arguments of `generate` for the images of a batch of prompts."""
            return read_image_arguments(model, [asked[i] for i in indices], width, inputs.image_format)

        generated = generate_answers(model, [ids for ids, _ in asked], *lengths, make_criterion, read_images)
        answers = [normalize_answer(decode_answer(ids, tokenizer, stop_ids, marker)) for ids in generated]
        truncated = sum(_is_truncated(ids, options.max_new_tokens, tokenizer, marker) for ids in generated)
        for name in metrics:
            if name in TEXT_METRICS:
                values |= TEXT_METRICS[name](answers, [p.answer for p in inputs.prompts])
    return ModelScores(values, answers, truncated)


def _is_truncated(ids: list[int], max_new_tokens: int, tokenizer, marker: str | None) -> bool:
    """Return whether an answer (without its stop token) ended at max_new_tokens, not by itself."""
    return len(ids) == max_new_tokens and not (
        marker and marker in tokenizer.decode(ids, skip_special_tokens=True)
    )
