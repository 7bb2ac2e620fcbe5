"""Try values of options: each trial is a run of train.py, and the lowest evaluation loss wins.

    python sweep.py --config base.yaml --space space.yaml --trials 20

The same command goes on with a stopped sweep. Given on several machines that see --output_dir, it shares the
trials among them. docs/sweep.md explains it.

Stages: parse options and space -> let train.py check one trial -> in each worker: claim a trial, run it, tell
how it ended -> table and page.
"""

from __future__ import annotations

import sys

from launch.program import exit_on_signals, is_under_torchrun, parse_or_exit, print_error, run_command
from options.sweep import Request, parse

if __name__ == "__main__":
    # The imports below take seconds; --help and wrong options are answered before them.
    PARSED = parse_or_exit(sys.argv[1:], parse)

import time
from functools import partial

from files.atomic_writes import write_text
from files.disk_room import warn_on_full_disk
from monitoring.sweep_page import PAGE, render_sweep
from options.errors import UserError, needs_no_traceback
from options.wandb_sweep import write_wandb_sweep
from training.sweep_pool import Stop, run_in_threads, stop_requests
from training.sweep_results import collect_results, describe_next, format_results
from training.sweep_study import JOURNAL, Study, check_folder
from training.sweep_trial import WAIT_SECONDS, check_run, run_trial
from training.sweep_worker import Worker, share_gpus


def work(request: Request, study: Study, gpus: dict[str, str], stop: Stop) -> None:
    """Run one trial after the other, until all have ended or the sweep stops. Raises UserError.

    Args:
        request: what this command was asked.
        study: the trials, which other workers run too.
        gpus: the environment variables that give a run its GPUs.
        stop: the request to stop.
    """
    awaited: list[int] = []
    while not stop.count and not study.has_ended():
        trial = study.claim()
        if trial is None:  # others run the last ones, and may die
            awaited = wait_for_others(study, stop, awaited)
            continue
        values = " ".join(f"{name}={text}" for name, text in trial.combination.items())
        print(f"trial {trial.number}{' again' * (trial.starts > 1)}: {values}", flush=True)
        began = time.monotonic()
        end = run_trial(request, study, trial, gpus, stop)
        if end:
            print(f"trial {trial.number}: {end} ({time.monotonic() - began:.0f} s)", flush=True)
            write_page(request, study)
            study.check_promising()


def wait_for_others(study: Study, stop: Stop, known: list[int]) -> list[int]:
    """Wait some seconds for the trials that other workers run; print their numbers if they are not `known`.

    Return the numbers. If one of these workers is dead, its trial can be claimed after that was noticed.
    """
    numbers = study.trials_of_others()
    if set(numbers) - set(known):
        print(f"waiting for other workers, which have trial {', '.join(map(str, numbers))}", flush=True)
    stop.wait(WAIT_SECONDS)
    return numbers


def write_page(request: Request, study: Study) -> None:
    """Write sweep.html, which then shows all trials so far."""
    with study.lock(), warn_on_full_disk(request.folder / PAGE):
        write_text(request.folder / PAGE, render_sweep(collect_results(request, study)))


def finish(request: Request, study: Study, is_stopped: bool) -> int:
    """Print the trials, the best first, and what can follow. Return the exit status."""
    write_page(request, study)
    results = collect_results(request, study)
    print(format_results(results))
    print(f"in {request.folder}: {PAGE}, {JOURNAL}, and the runs of the trials")
    if is_stopped:
        print(f"stopped after {results.ended} of {results.trials} trials; the same command goes on")
        return 0
    print(*describe_next(request, results), sep="\n")
    return 0 if results.best else 1


def sweep(request: Request) -> int:
    """Check the sweep, and run its trials, several at a time. Return the exit status. Raises UserError."""
    shares = share_gpus(request.sweep.workers)
    is_new = not check_folder(request.folder)
    if is_new:
        check_run(request, shares[0])  # before anything is written
    with Worker(request.folder / "workers") as worker:
        study = Study(request, worker)
        if not is_new and not study.has_ended():
            check_run(request, shares[0])  # this machine may lack the model or the data: all its trials fail
        with stop_requests() as stop:
            run_in_threads([partial(work, request, study, gpus, stop) for gpus in shares], stop)
            return finish(request, study, is_stopped=bool(stop.count))


def run(request: Request) -> int:
    """Run trials until all have ended. Return 0, also after a stop; 1 if none is complete; 2 for an error."""
    exit_on_signals()
    for remark in request.remarks:
        print(remark, flush=True)
    try:
        if is_under_torchrun():
            raise UserError(
                "sweep.py starts the ranks of its runs itself; start it with python, once per machine"
            )
        if request.sweep.wandb_sweep is None:
            return sweep(request)
        write_wandb_sweep(request, request.sweep.wandb_sweep)
        print(request.sweep.wandb_sweep)
        return 0
    except (UserError, OSError) as e:
        if not needs_no_traceback(e):
            raise
        return print_error(e, verbose=request.config.verbose)


def main(argv: list[str]) -> int:
    """Parse the options and run the command. Return the exit status."""
    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(run(PARSED))
