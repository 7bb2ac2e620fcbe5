"""Errors that the user can fix, exit statuses, and exceptions and untrusted names as one line of text."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix. It is printed as one line, `error: ...`, with exit status 2."""


@contextmanager
def reword_errors(change: Callable[[str], str]) -> Iterator[None]:
    """Within the context, replace the text of a UserError by change(text)."""
    try:
        yield
    except UserError as e:
        raise UserError(change(str(e))) from None


MAX_NAMES, MAX_NAME_LENGTH = 20, 60  # names in a line, and characters of one name
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # EDQUOT: the user's quota is used up


# Exit statuses of every command. A run that a signal ended has 128 + the signal's number.
DONE, FAILED, REFUSED = 0, 1, 2


def exit_status(e: BaseException) -> int:
    """Return the exit status for an error: REFUSED if the user can fix it, else FAILED."""
    return REFUSED if needs_no_traceback(e) else FAILED


def needs_no_traceback(e: BaseException) -> bool:
    """Whether the error's one line is enough: the user can fix the cause, such as a full disk."""
    return isinstance(e, UserError) or (isinstance(e, OSError) and e.errno in FULL_DISK)


def describe(e: BaseException) -> str:
    """Return an exception as one line: "Type: text", or only the text of a UserError.

    Control characters are escaped: messages contain names out of untrusted files.
    """
    text = " ".join(str(e).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if isinstance(e, UserError) else f"{type(e).__name__}: {text}" if text else type(e).__name__


def join_names(names: Sequence[str]) -> str:
    """Return untrusted names as a comma-separated list: escaped, at most MAX_NAMES, each cut if too long."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(_escape_name, names[:MAX_NAMES])) + more


def _escape_name(name: str) -> str:
    """Return a name cut to MAX_NAME_LENGTH, as a Python literal if it is empty or not printable."""
    name = name if len(name) <= MAX_NAME_LENGTH else name[:MAX_NAME_LENGTH] + "..."
    return name if name.isprintable() and name else ascii(name)
