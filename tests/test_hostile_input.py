"""Input that was made to do harm: exit status 2, one line, nothing written, no memory filled, no wait.

hostile.py has the cases and the process that runs them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from files.output_folder import clear_output
from tests.helpers import hostile
from tests.helpers.hostile_checkpoints import SOUND
from tests.helpers.programs import ROOT
from tests.helpers.resuming import run

MOST_GIB, MOST_SECONDS, ADDRESSES_GIB = 2, 20, 24
NAMES = list(hostile.cases())
assert set(NAMES) >= hostile.HEAVY


@pytest.fixture(scope="module")
def results(request, checkpoints, alpaca_file, one_rank, tmp_path_factory) -> dict[str, dict]:
    """{name of the case: its outcome}, of one process that runs all cases whose tests are selected."""
    root = tmp_path_factory.mktemp("hostile")
    selected = {item.name for item in request.session.items if item.path == request.path}
    names = [name for name in NAMES if f"{test_is_refused_in_one_line.__name__}[{name}]" in selected]
    (root / "names.json").write_text(json.dumps([*names, SOUND]))
    world = root / "world"
    shutil.copytree(checkpoints(), world / "model")
    shutil.copy(alpaca_file, world / "rows.jsonl")
    (world / "secret.jsonl").write_text(hostile.ROW)
    argv = ["--model_name", str(world / "model"), "--dataset", str(world / "rows.jsonl"), "--max_steps", "1"]
    one_rank(run, [*argv, "--save_every", "1", "--log_to", "stdout", "--output_dir", str(world / "run")])
    for path in (world / "run").glob("adapter*"):  # as if it had been stopped
        path.unlink()
    (world / "zero.txt").symlink_to("/dev/zero")
    folders = {name: world / name.lower() for name in ("HOME", "TMPDIR")}
    for folder in folders.values():
        folder.mkdir()
    # The tests measure memory in use; the limit only protects the machine from a failure.
    limited = f"ulimit -v {ADDRESSES_GIB * 2**20}; exec {sys.executable} -m tests.helpers.hostile {root}"
    environment = (
        os.environ | {name: str(folder) for name, folder in folders.items()} | {"PYTHONPATH": str(ROOT)}
    )
    done = subprocess.run(
        ["bash", "-c", limited], cwd=world, env=environment, capture_output=True, text=True, timeout=200
    )
    found = [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0, f"ended after {found[-1]['name'] if found else 'nothing'}: {done.stderr}"
    return {line.pop("name"): line for line in found}


def test_what_is_damaged_was_sound(results):
    """Otherwise each case could be refused for a fault that all share."""
    assert "the run was started" in results[SOUND]["raised"]


def test_there_are_a_hundred():
    assert len(NAMES) >= 100


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in hostile.HEAVY else n for n in NAMES]
)
def test_is_refused_in_one_line(name, results):
    found = results[name]
    assert not found["raised"], found["raised"]
    assert found["status"] == 2 and len(found["lines"]) == 1, found
    assert found["lines"][0].startswith("error: ") and len(found["lines"][0]) > len("error: ") + 10
    assert found["written"] == []
    assert found["seconds"] < MOST_SECONDS and found["peak_gib"] < MOST_GIB


def test_none_takes_much_memory(results):
    """The first case that raises the highest memory use of the process."""
    peaks = [(found["peak_gib"], name) for name, found in results.items()]
    assert max(peaks)[0] < MOST_GIB, next(x for x in peaks if x[0] >= MOST_GIB)


def test_a_link_in_an_old_run_is_not_followed(tmp_path):
    """--overwrite removes an earlier run's best/, not the target of a link in its place."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors", "adapter_config.json"):
        (other / name).write_text("somebody's")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "best").symlink_to(other)
    (tmp_path / "out" / "metrics.jsonl").symlink_to(other / "config.json")
    clear_output(tmp_path / "out")
    assert {p.name: p.read_text() for p in other.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors", "adapter_config.json"), "somebody's"
    )
    assert list((tmp_path / "out").iterdir()) == []
