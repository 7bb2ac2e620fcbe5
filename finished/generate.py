"""generate.py: a finished run and its base answer the same prompts, or hold a conversation."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from data.answers import cut_repetition, make_printable
from data.image_store import IMAGE_COLUMNS
from data.recognition import list_unread_columns
from data.schemas import find_schema, join_columns
from files.disk_room import check_writable
from finished.answer_table import format_summary, write_comparison
from finished.comparison import AnswerTimer, ComparedPrompt, Comparison, TimedAnswer
from finished.conversation import Chat, choose_template
from finished.generation import BASE, AnsweringModels, has_bf16, make_template, name_model, open_runs
from finished.prompt_template import (
    Answer,
    AnswerStreamer,
    EncodedPrompt,
    PromptTemplate,
    RenderedPrompt,
)
from finished.references import read_reference
from launch.devices import choose_device
from launch.program import print_error, quiet_libraries
from monitoring.best_step import find_better_step
from options.errors import UserError
from options.generate import Options, Prompt, explode_questions

MIN_COLUMN_WIDTH = 34  # characters; on narrower terminals answers are printed one below the other


def check_device(device: torch.device) -> None:
    """Raise UserError for a missing GPU."""
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {device}: this machine has {gpus} GPU(s)")


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError for bf16 on a GPU that computes in it only by emulation, or not at all."""
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError("--precision bf16: this GPU has no bf16; use auto, fp16 or fp32")


def display_width(text: str) -> int:
    """Count the terminal columns that a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def wrap_text(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` columns, at spaces where possible."""
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if line and display_width(line) + 1 + display_width(word) > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
            while display_width(line) > width:
                end = next(n for n in range(len(line), 0, -1) if display_width(line[:n]) <= width or n == 1)
                lines.append(line[:end])
                line = line[end:]
        lines.append(line)
    return lines


def format_columns(texts: dict[str, str], width: int) -> str:
    """Format texts side by side on `width` columns, each below its name."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [[*wrap_text(name, each), "-" * each, *wrap_text(text, each)] for name, text in texts.items()]
    height = max(map(len, columns))
    padded = [
        [line + " " * (each - display_width(line)) for line in c + [""] * (height - len(c))] for c in columns
    ]
    return "\n".join(" | ".join(row).rstrip() for row in zip(*padded, strict=True))


def format_stacked(texts: dict[str, str]) -> str:
    """Format texts one below the other; continuation lines are indented."""
    return "\n".join(f"{name}: " + text.replace("\n", "\n    ") for name, text in texts.items())


def format_answers(question: str, texts: dict[str, str], images: Sequence[str] = ()) -> str:
    """Format a question and its answers for stdout: in columns on a wide terminal, otherwise stacked.

    images: labels of the images that the question shows.
    """
    texts = {name: make_printable(text.strip()) for name, text in texts.items()}
    columns = shutil.get_terminal_size().columns
    fits = sys.stdout.isatty() and columns >= len(texts) * (MIN_COLUMN_WIDTH + 3) - 3
    answers = format_columns(texts, columns) if fits else format_stacked(texts)
    asked = {"prompt": make_printable(question)}
    if images:
        asked["images"] = make_printable(", ".join(images))
    return format_stacked(asked) + "\n" + answers


def choose_display_names(models: AnsweringModels) -> dict[str, str]:
    """Return {model name: name to print}: a single run is "tuned"."""
    single = len(models.runs) == 1
    return {name: "tuned" if single and name != BASE else name for name in models.names}


def tell_better_steps(folders: list[Path]) -> None:
    """Print a line to stderr for each RUN whose best/ evaluated better, unless best/ answers too."""
    for folder in folders:
        better = find_better_step(folder)
        if better and better.folder not in folders:
            print(better.describe(), file=sys.stderr)  # stdout is for the answers


def answer_prompts(options: Options, models: AnsweringModels, templates: dict[str, PromptTemplate]) -> None:
    """Let each model answer all prompts, one model after the other.

    Prints a prompt as soon as all models have answered it. Writes the table of --out at the end.
    """
    assert options.all_prompts is not None
    rendered = {
        name: [template.render(prompt, options.system) for prompt in options.all_prompts]
        for name, template in templates.items()
    }
    encoded = {name: [templates[name].encode(prompt) for prompt in rendered[name]] for name in rendered}
    for line in describe_unread_fields(options.all_prompts, templates):
        print(line, file=sys.stderr)  # stdout is for the answers
    names = choose_display_names(models)
    last = next(reversed(templates))
    compared = list_prompts(options, templates[last], rendered[last])
    for name in names:
        template = choose_template(name, templates)
        prompts = encoded.get(name) or next(iter(encoded.values()))
        with models.activate(name):
            if options.out:  # the first answer on a device also loads kernels
                models.generate_answer(template, prompts[0], replace(options.sampling, max_new_tokens=2))
            for prompt, shown in zip(prompts, compared, strict=True):
                timer = AnswerTimer()
                answer = models.generate_answer(template, prompt, options.sampling, timer)
                shown.answers[name] = TimedAnswer(**dataclasses.asdict(answer) | timer.read())
                if len(shown.answers) == len(names):
                    print_answers(options, shown, names)
    if options.out:
        comparison = Comparison(describe_settings(options, models), names, compared)
        write_comparison(options.out, comparison)
        if not options.json:
            print(f"{format_summary(comparison)}\nanswers and times: {options.out}")


def list_prompts(
    options: Options, template: PromptTemplate, rendered: list[RenderedPrompt]
) -> list[ComparedPrompt]:
    """Return the prompts, still without answers, as they are shown; for --out with the answers of their rows.

    Args:
        options: options of the command.
        template: the template of the run that answers last.
        rendered: the prompts in it.

    Raises UserError as `read_reference` does.
    """
    found = []
    for prompt, text in zip(options.all_prompts or [], rendered, strict=True):
        question = prompt.content if isinstance(prompt.content, str) else template.find_question(text)
        reference = read_reference(prompt, template) if options.out else ""
        found.append(ComparedPrompt(prompt.content, text.text, question, text.images, reference, {}))
    return found


def describe_settings(options: Options, models: AnsweringModels) -> dict[str, object]:
    """Return what the answers and their times depend on, for a table."""
    device, sampling = models.device, dataclasses.asdict(options.sampling)
    is_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    if not options.temperature:
        sampling = {"sampling": "greedy"} | {
            name: sampling[name] for name in ("max_new_tokens", "repetition_penalty")
        }
    return {
        "base model": options.base_model or models.first_run.config.model_name,
        "device": where,
        "precision": options.precision,
        **sampling,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _explode_renamed(options: Options, templates: dict[str, PromptTemplate]) -> Options:
    """Return the options; of a list of questions that a run's data names otherwise, each is a prompt."""
    prompts = options.all_prompts or []
    for names in (template.columns.names for template in templates.values()):
        if column := names.get("questions"):
            answers = names.get("answers", "answers")
            prompts = [each for prompt in prompts for each in explode_questions(prompt, column, answers)]
    return dataclasses.replace(options, all_prompts=prompts)


def describe_unread_fields(prompts: list[Prompt], templates: dict[str, PromptTemplate]) -> list[str]:
    """Return lines with the fields of prompts that a template does not read, so that a misspelt one shows."""
    given = [prompt.content for prompt in prompts if isinstance(prompt.content, dict)]
    unread = []
    for template in templates.values():
        matched = [template.match_row(row) for row in given]
        schemas = [find_schema(row, fitting, needs_answer=False) or fitting[0] for row, fitting in matched]
        shown = IMAGE_COLUMNS if template.images.format else ()
        rows = [{name: row[name] for name in row if name not in shown} for row, _ in matched]
        unread.append(join_columns(list_unread_columns(rows, schemas, template.columns.names.values())))
    return [f"--prompts: fields that are not read: {names}" for names in dict.fromkeys(unread) if names]


def print_answers(options: Options, prompt: ComparedPrompt, display_names: dict[str, str]) -> None:
    """Print one prompt and its answers: with --json as a line of JSON, otherwise as text.

    Args:
        options: options of the command.
        prompt: the prompt and its answers.
        display_names: {model name: name to print}.
    """
    if options.json:
        answer_fields = [
            {"model": name, "text": a.text, "tokens": a.tokens, "ended": a.ended}
            for name, a in prompt.answers.items()
        ]
        print(json.dumps({**prompt.to_json(), "answers": answer_fields}), flush=True)
        return
    texts = {
        display_names[name]: cut_repetition(a.text.rstrip()) + ("" if a.ended else " ...")
        for name, a in prompt.answers.items()
    }
    labels = [ref.label for ref in prompt.images]
    question = prompt.given if isinstance(prompt.given, str) else prompt.rendered.strip()
    print(format_answers(question, texts, labels), end="\n\n", flush=True)


def chat(options: Options, models: AnsweringModels, templates: dict[str, PromptTemplate]) -> None:
    """Hold a conversation with streamed answers until the user leaves."""

    def reply(name: str, template: PromptTemplate, prompt: EncodedPrompt, stream: AnswerStreamer) -> Answer:
        """Return the answer of the model `name`."""
        with models.activate(name):
            return models.generate_answer(template, prompt, options.sampling, stream)

    Chat(reply, models.names, templates, options.system, options.image_path or ()).run()


def run(options: Options) -> int:
    """Run the command. Return the exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C.

    Ctrl-C in a conversation is its end: 0.
    """
    if not options.verbose:
        quiet_libraries()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # the terminal's encoding may lack a character of an answer
            stream.reconfigure(errors="replace")
    try:
        device = choose_device(options.device)
        check_device(device)
        check_precision(options.precision, device)
        if options.out:
            check_writable(options.out.absolute().parent, "--out")
        runs = open_runs(options.runs, options.base_model)
        tell_better_steps([run.folder for run in runs])
        models = AnsweringModels(runs, options.base_model, device, options.precision, options.compare)
        how = (options.dataset_format, options.thinking, options.system, options.image_folder)
        templates = {name_model(run): make_template(run, *how) for run in runs}
        if options.all_prompts is not None:
            options = _explode_renamed(options, templates)
            answer_prompts(options, models, templates)
        else:
            chat(options, models, templates)
    except UserError as e:
        return print_error(e, options.verbose)
    except KeyboardInterrupt:
        print()
        return 0 if options.all_prompts is None else 130
    return 0
