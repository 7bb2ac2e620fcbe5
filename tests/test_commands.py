"""export.py, evaluate.py and the others as they are typed: processes of their own, with what they show."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import ROOT


@pytest.mark.parametrize("program", ["train", "export", "generate", "evaluate", "report", "block_expansion"])
def test_help_shows_nothing_else(program):
    """No library's advice before it."""
    done = subprocess.run(
        [sys.executable, f"{program}.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "usage:" in done.stdout and done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "program", ["export.py --to merged --check false", "evaluate.py --metrics perplexity"]
)
def test_stopped_by_a_signal(program, number, runs, alpaca_file, tmp_path):
    """No traceback, and nothing is written; also where the libraries are still being loaded."""
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
