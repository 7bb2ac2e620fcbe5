"""What the user can put right, as an exception, and how exceptions become one line."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Something the user can put right. Shown as one line, `error: ...`, with exit status 2."""


FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # EDQUOT: of what a user may fill


# Exit statuses of every command; of a run that a signal ended it is 128 + the signal's number.
DONE, FAILED, REFUSED = 0, 1, 2


def exit_status(e: BaseException) -> int:
    """The status that an error ends a process with: REFUSED for what the user can put right, else FAILED."""
    return REFUSED if needs_no_traceback(e) else FAILED


def needs_no_traceback(e: BaseException) -> bool:
    """Whether its line says all: of what the user can put right, as a disk that is full."""
    return isinstance(e, UserError) or (isinstance(e, OSError) and e.errno in FULL_DISK)


def describe(e: BaseException) -> str:
    """One line for an exception: a UserError's text; otherwise its type as well."""
    text = " ".join(str(e).split())
    return text if isinstance(e, UserError) else f"{type(e).__name__}: {text}" if text else type(e).__name__
