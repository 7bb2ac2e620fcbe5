"""evaluate.py: score a finished run and its base model on the same rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import torch

from data.columns import ColumnNames
from data.encoding import drop_empty_answers, encode
from data.evaluation_data import Prompt
from data.evaluation_sets import (
    make_row_prompt,
    optional_columns,
    read_evaluation_rows,
    read_in_trained_format,
)
from data.formats import Rendered
from data.image_format import ImageFormat
from data.mixtures import read_each_row_once
from data.reading import ReadingOptions
from data.rows import digest_rows
from data.tokenizing import describe_joined_prompts, describe_unknown_tokens, tokenize
from files.atomic_writes import nonfinite_to_null, write_text
from files.disk_room import check_writable
from files.names import BEST
from finished.finished_run import (
    Run,
    find_stop_ids,
    load_model,
    load_tokenizer,
    open_base,
    open_run,
    read_run_image_format,
)
from finished.score_table import describe_scoring_details, format_table
from finished.scoring import EvaluationInputs, score_model
from finished.text_scores import scored_with
from launch.devices import choose_device
from launch.precision import detect_precision
from launch.program import print_error, quiet_libraries
from models.adapters import round_base_matmuls
from models.lora import adapters_off
from monitoring.run_facts import EVALUATION, FACTS
from options.errors import UserError
from options.evaluate import Options
from options.limits import MAX_CONFIG_BYTES, read_json
from training.base_matmul import check_base_matmul_here, remark_on_matmuls, try_base_matmul
from training.run_images import explain_refused_images


def read_rows(
    run: Run, options: Options, tokenizer, image_format: ImageFormat | None = None
) -> tuple[str, list[Rendered], tuple[str, ...]]:
    """Read the rows to score. Return (name of the data, rendered rows, remarks to print).

    Without --dataset, reads the run's own evaluation set. Raises UserError for unusable data. image_format:
    how the model takes images; None = it takes none.
    """
    config = run.config
    if options.image_folder is not None:
        config = dataclasses.replace(config, image_folder=options.image_folder)
    if options.dataset is None:
        rows, remarks = read_evaluation_rows(config, tokenizer, image_format)
        if rows is None:
            raise UserError(f"--dataset: is needed; {run.folder} had no evaluation set of its own")
        remarks = (*remarks, *_check_same_rows(run, rows, tokenizer, image_format))
        rows = rows[: options.samples] if options.samples > 0 else rows
        share = f"fold {config.eval_fold}" if config.eval_fold else f"{config.eval_share:g}"
        return config.eval_dataset or f"{share} of {config.dataset}", rows, remarks
    columns = optional_columns(config)
    if options.columns is not None or options.text_column is not None:
        columns = ColumnNames.from_options(options.columns, options.text_column)
    if options.dataset_format is None:
        examples = read_in_trained_format(
            config, options.dataset, options.samples, tokenizer, columns, image_format=image_format
        )
    else:
        reading = dataclasses.replace(
            ReadingOptions.from_config(config, tokenizer, image_format),
            format=options.dataset_format,
            samples=options.samples,
            columns=columns,
        )
        examples = read_each_row_once(options.dataset, reading)
    return options.dataset, examples.rendered, examples.remarks


def _check_same_rows(
    run: Run, rows: list[Rendered], tokenizer, image_format: ImageFormat | None
) -> list[str]:
    """Raise UserError unless the rows are those that the run was evaluated on.

    Otherwise rows of its training could be among them. Returns a remark if the RUN, of an earlier version of
    this program, does not say which rows they were.
    """
    folder = run.folder.parent if run.folder.name == BEST else run.folder
    path = folder / FACTS
    data = read_json(path, MAX_CONFIG_BYTES).get("data") if path.is_file() else None
    recorded = data.get(EVALUATION) if isinstance(data, dict) else None
    if not recorded:
        return [f"data: {path} does not record the rows that the run was evaluated on; they may have changed"]
    config = run.config
    tokenized = tokenize(rows, tokenizer, config.context_length, "--dataset", image_format)
    if digest_rows(tokenized) != recorded:
        source = config.eval_dataset or config.dataset
        raise UserError(
            f"--dataset: is needed; {source} no longer gives the rows that {run.folder} was evaluated on"
        )
    return []


def check_options(options: Options) -> Run:
    """Return the opened RUN. Raises UserError if --out cannot be written, or as `open_run` does."""
    if options.out is not None:
        if options.out.is_dir():
            raise UserError(f"--out {options.out}: is a folder; name a file")
        check_writable(options.out.absolute().parent, "--out")
    check_base_matmul_here(options.base_matmul, "auto")
    run = open_run(options.run, options.base_model)
    if options.base_matmul != "16bit" and not (run.adapter and run.config.method.quantizer):
        raise UserError(f"--base_matmul {options.base_matmul}: {run.folder} has no 4-bit base; leave it out")
    return run


def prepare_inputs(
    metrics: Sequence[str],
    run: Run,
    rendered: list[Rendered],
    dataset: str,
    tokenizer,
    stop_ids: list[int],
    image_format: ImageFormat | None = None,
) -> EvaluationInputs:
    """Tokenize the rows for perplexity, and make prompts for text metrics, if they are in `metrics`.

    Args:
        metrics: names of the requested metrics.
        run: the opened RUN; its context_length limits rows and prompts.
        rendered: the rows to score.
        dataset: name of the data, for messages.
        tokenizer: the run's tokenizer.
        stop_ids: tokens that end an answer.
        image_format: how the model takes images; None = it takes none.

    Raises UserError if a text metric finds no row with a question and an answer.
    """
    length = run.config.context_length
    rows = None
    if "perplexity" in metrics:
        rows = tokenize(rendered, tokenizer, length, f"--dataset {dataset}", image_format)
    if tuple(metrics) == ("perplexity",):
        return EvaluationInputs(rows, [])
    candidates = [make_row_prompt(r, tokenizer, length, stop_ids, image_format) for r in rendered]
    prompts = [p for p in candidates if p and p.answer]
    without = (r for r, p in zip(rendered, candidates, strict=True) if p is None and r.images)
    too_long = sum(bool(drop_empty_answers(r, tokenizer).learned) for r in without)
    if not prompts and too_long:
        raise UserError(
            f"--dataset {dataset}: no question with its images fits in the run's {length:,} tokens"
        )
    if not prompts:
        raise UserError(
            f"--dataset {dataset}: its rows have no question and answer, as text metrics need;"
            " use --metrics perplexity"
        )
    return EvaluationInputs(rows, prompts, image_format, too_long)


def evaluate(options: Options) -> dict:
    """Score the RUN and its base, print remarks, and return what --out stores. Raises UserError."""
    names, run = options.metrics, check_options(options)
    base = None if run.adapter else open_base(run, options.base_model)
    tokenizer = load_tokenizer(run)
    image_format, reason = read_run_image_format(run)
    with explain_refused_images(reason):
        dataset, rendered, remarks = read_rows(run, options, tokenizer, image_format)
    add_special_tokens = bool(rendered) and rendered[0].add_special_tokens
    encoded = encode(tokenizer, [row.text for row in rendered], add_special_tokens)
    tokens = torch.tensor([token for ids, _ in encoded for token in ids])
    rounded = dataclasses.replace(run.config, base_matmul=options.base_matmul)
    remarks = (
        *remarks,
        *describe_unknown_tokens(tokens, tokenizer),
        *remark_on_matmuls(run.model_config, run.family, rounded, run.files),
    )
    for remark in (*remarks, *describe_joined_prompts(rendered, tokenizer)):
        print(remark, flush=True)
    stop_ids = find_stop_ids(run, tokenizer)
    inputs = prepare_inputs(names, run, rendered, dataset, tokenizer, stop_ids, image_format)
    device, dtype = choose_device(), detect_precision("auto").frozen
    arguments = (names, inputs, options, tokenizer, stop_ids)
    try_base_matmul(options.base_matmul, device)
    model = load_model(run, device, dtype)
    round_base_matmuls(model, run.family, options.base_matmul, in_evaluation=True)
    tuned_scores = score_model(model, *arguments)
    if base is None:
        with adapters_off(model):
            base_scores = score_model(model, *arguments)
    else:
        del model  # so that only one model is in memory
        base_scores = score_model(load_model(base, device, dtype), *arguments)
    answers = zip(inputs.prompts, base_scores.answers, tuned_scores.answers, strict=True)
    return {
        "run": str(run.folder),
        "base": str((base or run).base),
        "dataset": dataset,
        "rows": len(rendered),
        "answered": len(inputs.prompts),
        "too_long": inputs.too_long,
        "unscored": inputs.rows.dropped if inputs.rows else 0,
        "cut_rows": inputs.rows.cut if inputs.rows else 0,
        "row_reasons": inputs.rows.describe_reasons() if inputs.rows else [],
        "max_new_tokens": options.max_new_tokens,
        "context_length": run.config.context_length,
        "cut": {"base": base_scores.truncated, "tuned": tuned_scores.truncated},
        "dtype": str(dtype).removeprefix("torch."),
        "base_matmul": options.base_matmul,
        "scored_with": scored_with(names, [p.answer for p in inputs.prompts]),
        "metrics": {
            name: {"base": base_scores.values[name], "tuned": value}
            for name, value in tuned_scores.values.items()
        },
        "answers": [
            {"prompt": p.text, "reference": p.answer, "base": b, "tuned": t} | _list_images(p)
            for p, b, t in answers
        ],
    }


def _list_images(prompt: Prompt) -> dict[str, list[str]]:
    """Return the images of a prompt as results name them; {} if it has none."""
    return {"images": [ref.label for ref in prompt.images]} if prompt.images else {}


def run(options: Options) -> int:
    """Run the command. Return the exit status: 0, or 2 for an error that the user can fix."""
    if not options.verbose:
        quiet_libraries()
    try:
        results = evaluate(options)
    except UserError as e:
        return print_error(e, options.verbose)
    print(f"{results['run']} on {results['rows']:,} rows of {results['dataset']}\n{format_table(results)}")
    for remark in describe_scoring_details(results):
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
