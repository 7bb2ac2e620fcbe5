"""The front of `python train.py`: options are read and wrong ones told before torch is imported, which with
transformers takes seconds. Nothing here needs either."""

from __future__ import annotations

import os
import sys
import traceback

from config import Config, UserError, parse


def parse_or_exit(argv: list[str]) -> tuple[Config, list[str]]:
    """`config.parse`; a UserError ends the program as `report` tells it."""
    try:
        return parse(argv)
    except UserError as e:
        sys.exit(report(e, verbose="--verbose" in argv))


def report(error: UserError, verbose: bool) -> int:
    """Prints `error: ...`, with verbose below its traceback. Returns the exit status for it, 2."""
    if verbose:
        traceback.print_exception(error)
    if not under_torchrun() or os.environ["RANK"] == "0":  # all ranks find the same wrong option
        print(f"error: {describe(error)}", file=sys.stderr)
    return 2


def describe(e: BaseException) -> str:
    """One line for an exception: a UserError's text; otherwise its type as well."""
    text = " ".join(str(e).split())
    return text if isinstance(e, UserError) else f"{type(e).__name__}: {text}" if text else type(e).__name__


def under_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))
