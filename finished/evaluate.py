"""evaluate.py: scores of a finished run and of its base model, on the same rows."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from data.answers import answer_text, comparable
from data.evaluation_sets import Prompt, held_rows, prompt_of, read_beside
from data.examples import read_examples
from data.formats import Rendered
from data.rows import TokenizedRows
from data.tokenizing import tokenize
from files.atomic_writes import nonfinite_to_null, write_text
from files.disk_room import check_writable
from finished.finished_run import Run, load_model, load_tokenizer, open_base, open_run, stops_of
from finished.generation import Ending
from finished.text_scores import TEXT_METRICS, scored_with
from launch.precision import choose_precision, has_bf16_gpu
from launch.program import print_error, quiet_libraries
from launch.ranks import RankInfo
from models.causal_lm import loss_sum
from models.family import longrope_threshold
from models.lora import adapters_off
from options.errors import UserError
from options.evaluate import Options
from training.evaluation import group_rows, mean_loss, perplexity


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    tokens: int,
    stops: list[int],
    batch_size: int,
    ending: Callable[[int], StoppingCriteria] | None = None,
) -> list[list[int]]:
    """The likeliest answer of at most `tokens` tokens to each prompt, by transformers' generate with its
    cache, without the token of `stops` that ended it. Prompts of similar length go together, padded on the
    left. ending(start): what else ends the answers that begin at this position."""
    device = next(model.parameters()).device
    options = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, eos_token_id=stops or None, pad_token_id=0
    )
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    for batch in itertools.chain(
        *group_rows(lengths, batch_size, longrope_threshold(model.config), growth=tokens)
    ):
        chosen = batch.tolist()
        width = len(prompts[chosen[0]])
        ids = torch.zeros(len(chosen), width, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        # The classes of families have transformers' GenerationMixin, the base class has not.
        made = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            generation_config=options,
            stopping_criteria=StoppingCriteriaList([ending(width)] if ending else []),
        )
        for i, answer in zip(chosen, made[:, width:].tolist(), strict=True):
            ends = [at for at, token in enumerate(answer) if token in stops]
            answers[i] = answer[: ends[0]] if ends else answer
    return answers


def read_rows(run: Run, options: Options, tokenizer) -> tuple[str, list[Rendered], tuple[str, ...]]:
    """(what was read, its rows as texts, remarks on them as training has of its own). Raises UserError for
    anything wrong with the data."""
    config = run.config
    if options.dataset is None:
        rows, remarks = held_rows(config, tokenizer)
        if rows is None:
            raise UserError(f"--dataset: is needed; {run.folder} had no evaluation set of its own")
        rows = rows[: options.samples] if options.samples > 0 else rows
        return config.eval_dataset or f"{config.eval_share:g} of {config.dataset}", rows, remarks
    if options.dataset_format is None:
        examples = read_beside(config, options.dataset, options.samples, tokenizer)
    else:
        reading = (options.dataset_format, options.samples, config.context_length)
        examples = read_examples(options.dataset, *reading, tokenizer, config.chat_date)
    return options.dataset, examples.rendered, examples.remarks


def check(options: Options) -> Run:
    """The opened run. Raises UserError for what is wrong with the options."""
    if options.out is not None:
        if options.out.is_dir():
            raise UserError(f"--out {options.out}: is a folder; name a file")
        check_writable(options.out.absolute().parent, "--out")
    return open_run(options.run, options.base_model)


@dataclasses.dataclass(frozen=True)
class Questions:
    """What both models are asked: rows to take the loss of (None: not wanted), prompts to answer."""

    rows: TokenizedRows | None
    prompts: list[Prompt]


def prepare(
    names: Sequence[str], run: Run, rendered: list[Rendered], where: str, tokenizer, stops: list[int]
) -> Questions:
    """Raises UserError if there is nothing that a metric could be taken of."""
    length = run.config.context_length
    rows = tokenize(rendered, tokenizer, length, f"--dataset {where}") if "perplexity" in names else None
    if tuple(names) == ("perplexity",):
        return Questions(rows, [])
    made = (prompt_of(r, tokenizer, length, stops) for r in rendered)
    prompts = [p for p in made if p and p.answer]
    if not prompts:
        raise UserError(
            f"--dataset {where}: its rows have no question and answer, as text metrics need; use --metrics perplexity"
        )
    return Questions(rows, prompts)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's {metric: value}, None if undefined; its answers; how many --max_new_tokens cut."""

    values: dict[str, float | None]
    answers: list[str]
    cut: int


def measure(
    model: PreTrainedModel,
    names: Sequence[str],
    asked: Questions,
    options: Options,
    tokenizer,
    stops: list[int],
) -> Measured:
    values: dict[str, float | None] = {}
    answers, cut = [], 0
    rank_info = RankInfo(0, 1, 0, 1, next(model.parameters()).device)
    if asked.rows is not None:
        loss = mean_loss(model, asked.rows, options.batch_size, loss_sum, rank_info, contextlib.nullcontext)
        values["perplexity"] = perplexity(loss)
    if asked.prompts:
        marker = asked.prompts[0].marker  # the rows are of one format
        ending = partial(Ending, tokenizer, marker) if marker else None
        lengths = (options.max_new_tokens, stops, options.batch_size)
        made = generate_answers(model, [p.ids for p in asked.prompts], *lengths, ending)
        answers = [comparable(answer_text(ids, tokenizer, stops, marker)) for ids in made]
        cut = sum(_is_cut(ids, options.max_new_tokens, tokenizer, marker) for ids in made)
        for name in names:
            if name in TEXT_METRICS:
                values |= TEXT_METRICS[name](answers, [p.answer for p in asked.prompts])
    return Measured(values, answers, cut)


def _is_cut(ids: list[int], tokens: int, tokenizer, marker: str | None) -> bool:
    """Whether an answer of at most `tokens` tokens, without the one that ended it, had not ended there."""
    return len(ids) == tokens and not (marker and marker in tokenizer.decode(ids, skip_special_tokens=True))


def evaluate(options: Options) -> dict:
    """The whole command but for showing its results, which it returns."""
    names, run = options.metrics, check(options)
    base = None if run.adapter else open_base(run, options.base_model)
    tokenizer = load_tokenizer(run)
    where, rendered, told = read_rows(run, options, tokenizer)
    for remark in told:
        print(remark, flush=True)
    stops = stops_of(run, tokenizer)
    asked = prepare(names, run, rendered, where, tokenizer, stops)
    gpu = torch.cuda.is_available()
    device, dtype = (
        torch.device("cuda" if gpu else "cpu"),
        choose_precision("auto", gpu, has_bf16_gpu()).frozen,
    )
    rest = (names, asked, options, tokenizer, stops)
    model = load_model(run, device, dtype)
    tuned = measure(model, *rest)
    if base is None:
        with adapters_off(model):
            untrained = measure(model, *rest)
    else:
        del model  # one at a time in memory
        untrained = measure(load_model(base, device, dtype), *rest)
    answers = zip(asked.prompts, untrained.answers, tuned.answers, strict=True)
    return {
        "run": str(run.folder),
        "base": str((base or run).base),
        "dataset": where,
        "rows": len(rendered),
        "answered": len(asked.prompts),
        "max_new_tokens": options.max_new_tokens,
        "cut": {"base": untrained.cut, "tuned": tuned.cut},
        "dtype": str(dtype).removeprefix("torch."),
        "scored_with": scored_with(names, [p.answer for p in asked.prompts]),
        "metrics": {
            name: {"base": untrained.values[name], "tuned": value} for name, value in tuned.values.items()
        },
        "answers": [{"prompt": p.text, "reference": p.answer, "base": b, "tuned": t} for p, b, t in answers],
    }


def table(results: dict) -> str:
    lines = [f"{'':12} {'base':>12} {'tuned':>12}"]
    for name, values in results["metrics"].items():
        lines.append(f"{name:12} {_shown(values['base'])} {_shown(values['tuned'])}")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return f"{'undefined':>12}" if value is None else f"{value:12,.2f}"


def remarks(results: dict) -> list[str]:
    """Lines on how the table came about."""
    lines = [f"{name}: {how}" for name, how in results["scored_with"].items()]
    if None in results["metrics"].get("bleu", {}).values():
        lines.append("bleu is undefined where no answer, or no reference, has four tokens")
    base, tuned = results["cut"]["base"], results["cut"]["tuned"]
    if base or tuned:
        lines.append(
            f"of {results['answered']:,} answers {base:,} of the base and {tuned:,} of the tuned model were"
            f" cut at --max_new_tokens {results['max_new_tokens']}"
        )
    return lines


def run(options: Options) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    if not options.verbose:
        quiet_libraries()
    try:
        results = evaluate(options)
    except UserError as e:
        return print_error(e, options.verbose)
    print(f"{results['run']} on {results['rows']:,} rows of {results['dataset']}\n{table(results)}")
    for remark in remarks(results):
        print(remark)
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(
                options.out,
                json.dumps(nonfinite_to_null(results), indent=2, allow_nan=False, ensure_ascii=False) + "\n",
            )
        except OSError as e:
            return print_error(
                UserError(f"--out {options.out}: cannot be written ({e.strerror})"), options.verbose
            )
        print(f"results and answers: {options.out}")
    return 0
