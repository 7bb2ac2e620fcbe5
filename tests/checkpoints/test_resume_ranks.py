"""A run is resumed with another number of processes."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import storage as checkpoint_files
from checkpoints.storage import checkpoint_folder
from tests.helpers.resuming import QUIET, Signals, adapter, lines, repeatable_metrics, run

# On GPUs too, where bf16 matmuls of other numbers of rows round differently.
EXACT = ["--precision", "fp32", "--compile", "false"]
KINDS = {
    "bnb_dora": ["--train_type", "bnb_dora", "--lora_rank", "6", "--lr", "1e-2"],
    "dora": ["--train_type", "dora", "--lora_rank", "6", "--lr", "1e-2"],
    "full": ["--train_type", "full", "--lr", "1e-3"],
}


# The others are slow, and bnb_dora has all kinds: matrices and vectors, on one rank and sharded unevenly.
@pytest.mark.parametrize(
    "kind", ["bnb_dora", *(pytest.param(k, marks=pytest.mark.slow) for k in ("dora", "full"))]
)
def test_a_run_of_one_rank_resumes_on_two(kind, source, one_rank, two_ranks, tmp_path):
    argv = [*source, *KINDS[kind], *"--batch_size 1 --num_epochs 2 --max_steps 5 --log_to stdout".split()]
    argv += ["--lr_scheduler", "cosine", "--context_length", "256", *EXACT]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    one_rank(run, [*argv, "--gradient_accumulation_steps", "4", "--output_dir", str(whole)])
    again = [*argv, "--output_dir", str(folder), "--resume", "auto"]
    one_rank(run, [*again, "--gradient_accumulation_steps", "4"], Signals({2: signal.SIGTERM}))
    assert (
        "5 steps, the last 3 of them in" in two_ranks(run, [*again, "--gradient_accumulation_steps", "2"])[0]
    )
    for name in ("loss", "grad_norm"):
        ours, theirs = ([line[name] for line in lines(f)] for f in (folder, whole))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=1e-5)
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys() and ours
    # Adam's first steps follow the gradient's sign, even if the gradient is only rounding.
    for name in theirs:
        error = (ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()
        assert error < 1e-3, name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a RUN's result."""
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.slow
def test_8_bit_states_move_to_other_ranks(source, one_rank, two_ranks, tmp_path):
    """One rank has more than 4,096 of 51 x 160 weights, so its state is 8-bit; the other has fewer."""
    argv = [*source, *QUIET, *EXACT, "--optimizer", "adamw_8bit", "--lora_rank", "51", "--resume", "auto"]
    argv += ["--lora_plus_ratio", "2"]
    whole, folder, other = (tmp_path / name for name in ("whole", "run", "other"))
    two_ranks(run, [*argv, "--output_dir", str(whole)])
    again = [*argv, "--output_dir", str(folder)]
    two_ranks(run, again, Signals({2: signal.SIGTERM}))
    shutil.copytree(folder, other)
    kinds = {(name[-1], t["dtype"]) for name, t in states(folder, 2).items()}
    assert kinds == {("0", "uint8"), ("0", "float32"), ("1", "float32")}
    two_ranks(run, again)
    assert repeatable_metrics(folder) == repeatable_metrics(whole)
    again = [*argv, "--output_dir", str(other)]
    one_rank(run, [*again, "--gradient_accumulation_steps", "4"], Signals({4: signal.SIGTERM}))
    assert {name[-1] for name in states(other, 4)} == {"0"}
    two_ranks(run, again)
    for name in ("loss", "grad_norm"):
        ours, theirs = (torch.tensor([line[name] for line in lines(f)]) for f in (other, whole))
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=0)
    ours, theirs = adapter(other), adapter(whole)
    assert max((ours[name] - theirs[name]).norm() / theirs[name].norm() for name in theirs) < 0.02


def states(folder: Path, step: int) -> dict[str, dict]:
    """Return the first moments in a checkpoint: {parameter@rank: manifest entry}."""
    tensors = checkpoint_files.read_checkpoint(checkpoint_folder(folder, step)).tensors
    return {
        n.split(".", 2)[2] + n.split(".", 2)[1]: t
        for n, t in tensors.items()
        if n.startswith("optimizer.state1")
    }
