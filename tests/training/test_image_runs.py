"""A run on rows with images that is resumed within an epoch equals one that never stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import train
from checkpoints.storage import checkpoint_folder
from data.image_sizes import FixedImages
from data.images import ImageRef
from options.train import parse
from tests.helpers.adapters import args_for
from tests.helpers.image_models import PROJECTOR
from tests.helpers.picture_rows import make_picture_rows, rows_replaced, write_pictures
from tests.helpers.resuming import adapter, repeatable_metrics
from tests.helpers.runs import full_run

# Of the tiny Gemma 3, tests/helpers/tiny.py.
FORMAT = FixedImages("", 299, (), (0.5, 0.4, 0.6), (0.5, 0.25, 0.4), text="", n_tokens=4, side=16, resample=2)
COUNTS = [1, 0, 0, 2, 0, 0, 0, 1, 3, 0, 0, 0, 1, 0, 2, 0]  # images of each row


def run(rank_info, argv: list[str], refs: list[ImageRef]) -> None:
    """Run the program on rows of COUNTS images."""
    rows = make_picture_rows(refs, COUNTS, FORMAT)
    rows = replace(rows, tokens=torch.where(rows.learned, rows.tokens % 250, rows.tokens))
    with rows_replaced(lambda _: rows):
        job = train.check_run(parse([*argv, "--world_size", str(rank_info.world)])[0])
    try:
        full_run(rank_info, job)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
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
