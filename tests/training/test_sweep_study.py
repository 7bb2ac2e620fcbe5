"""The study of a sweep: its trials under several workers, also dead ones, and when a trial is pruned."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import optuna
import pytest
import torch
from optuna.trial import TrialState

from options.errors import UserError
from options.sweep import parse
from training.sweep_pruning import is_worse_than_median
from training.sweep_results import collect_results
from training.sweep_study import MAX_STARTS, Study
from training.sweep_worker import STALE_SECONDS, Worker, count_processes, share_gpus

BASE = "--eval_share 0.1 --eval_every 10".split()


@pytest.fixture
def request_of(tmp_path):
    def make(space: str, *argv):
        path = tmp_path / "space.yaml"
        path.write_text(space)
        return parse([*BASE, *argv, "--space", str(path), "--output_dir", str(tmp_path / "out")])

    return make


@pytest.fixture
def study_of(request_of):
    """Makes studies, each with a worker of its own, as in processes of their own."""
    workers = []

    def make(space: str, *argv) -> Study:
        request = request_of(space, *argv)
        workers.append(Worker(request.folder / "workers").__enter__())
        return Study(request, workers[-1])

    yield make
    for worker in workers:
        with contextlib.suppress(OSError):  # the test has ended it
            worker.__exit__()


def test_two_workers_share_a_grid(study_of):
    """Many threads of two workers: each combination is run once."""
    space = "lora_rank: [8, 16, 32]\nlr: [0.1, 0.2, 0.3, 0.4]"
    studies, run = [study_of(space, "--sampler", "grid") for _ in range(2)], []

    def work(study):
        while not study.has_ended():
            if (trial := study.claim()) is not None:
                run.append((trial.number, tuple(trial.combination.values())))
                study.complete(trial.number, (float(trial.number),))

    threads = [threading.Thread(target=work, args=(studies[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    grid = [tuple(each.values()) for each in studies[0].request.space.combinations()]
    assert sorted(run) == list(enumerate(grid))
    assert [t.value for t in studies[0].trials()] == list(map(float, range(12)))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_try_no_combination_twice(sampler, study_of):
    space = "lora_rank: [8, 16, 32]\nlora_dropout: {min: 0, max: 0.15, step: 0.05}"
    study = study_of(space, "--sampler", sampler)
    assert study.request.trials == 12
    seen = []
    while (trial := study.claim()) is not None:
        seen.append(tuple(trial.combination.values()))
        study.complete(trial.number, (random.random(),))
    assert len(set(seen)) == len(seen) == 12 and {of[1] for of in seen} == {"0.0", "0.05", "0.1", "0.15"}


def test_tpe_goes_where_losses_are_low(study_of):
    study = study_of("lr: {min: 1e-6, max: 1, log: true}", "--trials", "40")
    rates = []
    while (trial := study.claim()) is not None:
        rates.append(float(trial.combination["lr"]))
        study.complete(trial.number, (abs(rates[-1] / 1e-3 - 1),))
    assert len(set(rates)) == 40 and all(len(str(rate).replace(".", "")) < 12 for rate in rates)
    near = [1e-4 < rate < 1e-2 for rate in rates]
    assert sum(near[20:]) > sum(near[:10]) + 5


def test_a_killed_workers_trial_is_taken_over(study_of, tmp_path):
    """It keeps its number and values, also with what its folds have lost by then; a living one's is left."""
    space = "lr: [0.1, 0.2, 0.3]"
    first, second = study_of(space, "--sampler", "grid"), study_of(space, "--sampler", "grid")
    trials = [first.claim() for _ in range(2)]
    first.record_fold(1, (0.5,))
    third = second.claim()
    assert third.number == 2 and second.claim() is None and not second.has_ended(), "others are running"
    first.worker.__exit__()  # as when its process is gone
    again = [second.claim() for _ in range(2)]
    assert [(t.number, t.combination) for t in again] == [(t.number, t.combination) for t in trials]
    assert again[1].losses == (0.5,) and again[0].starts == 2
    assert not first.is_mine(0) and second.is_mine(0) and second.claim() is None
    second.complete(0, (1.0,))
    first.complete(0, (2.0,))  # it was only slow: its end comes too late
    for number in (1, 2):
        second.complete(number, (float(number),))
    assert second.has_ended() and [t.value for t in second.trials()] == [1.0, 1.0, 2.0]


def test_a_trial_that_kills_its_workers_fails(study_of):
    study = study_of("lr: [0.1, 0.2]", "--sampler", "grid")
    study.claim()
    for start in range(2, MAX_STARTS + 1):
        study._set(study.trials()[0], worker={"id": "gone", "machine": study.worker.identity["machine"]})
        assert study.claim().starts == start
    study.release(0)  # a stop of the sweep is no start
    assert study.claim().starts == MAX_STARTS
    study._set(study.trials()[0], worker={"id": "gone", "machine": study.worker.identity["machine"]})
    assert study.claim().number == 1
    (failed,) = [t for t in study.trials() if t.state == TrialState.FAIL]
    assert failed.user_attrs["reason"] == f"its worker was killed {MAX_STARTS} times"


def test_workers_of_other_machines_are_known_by_their_files_time(tmp_path):
    """Their locks may not be seen here, and their clocks may differ."""
    now = [0.0]
    with Worker(tmp_path, clock=lambda: now[0]) as here, Worker(tmp_path) as there:
        other = there.identity | {"machine": "another"}
        assert here.is_alive(other)
        now[0] = STALE_SECONDS - 1
        assert here.is_alive(other)
        there.path.touch()
        now[0] += 2
        assert here.is_alive(other), "it has renewed its file"
        now[0] += STALE_SECONDS
        assert not here.is_alive(other)
        never = other | {"id": "never"}
        assert here.is_alive(never), "a network file system may show its file late"
        now[0] += STALE_SECONDS
        assert not here.is_alive(never)


WORKER = """
import pathlib, subprocess, sys
from training.sweep_worker import Worker
with Worker(pathlib.Path(sys.argv[1])) as worker:
    run = subprocess.Popen(["sleep", "60"], pass_fds=(worker.descriptor,), stdout=subprocess.DEVNULL)
    print(run.pid, worker.identity["id"], sep="\\n", flush=True)
    run.wait()
"""


def test_a_workers_runs_hold_its_lock(tmp_path):
    """So a trial is not started a second time beside the run that a killed worker has left."""
    with Worker(tmp_path) as here:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        child = int(process.stdout.readline())
        other = here.identity | {"id": process.stdout.readline().strip(), "pid": process.pid}
        process.kill()
        process.wait()
        assert here.is_alive(other)
        os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while here.is_alive(other) and time.monotonic() < deadline:
            pass
        assert not here.is_alive(other)


def test_gpus_are_shared_evenly(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, visible, workers, shares in (
        (0, "", 2, [None, None]),
        (4, "", 2, ["0,1", "2,3"]),
        (2, "5,7", 2, ["5", "7"]),
        (2, "5,7", 1, [None]),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [share.get("CUDA_VISIBLE_DEVICES") for share in share_gpus(workers)] == shares
        assert count_processes(-1, workers) == (count // workers or 2)
    with pytest.raises(UserError, match=r"^--workers 3: this machine's 2 GPUs cannot be shared evenly"):
        share_gpus(3)
    assert count_processes(1, 1) == 1


def test_pruning_is_the_median_rule_of_optuna():
    """Random histories with evaluations at the same steps: the same decisions as MedianPruner's."""
    rng, decisions = random.Random(0), []
    for _ in range(200):
        steps = sorted(rng.sample(range(1, 1001), 4))
        complete = [{step: rng.random() for step in steps} for _ in range(rng.randint(3, 9))]
        own = {step: rng.random() for step in steps[: rng.randint(1, 4)]}
        study = optuna.create_study(pruner=optuna.pruners.MedianPruner())
        for values in complete:
            study.add_trial(optuna.create_trial(value=1.0, intermediate_values=values))
        trial = study.ask()
        for step, loss in own.items():
            trial.report(loss, step)
        decisions.append((is_worse_than_median(own, complete), trial.should_prune()))
    assert all(ours == theirs for ours, theirs in decisions) and 20 < sum(ours for ours, _ in decisions) < 100


def test_pruning_compares_the_same_share_of_the_same_fold():
    complete = [{250: 3.0, 500: 2.0, 1000: 1.0, 1500: 9.0, 2000: 8.0}] * 5
    assert is_worse_than_median({333: 3.1}, complete), "another batch size evaluates at other shares"
    assert not is_worse_than_median({333: 2.9}, complete)
    assert not is_worse_than_median({200: 9.0}, complete), "none had an evaluation so early"
    assert not is_worse_than_median({1000: 0.5, 1500: 8.9}, complete)
    assert is_worse_than_median({1000: 0.5, 1500: 9.1}, complete), "the loss of the first fold does not count"


def test_another_sweep_in_the_folder(study_of):
    study_of("lr: [0.1, 0.2]")
    for space, argv, words in (
        ("lr: [0.1, 0.3]", (), r'space.yaml: lr is \["0.1", "0.3"\] here, and \["0.1", "0.2"\] in the sweep'),
        ("lora_rank: [8]", (), r"lr is not given here, and"),
        ("lr: [0.1, 0.2]", ("--lora_rank", "8"), r'^--lora_rank: is "8" here, and not given in the sweep in'),
    ):
        with pytest.raises(UserError, match=words):
            study_of(space, *argv)
    study_of("lr: [0.1, 0.2]", "--sampler", "random", "--verbose")


def test_all_trials_have_as_many_processes(study_of):
    """More processes make more rows a step, and a trial that is taken over could not be resumed."""
    study_of("lr: [0.1, 0.2]")
    with pytest.raises(UserError, match=r"^a trial has 3 processes here, and 2 in the sweep in .*; give"):
        study_of("lr: [0.1, 0.2]", "--world_size", "3")


def test_a_fixed_number_of_rows_allows_other_processes(study_of):
    study_of("lr: [0.1, 0.2]", "--effective_batch_size", "12")
    study_of("lr: [0.1, 0.2]", "--effective_batch_size", "12", "--world_size", "3")


def test_a_journal_with_half_a_line(study_of, tmp_path):
    """What a full disk leaves is cut; a journal that is damaged elsewhere is named."""
    space = "lr: [0.1, 0.2, 0.3]"
    study_of(space).claim()
    journal = tmp_path / "out" / "journal.log"
    whole = journal.read_text()
    journal.write_text(whole + whole.splitlines()[-1][:40])
    study = study_of(space)
    assert len(study.trials()) == 1 and study.claim().number == 1
    unknown = '{"op_code": 99, "worker_id": "a"}'
    for damaged in (whole[:60] + whole, "[1]\n", "null\n", f"{unknown}\n", "{}\n"):
        journal.write_text(damaged)
        with pytest.raises(UserError, match=r"journal.log: is damaged, or no journal of a sweep"):
            study_of(space)


def test_importances_need_a_difference(study_of):
    """Equal losses say nothing, and an option with a single value has no share."""
    study = study_of("lora_rank: [4, 8, 16, 32, 64]\nlora_alpha: [3]\nseed: [1, 2]", "--sampler", "grid")
    for number in range(10):
        assert study.claim().number == number and not collect_results(study.request, study).importances
        study.complete(number, (1.0 if number < 9 else 2.0,))
    shares = collect_results(study.request, study).importances
    assert set(shares) == {"lora_rank", "seed"} and sum(shares.values()) == pytest.approx(1)


def test_fewer_trials_than_there_are(study_of):
    study = study_of("lr: [1, 2, 3]", "--sampler", "grid")
    for number in range(3):
        study.claim()
        study.complete(number, (1.0,))
    fewer = study_of("lr: [1, 2, 3]", "--sampler", "grid", "--trials", "1")
    assert fewer.has_ended() and fewer.claim() is None
    assert collect_results(fewer.request, fewer).trials == 3
