"""generate.py: a finished run and its base answer the same prompts, or hold a conversation."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import unicodedata
from collections.abc import Iterator

import torch

from data.recognition import unread_columns
from finished.generation import BASE, Answer, Conversation, Stream, Template, Voices, make_template, open_runs
from launch.program import print_error, quiet_libraries
from options.errors import UserError
from options.generate import Options, Prompt

NARROWEST = 34  # characters of a column; on narrower terminals answers stand one below the other


def choose_device(name: str | None) -> torch.device:
    gpus = torch.cuda.device_count()
    device = torch.device(name or ("cuda" if gpus else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {name}: this machine has {gpus} GPU(s)")
    return device


def check_precision(name: str, device: torch.device) -> None:
    if (
        name == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError("--precision bf16: this GPU has no bf16; use auto, fp16 or fp32")


def printable(text: str) -> str:
    """A model's text as a terminal may have it: a control character could move the cursor or worse."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces where there are any."""
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if line and cells(line) + 1 + cells(word) > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
            while cells(line) > width:
                part = next(n for n in range(len(line), 0, -1) if cells(line[:n]) <= width or n == 1)
                lines.append(line[:part])
                line = line[part:]
        lines.append(line)
    return lines


def side_by_side(texts: dict[str, str], width: int) -> str:
    """One column for each, with its name above it."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = [[*wrapped(name, each), "-" * each, *wrapped(text, each)] for name, text in texts.items()]
    height = max(map(len, columns))
    padded = [[line + " " * (each - cells(line)) for line in c + [""] * (height - len(c))] for c in columns]
    return "\n".join(" | ".join(row).rstrip() for row in zip(*padded, strict=True))


def below(texts: dict[str, str]) -> str:
    """One below the other; further lines of a text are indented."""
    return "\n".join(f"{name}: " + text.replace("\n", "\n    ") for name, text in texts.items())


def show(question: str, texts: dict[str, str]) -> str:
    """question and answers for the terminal, or for whatever stdout is."""
    texts = {name: printable(text.strip()) for name, text in texts.items()}
    columns = shutil.get_terminal_size().columns
    fits = sys.stdout.isatty() and columns >= len(texts) * (NARROWEST + 3) - 3
    return (
        below({"prompt": printable(question)})
        + "\n"
        + (side_by_side(texts, columns) if fits else below(texts))
    )


def names(voices: Voices) -> dict[str, str]:
    """{who answers: the name to print}."""
    alone = len(voices.runs) == 1
    return {name: "tuned" if alone and name != BASE else name for name in voices.names}


def template_of(name: str, templates: dict[str, Template]) -> Template:
    """The base is asked as the first run is."""
    return templates.get(name) or next(iter(templates.values()))


def answer_all(options: Options, voices: Voices, templates: dict[str, Template]) -> None:
    """Each of the voices answers all prompts before the next one is put in place; printed as soon as a prompt
    has all its answers."""
    assert options.all_prompts is not None
    asked = {}
    for name, template in templates.items():
        texts = [template.text(prompt) for prompt in options.all_prompts]
        asked[name] = [
            (text, template.ids(text, prompt.origin))
            for text, prompt in zip(texts, options.all_prompts, strict=True)
        ]
    shown = names(voices)
    answers: list[dict[str, Answer]] = [{} for _ in options.all_prompts]
    for name in shown:
        template, own = template_of(name, templates), asked.get(name) or next(iter(asked.values()))
        with voices.speaking(name):
            for i, prompt in enumerate(options.all_prompts):
                answers[i][name] = voices.answer(template, own[i][1], options.sampling)
                if len(answers[i]) == len(shown):
                    print_answers(options, prompt.content, own[i][0], answers[i], shown)


def unread_fields(asked: list[Prompt], templates: dict[str, Template]) -> list[str]:
    """Lines on fields of the prompts' rows that are not read: one that is spelled wrong would be missed."""
    rows = [prompt.content for prompt in asked if isinstance(prompt.content, dict)]
    unread = (unread_columns(rows, template.form) for template in templates.values())
    return [f"--prompts: fields that are not read: {names}" for names in dict.fromkeys(unread) if names]


def print_answers(
    options: Options, given: str | dict, text: str, answers: dict, shown: dict[str, str]
) -> None:
    """text: the prompt in the template of the voice that answered last."""
    if options.json:
        said = [{"model": name, **dataclasses.asdict(answer)} for name, answer in answers.items()]
        print(json.dumps({"prompt": given, "rendered": text, "answers": said}), flush=True)
        return
    question = given if isinstance(given, str) else text.strip()
    texts = {shown[name]: a.text.rstrip() + ("" if a.ended else " ...") for name, a in answers.items()}
    print(show(question, texts), end="\n\n", flush=True)


def lines() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and a history for input()
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


def chat(options: Options, voices: Voices, templates: dict[str, Template]) -> None:
    """A conversation, answered as it is generated. The first run answers until /use names another voice."""
    speaker, choices = next(iter(voices.runs)), voices.names
    template = template_of(speaker, templates)
    conversation = Conversation(template)
    turns = "a conversation" if template.form.turns else "each question by itself"
    print(
        f"{speaker}: {turns}. /use N: another answers ({', '.join(f'{i} {c}' for i, c in enumerate(choices))})"
    )
    print("/new: begin anew; /quit or Ctrl-D: leave", flush=True)
    for line in lines():
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            conversation = Conversation(template)
        elif command == "/use" and rest.strip().isdecimal() and int(rest) < len(choices):
            speaker = choices[int(rest)]
            if template_of(speaker, templates) is not template:
                template = template_of(speaker, templates)
                conversation = Conversation(template)
            print(f"{speaker} answers")
        elif line.startswith("/"):
            print("/use N, /new or /quit")
        elif line:
            reply(options, voices, speaker, conversation, line)


def reply(options: Options, voices: Voices, speaker: str, conversation: Conversation, question: str) -> None:
    template = conversation.template
    try:
        row, text = conversation.ask(question)
        ids = template.ids(text, "the conversation" if template.form.turns else "the question")
    except UserError as e:
        print(f"{e}{'; /new begins another' if template.form.turns else ''}", flush=True)
        return
    stream = Stream(template, lambda piece: print(printable(piece), end="", flush=True))
    with voices.speaking(speaker):
        answer = voices.answer(template, ids, options.sampling, stream)
    print("" if answer.ended else " ...", flush=True)
    conversation.answered(row, answer.text)


def run(options: Options) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    if not options.verbose:
        quiet_libraries()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # a model may say what the terminal's encoding has not
            stream.reconfigure(errors="replace")
    try:
        device = choose_device(options.device)
        check_precision(options.precision, device)
        runs = open_runs(options.runs, options.base_model)
        voices = Voices(runs, options.base_model, device, options.precision, options.compare)
        templates = {str(run.folder): make_template(run, options.dataset_format) for run in runs}
        if options.all_prompts is not None:
            for line in unread_fields(options.all_prompts, templates):
                print(line, file=sys.stderr)  # stdout has the answers
            answer_all(options, voices, templates)
        else:
            chat(options, voices, templates)
    except UserError as e:
        return print_error(e, options.verbose)
    except KeyboardInterrupt:
        print()
        return 0 if options.all_prompts is None else 130
    return 0
