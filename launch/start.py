"""Checks a run and starts it on every rank: in new processes, or, under torchrun, in this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from launch import processes, torchrun
from launch.apart import Launcher, TorchrunLauncher
from launch.nodes import AnyJob
from launch.program import is_first_process, is_under_torchrun, print_error
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
    settle: Callable[[AnyJob, Launcher], AnyJob] = lambda job, launcher: job,
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
        settle: decides what the check leaves open, by ranks that the launcher starts, and returns the job.

    Returns:
        The exit status: 0 for success, 2 for an error that the user can fix, 1 for any other, 128 + the
        number of a signal that ended the run. Under torchrun an error while it trains ends this process
        instead.
    """

    prints = is_first_process()

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
            check_all = partial(check_and_settle, check_and_print, settle)
            return torchrun.run_as_rank(run_rank, check_all, verbose, preload)
        job = check_and_print()
        world = job.config.world_size
        job = settle(job, Launcher(world, master_addr, master_port, preload))
        return processes.start(run_rank, world, (job,), master_addr, master_port, verbose, preload)
    except (UserError, OSError) as e:
        if not needs_no_traceback(e):
            raise
        return print_error(e, verbose)


def check_and_settle(
    check: Callable[[], AnyJob], settle: Callable[[AnyJob, Launcher], AnyJob], launcher: TorchrunLauncher
) -> AnyJob:
    """Return the job, checked on all nodes and settled. Collective; raises UserError on all ranks or none."""
    return settle(launcher.check(check), launcher)
