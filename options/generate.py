"""Options and prompts of generate.py. Errors in them are found before torch and transformers are imported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from options.command_line import Command
from options.config import DATASET_FORMATS
from options.data_files import JSON_LINES, KINDS, conversion_advice, file_suffix
from options.declaration import argument, option
from options.errors import UserError
from options.exact_json import parse_json
from options.limits import MAX_LINE_BYTES, read_text
from options.run_folders import check_runs

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TABLES = (".md", ".html", ".csv", ".jsonl")  # what --out writes, by the suffix


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 = always the likeliest token
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 = off
    repetition_penalty: float = 1.0  # 1 = off
    seed: int = 42


@dataclass(frozen=True)
class Prompt:
    """A prompt, and where it came from."""

    origin: str  # for messages
    content: str | dict  # a text, or a row with the fields of the dataset format
    image_paths: tuple[str, ...] = ()  # images that a text shows; a row names its own
    folder: str = ""  # that paths of images in a row are relative to
    answer: object = None  # the answer to a question of a list; other rows hold theirs; None = none is known


def _parse_device(text: str) -> str:
    """Return the text if it is cpu, cuda or cuda:N. Raises ValueError if not."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ValueError
    return text


@dataclass(frozen=True)
class Options:
    """The options of generate.py.

    Attributes:
        all_prompts: the prompts of --prompt and --prompts; None for a conversation at the terminal.
    """

    # fmt: off
    runs: list[str] = argument("RUN", "the --output_dir of a run of train.py; several adapters of one base"
        " share the loaded base", several=True)
    prompt: list[str] | None = option(None, "Prompts", "a prompt; may be given several times. Without"
        " --prompt and --prompts: a conversation at the terminal", repeat=True)
    text_prompt: list[str] | None = option(None, "Prompts", "another name of --prompt", repeat=True)
    image_path: list[str] | None = option(None, "Prompts", "an image that every prompt shows, or the first"
        " question of a conversation; may be given several times. <image> in a prompt is its place",
        repeat=True)
    prompts: Path | None = option(None, "Prompts", "file of prompts, one per line; .jsonl or .ndjson: rows"
        " with the fields of the format or of the data, whose answers no model sees")
    dataset_format: str = option("auto", "Prompts", "format of the prompts; auto = the run's",
        choices=DATASET_FORMATS)
    image_folder: str | None = option(None, "Prompts", "folder that the paths of images in --prompts are"
        " relative to; unset = the folder of that file")
    system: str | None = option(None, "Prompts", "system prompt of every question; it replaces the one of a"
        " conversation in --prompts")
    thinking: str = option("auto", "Prompts", "false = questions end with the chat template's empty thinking"
        " block, so that the model answers without a thought; true = they do not; auto = as in training",
        choices=("auto", "true", "false"))
    max_new_tokens: int = option(Sampling.max_new_tokens, "Answers", "longest answer, in tokens", ge=1)
    temperature: float = option(Sampling.temperature, "Answers", "0 = always the likeliest token; 1 = sample"
        " with the model's probabilities", ge=0)
    top_p: float = option(Sampling.top_p, "Answers", "sample from the likeliest tokens whose probabilities"
        " add up to this; 1 = all", gt=0, le=1)
    top_k: int = option(Sampling.top_k, "Answers", "sample from this many likeliest tokens; 0 = all", ge=0)
    repetition_penalty: float = option(Sampling.repetition_penalty, "Answers", "above 1 makes tokens that are"
        " already in the text less likely", gt=0)
    seed: int = option(Sampling.seed, "Answers", "seed of sampling; the same for every answer", ge=0,
        lt=2**63)
    compare: bool = option(True, "Answers", "show the base model's answers as well")
    base_model: str | None = option(None, "Model", "folder or hub id of the base model, if it is not where"
        " the run had it")
    device: str | None = option(None, "Model", "cpu, cuda or cuda:1; unset = a GPU if there is one",
        convert=_parse_device, noun="one of cpu, cuda, cuda:N")
    precision: str = option("auto", "Model", "auto = as in training", choices=PRECISIONS)
    json: bool = option(False, "Output", "one JSON object per prompt instead of columns")
    out: Path | None = option(None, "Output", "also write the answers side by side, each with its times, and"
        " with scores where rows have answers, to this .md, .html, .csv or .jsonl")
    verbose: bool = option(False, "Output", "tracebacks with errors")
    # fmt: on
    all_prompts: list[Prompt] | None = None

    @property
    def sampling(self) -> Sampling:
        """The options that choose tokens."""
        return Sampling(**{name: getattr(self, name) for name in vars(Sampling())})


COMMAND = Command(
    "generate.py",
    'RUN [RUN ...] [--prompt "..."] [--option value ...]',
    "Show the answers of a finished run beside those of its base model.",
    Options,
)


def parse(argv: list[str]) -> Options:
    """Return the options in `argv`, with all prompts read. Raises UserError if options or prompts are wrong.

    Exits with status 0 on --help.
    """
    given = COMMAND.read(argv)
    options = Options(**given | {"runs": check_runs(given["runs"])})
    for name in ("top_p", "top_k", "seed"):
        if name in given and options.temperature == 0:
            raise UserError(f"--{name} has no effect with --temperature 0, which always takes the likeliest"
                            " token; set a temperature, or leave it out")  # fmt: skip
    if options.image_folder is not None and options.prompts is None:
        raise UserError("--image_folder: has no effect without --prompts")
    prompts = _read_all_prompts(options)
    for name in ("json", "out"):
        if name in given and given[name] and not prompts:
            raise UserError(f"--{name}: needs --prompt or --prompts")
    if options.out is not None:
        _check_out(options.out, options.prompts)
    return replace(options, all_prompts=prompts or None)


def _read_all_prompts(options: Options) -> list[Prompt]:
    """Return the prompts of all options, with the images of --image_path. Raises UserError."""
    given = {"prompt": options.prompt, "text_prompt": options.text_prompt}
    prompts = [
        Prompt(f"--{name} {i}", text)
        for name, texts in given.items()
        for i, text in enumerate(texts or [], 1)
    ]
    prompts += read_prompts(options.prompts) if options.prompts else []
    for prompt in prompts:
        if isinstance(prompt.content, str) and not prompt.content.strip():
            raise UserError(f"{prompt.origin}: is empty")
        if isinstance(prompt.content, dict) and options.image_path:
            raise UserError(
                f"{prompt.origin}: is a row, which names its images itself; leave out --image_path"
            )
    return [replace(prompt, image_paths=tuple(options.image_path or ())) for prompt in prompts]


def _check_out(out: Path, prompts: Path | None) -> None:
    """Raise UserError unless --out names a table that is not the file of the prompts."""
    if out.suffix.lower() not in TABLES:
        raise UserError(f"--out {out}: must end with one of {', '.join(TABLES)}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    if prompts is not None and out.exists() and out.samefile(prompts):
        raise UserError(f"--out {out}: is the file of --prompts, which would be lost")


def read_prompts(path: Path) -> list[Prompt]:
    """Return a prompt for each line of a file that is not blank; lines of .jsonl and .ndjson are rows.

    Raises UserError if the file cannot be read or has no prompt.
    """
    suffix = file_suffix(path.name)
    if suffix not in (*JSON_LINES, ".txt", ".md") and (suffix in KINDS or conversion_advice(path.name)):
        raise UserError(
            f"--prompts {path}: {suffix} files are not read; write a line for each prompt, or a row as .jsonl"
        )
    try:
        text = read_text(path, MAX_LINE_BYTES)
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: not UTF-8") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"--prompts {path}: {getattr(e, 'strerror', None) or e}") from None
    lines = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path}: holds no prompt")
    if suffix not in JSON_LINES:
        return [Prompt(origin, line.rstrip("\r")) for origin, line in lines]
    folder = os.path.dirname(os.path.abspath(path))
    rows = (Prompt(origin, _parse_row(origin, line), folder=folder) for origin, line in lines)
    return [prompt for row in rows for prompt in explode_questions(row)]


def explode_questions(prompt: Prompt, column: str = "questions", answers: str = "answers") -> list[Prompt]:
    """Return a prompt for each question of a row with a list of them, as training reads it.

    column, answers: the lists' columns. Raises UserError if the list of questions is empty.
    """
    row = prompt.content
    if not isinstance(row, dict) or not isinstance(row.get(column), list):
        return [prompt]
    if not row[column]:
        raise UserError(f"--prompts {prompt.origin}: {column} is an empty list")
    others = {name: value for name, value in row.items() if name not in (column, "answers")}
    given = row.get(answers)
    if not isinstance(given, list) or len(given) != len(row[column]):
        given = [None] * len(row[column])
    return [
        replace(prompt, origin=f"{prompt.origin} question {i}", content={**others, "question": q}, answer=a)
        for i, (q, a) in enumerate(zip(row[column], given, strict=True), 1)
    ]


def _parse_row(origin: str, line: str) -> str | dict:
    """Return the JSON object or string in a line of a .jsonl file. Raises UserError if it is neither."""
    try:
        row = parse_json(line, exact=True)
    except (ValueError, RecursionError) as e:
        raise UserError(f"--prompts {origin}: not JSON ({getattr(e, 'msg', None) or e})") from None
    if not isinstance(row, dict | str):
        raise UserError(f"--prompts {origin}: neither a JSON object nor a text")
    return row
