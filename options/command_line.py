"""The command line and the YAML file: options as text become a `Config`, and errors become one line.

Nothing here needs torch or transformers, whose import takes seconds: wrong options and --help are answered at
once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from options.config import FIELDS, HINTS, NEEDS, Config, UserError, shown
from options.limits import OPTIONS_FILE, read_text
from options.resolve import resolve

T = typing.TypeVar("T")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # EDQUOT: of what a user may fill

# torch's name of the setting, and the older one that users know.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_environment() -> None:
    """What torch reads when it is imported, here and, the environment being passed on, in the ranks; unless the user has
    chosen otherwise: blocks of GPU memory that grow, so that little is lost between them, and threads that sleep when they
    have nothing to do. They would spin, and beside any other load each short operation would wait for one that is not
    scheduled."""
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def exit_on_signals() -> None:
    """From here on Ctrl-C and SIGTERM end the program without a traceback, its `finally` blocks run. Once: pressed
    again, they would cut these as well."""

    def leave(number: int, _frame) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, leave)


def report(error: Exception, verbose: bool) -> int:
    """Prints `error: ...`, with verbose below its traceback. Returns the exit status for it, 2."""
    if verbose:
        traceback.print_exception(error)
    if not under_torchrun() or os.environ["LOCAL_RANK"] == "0":  # all ranks of a node find the same
        print(f"error: {describe(error)}", file=sys.stderr)
    return 2


def needs_no_traceback(e: BaseException) -> bool:
    """Whether its line says all: of what the user can put right, as a disk that is full."""
    return isinstance(e, UserError) or (isinstance(e, OSError) and e.errno in FULL_DISK)


def describe(e: BaseException) -> str:
    """One line for an exception: a UserError's text; otherwise its type as well."""
    text = " ".join(str(e).split())
    return text if isinstance(e, UserError) else f"{type(e).__name__}: {text}" if text else type(e).__name__


class Unfailing(io.FileIO):
    """Standard output or error. If it is a file on a disk that is full, what is told is lost, and the program goes on."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in FULL_DISK:
                raise
            return memoryview(data).nbytes


def outlast() -> None:
    """For a process that is to run for days: a full disk under its output does not end it, nor does SIGUSR1 before
    anybody listens to it. Until then SIGINT ends it as SIGTERM does, at once and without a traceback."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the program
            continue
        stream.flush()
        raw = Unfailing(stream.fileno(), "w", closefd=False)
        options = {
            "encoding": stream.encoding,
            "errors": stream.errors,
            "line_buffering": stream.line_buffering,
            "write_through": stream.write_through,
        }
        # Of `python -u` and PYTHONUNBUFFERED, Python itself has no buffer below the text either.
        buffer = raw if stream.write_through else io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(buffer, **options))


def under_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def _annotation(name: str) -> tuple[type, bool]:
    """(int, float, bool or str; whether None is allowed) of an option."""
    hint = HINTS[name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def _convert(name: str, value, where: str):
    """value, a string or a YAML scalar, as the option's type. Raises UserError that names `where`."""
    kind, optional = _annotation(name)
    meta = FIELDS[name].metadata
    if value is None and optional:
        return None
    text = str(value).strip()
    try:
        if kind is bool:
            result = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        elif isinstance(value, bool | list | dict) or value is None:
            raise ValueError
        else:
            result = kind(text) if kind is not str else str(value)
    except (ValueError, KeyError):
        noun = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        raise UserError(f"{where}: {text!r} is not {noun}") from None
    if kind is float and result != result:
        raise UserError(f"{where}: nan is not a number to train with")
    if meta["choices"] and result not in meta["choices"]:
        raise UserError(f"{where}: {result!r} is none of {', '.join(meta['choices'])}")
    return result


class Parser(argparse.ArgumentParser):
    """argparse with errors as UserErrors."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value == [] and name != "runs":  # what argparse makes of `--name=--`
                raise UserError(f"--{name}: expected a value")
        return found, rest


def command_parser(program: str, usage: str, description: str) -> Parser:
    """The parser of a command beside train.py; usage: what follows `python <program>`."""
    return Parser(
        prog=program,
        usage=f"python {program} {usage}",
        allow_abbrev=False,
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )


def _parser() -> Parser:
    parser = Parser(
        prog="train.py",
        usage="python train.py [--option value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Fine-tune a language model too big for one GPU. Without options: a small demo run.",
        epilog="Options may be written with - for _, and switches without `true`.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=110),
    )
    parser.add_argument("--config", metavar="YAML", help="read options from this file; the command line wins")
    groups = {}
    for field in FIELDS.values():
        meta, (kind, _) = field.metadata, _annotation(field.name)
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        flag = {"nargs": "?", "const": "true"} if kind is bool else {}
        metavar = "NAME" if meta["choices"] else {bool: "BOOL", int: "N", float: "X", str: "TEXT"}[kind]
        groups[meta["group"]].add_argument(f"--{field.name}", metavar=metavar, help=_help(field), **flag)
    return parser


def _help(field: dataclasses.Field) -> str:
    meta = field.metadata
    text = meta["help"]
    if meta["choices"]:
        text += f": {', '.join(meta['choices'])}"
    text += f" [{shown(field.default)}]"
    if meta["needs"]:
        text += f" (only for {NEEDS[meta['needs']]})"
    return text.replace("%", "%%")


def suggest(name: str, known: Iterable[str] = FIELDS) -> str:
    """The end of an error line about an unknown option."""
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f"; did you mean --{near[0]}?" if near else "; see --help"


def _read_yaml(path: str) -> dict:
    try:
        text = read_text(Path(path), OPTIONS_FILE)
        _check_flat(text, path)
        given = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a UTF-8 text") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name, or a date that no calendar has
        reason = getattr(e, "strerror", None) or f"not YAML ({e})"
        raise UserError(f"--config {path}: {reason}") from None
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ArithmeticError) as e:
        # The last four are what its constructors raise for an explicit tag whose value is not of its kind.
        line = f" line {e.problem_mark.line + 1}" if getattr(e, "problem_mark", None) else ""
        raise UserError(f"--config {path}:{line} is not YAML ({getattr(e, 'problem', e)})") from None
    if not isinstance(given, dict):
        raise UserError(f"--config {path}: expected lines of `option: value`")
    values = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            raise UserError(f"--config {path}: unknown option {key}{suggest(str(key))}")
        if value is not None:  # a null line is an option that was not given
            values[name] = _convert(name, value, f"{path}: {name}")
    return values


def _check_flat(text: str, path: str) -> None:
    """Raises UserError for more than lines of `option: value` or lists of values: an alias or a merge stands for as
    much as its writer likes, and depth costs the stack."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--config {path}: line {event.start_mark.line + 1}: aliases (*) are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2:
            line = event.start_mark.line + 1
            raise UserError(f"--config {path}: line {line}: nested; expected lines of `option: value`")


def with_underscores(argv: list[str]) -> list[str]:
    """--train-type=x -> --train_type=x; values stay as they are."""
    dashes = re.compile(r"--[a-z][a-z0-9-]*")
    return [
        dashes.sub(lambda m: "--" + m[0][2:].replace("-", "_"), a, count=1) if dashes.match(a) else a
        for a in argv
    ]


def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """(the resolved configuration, remarks to print once). Raises UserError; exits 0 on --help."""
    args, rest = _parser().parse_known_args(with_underscores(argv))
    if rest:
        raise UserError(f"unknown option {rest[0]}{suggest(rest[0].split('=')[0])}")
    raw = vars(args)
    given = _read_yaml(raw.pop("config")) if "config" in raw else {}
    given |= {name: _convert(name, value, f"--{name}") for name, value in raw.items()}
    return resolve(given)


def parse_or_exit(argv: list[str], read: Callable[[list[str]], T] = parse) -> T:
    """What `read` makes of a command line; a UserError ends the program as `report` tells it. So does a machine where no
    folder takes temporary files, which libraries want as soon as they are imported."""
    try:
        parsed = read(argv)
        try:
            tempfile.gettempdir()
        except OSError as e:
            raise UserError(
                f"{e.strerror or e}; the disk is full, or TMPDIR should name another folder"
            ) from e
        return parsed
    except UserError as e:
        sys.exit(report(e, verbose="--verbose" in argv))


def run_program(argv: list[str], read: Callable[[list[str]], T], run: Callable[[T], int]) -> int:
    """A whole program, for callers from Python: options in, exit status out."""
    try:
        parsed = read(argv)
    except UserError as e:
        return report(e, verbose="--verbose" in argv)
    return run(parsed)


def report_folder(argv: list[str]) -> Path:
    """The RUN of report.py's command line. Exits 0 on --help, 2 if there is none."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="Makes RUN/report.html out of a RUN's files."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the --output_dir of a run of train.py")
    return parser.parse_args(argv).run.expanduser()


def program(script: str) -> list[str]:
    """[this interpreter, one of our programs] as they can be typed where this process was started: `python` may be
    another interpreter there, or none."""
    path = Path(__file__).parents[1] / script
    here = os.path.exists(script) and os.path.samefile(script, path)
    return [_python(), script if here else str(path)]


def _python() -> str:
    if Path.cwd() in Path(sys.executable).parents:
        return os.path.relpath(sys.executable)
    for name in ("python", os.path.basename(sys.executable)):
        # The folder counts as well: the interpreters of two virtual environments may be links to one file.
        found = shutil.which(name)
        same = found and os.path.dirname(found) == os.path.dirname(sys.executable)
        if same and os.path.samefile(found, sys.executable):
            return name
    return sys.executable
