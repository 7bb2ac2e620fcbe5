"""How a launch failed: the first failure of its ranks, and the line about it."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from options.errors import FAILED, REFUSED


@dataclass(frozen=True)
class Failure:
    """How a launch failed.

    Attributes:
        status: the exit status: 2 for an error that the user can fix, 1 for any other, 128 + a signal that
            ended the run.
        message: the line for stderr; "" if the rank has printed it itself.
        traceback: of the rank that failed first, or "".
        is_killed: whether a rank was killed from outside, for which a full host memory is the usual cause.
    """

    status: int
    message: str
    traceback: str = ""
    is_killed: bool = False

    def print(self, verbose: bool = False) -> int:
        """Print the line, and the traceback of an error that the user cannot fix; return the status.

        verbose: print the traceback of every error.
        """
        if self.status == FAILED or verbose:
            print(self.traceback, file=sys.stderr, end="")
        if self.message:
            print(self.message, file=sys.stderr)
        return self.status


def first_failure(failed: dict[int, int], first_rank: int, reports: Path) -> Failure:
    """Return one failure: a rank ended by a signal, else the earliest report.

    Later reports are of lost connections to the rank that failed first.

    Args:
        failed: {index among the ranks started here: exit code}.
        first_rank: the number of the first of them.
        reports: folder of the ranks' reports, <rank>.json.
    """
    for index, exitcode in failed.items():
        if exitcode < 0 and exitcode != -signal.SIGTERM:
            name = signal.Signals(-exitcode).name
            hint = "; out of host memory is the usual cause" if name == "SIGKILL" else ""
            message = f"error: rank {first_rank + index} was ended by {name}{hint}"
            return Failure(FAILED, message, is_killed=name == "SIGKILL")
    failures = [json.loads(p.read_text()) for p in reports.glob("*.json")]
    if not failures:
        if REFUSED in failed.values():  # that rank could not write its report, and printed the error itself
            return Failure(REFUSED, "")
        return Failure(FAILED, "error: a process was ended from outside")
    first = min(failures, key=lambda f: f["time"])
    return Failure(first["status"], f"error: rank {first['rank']}: {first['message']}", first["traceback"])
