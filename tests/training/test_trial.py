"""Trials: the real code with random weights and the longest rows, in processes that are gone afterwards."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time

import psutil
import pytest
import torch

import train
from data.fullest_images import fullest_images, max_sequence_pixels
from data.packing import make_sampler
from launch.apart import Launcher
from options.errors import UserError
from options.train import parse
from parallel.layer_graphs import CALLS_BEFORE
from tests.helpers.bnb_checkpoints import QLORA, pack_like_the_hub
from tests.helpers.image_models import FORMAT
from tests.helpers.picture_rows import make_picture_rows, rows_replaced, write_pictures
from tests.helpers.runs import dense_tensors, make_job
from tests.helpers.trials import (
    MOST_TOKENS,
    be_killed,
    be_refused,
    be_wrong,
    never_end,
    run_in_pool,
    try_with_limit,
)
from training.planned_model import open_planned_model
from training.sample_weights import STD, fill_with_samples
from training.trial import Trial, run_trial
from training.trial_rank import SCALER_STEPS
from training.trial_rank import make_job as make_trial_job

TYPES = {
    "full": "qwen2",
    "dora": "llama_bias",
    "bnb_dora": "gemma2",
    "hqq_lora": "phi3",
    "qlora": "qwen3_moe",
    "bnb_llama_pro": "llama_pro",
}


class OneRank:
    rank, world = 0, 1


def make_trial(argv: list, tokens: int = 48, world: int = 1, **changes) -> Trial:
    job = make_job(OneRank, [*argv, "--world_size", world])
    config = dataclasses.replace(job.config, **changes)
    return Trial(config, job.model_config, job.files, tokens, job.rows)


def compare_fills(rank_info, argv: list) -> tuple[dict, dict, dict]:
    """Return {name: (shape, dtype)} of a run's parameters, the same of a trial's, and the trial's weights."""
    job = make_job(rank_info, argv)
    loaded, _ = train.set_up(job, rank_info)
    sampled, _ = train.set_up(job, rank_info, load=fill_with_samples)  # also checks the bytes
    kinds = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (loaded, sampled)]
    return *kinds, dense_tensors(sampled)


def try_options(rank_info, argv: list, folder) -> dict:
    """Make a trial and run it in the same process."""
    job = make_job(rank_info, argv)
    return run_in_pool(rank_info, Trial(job.config, job.model_config, job.files, 48), folder)


@pytest.mark.parametrize("train_type", TYPES)
def test_random_weights_have_the_shapes_and_dtypes_of_the_files(
    checkpoints, short_rows, one_rank, train_type, tmp_path
):
    argv = ["--model_name", checkpoints(TYPES[train_type]), "--dataset", short_rows]
    argv += ["--train_type", train_type]
    loaded, sampled, weights = one_rank(compare_fills, argv)[0]
    assert sampled == loaded
    for name, weight in weights.items():
        assert torch.isfinite(weight).all(), name
        assert weight.dim() == 1 or abs(weight.std() - STD) < STD / 5, name
    record = one_rank(try_options, argv, tmp_path)[0]
    assert record["fits"] and len(record["step_seconds"]) == 2 and record["peak"] > 0


def test_steps_that_fp16s_scaler_skips_are_made_up_for(source, one_rank, tmp_path):
    record = one_rank(try_options, [*source, "--precision", "fp16_autocast"], tmp_path)[0]
    assert len(record["step_seconds"]) == 2 + SCALER_STEPS


@pytest.mark.parametrize("double", [True, False])
def test_weights_that_are_packed_in_the_files_are_sampled_as_they_are(
    checkpoints, short_rows, one_rank, tmp_path, double
):
    pack_like_the_hub(checkpoints("llama"), tmp_path / "packed", double)
    argv = ["--model_name", tmp_path / "packed", "--dataset", short_rows, *QLORA]
    loaded, sampled, weights = one_rank(compare_fills, argv)[0]
    assert sampled == loaded and all(torch.isfinite(weight).all() for weight in weights.values())


def test_ranks_of_a_trial_read_no_weight(checkpoints, short_rows, two_ranks, tmp_path):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "model")
    trial = make_trial(["--model_name", folder, "--dataset", short_rows], world=2)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    records = two_ranks(run_in_pool, trial, tmp_path)
    assert all(record["fits"] for record in records)


def test_a_model_is_tried_that_is_known_by_its_headers(checkpoints, source, one_rank, tmp_path):
    """As plan.py knows it. Headers go to the ranks."""
    planned = open_planned_model(str(checkpoints("qwen2")))
    trial = Trial(make_trial(source).config, planned.model.config, planned.files, tokens=40)
    assert one_rank(run_in_pool, trial, tmp_path)[0]["fits"]


@pytest.mark.parametrize("packing", [False, True])
def test_all_rows_are_as_long_as_the_longest_and_learned(source, packing):
    """With packing the batches have the shapes of the run's: width, and bounds of as many rows."""
    argv = [*source, "--packing", packing, "--context_length", 200, "--batch_size", 3]
    trial = make_trial([*argv, "--gradient_accumulation_steps", 5], tokens=200)
    job, real = make_trial_job(trial), make_job(OneRank, argv)
    steps = list(make_sampler(job.config, job.rows, 0, 1).steps(job.config.num_epochs))
    assert job.total_steps(make_sampler(job.config, job.rows, 0, 1)) == 2 <= len(steps)
    batch, other = steps[0].batches[0], next(make_sampler(real.config, real.rows, 0, 1).steps(1)).batches[0]
    assert job.config.cuda_graphs == "false"  # `auto` takes only memory that is free
    recording = make_trial_job(make_trial([*argv, "--cuda_graphs", "true"], tokens=200)).config
    assert recording.cuda_graphs == "true" and recording.max_steps > CALLS_BEFORE
    assert len(steps[0].batches) == 2  # enough to accumulate gradients
    if packing:
        assert (batch.ids.shape, batch.bounds.shape) == (other.ids.shape, other.bounds.shape)
        firsts = (batch.positions == 0) & (batch.lengths > 0)
        assert (batch.targets >= 0).sum() == (batch.lengths > 0).sum() - firsts.sum()
    else:
        assert batch.ids.shape == (3, 200) and (batch.targets >= 0).sum() == 3 * 199


def launch(trial: Trial, try_rank):
    return run_trial(trial, try_rank, Launcher(trial.config.world_size, "localhost", None))


def test_a_trial_runs_in_processes_that_are_gone_afterwards(source, processes, monkeypatch, capfd):
    """One rank out of memory, or killed, is a result; any other failure is reported as what it is."""
    trial = make_trial(source, tokens=100, world=2)
    monkeypatch.setenv(MOST_TOKENS, "250")
    before = torch.get_rng_state()
    assert launch(dataclasses.replace(trial, config=dataclasses.replace(trial.config, batch_size=2)),
                  try_with_limit).fits  # fmt: skip
    full = dataclasses.replace(trial, config=dataclasses.replace(trial.config, batch_size=3))
    assert not launch(full, try_with_limit).fits
    assert not launch(trial, be_killed).fits
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match=r"^rank [01]: no such thing$"):
        launch(trial, be_refused)
    with pytest.raises(SystemExit) as exit_:
        launch(trial, be_wrong)
    assert exit_.value.code == 1 and "RuntimeError: a defect" in capfd.readouterr().err
    assert torch.equal(torch.get_rng_state(), before)
    assert len(processes) == 10 and not any(psutil.pid_exists(p.pid) for p in processes)


def test_a_signal_ends_the_program_in_a_trial(source, processes, capfd):
    """It goes on to the ranks, like that of a run."""

    def send():
        while len(processes) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(SystemExit) as exit_:
        launch(make_trial(source, world=2), never_end)
    assert exit_.value.code == 128 + signal.SIGTERM and capfd.readouterr().err == "ended by SIGTERM\n"
    assert not any(psutil.pid_exists(p.pid) for p in processes)


COUNTS, LONG = [1, 0, 3, 2], 64  # images of rows, and tokens that none of them has


def trial_of_images(argv: list, refs: list, tokens: int, **changes) -> Trial:
    rows = make_picture_rows(refs, COUNTS, FORMAT)
    rows = dataclasses.replace(rows, tokens=torch.where(rows.learned, rows.tokens % 250, rows.tokens))
    with rows_replaced(lambda _: rows):
        trial = make_trial([*argv, "--images", "true"], tokens, **changes)
    if trial.config.packing:
        return trial
    return dataclasses.replace(
        trial, rows=None, images=fullest_images(rows, tokens), image_format=rows.image_format
    )


@pytest.mark.parametrize("packing", [False, True])
def test_a_trial_has_the_images_of_the_fullest_row(packing, checkpoints, short_rows, one_rank, tmp_path):
    """Rows that are cut keep the images that are whole: two of four tokens in ten."""
    refs = write_pictures(tmp_path, sum(COUNTS))
    argv = ["--model_name", checkpoints("gemma3_wrapper"), "--dataset", short_rows, "--batch_size", 2]
    argv += ["--packing", packing, "--context_length", LONG]
    for tokens, most in ((LONG, 3), (10, 2)):
        trial = trial_of_images(argv, refs, tokens)
        rows = make_trial_job(trial).rows
        counts = [min(count, most) for count in COUNTS] if packing else [most] * len(rows)
        assert rows.image_counts().tolist() == counts and int(rows.lengths().max()) <= tokens
        assert rows.count_image_tokens() == 4 * sum(counts)
        assert not rows.learned[rows.tokens == FORMAT.token_id].any()
    (tmp_path / "records").mkdir()
    assert one_rank(run_in_pool, trial, tmp_path / "records")[0]["fits"]


def test_the_pixels_of_the_fullest_sequence(tmp_path):
    rows = make_picture_rows(write_pictures(tmp_path, sum(COUNTS)), COUNTS, FORMAT)
    image = FORMAT.side**2
    for options, tokens, images in (
        ("", LONG, 3), ("", 10, 2), ("--packing", LONG, 16), ("--packing --images_per_pack 5", LONG, 5),
        ("--packing --images_per_pack 2", LONG, 3), ("--packing --images_per_pack -1", 4 * LONG, 64),
    ):  # fmt: skip
        config, _ = parse(["--model_name", "x", *options.split()])
        assert max_sequence_pixels(config, rows, tokens) == images * image, options
