"""Checks a run and starts it on every rank: in new processes, or, under torchrun, in this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from launch import nodes, processes, torchrun
from launch.nodes import AnyJob
from launch.program import is_under_torchrun, print_error
from options.errors import DONE, UserError, needs_no_traceback


def start(
    run_rank: Callable,
    check: Callable[[], AnyJob],
    remarks: list[str],
    *,
    master_addr: str,
    master_port: int | None,
    verbose: bool,
    preload: Sequence[str],
    show: Callable[[AnyJob], None] | None = None,
) -> int:
    """Check a run, then run its ranks: new processes, or under torchrun this one; return the exit status.

    Args:
        run_rank: the function of a rank, called as run_rank(rank_info, job); at the top level of a module.
        check: checks the run and returns the job. Raises UserError for what is wrong with it.
        remarks: lines to print after the check, once, before the job's own remarks.
        master_addr, master_port: where new processes find rank 0; port None = a free one. torchrun has its
            own.
        verbose: print tracebacks with errors.
        preload: modules that ranks need; the server that ranks may be forked from imports them once.
        show: prints something of the job after its remarks; then no rank is run.

    Returns:
        The exit status: 0 for success, 2 for an error that the user can fix, 1 for any other, 128 + the
        number of a signal that ended the run. Under torchrun an error while it trains ends this process
        instead.
    """

    prints = not is_under_torchrun() or os.environ["RANK"] == "0"

    def check_and_print() -> AnyJob:
        job = check()
        lines = [*remarks, *job.remarks] if prints else []
        print(*lines, sep="\n", end="\n" * bool(lines))
        return job

    try:
        if show:
            if prints:
                show(check_and_print())
            return DONE
        if is_under_torchrun():
            return torchrun.run_as_rank(run_rank, partial(nodes.check_on_nodes, check_and_print), verbose)
        job = check_and_print()
        world = job.config.world_size
        return processes.start(run_rank, world, (job,), master_addr, master_port, verbose, preload)
    except (UserError, OSError) as e:
        if not needs_no_traceback(e):
            raise
        return print_error(e, verbose)
