"""Checks a run and has its ranks run it: in new processes, or, under torchrun, in this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from launch import nodes, processes, torchrun
from launch.nodes import AnyJob
from launch.program import report, under_torchrun
from options.errors import UserError, needs_no_traceback


def start(
    run_rank: Callable,
    check: Callable[[], AnyJob],
    remarks: list[str],
    where: tuple[str, int | None],
    *,
    verbose: bool,
    preload: Sequence[str],
) -> int:
    """Checks a run, prints the remarks on its options and its job's, and runs run_rank(rank_info, job) on every
    rank: in new processes, or, under torchrun, in this one. Returns the exit status: 0, 2 for something the
    user can put right, 1 for anything else.

    Args:
        run_rank: what a rank does, a function of a module.
        check: makes the job. Raises UserError for what is wrong with it.
        where: address and port of rank 0, for new processes; None = a free port.
        verbose: tracebacks with errors.
        preload: modules that ranks import, for the server that they may be forks of.
    """

    def checked() -> AnyJob:
        job = check()
        told = [] if under_torchrun() and os.environ["RANK"] != "0" else [*remarks, *job.remarks]
        print(*told, sep="\n", end="\n" * bool(told))
        return job

    try:
        if under_torchrun():
            return torchrun.join(run_rank, partial(nodes.prepare, checked), verbose)
        job = checked()
        return processes.start(run_rank, job.config.world_size, (job,), *where, verbose, preload)
    except (UserError, OSError) as e:
        if not needs_no_traceback(e):
            raise
        return report(e, verbose)
