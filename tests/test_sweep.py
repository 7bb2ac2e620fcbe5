"""sweep.py: sweeps that are killed, stopped, shared and resumed; their table and page."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

import sweep
from monitoring.sweep_page import SweepPage, TrialRow, render_sweep
from options import train
from options.sweep import parse
from tests.helpers.browser import open_browser
from tests.helpers.fake_training import COMMAND, evaluation_loss, run_sweep
from tests.helpers.programs import ROOT
from tests.helpers.report_pages import CHROMIUM, HOSTILE, Page, screenshot
from training.sweep_results import collect_results
from training.sweep_study import Study
from training.sweep_worker import Worker

BASE = "--eval_share 0.1 --eval_every 2 --num_epochs 1 --save_model false".split()
RATES = ["1e-5", "1e-4", "5e-4", "1e-3", "2e-3", "1e-2", "0.1", "1"]
GRID = f"lr: [{', '.join(RATES)}]"


@pytest.fixture
def arguments(tmp_path):
    """Writes a space, and returns the command line of its sweep in tmp_path/out."""

    def make(space: str, *argv, base=BASE) -> list[str]:
        (tmp_path / "space.yaml").write_text(space)
        return [*base, "--space", str(tmp_path / "space.yaml"), "--output_dir", str(tmp_path / "out"), *argv]

    return make


@pytest.fixture
def start():
    """Starts sweep.py with the stand-in for train.py in a process of its own."""
    started = []

    def start(argv, seconds: float) -> subprocess.Popen:
        variables = os.environ | {"FAKE_SECONDS": str(seconds)}
        process = subprocess.Popen([*COMMAND, "sweep", *argv], cwd=ROOT, env=variables, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs sweep.py with the stand-in in this process; returns (exit status, what it printed)."""
    monkeypatch.chdir(ROOT)

    def run(argv, seconds: float = 0.0) -> tuple[int, str]:
        monkeypatch.setenv("FAKE_SECONDS", str(seconds))
        status = run_sweep(argv)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def journal_states(folder: Path) -> Counter:
    """Count the trials' ends in the journal, by Optuna's numbers: 1 complete, 2 pruned, 3 failed."""
    lines = map(json.loads, (folder / "journal.log").read_text().splitlines())
    return Counter(line["state"] for line in lines if line["op_code"] == 6)


def table(printed: str) -> list[list[str]]:
    """Return the rows of the table that a sweep ends with: trial, loss, state, value."""
    rows = printed.partition("trial  ")[2].splitlines()[1:]
    return [row.split()[:4] for row in rows if re.match(r" *\d+  ", row)]


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended_trials(folder: Path) -> int:
    """Return the number of trials with an end in the journal; 0 without one."""
    with contextlib.suppress(FileNotFoundError):
        return journal_states(folder).total()
    return 0


def starts(folder: Path) -> list[str]:
    return [line for log in sorted(folder.glob("logs/*.log")) for line in log.read_text().splitlines()
            if line.startswith("start ")]  # fmt: skip


def test_a_killed_sweep_goes_on(arguments, start, run, tmp_path):
    """Killed in the middle of a trial: it is run again, the others are not, and each counts once."""
    rates = RATES[2:6]
    space = f"lr: [{', '.join(rates)}]"
    out, argv = tmp_path / "out", arguments(space, "--sampler", "grid", "--prune", "false")
    first = start(argv, 0.2)
    wait_for(lambda: ended_trials(out) >= 1 and (out / "trial-0001" / "metrics.jsonl").exists())
    first.kill()
    process = Path("/proc", starts(out)[-1].split()[-1])
    done = ended_trials(out)
    wait_for(lambda: not process.exists(), 10)  # the run has got SIGTERM, and wrote a checkpoint
    assert (out / f"trial-{done:04}" / "checkpoints").is_dir()
    status, printed = run(argv)
    assert f"trial {done} again: lr={float(rates[done])}" in printed and printed.count(" again: ") == 1
    rows = table(printed)
    assert status == 0 and sorted(int(row[0]) for row in rows) == list(range(4))
    assert {row[1] for row in rows} == {f"{evaluation_loss(float(rate), 6):.4f}" for rate in rates}
    assert {row[2] for row in rows} == {"complete"} and rows[0][3] == "0.001"
    assert journal_states(out) == {1: 4}
    assert len(starts(out)) == 5 and [line for line in starts(out) if not line.startswith("start at 0")]
    status, again = run(argv)
    assert table(again) == rows and len(starts(out)) == 5, "nothing is left to run"


# tests/training/test_sweep_study.py lets two workers share a grid in `make test`.
@pytest.mark.slow
def test_two_workers_at_once_and_a_stop(arguments, start, run, tmp_path):
    """Two processes with two runs each share 8 trials. One is stopped, and the other finishes its trials."""
    out = tmp_path / "out"
    argv = arguments(GRID, "--sampler", "grid", "--prune", "false", "--workers", "2")
    first = start(argv, 0.3)
    wait_for(lambda: len(starts(out)) >= 2)
    stopping = threading.Timer(1.0, first.send_signal, (signal.SIGINT,))
    stopping.start()
    status, printed = run(argv, 0.05)
    stopped, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and "the same command goes on" in stopped
    assert status == 0 and sorted(int(row[0]) for row in table(printed)) == list(range(8)), printed
    assert journal_states(out) == {1: 8} and not list(out.glob("workers/*"))
    resumed = [line for line in starts(out) if not line.startswith("start at 0")]
    assert len(starts(out)) == 8 + len(resumed) and 1 <= len(resumed) <= 2


def test_a_stopped_trial_is_paused(arguments, start, tmp_path):
    """It is not running, since no worker has it."""
    out = tmp_path / "out"
    process = start(arguments(GRID, "--sampler", "grid"), 0.3)
    wait_for(lambda: len(starts(out)) >= 1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and [row[:2] for row in table(printed)] == [["0", "paused"]]
    assert printed.count("stopping: each run finishes its step and writes a checkpoint; Ctrl-C again") == 1
    assert "0 running, 1 paused" in Page((out / "sweep.html").read_text()).text
    assert "stopped after 0 of 8 trials" in printed


@pytest.mark.slow
def test_a_worker_that_waits_says_for_what(arguments, start, tmp_path):
    """One on another machine that was killed is known to be dead after two minutes only."""
    argv = arguments("lr: [1e-3, 1e-4]", "--sampler", "grid")
    request = parse(argv)
    with Worker(request.folder / "workers") as other:
        study = Study(request, other)
        trial = study.claim()
        process = start(argv, 0.0)
        lines = iter(process.stdout.readline, "")
        assert "waiting for other workers, which have trial 0\n" in lines
        study.complete(trial.number, (0.5,))
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "waiting" not in printed and table(printed)[0][:2] == ["0", "0.5000"]


@pytest.mark.slow
def test_pruned_and_failed_trials(arguments, run, tmp_path):
    """The first five end; worse ones are stopped while they run. A failed one tells why."""
    out, space = tmp_path / "out", "lr: [1e-3, 2e-3, 5e-4, 1e-2, 1e-4, 1, 10]"
    status, printed = run(arguments(space, "--sampler", "grid"), 0.1)
    assert status == 0 and journal_states(out) == {1: 5, 2: 2}
    assert "trial 6: stopped: above the median, at " in printed
    assert "stopped\n" in (out / "logs" / "trial-0006.log").read_text() and not list(
        out.glob("*/checkpoints")
    )
    assert [row[2] for row in table(printed)] == ["complete"] * 5 + ["pruned"] * 2
    argv = arguments("lora_rank: [8, 13]", "--sampler", "grid", "--output_dir", str(tmp_path / "other"))
    status, printed = run(argv)
    assert "trial 1: failed: --lora_rank 13: is unlucky" in printed and status == 0
    argv = arguments("lora_rank: [13]", "--sampler", "grid", "--output_dir", str(tmp_path / "third"))
    assert run(argv)[0] == 1, "no trial is complete"
    argv = arguments("lora_rank: [13]\nlora_alpha: [1, 2, 3, 4, 5]", "--output_dir", str(tmp_path / "fourth"))
    status, printed = run(argv)
    assert status == 2 and printed.count(": failed: ") == 3
    assert (
        "error: the first 3 trials failed, the last one: --lora_rank 13: is unlucky; begin again" in printed
    )


def test_a_combination_that_train_py_refuses_fails_its_trial(arguments, run):
    """A space of more corners than are checked beforehand; the other trials run."""
    space = "activation_budget: [0, 1, 2, 3]\nuse_gradient_checkpointing: [true, false]\n"
    space += f"lora_rank: [{', '.join(map(str, range(20, 60)))}]"
    status, printed = run(arguments(space, "--sampler", "random", "--trials", "8"))
    failed = printed.count(": failed: --activation_budget: has no effect without")
    assert status == 0 and len(table(printed)) == 8 and 1 <= failed < 8, printed
    assert printed.count(": evaluation loss ") == 8 - failed


def test_folds(arguments, run, tmp_path):
    """A trial's loss is the mean of its folds', each a run of its own."""
    base = "--eval_every 2 --num_epochs 1 --save_model false --folds 3".split()
    _, printed = run(arguments("lr: [1e-3, 1e-2]", "--sampler", "grid", base=base))
    first = evaluation_loss(1e-3, 6)  # the stand-in adds the fold's number
    assert (
        f"trial 0: evaluation loss {first + 2:.4f}, the mean of {first + 1:.4f}, {first + 2:.4f}" in printed
    )
    assert sorted(path.parent.name for path in tmp_path.glob("out/trial-0001/*/metrics.jsonl")) == [
        "fold-1", "fold-2", "fold-3"
    ]  # fmt: skip
    command = shlex.split(printed.splitlines()[-1].partition("next, on all rows: ")[2])
    config, _ = train.parse(command[2:])
    assert config.lr == 1e-3 and config.save_model and not config.evaluates


def test_bad_input_writes_nothing(arguments, run, tmp_path, capsys):
    """Also what only train.py's own checks find, by running it once without output."""
    out, none = tmp_path / "out", tmp_path / "none.jsonl"
    status, printed = run(arguments("nope: [1]"))
    assert (status, printed) == (
        2,
        f"error: --space {tmp_path}/space.yaml: unknown option --nope; see --help\n",
    )
    assert sweep.main(arguments(GRID, "--dataset", str(none))) == 2
    assert capsys.readouterr().err == f"error: --dataset {none}: no such file\n"
    assert not out.exists()
    out.mkdir()
    (out / "metrics.jsonl").write_text("")
    status, printed = run(arguments(GRID))
    assert status == 2 and "out: holds a run of train.py; choose another folder" in printed


def test_a_machine_without_the_data_runs_no_trial(arguments, run, tmp_path, monkeypatch):
    """It would fail all trials that are left of a sweep that others have begun."""
    grid = arguments(GRID, "--sampler", "random", "--trials", "2")
    assert run(grid)[0] == 0
    monkeypatch.setenv("FAKE_MISSING", "rows.jsonl")
    assert run([*grid, "--trials", "4"]) == (2, "error: --dataset rows.jsonl: no such file\n")
    assert len(starts(tmp_path / "out")) == 2
    assert run(grid)[0] == 0, "nothing is left to run, so nothing is needed for it"


def page_of(tmp_path, trials: int = 12, failed: str = "") -> Path:
    """Write the sweep.html of trials that never ran."""
    space = {"lr": {"min": 1e-5, "max": 0.1, "log": True}, "lora_rank": [8, 16]}
    space["lora_target_modules"] = ["all", HOSTILE]
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    request = parse([*BASE, "--space", str(tmp_path / "space.yaml"), "--output_dir", str(tmp_path / "out"),
                     "--trials", str(trials)])  # fmt: skip
    with Worker(request.folder / "workers") as worker:
        study = Study(request, worker)
        for number in range(trials):
            trial = study.claim()
            loss = 1 + (math.log10(float(trial.combination["lr"])) + 3) ** 2
            if number == 3:
                study.report(number, 0, 500, loss)
                study.prune(number, "above the median at 50% of the run")
            elif number == 4:
                study.fail(number, failed)
            else:
                study.complete(number, (loss,))
        page = tmp_path / "sweep.html"
        page.write_text(render_sweep(collect_results(request, study)), encoding="utf-8")
    return page


def test_the_page_shows_the_trials_the_best_first(tmp_path):
    text = page_of(tmp_path, failed=HOSTILE).read_text(encoding="utf-8")
    page = Page(text)
    tags = Counter(tag for tag, _ in page.tags)
    dots = [a for tag, a in page.tags if tag == "circle"]
    assert len(dots) == 4 * 11, "the trials with a loss: over time, and over each of three options"
    assert "Trials 12 of 12 1 pruned, 1 failed, 0 running" in page.text
    losses = [float(text) for text in re.findall(r"\b\d+\.\d{4}\b", page.text.partition("All trials")[2])]
    assert losses[:10] == sorted(losses[:10])
    shares = [float(share) for share in re.findall(r"([\d.]+)%", page.text.partition("What mattered")[2])[:3]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and "lr" in page.text.partition("What mattered")[2]
    by_place = sorted((float(dot["cx"].rstrip("%")), float(dot["cy"])) for dot in dots[11:22])  # over lr
    lowest = max(by_place, key=lambda place: place[1])  # the lower, the more pixels from the top
    assert 25 < lowest[0] < 75, "1e-3 is in the middle of the logarithmic axis"
    assert page.text.count(HOSTILE) > 3 and not {"img", "u"} & tags.keys() and tags["script"] == 1
    assert not [a for _, a in page.tags for name in a if name.startswith("on") or name in ("style", "src")]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_the_page_light_and_dark(tmp_path):
    from matplotlib.image import imread

    page = page_of(tmp_path)
    screenshots = [screenshot(page, tmp_path, scheme) for scheme in (1, 0)]
    light, dark = (imread(picture)[..., :3] for picture, _ in screenshots)
    assert all(document.count("<circle") == 44 for _, document in screenshots)
    assert light.mean() > 0.85 and dark.mean() < 0.2
    for picture, dot in ((light, (0x25, 0x63, 0xC4)), (dark, (0x6E, 0xA8, 0xFF))):
        levels = (picture * 255).round().astype(int)
        places = (abs(levels - list(dot)).max(axis=-1) <= 3).nonzero()
        assert places[1].max() - places[1].min() > 700 and len(places[0]) > 500  # from side to side


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_narrow_page_breaks_no_word_of_the_table(tmp_path):
    """The table is scrolled, and neither a header nor a number in it is broken. Long values may be."""
    page = page_of(tmp_path, failed="a reason " * 20)
    with open_browser(tmp_path / "profile") as browser:
        browser.open(page, "light", width=400)
        # The pixels between the first and the last line of each cell.
        heights = browser.run(
            "[...document.querySelectorAll('.trials th, .trials td:nth-child(-n + 4)')]"
            ".filter(e => e.textContent).map(e => {"
            " const text = document.createRange(); text.selectNodeContents(e);"
            " const ends = [...text.getClientRects()].map(r => r.bottom);"
            " return Math.max(...ends) - Math.min(...ends); })"
        )
        # 7 headers; trial, loss, state and lr of 12 trials. Two have a reason below the state, one no loss.
        assert len(heights) == 7 + 4 * 12 - 1 and sum(height < 8 for height in heights) == len(heights) - 2
        assert browser.run("document.documentElement.scrollWidth") <= 400, "only the card scrolls"


def test_an_empty_page(tmp_path):
    """The page of a sweep whose first trial still runs."""
    (tmp_path / "space.yaml").write_text(GRID)
    request = parse([*BASE, "--space", str(tmp_path / "space.yaml")])
    row = TrialRow(0, "running", None, {"lr": "1e-05"}, (), None, "", "")
    page = SweepPage(Path("out"), request.space, [row], 20, request.sweep, {})
    assert "Too few complete trials" in Page(render_sweep(page)).text


@pytest.mark.slow
def test_a_sweep_of_the_toy_is_killed_and_goes_on(tmp_path):
    """Real runs, by two workers: 8 trials, one worker killed in the middle, packed weights shared."""
    (tmp_path / "space.yaml").write_text("lr: {min: 1e-4, max: 1e-2, log: true}\nlora_rank: [4, 8]\n")
    base = "train_type: qlora\neval_share: 0.1\neval_every: 5\nbatch_size: 16\nmax_steps: 15\nworld_size: 1\n"
    (tmp_path / "base.yaml").write_text(base)
    out = tmp_path / "out"
    command = [sys.executable, "sweep.py", "--config", str(tmp_path / "base.yaml"), "--space",
               str(tmp_path / "space.yaml"), "--trials", "8", "--output_dir", str(out)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start():
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    first = start()
    wait_for(lambda: ended_trials(out) >= 2 and (out / "trial-0002" / "run.json").exists(), 600)
    first.kill()
    two = [start(), start()]
    printed = [process.communicate(timeout=900)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0]
    assert sorted(int(row[0]) for row in table(printed[0])) == list(range(8))
    assert sum(" again: " in text for text in printed) == 1, "one worker has taken trial 2 over"
    assert journal_states(out).total() == 8 and len(list((out / "quantized").iterdir())) == 1
    best = table(printed[0])[0]
    evaluation = json.loads((out / f"trial-{int(best[0]):04}" / "best" / "evaluation.json").read_text())
    assert f"{evaluation['eval_loss']:.4f}" == best[1]
    shutil.rmtree(out)
