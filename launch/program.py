"""A command as a process: its environment, its output and signals, its exit status."""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from options.errors import FULL_DISK, REFUSED, UserError, describe

T = TypeVar("T")

# On some CPUs bitsandbytes advises at each import to install a package, which would stand before every line of ours.
# Said here because every command imports this file before it imports bitsandbytes.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

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
    """Prints `error: ...`, with verbose below its traceback. Returns the exit status, REFUSED."""
    if verbose:
        traceback.print_exception(error)
    if not under_torchrun() or os.environ["LOCAL_RANK"] == "0":  # all ranks of a node find the same
        print(f"error: {describe(error)}", file=sys.stderr)
    return REFUSED


class DiskFullTolerant(io.FileIO):
    """Standard output or error. If it is a file on a disk that is full, what is told is lost, and the program goes on."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in FULL_DISK:
                raise
            return memoryview(data).nbytes


def survive_full_disk() -> None:
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
        raw = DiskFullTolerant(stream.fileno(), "w", closefd=False)
        options = {
            "encoding": stream.encoding,
            "errors": stream.errors,
            "line_buffering": stream.line_buffering,
            "write_through": stream.write_through,
        }
        # Of `python -u` and PYTHONUNBUFFERED, Python itself has no buffer below the text either.
        buffer = raw if stream.write_through else io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(buffer, **options))


def quiet_libraries() -> None:
    """No warnings and progress bars of transformers and the hub: the one line of an error says more. Imports them."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def under_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def parse_or_exit(argv: list[str], read: Callable[[list[str]], T]) -> T:
    """The options that `read` makes of a command line. Ends the program as `report` does for a UserError, also where no
    folder takes temporary files, which libraries want as soon as they are imported."""
    try:
        return _read(argv, read)
    except UserError as e:
        sys.exit(report(e, verbose="--verbose" in argv))


def run_command(argv: list[str], read: Callable[[list[str]], T], run: Callable[[T], int]) -> int:
    """A whole command: options in, exit status out.

    read: makes options of a command line, without importing torch; run: runs them, and may import what takes seconds,
    as wrong options have been answered by then. `read` may raise UserError; `run` returns the exit
    status.
    """
    try:
        options = _read(argv, read)
    except UserError as e:
        return report(e, verbose="--verbose" in argv)
    return run(options)


def _read(argv: list[str], read: Callable[[list[str]], T]) -> T:
    options = read(argv)
    try:
        tempfile.gettempdir()
    except OSError as e:
        raise UserError(f"{e.strerror or e}; the disk is full, or TMPDIR should name another folder") from e
    return options


def typed_command(script: str) -> list[str]:
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
        if found is None or os.path.dirname(found) != os.path.dirname(sys.executable):
            continue
        if os.path.samefile(found, sys.executable):
            return name
    return sys.executable
