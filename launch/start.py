"""Checks a run and starts it on every rank: in new processes, or, under torchrun, in this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from launch import nodes, processes, torchrun
from launch.nodes import AnyJob
from launch.program import is_under_torchrun, print_error
from options.errors import UserError, needs_no_traceback


def start(
    run_rank: Callable,
    check: Callable[[], AnyJob],
    remarks: list[str],
    address: tuple[str, int | None],
    *,
    verbose: bool,
    preload: Sequence[str],
) -> int:
    """Check a run, print the remarks, and run run_rank(rank_info, job) on every rank. Return the exit status.

    The ranks are new processes; under torchrun this process is one of them. The exit status is 0 for success,
    2 for an error that the user can fix, and 1 for any other error.

    Args:
        run_rank: the function of a rank, at the top level of a module.
        check: checks the run and makes the job. Raises UserError for what is wrong with it.
        remarks: lines to print before those of the job.
        address: address and port of rank 0, for new processes; port None = a free one.
        verbose: print tracebacks with errors.
        preload: modules that ranks need; the server that ranks may be forked from imports them once.
    """

    def check_and_print() -> AnyJob:
        job = check()
        lines = [] if is_under_torchrun() and os.environ["RANK"] != "0" else [*remarks, *job.remarks]
        print(*lines, sep="\n", end="\n" * bool(lines))
        return job

    try:
        if is_under_torchrun():
            return torchrun.run_as_rank(run_rank, partial(nodes.check_on_nodes, check_and_print), verbose)
        job = check_and_print()
        return processes.start(run_rank, job.config.world_size, (job,), *address, verbose, preload)
    except (UserError, OSError) as e:
        if not needs_no_traceback(e):
            raise
        return print_error(e, verbose)
