"""Shows how far training is: a bar in a terminal; plain lines if the output is piped or logged.

metrics.jsonl has every step; lines may leave steps out. Times are in seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from monitoring.metrics import Metrics

LINE_SECONDS = 5.0  # between two lines without --log_every


class ProgressBar:
    """A bar on standard error, for a terminal: it rewrites its own line."""

    def __init__(self, total_steps: int, steps_done: int):
        """steps_done: steps before the run was resumed."""
        self.evaluation = ""
        self.bar = tqdm(total=total_steps, initial=steps_done, unit="step", dynamic_ncols=True)

    def show(self, metrics: Metrics) -> None:
        """Show a step. The last evaluation stays, marked with its step."""
        if metrics.eval_loss is not None:
            self.evaluation = f", eval_loss {metrics.eval_loss:.4f} at step {metrics.step}"
        details = f"{_describe_loss(metrics)}{self.evaluation}, {_describe_speed(metrics)}"
        self.bar.set_postfix_str(details, refresh=False)
        self.bar.update()

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


class ProgressLines:
    """Lines on standard output, without control characters, with the time that passed and the time left.

    A step has a line if --log_every divides its number, or, without --log_every, if the last line is five
    seconds old. The last step and every evaluated one have a line in any case.

    Args:
        total_steps: optimizer steps of the run.
        log_every: steps between lines; None = time decides.
        clock: returns the time in seconds.
    """

    def __init__(self, total_steps: int, log_every: int | None, clock: Callable[[], float] = time.monotonic):
        self.total_steps, self.log_every, self.clock = total_steps, log_every, clock
        self.start_time, self.last_line_time = clock(), -LINE_SECONDS
        self.first: tuple[int, float] | None = None  # (step, time) of the first step shown
        self.pending = ""  # the line of the last step, if it was not printed

    def show(self, metrics: Metrics) -> None:
        """Print the step's line if it is due."""
        now = self.clock() - self.start_time
        self.first = self.first or (metrics.step, now)
        self.pending = self._format_line(metrics, now)
        if self._is_due(metrics, now):
            self.last_line_time = now
            self._print_pending()

    def print_line(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def close(self) -> None:
        """Print the line of the last step, unless it is printed: the run may end before its planned end."""
        self._print_pending()

    def _print_pending(self) -> None:
        if self.pending:
            self.print_line(self.pending)
        self.pending = ""

    def _is_due(self, metrics: Metrics, now: float) -> bool:
        if metrics.step == self.total_steps or metrics.eval_loss is not None:
            return True
        if self.log_every is not None:
            return metrics.step % self.log_every == 0
        return now - self.last_line_time >= LINE_SECONDS

    def _format_line(self, metrics: Metrics, now: float) -> str:
        evaluation = "" if metrics.eval_loss is None else f", eval_loss {metrics.eval_loss:.4f}"
        left = self._seconds_left(metrics.step, now)
        times = f"{tqdm.format_interval(now)} elapsed, " + (
            "time left unknown" if left is None else f"{tqdm.format_interval(left)} left"
        )
        return (
            f"step {metrics.step}/{self.total_steps}: {_describe_loss(metrics)}{evaluation},"
            f" {_describe_speed(metrics)}, {times}"
        )

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Return the time of the steps to come, at the mean time of those after the first one shown.

        The first one compiles layers and fills caches, so it does not count. After it, None is returned.
        Evaluations, samples and checkpoints between the steps count.
        """
        assert self.first is not None
        first_step, first_time = self.first
        if step == self.total_steps:
            return 0.0
        if step == first_step:
            return None
        return (self.total_steps - step) * (now - first_time) / (step - first_step)


Progress = ProgressBar | ProgressLines


def make_progress(log_to: str, log_every: int | None, total_steps: int, steps_done: int) -> Progress:
    """Return a bar if a terminal shows all output, and --log_to does not ask for lines; else lines.

    Args:
        log_to, log_every: the options.
        total_steps: optimizer steps of the run.
        steps_done: steps before the run was resumed.
    """
    if log_to == "stdout" or not _can_show_bar():
        return ProgressLines(total_steps, log_every)
    return ProgressBar(total_steps, steps_done)


def _can_show_bar() -> bool:
    """Return whether both output streams are of a terminal with a width, which some containers do not give.

    The bar is on standard error. A file or a pipe of either stream would be full of its rewritten lines.
    """
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return False


def _describe_loss(metrics: Metrics) -> str:
    auxiliary = metrics.router_aux_loss
    return f"loss {metrics.loss:.4f}" + ("" if auxiliary is None else f", router_aux_loss {auxiliary:.4f}")


def _describe_speed(metrics: Metrics) -> str:
    return (
        f"lr {metrics.lr:.2e}, {metrics.tokens_per_second:,.0f} tok/s, {metrics.memory_allocated_gib:.2f} GiB"
    )
