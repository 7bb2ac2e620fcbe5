"""generate.py's command line and prompts files: what can be wrong with them is found here, before torch and
transformers are imported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from options.command_line import Command
from options.config import DATASET_FORMATS
from options.data_files import JSON_LINES, KINDS, advice, suffix_of
from options.declaration import argument, option
from options.errors import UserError
from options.exact_json import parse_json
from options.limits import LINE, read_text

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, under the field's names. temperature 0: always the likeliest; top_k 0, top_p 1
    and repetition_penalty 1: off. max_new_tokens: of one answer."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


@dataclass(frozen=True)
class Prompt:
    """given: a text, or a row with the fields of the format; place: where it stands, for messages."""

    origin: str
    given: str | dict


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ValueError
    return text


@dataclass(frozen=True)
class Options:
    """What generate.py does. asked: the prompts of --prompt and --prompts; None for a conversation at the
    terminal."""

    # fmt: off
    runs: list[str] = argument("RUN", "the --output_dir of a run of train.py; several adapters of one base are switched"
        " without loading it again", several=True)
    prompt: list[str] | None = option(None, "Prompts", "a prompt; may be given several times. Without any: a conversation"
        " at the terminal", repeat=True)
    prompts: Path | None = option(None, "Prompts", "file of prompts, one per line; .jsonl or .ndjson: rows"
        " with the fields of the format, their answers ignored")
    dataset_format: str = option("auto", "Prompts", "instead of the run's", choices=DATASET_FORMATS)
    max_new_tokens: int = option(Sampling.max_new_tokens, "Answers", "longest answer, in tokens", least=1)
    temperature: float = option(Sampling.temperature, "Answers", "0 = always the likeliest token; 1 = as the model has"
        " them", least=0)
    top_p: float = option(Sampling.top_p, "Answers", "sample from the likeliest tokens that hold this share; 1 = all",
        above=0, most=1)
    top_k: int = option(Sampling.top_k, "Answers", "sample from this many likeliest tokens; 0 = all", least=0)
    repetition_penalty: float = option(Sampling.repetition_penalty, "Answers", "above 1 makes tokens that were there"
        " less likely", above=0)
    seed: int = option(Sampling.seed, "Answers", "of sampling; the same for every answer", least=0, below=2**63)
    compare: bool = option(True, "Answers", "the base model's answers as well")
    base_model: str | None = option(None, "Model", "folder or hub id of the base model, if it is not where the run had"
        " it")
    device: str | None = option(None, "Model", "cpu, cuda or cuda:1; unset = a GPU if there is one",
        convert=_device, noun="one of cpu, cuda, cuda:N")
    precision: str = option("auto", "Model", "auto = as in training", choices=PRECISIONS)
    json: bool = option(False, "Output", "one JSON object per prompt instead of columns")
    verbose: bool = option(False, "Output", "tracebacks with errors")
    # fmt: on
    asked: list[Prompt] | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in vars(Sampling())})


COMMAND = Command(
    "generate.py",
    'RUN [RUN ...] [--prompt "..."] [--option value ...]',
    "Answers of a finished run beside those of its base model.",
    Options,
)


def parse(argv: list[str]) -> Options:
    """Raises UserError; exits 0 on --help."""
    given = COMMAND.read(argv)
    options = Options(**given | {"runs": _folders(given["runs"])})
    for name in ("top_p", "top_k", "seed"):
        if name in given and options.temperature == 0:
            raise UserError(f"--{name} has no effect with --temperature 0, which always takes the likeliest"
                            " token; set a temperature, or leave it out")  # fmt: skip
    asked = [Prompt(f"--prompt {i}", text) for i, text in enumerate(options.prompt or [], 1)]
    asked += read_prompts(options.prompts) if options.prompts else []
    for prompt in asked:
        if isinstance(prompt.given, str) and not prompt.given.strip():
            raise UserError(f"{prompt.origin}: is empty")
    if options.json and not asked:
        raise UserError("--json: needs --prompt or --prompts")
    return replace(options, asked=asked or None)


def _folders(runs: list[str]) -> list[str]:
    folders = [os.path.expanduser(run) for run in runs]
    for i, folder in enumerate(folders):
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder; expected a RUN, the --output_dir of train.py")
        if not os.path.isfile(os.path.join(folder, "config.yaml")):
            raise UserError(f"{folder}: is no run of train.py (no config.yaml)")
        if any(os.path.samefile(folder, other) for other in folders[:i]):
            raise UserError(f"{folder}: is given twice")
    return folders


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, blank lines left out. Raises UserError for what cannot be read."""
    suffix = suffix_of(path.name)
    if suffix not in (*JSON_LINES, ".txt", ".md") and (suffix in KINDS or advice(path.name)):
        raise UserError(
            f"--prompts {path}: {suffix} files are not read; write a line for each prompt, or a row as .jsonl"
        )
    try:
        text = read_text(path, LINE)
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: not UTF-8") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"--prompts {path}: {getattr(e, 'strerror', None) or e}") from None
    lines = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path}: holds no prompt")
    if suffix not in JSON_LINES:
        return [Prompt(origin, line.rstrip("\r")) for origin, line in lines]
    return [Prompt(origin, _row(origin, line)) for origin, line in lines]


def _row(origin: str, line: str) -> str | dict:
    try:
        row = parse_json(line, exact=True)
    except (ValueError, RecursionError) as e:
        raise UserError(f"--prompts {origin}: not JSON ({getattr(e, 'msg', None) or e})") from None
    if not isinstance(row, dict | str):
        raise UserError(f"--prompts {origin}: neither a JSON object nor a text")
    return row
