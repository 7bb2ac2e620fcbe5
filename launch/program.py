"""A command as a process: environment, output, signals, exit status."""

from __future__ import annotations

import io
import logging
import os
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, TypeVar

from options.errors import FULL_DISK, REFUSED, UserError, describe

T = TypeVar("T")

# On some CPUs each import of bitsandbytes logs advice to install a package, before all of our own output. It
# is silenced here because every command imports this module before bitsandbytes.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# torch's name of the setting, and its older name.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_environment() -> None:
    """Set environment variables that torch reads at import, unless the user has set them.

    New ranks inherit them.

    - PYTORCH_ALLOC_CONF: GPU memory segments that can grow, which reduces fragmentation.
    - OMP_WAIT_POLICY: idle threads sleep. Spinning threads would, on a busy machine, make each short
      operation wait for a thread that is not scheduled.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def exit_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the program without a traceback, after its `finally` blocks.

    After the first signal both are ignored, so that a second one does not interrupt the `finally` blocks.
    """

    def handle(number: int, _frame) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, handle)


def print_error(error: Exception, verbose: bool) -> int:
    """Print `error: ...` (under torchrun once per node), and return the exit status REFUSED, 2.

    verbose: print the traceback before it, on every rank.
    """
    if verbose:
        traceback.print_exception(error)
    if not is_under_torchrun() or os.environ["LOCAL_RANK"] == "0":  # all ranks of a node have this error
        print(f"error: {describe(error)}", file=sys.stderr)
    return REFUSED


class FullDiskTolerantFile(io.FileIO):
    """Standard output or error that drops what it cannot write because the disk is full."""

    def write(self, data) -> int:
        """Write the data, or drop it if the disk is full. Return how many bytes were written or dropped."""
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in FULL_DISK:
                raise
            return memoryview(data).nbytes


def prepare_long_run() -> None:
    """Prepare this process to run for days: a full disk under its output does not end it.

    Until handlers are installed (launch/signals.py), SIGUSR1 is ignored, and SIGINT ends the process as
    SIGTERM does: at once and without a traceback.
    """
    if sys.platform == "win32":  # which has no SIGUSR1, and which `check_platform` refuses
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have set it to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the program was started with this stream closed
            continue
        stream.flush()
        raw = FullDiskTolerantFile(stream.fileno(), "w", closefd=False)
        options = {
            "encoding": stream.encoding,
            "errors": stream.errors,
            "line_buffering": stream.line_buffering,
            "write_through": stream.write_through,
        }
        # With `python -u` or PYTHONUNBUFFERED there is no buffer below the text layer, as in Python itself.
        buffer = raw if stream.write_through else io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(buffer, **options))


def quiet_libraries() -> None:
    """Import transformers and huggingface_hub, and turn off their warnings and progress bars."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def is_under_torchrun() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started this process as a rank."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def is_first_process() -> bool:
    """Whether this process prints what concerns all of a run: under torchrun, only rank 0 does."""
    return not is_under_torchrun() or os.environ["RANK"] == "0"


def parse_or_exit(argv: list[str], parse: Callable[[list[str]], T]) -> T:
    """Return parse(argv), the options. If it raises UserError, print that and exit with REFUSED, 2.

    It is also an error on Windows itself, and if no folder takes temporary files, which libraries write at
    import.
    """
    try:
        return _parse(argv, parse)
    except UserError as e:
        sys.exit(print_error(e, verbose="--verbose" in argv))


def run_command(argv: list[str], parse: Callable[[list[str]], T], run: Callable[[T], int]) -> int:
    """Return run(parse(argv)), an exit status. If parse raises UserError, print that and return REFUSED, 2.

    Args:
        argv: the command line.
        parse: parses it into options, without importing torch. May raise UserError.
        run: runs the command with these options and returns the exit status. Its errors pass through. Slow
            imports belong here, so that wrong options are reported before them.
    """
    try:
        options = _parse(argv, parse)
    except UserError as e:
        return print_error(e, verbose="--verbose" in argv)
    try:
        status = run(options)
        sys.stdout.flush()  # an error at the interpreter's exit would be a traceback
        return status
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        return 128 + signal.SIGPIPE


def _is_unread(stream: TextIO) -> bool:
    """Return whether nobody reads a stream any more, as in `... | head -2`; if so, let it go nowhere."""
    poll = select.poll()
    poll.register(stream, 0)  # errors are reported always: a pipe without a reader is one
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True


def check_platform() -> None:
    """Raise UserError on native Windows, which lacks signals, file locks and the NCCL that are used here."""
    if sys.platform == "win32":
        raise UserError("Windows itself is not supported; install WSL2 (wsl --install) and run this in there")


def _parse(argv: list[str], parse: Callable[[list[str]], T]) -> T:
    """Return parse(argv). Raises its UserError, or one on Windows, or if no folder takes temporary files."""
    check_platform()
    options = parse(argv)
    try:
        tempfile.gettempdir()
    except OSError as e:
        raise UserError(f"{e.strerror or e}; the disk is full, or TMPDIR should name another folder") from e
    return options


def shell_command(script: str) -> list[str]:
    """Return [Python, path] as a user can type them in the current folder to run a script of this project.

    script: its path from the project's root, such as "train.py".
    `python` is used only if it is this process's interpreter; it may be another one, or missing.
    """
    path = Path(__file__).parents[1] / script
    is_here = os.path.exists(script) and os.path.samefile(script, path)
    return [_python_command(), script if is_here else str(path)]


def _python_command() -> str:
    """Return the shortest text that starts this process's interpreter from the current folder."""
    if Path.cwd() in Path(sys.executable).parents:
        return os.path.relpath(sys.executable)
    for name in ("python", os.path.basename(sys.executable)):
        # Compare the folders too: interpreters of two virtual environments may be links to the same file.
        found = shutil.which(name)
        if found is None or os.path.dirname(found) != os.path.dirname(sys.executable):
            continue
        if os.path.samefile(found, sys.executable):
            return name
    return sys.executable
