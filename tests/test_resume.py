"""A run that was stopped goes on as the run that was not: the same losses and weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import checkpoint_files
import checkpoints
import resume
import train
from checkpoint_files import folder_of, steps_in
from command_line import parse
from config import UserError
from precision import choose_precision
from stopping import Stopping
from tests.hostile_checkpoints import Pickled, edit
from tests.resuming import NOISY, QUIET, Filling, Signals, adapter, fill, lines, repeated, run
from tests.wandb_files import wandb_records
from tracking import Metrics, make_tracker


@pytest.fixture(scope="module")
def stopped(source, two_ranks, tmp_path_factory):
    """A RUN that was stopped at its third step, for copying."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    two_ranks(run, [*source, *QUIET, "--output_dir", str(folder)], Signals({3: signal.SIGTERM}))
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, two_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    two_ranks(run, [*source, *QUIET, "--output_dir", str(folder)])
    return folder


def test_a_stopped_run_goes_on_to_the_last_bit(source, two_ranks, tmp_path):
    """With packing, dropout, fp16's scaler and accumulation; stopped within both epochs, and cut
    within a line of metrics.jsonl."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    two_ranks(run, [*source, *NOISY, "--output_dir", str(whole)])
    again = [*source, *NOISY, "--output_dir", str(folder), "--resume", "auto"]
    printed = two_ranks(run, again, Signals({2: signal.SIGUSR1, 3: signal.SIGTERM}))[0]
    assert "stopped at step 3 of 8 (SIGTERM); go on with:" in printed
    assert steps_in(folder) == [3, 2] and not (folder / "adapter_model.safetensors").exists()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')
    assert "stopped at step 7 of 8 (SIGINT)" in two_ranks(run, again, Signals({7: signal.SIGINT}))[0]
    assert "8 steps, the last 1 of them in" in two_ranks(run, again)[0]
    assert repeated(folder) == repeated(whole) and len(lines(folder)) == 8
    ours, theirs = adapter(folder), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    two_ranks(run, again)  # nothing is left to do
    assert repeated(folder) == repeated(whole)


def test_another_number_of_ranks_changes_rounding_only(
    source, stopped, undisturbed, one_rank, two_ranks, four_ranks, tmp_path
):
    """From 2 ranks to 1 and to 4, of which the last has no row of an adapter's A; from there to 2."""
    for ranks, accumulation in ((one_rank, 4), (four_ranks, 1)):
        folder = tmp_path / f"on {ranks.world}"
        shutil.copytree(stopped, folder)
        argv = [*source, *QUIET, "--output_dir", str(folder), "--resume", str(folder)]
        argv += ["--sharding_strategy", "shard_grad_op", "--gradient_accumulation_steps", str(accumulation)]
        ranks(run, argv, Signals({5: signal.SIGTERM}))
        two_ranks(run, [*source, *QUIET, "--output_dir", str(folder), "--resume", "auto"])
        for name in ("loss", "grad_norm"):
            ours, theirs = ([line[name] for line in lines(f)] for f in (folder, undisturbed))
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(adapter(folder), adapter(undisturbed), rtol=1e-3, atol=1e-4)


def test_a_checkpoint_holds_no_frozen_weights(stopped):
    tensors = checkpoint_files.read_checkpoint(folder_of(stopped, 3)).tensors
    kinds = {name.rpartition(".")[2] for name in tensors if not name.startswith("random.")}
    assert kinds == {"lora_A", "lora_B", "magnitude_change"}
    assert {name.partition("@")[0] for name in tensors if name.startswith("random.")} >= {"random.cpu"}


def test_wandb_goes_on_with_its_run(source, one_rank, tmp_path):
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
        lambda parts: [
            parts["evaluator"].pop(name) for name in ("kept_step", "kept_loss")
        ],  # of an older version
    ],
)
def test_a_checkpoint_that_is_right_is_accepted(change, source, copied):
    lie(copied, lambda manifest: change(manifest["run"]["parts"]))
    assert resumed(source, copied).saved.step == 3


def test_evaluation_goes_on(source, two_ranks, tmp_path):
    """At a rate of 0 no evaluation is better than the first, which is the best; after one more the run stops early."""
    argv = [*source, *QUIET, "--lr", "0", "--eval_share", "0.2", "--eval_every", "2", "--sample_every", "4"]
    argv += ["--early_stopping_patience", "1", "--sample_tokens", "2"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    two_ranks(run, [*argv, "--output_dir", str(whole)])
    again = [*argv, "--output_dir", str(folder), "--resume", "auto", "--save_every", "3"]
    two_ranks(run, again, Signals({3: signal.SIGTERM}))
    (folder / "best").rename(folder / "best.old")  # as a cut between two renames leaves it
    for _ in range(2):  # the second time nothing is left
        assert "stopped at step 4 of 7: 1 evaluations were no better" in two_ranks(run, again)[0]
        assert repeated(folder) == repeated(whole) and len(lines(whole)) == 4
        assert json.loads((folder / "best" / "evaluation.json").read_text())["step"] == 2
        assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert steps_in(folder) == [4, 3]


def test_a_limit_of_time_and_regular_checkpoints(source, one_rank, tmp_path):
    argv = [*source, *QUIET, "--output_dir", str(tmp_path / "run"), "--resume", "auto", "--save_every", "2"]
    argv += ["--keep", "3"]
    printed = one_rank(run, [*argv, "--max_minutes", "0.0001"])[0]
    assert "stopped at step 1 of 7 (--max_minutes)" in printed and "python train.py --config" in printed
    ((printed, seconds),) = one_rank(run_and_time, argv)
    assert "checkpoints: 4; training stood still for 0." in printed
    assert len(seconds) == 4 and min(seconds) > 0
    assert steps_in(tmp_path / "run") == [7, 6, 4]


def run_and_time(place, argv: list[str]) -> tuple[str, list[float]]:
    """(what the run printed, what --max_minutes was told of its checkpoints)."""
    seconds, before = [], Stopping.saved_in
    Stopping.saved_in = lambda _, each: seconds.append(each)
    try:
        return run(place, argv), seconds
    finally:
        Stopping.saved_in = before


@pytest.mark.parametrize("checked", [True, False])
def test_a_full_disk_costs_a_checkpoint_and_no_more(checked, source, undisturbed, two_ranks, small_disk):
    argv = [*source, *QUIET, "--output_dir", str(small_disk / "run"), "--save_every", "2", "--keep", "1"]
    printed = two_ranks(run, argv, Filling(small_disk, 4, 6, checked))[0]
    assert "WARNING: the checkpoint of step 4 could not be written" in printed
    assert "No space left" in printed and "the checkpoint of step 2 stays, and training goes on" in printed
    assert steps_in(small_disk / "run") == [7]
    assert not list((small_disk / "run" / "checkpoints").glob("*.tmp"))
    assert repeated(small_disk / "run") == repeated(undisturbed)


def test_lines_of_a_full_disk_are_held(small_disk):
    config, _ = parse(["--output_dir", str(small_disk), "--log_to", "stdout"])
    tracker = make_tracker(config, 0, 3, {})
    step = dict.fromkeys(("epoch", "loss", "lr", "grad_norm", "step_seconds", "tokens_per_second"), 1.0)
    step |= dict.fromkeys(("tokens", "trained_tokens", "memory_allocated_gib", "memory_reserved_gib"), 1)
    tracker.log(Metrics(**step, step=1))
    fill(small_disk)
    for number in range(2, 40):  # the first still fit into the page of the file's end
        tracker.log(Metrics(**step, step=number))
    held = tracker.state_dict()["held"]
    assert held.endswith("\n") and '"step": 39' in held
    there = [
        line["step"] for line in lines(small_disk)
    ]  # whole lines, as a resumed run and report.py read them
    assert there + [json.loads(line)["step"] for line in held.splitlines()] == list(range(1, 40))
    (small_disk / "others").unlink()
    tracker.log(Metrics(**step, step=40))
    assert [line["step"] for line in lines(small_disk)] == list(range(1, 41))


def test_lines_that_were_held_are_there_when_a_run_goes_on(source, copied, undisturbed, two_ranks):
    """In its file and in what is told at its end."""
    *there, last = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]

    def hold(manifest: dict) -> None:
        manifest["run"]["files"]["metrics.jsonl"] = len("".join(there))
        manifest["run"]["parts"]["tracker"]["held"] = last

    lie(copied, hold)
    printed = two_ranks(run, [*source, *QUIET, "--output_dir", str(copied), "--resume", "auto"])[0]
    assert "7 steps, the last 4 of them" in printed
    assert repeated(copied) == repeated(undisturbed)


# What is not the same run


def resumed(source, folder: Path, *more: str):
    """The checked job of going on with a copy of `stopped`, in the 2 ranks that it had."""
    config, _ = parse(
        [*source, *QUIET, "--output_dir", str(folder), "--world_size", "2", "--resume", "auto", *more]
    )
    return train.check(config)


@pytest.fixture
def copied(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


OTHERS = {
    "--lora_rank 8": "the run has --lora_rank 6, not 8",
    "--train_type qlora": "--train_type bnb_dora, not qlora",
    "--lr 1e-3": "--lr 0.01, not 0.001",
    "--seed 1": "--seed 42, not 1",
    "--precision bf16": "--precision auto, not bf16",
    "--optimizer adam": "--optimizer adamw, not adam",
    "--eval_share 0.5": "--eval_share 0.0, not 0.5",
    "--context_length 200": "--context_length 256, not 200",
    "--batch_size 2": "has 4 rows; 2 processes x --batch_size 2 x --gradient_accumulation_steps 2 would make it 8",
    "--world_size 1": "has 4 rows; 1 processes",
    "--resume /nonexistent": "/nonexistent: no such folder",
    "--resume .": "a run goes on in its own folder",
}


@pytest.mark.parametrize("option", OTHERS)
def test_another_run_is_refused(option, source, copied):
    with pytest.raises(UserError) as refused:
        resumed(source, copied, *option.split())
    assert OTHERS[option] in str(refused.value)


def test_another_machines_precision_is_refused(source, copied, monkeypatch):
    """auto is fp16 on GPUs without bf16, and no run of a CPU's fp32 goes on there."""
    assert resumed(source, copied, "--precision", "fp32").saved.step == 3, "what auto is here"
    monkeypatch.setattr(resume, "precision_here", lambda name: choose_precision(name, True, False))
    with pytest.raises(
        UserError, match="which on this machine is float32 under autocast to float16, not float32"
    ):
        resumed(source, copied)


FREE = "--max_steps 9 --save_every 5 --log_to tqdm --wrap_policy sublayer --use_gradient_checkpointing false"


@pytest.mark.parametrize("where", ["auto", "run", "checkpoint"])
def test_what_changes_no_result_may_change(where, source, copied, capsys):
    paths = {"auto": "auto", "run": str(copied), "checkpoint": str(folder_of(copied, 3))}
    job = resumed(source, copied, *FREE.split(), "--resume", paths[where])
    assert job.saved.step == 3 and job.saved.folder == folder_of(copied, 3)
    assert "--max_steps 9 instead of 7: the learning rate follows it" in capsys.readouterr().out


def test_other_data_are_refused(source, copied, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(Path(source[3]).read_text().replace("Say red", "Say rot", 1))
    with pytest.raises(UserError, match="no longer makes the rows that the run began with"):
        resumed(source, copied, "--dataset", str(other))
    other.write_text(Path(source[3]).read_text())
    assert resumed(source, copied, "--dataset", str(other)).saved.step == 3, "the same rows from elsewhere"


def test_another_model_is_refused(source, copied, tmp_path):
    other = shutil.copytree(source[1], tmp_path / "other")
    assert resumed(source, copied, "--model_name", str(other)).saved.step == 3
    file = sorted(other.glob("*.safetensors"))[0]
    tensors = load_file(file)
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not the model that the run began with"):
        resumed(source, copied, "--model_name", str(other))


def test_a_run_without_its_metrics_is_refused(source, copied):
    path = copied / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"metrics.jsonl: is missing or cut: it ends before step 3"):
        resumed(source, copied)


@pytest.mark.parametrize("name", checkpoint_files.GROWING_FILES)
def test_a_link_among_its_files_is_not_followed(name, source, copied, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(10**6))
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(other)
    with pytest.raises(UserError, match=f"{name}: is a link"):
        resumed(source, copied)


def test_a_damaged_checkpoint_is_refused_or_passed_over(source, copied, capsys):
    (folder_of(copied, 3) / "rank-00001.safetensors").unlink()
    for path in (copied, folder_of(copied, 3)):
        with pytest.raises(UserError, match="no whole checkpoint"):
            resumed(source, copied, "--resume", str(path))
    assert resumed(source, copied).saved is None  # from the start
    assert "step-00000003: no whole checkpoint (rank-00001.safetensors" in capsys.readouterr().out
    (copied / "adapter_config.json").touch()
    with pytest.raises(UserError, match="holds a finished run without checkpoints"):
        resumed(source, copied)


def lie(folder: Path, change) -> None:
    """In the manifest of the copy's checkpoint, which is whole all the same."""
    edit(folder_of(folder, 3), change)


A = "model.model.layers.0.self_attn.q_proj.lora_A"
LIES = {
    "nothing of the run": (lambda m: m["run"].clear(), "is no checkpoint of this program"),
    "a parameter more": (lambda m: m["tensors"].update({A + "x": m["tensors"][A]}), "holds other parameters"),
    "a parameter less": (lambda m: m["tensors"].pop(A), "holds other parameters"),
    "a state of nothing": (
        lambda m: m["tensors"].update({"optimizer.x.y": m["tensors"][A]}),
        "other parameters",
    ),
    "a shape": (lambda m: m["tensors"][A].update(shape=[9, 9]), "cannot be loaded"),
    "a chunk": (lambda m: m["tensors"][A]["chunks"][0][1].reverse(), "cannot be loaded"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_checkpoint_that_lies_ends_in_a_line(kind, source, copied, two_ranks):
    change, reason = LIES[kind]
    lie(copied, change)
    for error in two_ranks(refused, [*source, *QUIET, "--output_dir", str(copied), "--resume", "auto"]):
        assert reason in error and str(folder_of(copied, 3)) in error


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of each file of the copy's checkpoint, which is whole all the same."""

    def fit(manifest: dict) -> None:
        for i, path in enumerate(sorted(folder_of(folder, 3).glob("rank-*"))):
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
            manifest["files"][i] = dataclasses.asdict(checkpoint_files._measure(path))
            for name, tensor in tensors.items():
                manifest["tensors"][name]["dtype"] = str(tensor.dtype).removeprefix("torch.")

    lie(folder, fit)


SPOILT = {
    "NaN": (lambda t: t[A].view(-1)[3].fill_(math.nan), "holds NaN"),
    "NaN in a moment": (lambda t: t[A.replace("model", "optimizer.exp_avg", 1)].fill_(math.nan), "holds NaN"),
    "another dtype": (lambda t: t.update({A: t[A].double()}), "holds other parameters"),
    "random states of none": (
        lambda t: [x.fill_(255) for n, x in t.items() if "random" in n],
        "cannot be loaded (random.cpu@",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_tensors_that_no_run_has_end_in_a_line(kind, source, copied, two_ranks):
    change, reason = SPOILT[kind]
    rewrite(copied, change)
    argv = [*source, *QUIET, "--output_dir", str(copied), "--resume", "auto"]
    error = two_ranks(refused_by_loading, argv)[0]
    assert error and reason in error and str(folder_of(copied, 3)) in error


def refused_by_loading(place, argv: list[str]) -> str:
    """`refused`, but before a rank trains, while which it would wait for one that was refused."""
    restore = checkpoints.restore

    def stopped(saved, model, optimizer, rank, group) -> None:
        try:
            restore(saved, model, optimizer, rank, group)
        except UserError as e:
            error = str(e)
        else:
            error = ""
        raise UserError(error)

    checkpoints.restore = stopped
    try:
        return refused(place, argv)
    finally:
        checkpoints.restore = restore


def test_a_pickle_beside_a_checkpoint_is_not_read(source, copied, two_ranks, tmp_path):
    """The one that torch.distributed.checkpoint's own storage would load, and so do what stands in it."""
    (folder_of(copied, 3) / ".metadata").write_bytes(pickle.dumps(Pickled(tmp_path / "pwned")))
    argv = [*source, *QUIET, "--output_dir", str(copied), "--resume", str(folder_of(copied, 3))]
    assert "7 steps, the last 4 of them" in two_ranks(run, argv)[0]
    assert not (tmp_path / "pwned").exists()
    with contextlib.suppress(Exception):
        dcp.FileSystemReader(folder_of(copied, 3)).read_metadata()
    assert (tmp_path / "pwned").exists(), "or it would be no trap"


def refused(place, argv: list[str]) -> str:
    try:
        run(place, argv)
    except UserError as e:
        return str(e)


# Determinism


def deterministic(place, argv: list[str], folder: str) -> bool:
    """Whether a run that was stopped repeats one that was not, in a process that may be the only one of a GPU."""
    run(place, [*argv, "--output_dir", f"{folder}/whole"])
    again = [*argv, "--output_dir", f"{folder}/run", "--resume", "auto"]
    run(place, again, Signals({1: signal.SIGTERM}))
    run(place, again)
    return repeated(Path(folder, "whole")) == repeated(Path(folder, "run"))


def test_one_process_repeats_itself(source, one_rank, tmp_path):
    assert one_rank(deterministic, [*source, *NOISY, "--max_steps", "3"], str(tmp_path)) == [True]


def test_the_option_refuses_what_does_not_repeat(source, one_rank, tmp_path):
    argv = [*source, *QUIET, "--max_steps", "1", "--deterministic", "--output_dir", str(tmp_path / "run")]
    one_rank(run, argv, expect_deterministic)


def expect_deterministic(place, step: int) -> None:
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# torchrun --max-restarts


def test_a_restart_goes_on(source, copied, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config, _ = parse([*source, *QUIET, "--output_dir", str(copied), "--world_size", "2", "--overwrite"])
    assert train.check(config).saved.step == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train.check(config).saved is None
    with pytest.raises(UserError, match="--output_dir: is needed under torchrun --max-restarts"):
        train.check(parse([*source, *QUIET, "--world_size", "2"])[0])
