"""Runs on rows with images: resumed within an epoch, and with --no_sync, they give what a plain run gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import train
from checkpoints.storage import checkpoint_folder
from data.image_sizes import FixedImages
from data.images import ImageRef
from data.rows import TokenizedRows
from options.train import parse
from tests.helpers.adapters import args_for
from tests.helpers.image_models import IMAGES, PROJECTOR, TOWER
from tests.helpers.parity import arguments, assert_same
from tests.helpers.picture_rows import make_picture_rows, rows_replaced, write_pictures
from tests.helpers.resuming import adapter, repeatable_metrics
from tests.helpers.runs import full_run, train_run

# Of the tiny Gemma 3, tests/helpers/tiny.py.
FORMAT = FixedImages("", 299, (), (0.5, 0.4, 0.6), (0.5, 0.25, 0.4), text="", n_tokens=4, side=16, resample=2)
COUNTS = [1, 0, 0, 2, 0, 0, 0, 1, 3, 0, 0, 0, 1, 0, 2, 0]  # images of each row


FEW = [0] * 9 + [1, 0, 0, 2, 0, 0, 0]


def rows_of(refs: list[ImageRef], counts: list[int]) -> TokenizedRows:
    """Return rows of so many images each, with tokens of the tiny model."""
    rows = make_picture_rows(refs, counts, FORMAT)
    return replace(rows, tokens=torch.where(rows.learned, rows.tokens % 250, rows.tokens))


def run(rank_info, argv: list[str], refs: list[ImageRef]) -> None:
    """Run the program on rows of COUNTS images."""
    with rows_replaced(lambda _: rows_of(refs, COUNTS)):
        job = train.check_run(parse([*argv, "--world_size", str(rank_info.world)])[0])
    try:
        full_run(rank_info, job)
    finally:
        torch.use_deterministic_algorithms(False)


# tests/checkpoints/test_resume.py resumes runs of texts in `make test`.
@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_equals_a_whole_one(packing, two_ranks, checkpoints, short_rows, tmp_path):
    options = (
        "--num_epochs 4 --batch_size 1 --log_to stdout --deterministic --lr 1e-2 --images true --save_every 1"
    )
    more = ["--packing", "--context_length", "64"] if packing else []
    args = [
        *args_for(checkpoints("gemma3_wrapper"), short_rows, "qlora", *PROJECTOR),
        *options.split(),
        *more,
    ]
    args = [*map(str, args), "--max_steps", "5"]
    refs = write_pictures(tmp_path, sum(COUNTS))
    out = tmp_path / "out"
    args += ["--output_dir", str(out)]
    two_ranks(run, [*args, "--keep", "-1"], refs)
    metrics, weights = repeatable_metrics(out), adapter(out)
    two_ranks(run, [*args, "--resume", str(checkpoint_folder(out, 2))], refs)
    assert repeatable_metrics(out) == metrics
    torch.testing.assert_close(adapter(out), weights, rtol=0, atol=0)


def train_on_few(rank_info, argv: list[str], refs: list[ImageRef]):
    """Return `train_run` on rows of FEW images: in most micro-batches no rank has one."""
    with rows_replaced(lambda _: rows_of(refs, FEW)):
        return train_run(rank_info, [*argv, *IMAGES])


# tests/test_parity.py has --no_sync with texts in `make test`.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("train_type", "options"),
    [
        ("bnb_dora", TOWER),
        ("bnb_dora", []),
        ("full", []),
        ("lora", [*TOWER, "--sharding_strategy", "ddp"]),
    ],
)
def test_no_sync_changes_nothing(train_type, options, checkpoints, short_rows, one_rank, two_ranks, tmp_path):
    args = arguments(checkpoints("gemma3_wrapper"), short_rows, train_type, *options)
    args += ["--num_epochs", "2", "--batch_size"]
    refs = write_pictures(tmp_path, sum(FEW))
    plain = one_rank(train_on_few, [*args, "8"], refs)[0]
    small = ["1", "--gradient_accumulation_steps", "4", "--no_sync", "true"]
    assert_same(plain, two_ranks(train_on_few, [*args, *small], refs)[0])
