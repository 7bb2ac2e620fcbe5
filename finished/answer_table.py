"""The table of `generate.py --out`: answers side by side, their times and scores, and the averages.

One writer for each suffix. What models and prompts wrote is untrusted: it is escaped for Markdown and HTML.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

from data.answers import make_printable
from files.atomic_writes import nonfinite_to_null, write_text
from finished.comparison import ComparedPrompt, Comparison
from monitoring.page import render
from monitoring.sample_images import MAX_COPIES, MAX_EMBEDDED_CHARS, embed_image
from options.errors import UserError
from options.generate import TABLES

# {measure of `Comparison.averages`: (name in a table, format)}. Scores have their own names.
MEASURES = {
    "first_token_seconds": ("first token, s", "{:,.3f}"),
    "seconds": ("whole answer, s", "{:,.3f}"),
    "tokens": ("tokens", "{:,.1f}"),
    "tokens_per_second": ("tokens/s", "{:,.1f}"),
    "cut": ("cut answers", "{:,}"),
    "scored": ("answers scored", "{:,}"),
}
SCORE_FORMAT = "{:,.2f}"
MARKDOWN = re.compile(r"([\\`*_~|$\[\]])")


def format_averages(comparison: Comparison) -> list[list[str]]:
    """Return rows of texts: the names of the models, then each measure with its value for every model."""
    averages = [comparison.averages(model) for model in comparison.names]
    rows = [["mean", *comparison.names.values()]]
    for measure in averages[0]:
        label, form = MEASURES.get(measure, (measure, SCORE_FORMAT))
        values = (values[measure] for values in averages)
        rows.append([label, *("undefined" if value is None else form.format(value) for value in values)])
    return rows


def format_summary(comparison: Comparison) -> str:
    """Return the averages as a table for a terminal."""
    rows = [[make_printable(cell) for cell in row] for row in format_averages(comparison)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    return "\n".join(
        f"{label:{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        for label, *cells in rows
    )


def describe_answer(prompt: ComparedPrompt, model: str) -> str:
    """Return a line on an answer: whether it is the reference, its times and tokens."""
    timed = prompt.answers[model]
    match, speed = prompt.matches(model), timed.tokens_per_second
    parts = [] if match is None else ["exact match" if match else "no match"]
    parts.append(f"{timed.first_token_seconds:.3f} s to the first token, {timed.seconds:.3f} s in all")
    parts.append(f"{timed.tokens:,} tokens" + (f" at {speed:,.1f}/s" if speed else ""))
    return " · ".join([*parts, *([] if timed.ended else ["cut"])])


def to_markdown(comparison: Comparison) -> str:
    """Return the table as Markdown, as GitHub renders it."""
    settings = ", ".join(f"{_escape(str(k))}: {_escape(str(v))}" for k, v in comparison.settings.items())
    averages = [[_escape(cell) for cell in row] for row in format_averages(comparison)]
    columns = ["", "prompt", *(["reference"] if comparison.has_references else [])]
    rows = [[*columns, *map(_escape, comparison.names.values())]]
    for i, prompt in enumerate(comparison.prompts, 1):
        images = "".join(f"<br>_image: {_escape(ref.label)}_" for ref in prompt.images)
        cells = [str(i), _escape(prompt.question) + images]
        cells += [_escape(prompt.reference)] if comparison.has_references else []
        for model in comparison.names:
            text = _escape(prompt.answers[model].text.strip())
            cells.append(f"{text}<br><sub>{describe_answer(prompt, model)}</sub>")
        rows.append(cells)
    return f"{settings}\n\n{_write_table(averages)}\n\n{_write_table(rows)}\n"


def _write_table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _escape(text: str) -> str:
    """Return a text as it stands in a cell of a Markdown table, with its line breaks and indentation."""
    text = make_printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = MARKDOWN.sub(r"\\\1", text).replace("\t", "    ").replace("  ", "&nbsp; ")
    return text.replace("\n", "<br>")


def to_csv(comparison: Comparison) -> str:
    """Return the table as CSV: a row for each prompt, and a last one with the means of its columns."""
    measures = ["first_token_seconds", "seconds", "tokens", "tokens_per_second"]
    measures += ["exact_match"] if comparison.has_references else []
    header = ["row", "prompt", "images", "reference"]
    for name in comparison.names.values():
        header += [f"{name}: {column}" for column in ("answer", *measures)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for i, prompt in enumerate(comparison.prompts, 1):
        images = "; ".join(ref.label for ref in prompt.images)
        row = [i, prompt.question, images, prompt.reference]
        for model in comparison.names:
            fields = _answer_fields(prompt, model)
            if "exact_match" in fields:
                fields["exact_match"] = 100 * fields["exact_match"]  # percent, as the mean
            row += [fields["text"], *(fields.get(measure) for measure in measures)]
        writer.writerow(row)
    means = [comparison.averages(model) for model in comparison.names]
    cells = (cell for values in means for cell in ("", *(values[measure] for measure in measures)))
    writer.writerow(["mean", "", "", "", *cells])
    return file.getvalue()


def to_jsonl(comparison: Comparison) -> str:
    """Return a line for each prompt, as --json prints it with times and scores, and one with the averages."""
    lines = []
    for prompt in comparison.prompts:
        answers = [{"model": model, **_answer_fields(prompt, model)} for model in comparison.names]
        reference = {"reference": prompt.reference} if prompt.reference else {}
        lines.append({**prompt.to_json(), **reference, "answers": answers})
    averages = {model: comparison.averages(model) for model in comparison.names}
    lines.append({"averages": averages, "settings": comparison.settings})
    return "".join(json.dumps(nonfinite_to_null(line)) + "\n" for line in lines)


def _answer_fields(prompt: ComparedPrompt, model: str) -> dict:
    """Return an answer as --json prints it, with its times, and whether it is the reference."""
    timed = prompt.answers[model]
    match = prompt.matches(model)
    return {
        **dataclasses.asdict(timed),
        "tokens_per_second": timed.tokens_per_second,
        **({} if match is None else {"exact_match": match}),
    }


def to_html(comparison: Comparison) -> str:
    """Return the table as a page of its own, with small copies of the images."""
    prompts, room = [], MAX_EMBEDDED_CHARS
    for prompt in comparison.prompts:
        images = []
        for i, ref in enumerate(prompt.images):
            url = embed_image(ref) if i < MAX_COPIES and room > 0 else ""
            room -= len(url)
            images.append((ref.label, url))
        answers = [
            (name, prompt.answers[model].text.strip(), describe_answer(prompt, model))
            for model, name in comparison.names.items()
        ]
        prompts.append({"prompt": prompt, "images": images, "answers": answers})
    return render(
        "answers.html.j2",
        title=f"Answers to {len(prompts):,} {'prompts' if len(prompts) > 1 else 'prompt'}",
        settings=comparison.settings,
        averages=format_averages(comparison),
        prompts=prompts,
    )


WRITERS: dict[str, Callable[[Comparison], str]] = {
    ".md": to_markdown,
    ".html": to_html,
    ".csv": to_csv,
    ".jsonl": to_jsonl,
}
assert (*WRITERS,) == TABLES


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the table in the form that the suffix of the file names. Raises UserError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, WRITERS[path.suffix.lower()](comparison))
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written ({e.strerror})") from None
