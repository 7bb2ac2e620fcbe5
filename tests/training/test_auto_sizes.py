"""--batch_size auto and --context_length auto become numbers that fit, and leave no trace in the run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

import train
from data.rows import digest_rows
from launch.apart import Launcher
from launch.failures import Failure
from launch.gpus import GPUS
from models.registry import build_on_meta
from monitoring.memory_model import estimate_memory
from monitoring.run_sizes import run_sizes
from options.errors import UserError
from options.train import parse
from tests.helpers.programs import losses, small
from tests.helpers.resuming import QUIET
from tests.helpers.runs import full_run, make_job
from tests.helpers.trials import MOST_TOKENS, try_with_limit
from training import preflight
from training.auto_sizes import settle_sizes
from training.step_sizes import with_batch


class TwoRanks:
    rank, world = 0, 2


class LimitedLauncher(Launcher):
    """Trials whose micro-batch has more than `most` tokens are out of memory. Starts no process.

    Attributes:
        tried: (rows, tokens of a sequence) of each trial.
    """

    def __init__(self, most: int):
        super().__init__(2, "localhost", None)
        self.most, self.tried = most, []

    def run_apart(self, run, *args) -> list[Failure]:
        trial, folder = args
        self.tried.append((trial.config.batch_size, trial.tokens))
        fits = trial.config.batch_size * trial.tokens <= self.most
        return write_record(folder, fits, peak=1, room=0)


def write_record(folder: str, fits: bool, peak: int, room: float) -> list[Failure]:
    """Write what a rank of a trial would, and return its failure, if any."""
    record = {
        "fits": fits,
        "peak": peak,
        "phases": {},
        "after": {},
        "step_seconds": [],
        "times": None,
        "room": room,
    }
    (Path(folder) / "0.json").write_text(json.dumps(record))
    return [] if fits else [Failure(2, "error: rank 0: out of memory")]


def check(config) -> train.Job:
    original, preflight.check_output = preflight.check_output, lambda *_: None  # nothing is written here
    try:
        return train.check_run(config)
    finally:
        preflight.check_output = original


def settle(argv: list, most: int) -> tuple[train.Job, list]:
    """Return (the settled job, what was tried)."""
    launcher = LimitedLauncher(most)
    return settle_sizes(None, check, make_job(TwoRanks, argv), launcher), launcher.tried


def longest_row(source: list) -> int:
    return int(make_job(TwoRanks, source).rows.lengths().max())


def test_losses_are_those_of_a_run_with_that_number(
    checkpoints, short_rows, source, processes, two_ranks, tmp_path, monkeypatch, capsys
):
    """Trials of ranks in real processes; one of them is out of memory. Losses are equal bit for bit."""
    monkeypatch.setattr(train, "try_rank", try_with_limit)
    monkeypatch.setenv(MOST_TOKENS, str(3 * longest_row(source)))
    args = small(checkpoints, short_rows, tmp_path / "auto", "--world_size", "2", "--lora_dropout", "0.1")
    auto = ["--batch_size", "auto", "--effective_batch_size", "12"]
    assert train.main([*map(str, args), *auto]) == 0
    lines = capsys.readouterr().out
    assert (
        "--batch_size auto: 3 (tried: 6 does not fit, 2 fits, 3 fits), at most 8 without a GPU; a step has"
        " 12 rows with --gradient_accumulation_steps 2, the run 4 steps\n" in lines
    )
    recorded = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    numbers = {"batch_size": 3, "gradient_accumulation_steps": 2, "effective_batch_size": 12}
    assert {name: recorded[name] for name in numbers} == numbers
    given = small(checkpoints, short_rows, tmp_path / "given", "--world_size", "2", "--lora_dropout", "0.1")
    given += ["--batch_size", "3", "--gradient_accumulation_steps", "2"]
    two_ranks(full_run, train.check_run(parse(list(map(str, given)))[0]))
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")
    # The recorded options repeat the run, without a trial.
    config, _ = parse(
        ["--config", str(tmp_path / "auto" / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    )
    repeated = train.check_run(config).config
    assert not repeated.unsettled and {name: getattr(repeated, name) for name in numbers} == numbers


def test_the_context_comes_first_and_cuts_the_rows_as_a_number_does(source):
    """At batch 1; then the batch with rows of that length."""
    argv = [*source, "--eval_share", "0.2", "--eval_every", "2", "--sample_every", "2"]
    assert longest_row(source) > 64 + 8
    job, tried = settle([*argv, "--context_length", "auto", "--batch_size", "auto"], most=70)
    assert tried == [(1, longest_row(source)), (1, 64), (8, 64), (4, 64), (2, 64), (1, 64)]
    assert (job.config.context_length, job.config.batch_size) == (64, 1)
    given = make_job(TwoRanks, [*argv, "--context_length", "64"])
    assert digest_rows(job.rows) == digest_rows(given.rows) and job.config == given.config
    assert digest_rows(job.evaluation.rows) == digest_rows(given.evaluation.rows)
    assert [p.ids for p in job.evaluation.prompts] == [p.ids for p in given.evaluation.prompts]


def test_no_context_is_longer_than_the_rows_or_than_the_model_knows(
    source, checkpoints, short_rows, tmp_path
):
    longest = longest_row(source)
    job, tried = settle([*source, "--context_length", "auto", "--batch_size", "2"], most=10**6)
    assert job.config.context_length == longest and tried == [(2, longest)]
    folder = shutil.copytree(checkpoints(), tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    argv = ["--model_name", folder, "--dataset", short_rows, "--context_length", "auto"]
    assert settle(argv, most=10**6)[0].config.context_length == 48


def test_packs_are_tried_with_the_shapes_of_the_runs(source):
    job, tried = settle([*source, "--packing", "--context_length", "200", "--batch_size", "auto"], most=900)
    assert job.config.batch_size == 4 and {tokens for _, tokens in tried} == {200}


class MeasuringLauncher(LimitedLauncher):
    """Trials that take 4% more memory than the model of memory says, on a GPU with `room` bytes."""

    def __init__(self, job: train.Job, room: float):
        super().__init__(most=0)
        self.model, self.job, self.room = build_on_meta(job.model_config, job.family), job, room
        self.measured = 0

    def peak(self, config, tokens: int) -> float:
        job = self.job
        sizes = run_sizes(self.model, job.family, config, job.precision, job.files, tokens)
        return 1.04 * estimate_memory(config, job.precision, sizes, GPUS["t4"]).peak

    def run_apart(self, run, *args) -> list[Failure]:
        trial, folder = args
        if math.isinf(trial.expected):
            self.measured += 1
            return write_record(folder, fits=False, peak=0, room=self.room)
        self.tried.append((trial.config.batch_size, trial.tokens))
        peak = self.peak(trial.config, trial.tokens)
        assert trial.expected == pytest.approx(peak / 1.04)
        return write_record(folder, peak <= self.room, int(peak), self.room)


def test_the_model_of_memory_proposes(checkpoints, monkeypatch):
    """On a GPU: few trials, and the result is within one of the largest that fits."""
    argv = ["--model_name", checkpoints(), "--dataset", "dummy", "--dataset_samples", "400", "--batch_size"]
    job = make_job(TwoRanks, [*argv, "auto", "--context_length", "256"])
    monkeypatch.setattr(train.Job, "gpu", GPUS["t4"])  # of which others use much
    tokens = int(job.rows.lengths().max())
    for largest in (1, 20, 70):
        launcher = MeasuringLauncher(job, 0)
        launcher.room = launcher.peak(with_batch(job.config, largest), tokens) + 1000
        found = settle_sizes(None, check, job, launcher).config.batch_size
        assert largest - 1 <= found <= largest and len(launcher.tried) <= 4
        # What is free is known before the first proposal, which is wrong by no more than the model.
        assert launcher.measured == 1 and launcher.tried[0][0] <= 1.3 * largest + 1


@pytest.mark.parametrize("batch", ["auto", "4"])
def test_a_step_has_no_more_rows_than_an_epoch(batch, source, capsys):
    argv = [*source, "--batch_size", batch]
    line = r"^--effective_batch_size 48: an epoch has 40 rows; at most 40 is possible with 2 processes$"
    with pytest.raises(UserError, match=line):
        make_job(TwoRanks, [*argv, "--effective_batch_size", "48"])
    if batch == "auto":
        settle([*argv, "--gradient_accumulation_steps", "3"], most=10**6)
        assert "--batch_size auto: 7 (tried: 7 fits)" in (printed := capsys.readouterr().out)
        assert "; a step has 40 rows with --gradient_accumulation_steps 3, the run 1 steps" in printed


def test_none_fits(source):
    with pytest.raises(UserError, match=r"^--batch_size auto: not even 1 row of \d+ tokens per process fits"):
        settle([*source, "--batch_size", "auto"], most=10)
    with pytest.raises(UserError, match=r"^--context_length auto: not even 1 row of 64 tokens"):
        settle([*source, "--context_length", "auto"], most=10)


def test_a_resumed_run_has_its_own_numbers(copied, source):
    """Also on another number of processes, where a step keeps its rows."""
    argv = [*source, *QUIET, "--output_dir", str(copied), "--resume", "auto", "--batch_size", "auto"]
    argv += ["--context_length", "auto"]  # the last one counts
    for world, accumulation in (("2", 2), ("1", 4)):
        config, _ = parse([*argv, "--world_size", world])
        job = train.check_run(config)
        assert job.saved and not job.config.unsettled
        assert (job.config.batch_size, job.config.gradient_accumulation_steps) == (1, accumulation)
        assert "--batch_size auto: 1, as the resumed run has it" in job.remarks
        assert "--context_length auto: 256, as the resumed run has it" in job.remarks
    config, _ = parse([*argv, "--world_size", "2", "--effective_batch_size", "8"])
    with pytest.raises(UserError, match="a step of the run has 4 rows"):
        train.check_run(config)


def test_show_rows_tries_nothing(source, capsys):
    argv = [*source, "--show_rows", "1", "--batch_size", "auto", "--context_length", "auto"]
    assert train.main([*argv, "--effective_batch_size", "12"]) == 0
    assert "trying" not in capsys.readouterr().out


def test_a_run_without_a_number_cannot_start(source):
    job = make_job(TwoRanks, [*source, "--batch_size", "auto"])
    with pytest.raises(AssertionError, match="batch_size"):
        train.run_rank(None, job)
