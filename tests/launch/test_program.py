"""Commands run as processes: their output, errors, signals and exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.program import shell_command
from tests.helpers.programs import ROOT
from tests.helpers.resuming import fill


@pytest.mark.parametrize(
    "program", ["train", "export", "generate", "evaluate", "report", "block_expansion", "plan"]
)
def test_help_shows_nothing_else(program):
    """No library prints anything before it, and no library is imported that takes seconds."""
    command = [sys.executable, "-X", "importtime", f"{program}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert done.returncode == 0 and "usage:" in done.stdout and "argparse" in imported
    assert not {"torch", "transformers", "bitsandbytes"} & set(imported)
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("program", "argv"),
    [
        ("export", ["nosuch", "--to", "merged", "--out", "out"]),
        pytest.param("evaluate", ["nosuch", "--dataset", "toy"], marks=pytest.mark.slow),
        pytest.param("report", ["nosuch"], marks=pytest.mark.slow),
        pytest.param("plan", ["--model_name", "nosuch"], marks=pytest.mark.slow),
        pytest.param(
            "block_expansion",
            ["--model_name", "nosuch", "--output_dir", "out", "--new_blocks", "1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_is_the_only_line(program, argv, tmp_path):
    """Also for a command that imports bitsandbytes, which logs advice on some CPUs."""
    command = [sys.executable, str(ROOT / f"{program}.py"), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


ON_WINDOWS = """
import argparse, logging, runpy, shutil, signal, sys, tempfile, traceback
import options.train
sys.platform = "win32"
del signal.SIGUSR1
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "program", ["train", "export", "generate", "evaluate", "report", "block_expansion", "plan"]
)
def test_windows_is_refused_with_the_way_out(program):
    """Whatever the options are, and before the slow imports."""
    command = [sys.executable, "-c", ON_WINDOWS, f"{program}.py", "--nosuch", "option"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Windows") and "WSL2" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["the folder of train.py", "another"])
def test_a_command_that_is_shown_can_be_typed(where, tmp_path):
    """Also if the interpreter is not on PATH, and if `python` is another program there."""
    folder = ROOT if where != "another" else tmp_path
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    show = "import shlex; from launch.program import shell_command as c; print(shlex.join(c('report.py')))"
    options = {"cwd": folder, "env": environment, "text": True, "timeout": 60}
    typed = subprocess.check_output([sys.executable, "-c", show], **options)
    done = subprocess.run(f"{typed.strip()} --help", shell=True, capture_output=True, **options)
    assert done.returncode == 0 and "usage: python report.py" in done.stdout, (typed, done.stderr)


def test_an_interpreter_is_called_by_the_name_that_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "python3").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "one" / "python3"))
    assert shell_command("report.py") == ["one/python3", str(ROOT / "report.py")]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path / "one"))
    assert shell_command("report.py") == ["python3", "report.py"]
    monkeypatch.setenv("PATH", str(tmp_path / "two"))  # another virtual environment over the same Python
    assert shell_command("report.py") == [sys.executable, "report.py"]
    (tmp_path / "one" / "python").symlink_to("python3")
    monkeypatch.setenv("PATH", str(tmp_path / "one"))
    assert shell_command("report.py") == ["python", "report.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "program", ["export.py --to merged --check false", "evaluate.py --metrics perplexity"]
)
def test_stopped_by_a_signal(program, number, runs, alpaca_file, tmp_path):
    """No traceback, and nothing is written; also while the libraries are still being imported."""
    script, *options = program.split()
    more = ["--dataset", alpaca_file] if script == "evaluate.py" else []
    command = [sys.executable, script, runs[0], *options, *more, "--out", tmp_path / "a" / "out"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    maps, end = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while "libtorch" not in maps.read_text():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    shown = process.communicate(timeout=60)
    assert process.returncode == 128 + number and shown == ("", "")
    assert not list(tmp_path.iterdir())


TALKING = """
import os, signal, sys
from launch import processes as launch

def talk(rank_info):
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(100):
        print("x" * 1000, flush=True)

if __name__ == "__main__":
    sys.exit(launch.start(talk, 1, (), "localhost", None))
"""


@pytest.mark.slow
def test_a_full_disk_under_the_output_ends_no_rank(small_disk, tmp_path):
    """Nor does a SIGUSR1 that comes before the rank has a handler for it."""
    (tmp_path / "talking.py").write_text(TALKING)
    fill(small_disk, leave=8 * 4096)
    with (small_disk / "log").open("wb") as log:
        command = [sys.executable, str(tmp_path / "talking.py")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        status = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=100).returncode
    assert status == 0 and 4096 < (small_disk / "log").stat().st_size < 50_000


PRINTING = (
    "import os, sys; from launch.program import prepare_long_run; prepare_long_run();"
    " print('a', end=''); {}; os._exit(0)"
)


@pytest.mark.parametrize("unbuffered, expected", [("", "b"), ("1", "ab")])
def test_output_is_buffered_as_python_was_asked_to(unbuffered, expected):
    """Containers and batch systems set PYTHONUNBUFFERED to show output at once."""
    command = [sys.executable, "-c", PRINTING.format("print('b', file=sys.stderr)")]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
    )
    assert (done.returncode, done.stdout.decode().strip()) == (0, expected)


def test_a_program_without_output_runs():
    """A shell's >&- closes it; sys.stdout is None then."""
    command = [sys.executable, "-c", PRINTING.format("print('b')")]
    closed = ["sh", "-c", '"$@" >&-', "sh", *command]
    assert subprocess.run(closed, cwd=ROOT, timeout=60).returncode == 0


def test_output_that_nobody_reads_on_ends_a_command_in_silence():
    """As `generate.py RUN ... --json | head -2`. A broken pipe elsewhere is an error."""
    lines = "import sys; from launch.program import run_command; sys.exit(run_command([], list, {}))"
    printing = lines.format("lambda _: [print('line') for _ in range(10**6)] and 0")
    command = f'{sys.executable} -c "{printing}" | head -n 2; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["line", "line", str(128 + signal.SIGPIPE)], "")
    elsewhere = lines.format("lambda _: (_ for _ in ()).throw(BrokenPipeError)")
    done = subprocess.run([sys.executable, "-c", elsewhere], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 1 and b"BrokenPipeError" in done.stderr
