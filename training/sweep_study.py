"""The study of a sweep: which trials there are, what each tries, what came of it. Kept by Optuna.

Its journal, OUT/journal.log, has one line for each change. Optuna appends under a lock file, which works on
network file systems too, so workers on several machines share a study without a server.

A trial is in one of these states:

- running: it records its worker. If that worker is dead, or has let go of it, the next worker takes the trial
  over, with its number, its values and its folder. So no trial is lost, and none counts twice.
- complete: it has the loss of its best evaluation, with folds the mean of theirs.
- pruned: it was stopped early, by `is_worse_than_median`.
- failed: its run ended with an error, which the trial records.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from files.disk_room import check_writable
from files.output_folder import holds_run
from options.errors import UserError, describe
from options.sweep import Request
from options.sweep_space import Combination
from training.sweep_choice import choose, make_distributions, to_params
from training.sweep_pruning import STEPS_PER_FOLD, is_worse_than_median
from training.sweep_worker import Worker, count_processes

JOURNAL, LOCK, STUDY = "journal.log", "claims", "sweep"
MAX_STARTS = 5  # of a trial; one whose workers always die may be what kills them
FIRST_FAILURES = 3  # at the beginning, after which a sweep ends: the same will happen to all trials


@dataclass(frozen=True)
class Trial:
    """A trial that this worker runs.

    Attributes:
        number: from 0.
        combination: its values.
        losses: the loss of each fold that has ended, in order.
        starts: how often it has been started, this time included.
    """

    number: int
    combination: Combination
    losses: tuple[float, ...] = ()
    starts: int = 1


class Study:
    """The trials of a sweep. All methods may be called from several threads.

    Args:
        request: what sweep.py was asked.
        worker: this process.
    """

    def __init__(self, request: Request, worker: Worker):
        self.request, self.worker, self.path = request, worker, request.folder.resolve() / JOURNAL
        with _journal_errors(self.path), self.lock():
            _cut_torn_line(self.path)
            self.storage = JournalStorage(
                JournalFileBackend(str(self.path), JournalFileOpenLock(str(self.path)))
            )
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=STUDY,
                direction="minimize",
                sampler=optuna.samplers.RandomSampler(),  # which does nothing: `_choose` samples
                load_if_exists=True,
            )
            self._check_same()

    def _check_same(self) -> None:
        """Record what identifies the sweep. Raises UserError if the journal's sweep is another one."""
        request, day = self.request, datetime.date.today().isoformat()
        processes = count_processes(request.config.world_size, request.sweep.workers)
        own = {
            "space": request.space.as_json(),
            "options": request.recorded,
            "folds": request.sweep.folds,
        }
        if not self.study.user_attrs:
            self.study.set_user_attr("sweep", own | {"day": day, "processes": processes})
        recorded = self.study.user_attrs["sweep"]
        for name, value in own.items():
            if recorded[name] != value:
                raise UserError(_describe_other(name, recorded[name], value, request))
        if recorded["processes"] != processes and request.config.effective_batch_size is None:
            raise UserError(
                f"a trial has {processes} processes here, and {recorded['processes']} in the sweep in"
                f" {request.folder}, so its steps would have other rows; give a trial as many GPUs, or begin"
                " another sweep with --effective_batch_size"
            )

    @property
    def day(self) -> str:
        """The day on which the sweep began, for chat templates that contain a date."""
        return self.study.user_attrs["sweep"]["day"]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one thread of one worker at a time choose its trial, or write the page."""
        lock = JournalFileOpenLock(str(self.request.folder.resolve() / LOCK))
        lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # it took so long that another one broke the lock
                lock.release()

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def claim(self) -> Trial | None:
        """Return a trial to run, one that its worker left or a new one; None if there is none now."""
        with self.lock():
            running = [t for t in self.trials() if t.state == TrialState.RUNNING]
            for trial in running:
                owner = trial.user_attrs["worker"]
                if owner and self.worker.is_alive(owner):
                    continue
                if trial.user_attrs["starts"] < MAX_STARTS:
                    return self._take_over(trial)
                self._end(trial, TrialState.FAIL, f"its worker was killed {MAX_STARTS} times")
            if len(self.trials()) < self.request.trials:
                return self._create()
            return None

    def has_ended(self) -> bool:
        """Whether all trials have ended. Until then a worker may die, and leave its trial to others."""
        trials = self.trials()
        return len(trials) >= self.request.trials and all(t.state.is_finished() for t in trials)

    def trials_of_others(self) -> list[int]:
        """Return the numbers of the trials that other workers run, or have left when they were killed."""
        own = self.worker.identity
        running = [t for t in self.trials() if t.state == TrialState.RUNNING]
        return [t.number for t in running if t.user_attrs["worker"] not in (own, None)]

    def check_promising(self) -> None:
        """Raise UserError if FIRST_FAILURES trials have failed and none has ended otherwise."""
        ended = [t for t in self.trials() if t.state.is_finished()]
        if len(ended) >= FIRST_FAILURES and all(t.state == TrialState.FAIL for t in ended):
            raise UserError(
                f"the first {len(ended)} trials failed, the last one: {ended[-1].user_attrs['reason']}; begin"
                f" again in another --output_dir; logs are in {self.request.folder}"
            )

    def _take_over(self, trial: FrozenTrial) -> Trial:
        """Record this worker as a trial's worker. Return the trial."""
        starts = trial.user_attrs["starts"] + 1
        self._set(trial, worker=self.worker.identity, starts=starts)
        losses = tuple(trial.user_attrs.get("losses", ()))
        return Trial(trial.number, trial.user_attrs["options"], losses, starts)

    def _create(self) -> Trial:
        """Add a running trial to the study, in one line of the journal. Return it."""
        before = self.trials()
        request = self.request
        combination = choose(
            request.space, request.sweep.sampler, request.config.seed, request.trials, before
        )
        distributions = make_distributions(self.request.space)
        params = to_params(combination, distributions)
        attributes = {"options": combination, "worker": self.worker.identity, "starts": 1}
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=attributes
            )
        )
        return Trial(len(before), combination)

    def _find(self, number: int) -> FrozenTrial:
        return self.trials()[number]

    def _set(self, trial: FrozenTrial, **attributes) -> None:
        """Record attributes of a trial, unless it has ended."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            for name, value in attributes.items():
                self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def _end(
        self, trial: FrozenTrial, state: TrialState, reason: str = "", value: float | None = None
    ) -> None:
        """Record that a trial has ended, unless it has."""
        if reason:
            self._set(trial, reason=reason)
        self.study.tell(trial.number, value, state=state, skip_if_finished=True)

    def is_mine(self, number: int) -> bool:
        """Whether this worker still is a trial's worker: others take over from one that seems dead."""
        trial = self._find(number)
        return trial.state == TrialState.RUNNING and trial.user_attrs["worker"] == self.worker.identity

    def report(self, number: int, fold: int, share: int, loss: float) -> bool:
        """Record an evaluation of a trial. Return whether the trial should be stopped, as not promising.

        Args:
            number: the trial.
            fold: from 0.
            share: of the run's steps that were done, in thousandths.
            loss: the evaluation loss.
        """
        trial = self._find(number)
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_intermediate_value(trial._trial_id, fold * STEPS_PER_FOLD + share, loss)
        complete = [t.intermediate_values for t in self.trials() if t.state == TrialState.COMPLETE]
        own = self._find(number).intermediate_values
        return self.request.sweep.prune and share < STEPS_PER_FOLD and is_worse_than_median(own, complete)

    def record_fold(self, number: int, losses: tuple[float, ...]) -> None:
        """Record the losses of the folds of a trial that have ended."""
        self._set(self._find(number), losses=list(losses))

    def complete(self, number: int, losses: tuple[float, ...]) -> None:
        """Record that a trial has ended with the mean of its folds' losses."""
        self._end(self._find(number), TrialState.COMPLETE, value=statistics.fmean(losses))

    def prune(self, number: int, reason: str) -> None:
        """Record that a trial was stopped early."""
        self._end(self._find(number), TrialState.PRUNED, reason)

    def fail(self, number: int, reason: str) -> None:
        """Record that a trial's run ended with an error."""
        self._end(self._find(number), TrialState.FAIL, reason)

    def release(self, number: int) -> None:
        """Let go of a trial, which any worker may continue. Its start does not count."""
        if self.is_mine(number):
            trial = self._find(number)
            self._set(trial, starts=trial.user_attrs["starts"] - 1, worker=None)


def check_folder(folder: Path) -> bool:
    """Return whether a folder holds a sweep. Raises UserError if it holds a run, or cannot be written."""
    check_writable(folder, "--output_dir")
    if (folder / JOURNAL).is_file():
        return True
    if holds_run(folder):
        raise UserError(
            f"--output_dir {folder}: holds a run of train.py; choose another folder for the sweep"
        )
    return False


def _describe_other(name: str, before, value, request: Request) -> str:
    """Return the error for a sweep that differs from the one in the folder.

    Args:
        name: what differs: space, options or folds.
        before, value: that of the sweep in the folder, and of this command.
        request: what sweep.py was asked.
    """
    where = f"in the sweep in {request.folder}; choose another --output_dir for another sweep"
    if name == "folds":
        return f"--folds: is {value} here, and {before} {where}"
    first = next(key for key in {**before, **value} if before.get(key) != value.get(key))
    here, was = (json.dumps(each[first]) if first in each else "not given" for each in (value, before))
    option = f"--space {request.sweep.space}: {first}" if name == "space" else f"--{first}:"
    return f"{option} is {here} here, and {was} {where}"


def _cut_torn_line(path: Path) -> None:
    """Remove half a line at the journal's end, which a full disk or a power failure leaves.

    The next line would be appended to it, and Optuna could never read the journal again.
    """
    lock = JournalFileOpenLock(str(path))
    if not path.exists():
        return
    lock.acquire()
    try:
        with path.open("rb+") as file:
            text = file.read()
            if text and not text.endswith(b"\n"):
                file.truncate(text.rfind(b"\n") + 1)
    finally:
        lock.release()


@contextlib.contextmanager
def _journal_errors(path: Path) -> Iterator[None]:
    """Within the context, raise UserError for a journal that cannot be read or written."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, LookupError, TypeError, AssertionError) as e:  # what Optuna raises on other lines
        raise UserError(f"{path}: is damaged, or no journal of a sweep ({describe(e)})") from None
