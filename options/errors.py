"""What the user can put right, as an exception, and how exceptions and names from files become one line."""

from __future__ import annotations

import errno
from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right. Shown as one line, `error: ...`, with exit status 2."""


MOST_NAMES, LONGEST_NAME = 20, 60  # of names, and of the characters of one, in a line
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
    """Return one line for an exception: a UserError's text; otherwise its type as well.

    What a terminal would obey instead of printing is escaped: messages hold names out of others' files.
    """
    text = " ".join(str(e).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if isinstance(e, UserError) else f"{type(e).__name__}: {text}" if text else type(e).__name__


def listed(names: Sequence[str]) -> str:
    """Return names out of files as a list for a line: escaped, at most MOST_NAMES, each cut to
    LONGEST_NAME."""
    shown = [_shown(name) for name in names[:MOST_NAMES]]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(shown) + more


def _shown(name: str) -> str:
    name = name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "..."
    return name if name.isprintable() and name else ascii(name)
