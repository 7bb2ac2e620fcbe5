"""notebooks/run_folders.py: an earlier run is copied whole or not at all; losses and reports are shown."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path

import IPython.display
import pytest
import run_folders
import run_options
import session
from run_folders import CHECKPOINTS, MANIFEST, attach_run, compare_losses, find_run
from session import SessionError

from checkpoints import storage
from data.sources import find_recipe
from files import names
from options import config
from tests.helpers.data_files import read


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def earlier(tmp_path):
    """Make an attached, write-protected output of an earlier version: a RUN, an adapter, and a log."""
    folder = tmp_path / "input" / "my-notebook"
    for name in ("config.yaml", "run.json", "metrics.jsonl", "best/config.yaml"):
        write(folder / "run" / name, name)
    for step in (2, 4, 6):
        for name in (MANIFEST, "rank-00000.safetensors"):
            write(folder / "run" / CHECKPOINTS / f"step-{step:08}" / name, f"{name} {step}")
    write(
        folder / "run" / CHECKPOINTS / "step-00000008.tmp" / "rank-00000.safetensors"
    )  # an interrupted save
    write(folder / "run" / CHECKPOINTS / "step-00000007" / "rank-00000.safetensors")  # and a removal
    write(folder / "run-adapter" / "README.md")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700)


def test_names_are_those_of_the_program():
    assert (CHECKPOINTS, MANIFEST) == (config.CHECKPOINTS, storage.MANIFEST)
    assert (run_folders.METRICS, run_folders.RESULTS) == (
        names.METRICS,
        (names.ADAPTER, names.BLOCKS, names.CONFIG),
    )


@pytest.mark.parametrize("below", ["", "run"])
def test_a_read_only_run_becomes_a_writable_copy(earlier, tmp_path, below, capsys):
    before, output = files_of(earlier), tmp_path / "working" / "run"
    attach_run(str(earlier / below), str(output), keep=2)
    left_out = [f"{CHECKPOINTS}/step-0000000{name}" for name in ("2", "7", "8.tmp")]
    expected = {
        name: content
        for name, content in files_of(earlier / "run").items()
        if not name.startswith(tuple(left_out))
    }
    assert files_of(output) == expected and len(expected) == 8 and files_of(earlier) == before
    assert all(path.stat().st_mode & 0o200 for path in (output, *output.rglob("*")))
    assert [path.name for path in output.parent.iterdir()] == ["run"]
    out = capsys.readouterr().out
    assert out.count("its save was interrupted; the checkpoint before it is used") == 2
    assert out.endswith(f"is copied to {output}; checkpoints: 2\n")


@pytest.mark.parametrize(("keep", "steps"), [(-1, [2, 4, 6]), (1, [6]), (2, [4, 6]), (9, [2, 4, 6])])
def test_the_newest_checkpoints_are_copied_and_of_keep_minus_one_all(earlier, tmp_path, keep, steps):
    attach_run(str(earlier), str(tmp_path / "run"), keep)
    copied = sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir())
    assert copied == [f"step-{step:08}" for step in steps]


@pytest.mark.parametrize(("keep", "message"), [
    (0, r"KEEP = 0: no checkpoint of .*/run would be copied"),
    (-2, "KEEP = -2: has to be a whole number, at least -1"),
    ("two", "KEEP = 'two': has to be a whole number"),
])  # fmt: skip
def test_a_copy_without_the_checkpoints_is_refused(earlier, tmp_path, keep, message):
    with pytest.raises(SessionError, match=message):
        attach_run(str(earlier), str(tmp_path / "run"), keep)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_stays_as_it_is(earlier, tmp_path, capsys):
    output = tmp_path / "run"
    attach_run("", str(output), keep=2)
    assert not output.exists()
    for name in ("config.yaml", "run.json"):
        write(output / name, "newer")
    attach_run(str(earlier), str(output), keep=2)
    assert files_of(output) == {"config.yaml": b"newer", "run.json": b"newer"}
    assert f"{output} holds a run already" in capsys.readouterr().out


def test_a_copy_that_fails_leaves_nothing_and_can_be_made_again(earlier, tmp_path, monkeypatch):
    output, copied, copyfile = tmp_path / "working" / "run", [], shutil.copyfile

    def fill_the_disk(source, target):
        if len(copied) == 3:
            raise error
        copied.append(copyfile(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fill_the_disk)
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with pytest.raises(SessionError, match=rf"No space left on device\); {output} is unchanged"):
            attach_run(str(earlier), str(output), keep=2)
        assert list(output.parent.iterdir()) == []
        error = KeyboardInterrupt()
        copied.clear()
        with pytest.raises(KeyboardInterrupt):
            attach_run(str(earlier), str(output), keep=2)
        assert not output.exists()
    attach_run(str(earlier), str(output), keep=2)
    assert len(files_of(output)) == 8 and [path.name for path in output.parent.iterdir()] == ["run"]


def test_too_little_room_is_told_before_anything_is_copied(earlier, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(SessionError, match=r"0\.0 GB free"):
        attach_run(str(earlier), str(tmp_path / "run"), keep=2)
    assert not (tmp_path / "run").exists()


def test_what_is_no_earlier_run_is_told(earlier, tmp_path):
    with pytest.raises(SessionError, match=r"PREVIOUS = .*other: no such folder; .*input has: my-notebook"):
        find_run(str(earlier.parent / "other"))
    with pytest.raises(SessionError, match=r"should hold one run of train.py, and holds none"):
        find_run(str(earlier / "run-adapter"))
    for name in ("config.yaml", "run.json", f"{CHECKPOINTS}/x"):
        write(tmp_path / "input" / "second" / name)
    with pytest.raises(SessionError, match=r"holds .*/my-notebook/run, .*/second"):
        find_run(str(tmp_path / "input"))
    write(tmp_path / "full" / "notes.txt")
    with pytest.raises(SessionError, match="full: holds other files; choose another OUTPUT"):
        attach_run(str(earlier), str(tmp_path / "full"), keep=2)


@pytest.fixture
def shown(monkeypatch) -> list:
    """Return the list of things that cells display."""
    items: list = []
    monkeypatch.setattr(IPython.display, "display", lambda *each: items.extend(each))
    return items


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (2.0 * (1 + 9e-5), None),
        (2.0 * (1 + 2e-4), "the losses differ by 2.0e-04, more than 1e-04"),
        (math.nan, "the losses differ by nan, more than 1e-04"),
    ],
)
def test_losses_are_compared(second, message, tmp_path, shown, capsys):
    for name, loss in (("one", 2.0), ("two", second)):
        lines = [json.dumps({"step": step, "loss": value}) + "\n" for step, value in ((1, 3.0), (2, loss))]
        write(tmp_path / name / "metrics.jsonl", "".join(lines))
    runs = {"1 GPU": str(tmp_path / "one"), "2 GPUs": str(tmp_path / "two")}
    if message:
        with pytest.raises(SessionError, match=message):
            compare_losses(runs, 1e-4)
    else:
        compare_losses(runs, 1e-4)
        assert "   2     2.000000     2.000180  9.0e-05\n" in capsys.readouterr().out
    assert [item.format for item in shown] == ["png"]  # also of losses that differ


def test_the_report_cannot_reach_the_notebook(tmp_path, shown):
    write(tmp_path / "report.html", '<script>alert("x")</script>')
    run_folders.show_run(str(tmp_path))
    (frame,) = shown
    assert (
        'srcdoc="&lt;script&gt;alert(&quot;x&quot;)' in frame.data and 'sandbox="allow-scripts"' in frame.data
    )


@pytest.mark.parametrize(
    ("name", "to"), [(names.ADAPTER, "adapter"), (names.BLOCKS, "merged"), (names.CONFIG, "merged")]
)
def test_a_result_is_that_of_the_last_step(name, to, tmp_path, capsys):
    metrics, result = tmp_path / names.METRICS, tmp_path / name
    assert not run_folders.has_result(str(tmp_path))
    write(metrics)
    write(tmp_path / "model-00001-of-00002.safetensors")  # config.json gets its name after the weights
    assert not run_folders.has_result(str(tmp_path))
    assert capsys.readouterr().out.count("The run has not ended yet") == 2
    write(result)
    assert run_folders.has_result(str(tmp_path)) and run_folders.export_format(str(tmp_path)) == to
    os.utime(result, (0, 0))  # the run was continued after it
    assert not run_folders.has_result(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["full", "bnb_llama_pro", "bnb_dora"])
def test_the_result_of_each_kind_of_run_is_found_and_exported(train_type, checkpoints, tmp_path):
    run, kind = str(tmp_path / "run"), "llama_bias_pro" if train_type == "bnb_llama_pro" else "llama_bias"
    options = run_options.method_options(train_type, 8, str(tmp_path / "quantized"))
    options += ["--model_name", checkpoints(kind), "--dataset", "toy", "--max_steps", 1, "--world_size", 1]
    session.run(["train.py", *options, "--context_length", 256, "--log_to", "stdout", "--output_dir", run])
    assert run_folders.has_result(run)
    to, out = run_folders.export_format(run), tmp_path / "exported"
    session.run(["export.py", run, "--to", to, "--out", out])
    assert (out / ("adapter_config.json" if train_type == "bnb_dora" else "config.json")).is_file()


def test_own_rows_are_a_data_set(tmp_path):
    rows = [{"instruction": "Was ist größer?", "input": "", "output": "Zwei\nDrei"}]
    path = run_folders.write_rows(rows, str(tmp_path / "scratch" / "own.jsonl"))
    assert find_recipe(path) and [dict(row) for row in read(path)] == rows
