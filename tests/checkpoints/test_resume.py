"""A resumed run has the same losses and weights as an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import train
from checkpoints import storage as checkpoint_files
from checkpoints.storage import checkpoint_folder, checkpoint_steps
from files import lock
from files.lock import FolderLock
from launch.signals import StopRequests
from monitoring.metrics import Metrics
from monitoring.tracking import make_tracker
from options.errors import UserError
from options.train import parse
from tests.helpers.products import slow
from tests.helpers.resuming import (
    NOISY,
    QUIET,
    RUN,
    DiskFiller,
    Signals,
    adapter,
    check_resumed_job,
    edit_copied_manifest,
    fill,
    lines,
    repeatable_metrics,
    run,
)
from tests.helpers.runs import full_run
from tests.helpers.tiny import OTHERS
from tests.helpers.wandb_files import wandb_records

MIXTURES = ("qwen3_moe", "mixtral", "qwen2_moe", "glm4_moe_lite", "gpt_oss")


@pytest.fixture(scope="module")
def undisturbed(source, two_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    two_ranks(run, [*source, *QUIET, "--output_dir", str(folder)])
    return folder


def test_a_resumed_run_is_bitwise_equal(source, two_ranks, tmp_path):
    """With packing, dropout, LoRA+, fp16's scaler and accumulation.

    The run is stopped within both epochs, and metrics.jsonl is cut within a line.
    """
    whole, folder = tmp_path / "whole", tmp_path / "run"
    two_ranks(run, [*source, *NOISY, "--output_dir", str(whole)])
    again = [*source, *NOISY, "--output_dir", str(folder), "--resume", "auto"]
    printed = two_ranks(run, again, Signals({1: signal.SIGUSR1, 2: signal.SIGTERM}))[0]
    assert "stopped at step 2 of 5 (SIGTERM); resume with:" in printed
    assert checkpoint_steps(folder) == [2, 1] and not (folder / "adapter_model.safetensors").exists()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    assert "stopped at step 4 of 5 (SIGINT)" in two_ranks(run, again, Signals({4: signal.SIGINT}))[0]
    assert "5 steps, the last 1 of them in" in two_ranks(run, again)[0]
    assert repeatable_metrics(folder) == repeatable_metrics(whole) and len(lines(folder)) == 5
    assert lines(folder)[1]["epoch"] < 1 < lines(folder)[3]["epoch"]
    ours, theirs = adapter(folder), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    two_ranks(run, again)  # nothing is left to do
    assert repeatable_metrics(folder) == repeatable_metrics(whole)


@pytest.mark.parametrize(
    "given", [*slow(OTHERS), *slow([f"{kind} --lora_expert_rank 3 --train_router" for kind in MIXTURES])]
)
def test_a_resumed_run_of_each_family(given, checkpoints, short_rows, two_ranks, tmp_path):
    """Bitwise, with packing."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    kind, *more = given.split()
    model = ["--model_name", str(checkpoints(kind)), "--dataset", str(short_rows), *more]
    argv = [*model, *RUN, *"--lora_target_modules all --packing --max_steps 4 --output_dir".split()]
    two_ranks(run, [*argv, str(whole)])
    again = [*argv, str(folder), "--resume", "auto"]
    assert "stopped at step 2 of 4" in two_ranks(run, again, Signals({2: signal.SIGTERM}))[0]
    assert "4 steps, the last 2 of them in" in two_ranks(run, again)[0]
    assert repeatable_metrics(folder) == repeatable_metrics(whole) and len(lines(folder)) == 4
    ours, theirs = adapter(folder), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_another_number_of_ranks_changes_rounding_only(source, one_rank, two_ranks, four_ranks, tmp_path):
    """From 2 ranks to 1 or 4 ranks, and back to 2; in fp32 on GPUs too.

    The last of 4 ranks has no row of an adapter's A.
    """
    argv, whole, stopped = [*source, *QUIET, "--precision", "fp32"], tmp_path / "whole", tmp_path / "stopped"
    two_ranks(run, [*argv, "--output_dir", str(whole)])
    two_ranks(run, [*argv, "--output_dir", str(stopped)], Signals({3: signal.SIGTERM}))
    for ranks, accumulation in ((one_rank, 4), (four_ranks, 1)):
        folder = tmp_path / f"on {ranks.world}"
        shutil.copytree(stopped, folder)
        others = ["--sharding_strategy", "shard_grad_op", "--gradient_accumulation_steps", str(accumulation)]
        resume = [*argv, "--output_dir", str(folder), "--resume"]
        ranks(run, [*resume, str(folder), *others], Signals({5: signal.SIGTERM}))
        two_ranks(run, [*resume, "auto"])
        for name in ("loss", "grad_norm"):
            ours, theirs = ([line[name] for line in lines(f)] for f in (folder, whole))
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(adapter(folder), adapter(whole), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_packed_rows_with_fp16s_scaler_resume_on_another_number_of_ranks(
    source, one_rank, two_ranks, tmp_path
):
    """From 2 ranks to 1 and back, within an epoch. No dropout: its random numbers depend on the rank."""
    argv, whole, folder = [*source, *NOISY, "--lora_dropout", "0"], tmp_path / "whole", tmp_path / "run"
    two_ranks(run, [*argv, "--output_dir", str(whole)])
    again = [*argv, "--output_dir", str(folder), "--resume", "auto"]
    two_ranks(run, again, Signals({2: signal.SIGTERM}))
    one_rank(run, [*again, "--gradient_accumulation_steps", "4"], Signals({4: signal.SIGTERM}))
    two_ranks(run, again)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5]
    assert [line["tokens"] for line in lines(folder)] == [line["tokens"] for line in lines(whole)]
    for name in ("loss", "grad_norm"):
        ours, theirs = ([line[name] for line in lines(f)] for f in (folder, whole))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-3, atol=0)


def test_a_checkpoint_holds_no_frozen_weights(stopped):
    tensors = checkpoint_files.read_checkpoint(checkpoint_folder(stopped, 3)).tensors
    kinds = {name.rpartition(".")[2] for name in tensors if not name.startswith("random.")}
    assert kinds == {"lora_A", "lora_B", "magnitude_change"}
    assert {name.partition("@")[0] for name in tensors if name.startswith("random.")} >= {"random.cpu"}


def test_wandb_continues_its_run(source, one_rank, tmp_path):
    argv = [*source, *QUIET, "--max_steps", "4", "--output_dir", str(tmp_path), "--resume", "auto"]
    argv += ["--log_to", "wandb"]
    one_rank(run, argv, Signals({2: signal.SIGTERM}))
    time.sleep(1.1)  # wandb names its folders by the second
    one_rank(run, argv)
    steps = {}
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    for file in files:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
            if record.WhichOneof("record_type") == "history":
                steps.setdefault(run_id, []).append(record.history.step.num)
    assert len(files) == 2 and list(steps.values()) == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["tracker"].update(wandb="lr 1e-3.v2"),  # wandb allows it
        # Keys that checkpoints of older versions lack.
        lambda parts: [parts["evaluator"].pop(name) for name in ("kept_step", "kept_loss")],
        lambda parts: parts["guard"].pop("applied"),
    ],
)
def test_unusual_but_valid_checkpoints_are_accepted(change, source, copied):
    edit_copied_manifest(copied, lambda manifest: change(manifest["run"]["parts"]))
    assert check_resumed_job(source, copied).saved.step == 3


def test_evaluation_is_resumed(source, two_ranks, tmp_path):
    """At a learning rate of 0 no evaluation beats the first; after one more the run stops early."""
    argv = [*source, *QUIET, "--lr", "0", "--eval_share", "0.2", "--eval_every", "2", "--sample_every", "4"]
    argv += ["--early_stopping_patience", "1", "--sample_tokens", "2"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    two_ranks(run, [*argv, "--output_dir", str(whole)])
    again = [*argv, "--output_dir", str(folder), "--resume", "auto", "--save_every", "3"]
    two_ranks(run, again, Signals({3: signal.SIGTERM}))
    (folder / "best").rename(folder / "best.old")  # interrupted between two renames
    for _ in range(2):  # the second time nothing is left to do
        assert "stopped at step 4 of 7: 1 evaluations were no better" in two_ranks(run, again)[0]
        assert repeatable_metrics(folder) == repeatable_metrics(whole) and len(lines(whole)) == 4
        assert json.loads((folder / "best" / "evaluation.json").read_text())["step"] == 2
        assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert checkpoint_steps(folder) == [4, 3]


def test_a_time_limit_and_regular_checkpoints(source, one_rank, tmp_path):
    argv = [*source, *QUIET, "--output_dir", str(tmp_path / "run"), "--resume", "auto", "--save_every", "2"]
    argv += ["--keep", "3"]
    printed = one_rank(run, [*argv, "--max_minutes", "0.0001"])[0]
    assert "stopped at step 1 of 7 (--max_minutes)" in printed and "python train.py --config" in printed
    ((printed, seconds),) = one_rank(run_and_time, argv)
    assert re.search(r"checkpoints: 4; training paused for 0\.\d+ s for each, 0\.\d+ s at most\n", printed)
    assert len(seconds) == 4 and min(seconds) > 0
    assert checkpoint_steps(tmp_path / "run") == [7, 6, 4]


def run_and_time(rank_info, argv: list[str]) -> tuple[str, list[float]]:
    """Return (what the run printed, the seconds of its saves that --max_minutes got)."""
    seconds, before = [], StopRequests.record_save
    StopRequests.record_save = lambda _, each, complete=True: seconds.append(each) if complete else None
    try:
        return run(rank_info, argv), seconds
    finally:
        StopRequests.record_save = before


@pytest.mark.parametrize("checked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_costs_only_one_checkpoint(checked, source, undisturbed, two_ranks, small_disk):
    argv = [*source, *QUIET, "--output_dir", str(small_disk / "run"), "--save_every", "2", "--keep", "1"]
    printed = two_ranks(run, argv, DiskFiller(small_disk, 4, 6, checked))[0]
    assert "WARNING: the checkpoint of step 4 could not be written" in printed
    assert "No space left" in printed and "the checkpoint of step 2 stays, and training goes on" in printed
    assert checkpoint_steps(small_disk / "run") == [7]
    assert not list((small_disk / "run" / "checkpoints").glob("*.tmp"))
    assert repeatable_metrics(small_disk / "run") == repeatable_metrics(undisturbed)


def test_lines_are_held_while_the_disk_is_full(small_disk):
    config, _ = parse(["--output_dir", str(small_disk), "--log_to", "stdout"])
    tracker = make_tracker(config, 0, 3, {})
    step = dict.fromkeys(("epoch", "loss", "lr", "grad_norm", "step_seconds", "tokens_per_second"), 1.0)
    step |= dict.fromkeys(("tokens", "trained_tokens", "memory_allocated_gib", "memory_reserved_gib"), 1)
    tracker.log(Metrics(**step, step=1))
    fill(small_disk)
    for number in range(2, 40):  # the first ones still fit into the file's last page
        tracker.log(Metrics(**step, step=number))
    held = tracker.state_dict()["held"]
    assert held.endswith("\n") and '"step": 39' in held
    # Complete lines, since a resumed run and report.py read them.
    written = [line["step"] for line in lines(small_disk)]
    assert written + [json.loads(line)["step"] for line in held.splitlines()] == list(range(1, 40))
    (small_disk / "others").unlink()
    tracker.log(Metrics(**step, step=40))
    assert [line["step"] for line in lines(small_disk)] == list(range(1, 41))


def test_held_lines_are_restored_when_a_run_resumes(source, copied, undisturbed, two_ranks):
    """In the file, and in the count that is printed at the end."""
    *written, last = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]

    def hold(manifest: dict) -> None:
        manifest["run"]["files"]["metrics.jsonl"] = len("".join(written))
        manifest["run"]["parts"]["tracker"]["held"] = last

    edit_copied_manifest(copied, hold)
    printed = two_ranks(run, [*source, *QUIET, "--output_dir", str(copied), "--resume", "auto"])[0]
    assert "7 steps, the last 4 of them" in printed
    assert repeatable_metrics(copied) == repeatable_metrics(undisturbed)


# Determinism


def deterministic(rank_info, argv: list[str], folder: str) -> bool:
    """Return whether a resumed run equals an uninterrupted one, in one process."""
    run(rank_info, [*argv, "--output_dir", f"{folder}/whole"])
    again = [*argv, "--output_dir", f"{folder}/run", "--resume", "auto"]
    run(rank_info, again, Signals({1: signal.SIGTERM}))
    run(rank_info, again)
    return repeatable_metrics(Path(folder, "whole")) == repeatable_metrics(Path(folder, "run"))


def test_one_process_repeats_itself(source, one_rank, tmp_path):
    assert one_rank(deterministic, [*source, *NOISY, "--max_steps", "3"], str(tmp_path)) == [True]


def test_the_option_refuses_nondeterministic_operations(source, one_rank, tmp_path):
    argv = [*source, *QUIET, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    one_rank(run, argv, expect_deterministic)


def expect_deterministic(rank_info, step: int) -> None:
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


class RunWhileLocked:
    """A run in a folder that another run has locked."""

    def __init__(self, folder: Path):
        self.other = FolderLock(folder)

    def __call__(self, rank_info, argv: list[str]) -> str:
        with self.other, mock.patch.object(lock, "WAIT_SECONDS", 0.5):
            self.other.acquire()
            try:
                return run(rank_info, argv)
            except UserError as e:
                return str(e)


def test_a_second_run_does_not_write_in_a_locked_folder(source, copied, one_rank):
    argv = [*source, *QUIET, "--output_dir", str(copied), "--gradient_accumulation_steps", "4"]
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for how in (["--overwrite"], ["--resume", "auto"]):
        errors = one_rank(RunWhileLocked(copied), [*argv, *how])
        assert errors == [f"--output_dir {copied}: another run is writing in it"]
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    one_rank(run, [*argv, "--resume", "auto"])


class RunAfterChange:
    """A run whose folder another run changes after the check, before it is opened."""

    def __init__(self, change):
        self.change = change

    def __call__(self, rank_info, argv: list[str]) -> str:
        job = train.check_run(parse([*argv, "--world_size", "1"])[0])
        self.change(Path(job.config.output_dir))
        try:
            return full_run(rank_info, job)
        except UserError as e:
            return str(e)


def finish_other_run(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("of another")


def prune_by_other_run(folder: Path) -> None:
    (checkpoint_folder(folder, 3) / "manifest.json").unlink()
    (folder / "adapter_config.json").write_text("of another")


@pytest.mark.parametrize(
    ("is_resumed", "options", "change", "words"),
    [
        (False, [], finish_other_run, "holds a run already"),
        (False, ["--resume", "auto"], finish_other_run, "holds a finished run without checkpoints"),
        (
            True,
            ["--resume", "auto"],
            prune_by_other_run,
            "another run wrote there in the meantime; run the command again",
        ),
    ],
    ids=["new", "from the start", "resumed"],
)
def test_files_of_another_run_since_the_check_stay(
    is_resumed, options, change, words, source, copied, one_rank, tmp_path
):
    folder = copied if is_resumed else tmp_path / "new"
    argv = [*source, *QUIET, "--output_dir", str(folder), "--gradient_accumulation_steps", "4", *options]
    assert words in one_rank(RunAfterChange(change), argv)[0]
    assert (folder / "adapter_config.json").read_text() == "of another"


# torchrun --max-restarts


def test_a_restart_resumes(source, copied, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config, _ = parse([*source, *QUIET, "--output_dir", str(copied), "--world_size", "2", "--overwrite"])
    assert train.check_run(config).saved.step == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(UserError, match=r"--overwrite: .* has checkpoints, which a restart by torchrun"):
        train.check_run(config)
    shutil.rmtree(copied / "checkpoints")
    assert train.check_run(config).saved is None
    with pytest.raises(UserError, match="--output_dir: is needed under torchrun --max-restarts"):
        train.check_run(parse([*source, *QUIET, "--world_size", "2"])[0])
