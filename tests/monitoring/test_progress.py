"""Which steps have a line, what it says, and the time left against a hand calculation."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import replace

import pytest

from monitoring.metrics import Metrics
from monitoring.progress import ProgressBar, ProgressLines, make_progress


class Clock:
    """A clock that a test sets, in seconds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(number: int, eval_loss: float | None = None) -> Metrics:
    return Metrics(
        step=number, epoch=0.5, loss=2 / number, lr=2e-4, grad_norm=1.0, tokens=1000, trained_tokens=10,
        step_seconds=1.0, tokens_per_second=12296.4, memory_allocated_gib=9.567, memory_reserved_gib=10.0,
        eval_loss=eval_loss,
    )  # fmt: skip


def show_run(capsys, seconds: list[float], total: int, log_every=None, evaluated=(), close=True) -> list[str]:
    """Return the lines of a run whose steps end at these seconds. evaluated: steps with an evaluation."""
    clock = Clock()
    lines = ProgressLines(total, log_every, clock)
    for i, end in enumerate(seconds, 1):
        clock.now = 1000 + end
        lines.show(step(i, eval_loss=1.5 if i in evaluated else None))
    if close:
        lines.close()
    return capsys.readouterr().out.splitlines()


def steps_of(lines: list[str]) -> list[int]:
    return [int(line.removeprefix("step ").partition("/")[0]) for line in lines]


def test_lines_are_at_least_five_seconds_apart(capsys):
    # Steps end at 1, 3, 5, ... s: five seconds after 1 s is first step 4 (7 s), then step 7 (13 s), ...
    lines = show_run(capsys, [2 * i + 1 for i in range(20)], total=30, close=False)
    assert steps_of(lines) == [1, 4, 7, 10, 13, 16, 19]
    # Each slow step has its line; steps that end together have one.
    assert steps_of(show_run(capsys, [6 * i for i in range(1, 6)], total=9)) == [1, 2, 3, 4, 5]
    assert steps_of(show_run(capsys, [0.5] * 8, total=9, close=False)) == [1]


def test_log_every_counts_steps(capsys):
    """However long they take. The last step has a line, also if the run ends before its planned end."""
    assert steps_of(show_run(capsys, [0.1 * i for i in range(1, 11)], total=10, log_every=4)) == [4, 8, 10]
    assert steps_of(show_run(capsys, [60 * i for i in range(1, 10)], total=50, log_every=4)) == [4, 8, 9]
    assert steps_of(show_run(capsys, [60 * i for i in range(1, 9)], total=50, log_every=4)) == [4, 8]
    assert steps_of(show_run(capsys, [0.1, 0.2, 0.3], total=3)) == [1, 3]


def test_the_auxiliary_loss_of_routers_has_its_place_in_a_line(capsys):
    lines = ProgressLines(9, log_every=1)
    lines.show(replace(step(1, eval_loss=1.5), router_aux_loss=2.03125))
    text = capsys.readouterr().out
    assert text.startswith("step 1/9: loss 2.0000, router_aux_loss 2.0312, eval_loss 1.5000, lr 2.00e-04, ")


def test_the_text_of_lines(capsys):
    """The first step takes 41 s, as it compiles; all others 2.5 s. After step 3, 97 x 2.5 s are left.

    The evaluation is told at its own step only.
    """
    seconds = [41.0, 43.5, 46.0, 48.5, 51.0]
    assert show_run(capsys, seconds, total=100, log_every=1, evaluated=[3]) == [
        "step 1/100: loss 2.0000, lr 2.00e-04, 12,296 tok/s, 9.57 GiB, 00:41 elapsed, time left unknown",
        "step 2/100: loss 1.0000, lr 2.00e-04, 12,296 tok/s, 9.57 GiB, 00:43 elapsed, 04:05 left",
        "step 3/100: loss 0.6667, eval_loss 1.5000, lr 2.00e-04, 12,296 tok/s, 9.57 GiB,"
        " 00:46 elapsed, 04:02 left",
        "step 4/100: loss 0.5000, lr 2.00e-04, 12,296 tok/s, 9.57 GiB, 00:48 elapsed, 04:00 left",
        "step 5/100: loss 0.4000, lr 2.00e-04, 12,296 tok/s, 9.57 GiB, 00:51 elapsed, 03:57 left",
    ]
    # Evaluated steps have a line in any case; the last step has no time left.
    lines = show_run(capsys, [4000, 4001, 4002, 4003], total=4, evaluated=[3])
    assert steps_of(lines) == [1, 3, 4] and lines[-1].endswith(", 1:06:43 elapsed, 00:00 left")


def test_the_bar_marks_an_evaluation_with_its_step(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = ProgressBar(9, 2)
    shown = []
    for metrics in (step(3), step(4, eval_loss=1.5), step(5)):
        bar.show(metrics)
        shown.append(bar.bar.postfix)
    bar.close()
    assert [text.partition(", lr")[0] for text in shown] == [
        "loss 0.6667",
        "loss 0.5000, eval_loss 1.5000 at step 4",
        "loss 0.4000, eval_loss 1.5000 at step 4",
    ]
    assert bar.bar.n == 5


@pytest.mark.parametrize("stdout, stderr", [(True, True), (True, False), (False, True), (False, False)])
def test_only_a_terminal_has_a_bar(stdout, stderr, monkeypatch):
    """The bar is on standard error, which may be the only stream that goes to a file. It needs a width."""
    width = 80
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((width, 24)))
    for name, is_terminal in (("stdout", stdout), ("stderr", stderr)):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda value=is_terminal: value, raising=False)
        monkeypatch.setattr(stream, "fileno", lambda: 2, raising=False)
        monkeypatch.setattr(sys, name, stream)
    for log_to in ("tqdm", "wandb"):
        progress = make_progress(log_to, None, 9, 0)
        assert isinstance(progress, ProgressBar) == (stdout and stderr)
        progress.close()
    assert isinstance(make_progress("stdout", None, 9, 0), ProgressLines)
    width = 0
    assert isinstance(make_progress("tqdm", None, 9, 0), ProgressLines)
