"""generate.py's command line and prompts files: what can be wrong with them is found here, before torch and
transformers are imported."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from options.command_line import command_parser, suggest, with_underscores
from options.config import DATASET_FORMATS
from options.errors import UserError
from options.limits import LINE, read_text

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, under the field's names. temperature 0: always the likeliest; top_k 0, top_p 1 and
    repetition_penalty 1: off. max_new_tokens: of one answer."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


@dataclass(frozen=True)
class Prompt:
    """given: a text, or a row with the fields of the format; place: where it stands, for messages."""

    place: str
    given: str | dict


@dataclass(frozen=True)
class Options:
    """The command line. prompts: None for a conversation at the terminal; device: None = the GPU if there is one."""

    runs: list[str]
    prompts: list[Prompt] | None
    sampling: Sampling
    compare: bool
    json: bool
    base_model: str | None
    dataset_format: str
    device: str | None
    precision: str
    verbose: bool


HELP = (
    ("prompt", "TEXT", "a prompt; may be given several times. Without any: a conversation at the terminal"),
    ("prompts", "FILE", "prompts, one per line; .jsonl: rows with the fields of the format, their answers ignored"),
    ("max_new_tokens", "N", "longest answer, in tokens [128]"),
    ("temperature", "X", "0 = always the likeliest token; 1 = as the model has them [0]"),
    ("top_p", "X", "sample from the likeliest tokens that hold this share; 1 = all [1]"),
    ("top_k", "N", "sample from this many likeliest tokens; 0 = all [0]"),
    ("repetition_penalty", "X", "above 1 makes tokens that were there less likely [1]"),
    ("seed", "N", "of sampling; the same for every answer [42]"),
    ("compare", "BOOL", "the base model's answers as well [true]"),
    ("json", "BOOL", "one JSON object per prompt instead of columns [false]"),
    ("base_model", "TEXT", "folder or hub id of the base model, if it is not where the run had it"),
    ("dataset_format", "NAME", f"instead of the run's: {', '.join(DATASET_FORMATS)} [auto]"),
    ("device", "NAME", "cpu, cuda or cuda:1; unset = a GPU if there is one"),
    ("precision", "NAME", f"{', '.join(PRECISIONS)}; auto = as in training [auto]"),
    ("verbose", "BOOL", "tracebacks with errors [false]"),
)  # fmt: skip


def parse(argv: list[str]) -> Options:
    """Raises UserError; exits 0 on --help."""
    parser = command_parser(
        "generate.py",
        'RUN [RUN ...] [--prompt "..."] [--option value ...]',
        "Answers of a finished run beside those of its base model.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", help="an --output_dir of train.py; several adapters"
                        " of one base are switched without loading it again")  # fmt: skip
    for name, metavar, text in HELP:
        more = {"action": "append"} if name == "prompt" else {}
        more |= {"nargs": "?", "const": "true"} if metavar == "BOOL" else {}
        parser.add_argument(f"--{name}", metavar=metavar, help=text, **more)
    args, rest = parser.parse_known_args(_spelled(argv))
    if rest:
        raise UserError(f"unknown option {rest[0]}{suggest(rest[0].split('=')[0], vars(args))}")
    return _converted(args)


def _spelled(argv: list[str]) -> list[str]:
    """`with_underscores`, but not of what stands behind --prompt: a prompt may look like an option."""
    spelled = with_underscores(argv)
    return [argv[i] if i and spelled[i - 1] == "--prompt" else a for i, a in enumerate(spelled)]


def _converted(args: argparse.Namespace) -> Options:
    prompts = [Prompt(f"--prompt {i}", text) for i, text in enumerate(args.prompt or [], 1)]
    if args.prompts is not None:
        prompts += read_prompts(Path(os.path.expanduser(args.prompts)))
    for prompt in prompts:
        if isinstance(prompt.given, str) and not prompt.given.strip():
            raise UserError(f"{prompt.place}: is empty")
    options = Options(
        runs=_folders(args.runs),
        prompts=prompts if prompts or args.prompts is not None else None,
        sampling=_sampling(args),
        compare=_bool(args, "compare", True),
        json=_bool(args, "json", False),
        base_model=args.base_model,
        dataset_format=_choice(args, "dataset_format", DATASET_FORMATS),
        device=args.device,
        precision=_choice(args, "precision", PRECISIONS),
        verbose=_bool(args, "verbose", False),
    )
    if options.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise UserError(f"--device {options.device}: is none of cpu, cuda, cuda:N")
    if options.json and options.prompts is None:
        raise UserError("--json: needs --prompt or --prompts")
    return options


def _folders(runs: list[str]) -> list[str]:
    if not runs:
        raise UserError("give a RUN, the --output_dir of a run of train.py; see --help")
    folders = [os.path.expanduser(run) for run in runs]
    for i, folder in enumerate(folders):
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder; expected a RUN, the --output_dir of train.py")
        if not os.path.isfile(os.path.join(folder, "config.yaml")):
            raise UserError(f"{folder}: is no run of train.py (no config.yaml)")
        if any(os.path.samefile(folder, other) for other in folders[:i]):
            raise UserError(f"{folder}: is given twice")
    return folders


def _choice(args: argparse.Namespace, name: str, choices: tuple[str, ...]) -> str:
    value = getattr(args, name) or choices[0]
    if value not in choices:
        raise UserError(f"--{name} {value}: is none of {', '.join(choices)}")
    return value


def _bool(args: argparse.Namespace, name: str, default: bool) -> bool:
    value = getattr(args, name)
    if value not in (None, "true", "false"):
        raise UserError(f"--{name} {value}: is not true or false")
    return default if value is None else value == "true"


def _sampling(args: argparse.Namespace) -> Sampling:
    kinds = {name: type(value) for name, value in vars(Sampling()).items()}
    given = {
        name: _number(name, getattr(args, name), kind)
        for name, kind in kinds.items()
        if getattr(args, name) is not None
    }
    s = Sampling(**given)
    for name, good, right in (
        ("max_new_tokens", s.max_new_tokens >= 1, "1 or more"),
        ("temperature", 0 <= s.temperature < math.inf, "0 or more"),
        ("top_p", 0 < s.top_p <= 1, "above 0, up to 1"),
        ("top_k", s.top_k >= 0, "0 or more"),
        ("repetition_penalty", 0 < s.repetition_penalty < math.inf, "above 0"),
        ("seed", 0 <= s.seed < 2**63, "from 0 to 2^63 - 1"),
    ):
        if not good:
            raise UserError(f"--{name} {getattr(args, name)}: must be {right}")
    for name in ("top_p", "top_k", "seed"):
        if name in given and s.temperature == 0:
            raise UserError(f"--{name} has no effect with --temperature 0, which always takes the likeliest"
                            " token; set a temperature, or leave it out")  # fmt: skip
    return s


def _number(name: str, text: str, kind: type):
    try:
        return kind(text)
    except ValueError:
        noun = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{name}: {text!r} is not {noun}") from None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, blank lines left out. Raises UserError for what cannot be read."""
    try:
        text = read_text(path, LINE)
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path}: not UTF-8") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"--prompts {path}: {getattr(e, 'strerror', None) or e}") from None
    lines = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path}: holds no prompt")
    if path.suffix != ".jsonl":
        return [Prompt(place, line.rstrip("\r")) for place, line in lines]
    return [Prompt(place, _row(place, line)) for place, line in lines]


def _row(place: str, line: str) -> str | dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"--prompts {place}: not JSON ({getattr(e, 'msg', None) or e})") from None
    if not isinstance(row, dict | str):
        raise UserError(f"--prompts {place}: neither a JSON object nor a text")
    return row
