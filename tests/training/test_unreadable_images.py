"""An image that cannot be read any more ends a run on all ranks with its line, after a checkpoint."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import train
from checkpoints.storage import checkpoint_steps
from data.image_sizes import FixedImages
from data.images import ImageRef, RowImages
from data.packing import make_sampler
from data.pixels import PUT_BACK
from data.rows import TokenizedRows
from options.errors import UserError
from options.train import parse
from tests.helpers.adapters import args_for
from tests.helpers.picture_rows import rows_replaced, write_pictures
from tests.helpers.products import slow
from tests.helpers.resuming import adapter, lines, repeatable_metrics
from training import evaluator, loop_components, preflight

BOS = 256  # each row has one, which stands for the token of an image here


def without(rows: TokenizedRows, ref: ImageRef) -> TokenizedRows:
    """Return the rows without the file of an image."""
    gone = replace(ref, path=f"{ref.path}.gone")
    refs = [gone if each == ref else each for each in rows.images.refs]
    return replace(rows, images=replace(rows.images, refs=refs))


def run_with_images(
    rank_info,
    argv: list[str],
    refs: list[ImageRef],
    unreadable_step: int = 0,
    unreadable: str = "",
) -> tuple[str, str]:
    """Run a model of text whose rows and prompts have an image each; return (output, error line).

    Args:
        rank_info: this process.
        argv: options of train.py.
        refs: the images.
        unreadable_step: the step in which an image of rank 1 is gone; 0 = none.
        unreadable: "evaluation": an image of rank 1's first batch in an evaluation is gone; "samples": that
            of a prompt is, after the samples of step 0.
    """
    image_format = FixedImages("", BOS, (), (0.5,) * 3, (0.5,) * 3, text="", n_tokens=1, side=8, resample=2)

    def add_images(rows):
        images = RowImages([refs[i % len(refs)] for i in range(len(rows))], torch.arange(len(rows) + 1))
        return replace(rows, images=images, image_format=image_format)

    def build_text_alone(config, *_):
        return replace(config, images="false"), ()

    with rows_replaced(add_images), mock.patch.object(preflight, "settle_images", build_text_alone):
        job = train.check_run(parse([*argv, "--world_size", str(rank_info.world)])[0])
    if unreadable_step:
        steps = list(make_sampler(job.config, job.rows, 1, 2).steps(1))
        ref = steps[unreadable_step - 1].batches[-1].planned_images.refs[0]
        job = replace(job, rows=without(job.rows, ref))
    if job.evaluation.rows:
        rows = add_images(job.evaluation.rows)
        if unreadable == "evaluation":
            second = int(rows.lengths().argsort(descending=True, stable=True)[1])
            rows = without(rows, rows.images.refs[second])
        job = replace(job, evaluation=replace(job.evaluation, rows=rows))
    prompts = [replace(prompt, images=(refs[-1],)) for prompt in job.evaluation.prompts]
    job = replace(job, evaluation=replace(job.evaluation, prompts=prompts, image_format=image_format))
    loss_sum, output, error = train.loss_sum, io.StringIO(), ""

    def loss_of_text(model, batch):
        assert len(batch.images.values) == len(batch.ids)
        if unreadable == "samples" and rank_info.rank == 0:
            Path(refs[-1].path).unlink(missing_ok=True)
        return loss_sum(model, replace(batch, images=None))

    replaced = mock.patch.object
    with (
        replaced(train, "loss_sum", loss_of_text),
        replaced(loop_components, "loss_sum", loss_of_text),
        replaced(evaluator, "generate_greedily", lambda model, prompts, *_: [[] for _ in prompts]),
        contextlib.redirect_stdout(output),
    ):
        try:
            train.run_rank(rank_info, job)
        except UserError as e:
            error = str(e)
        finally:
            torch.use_deterministic_algorithms(False)
    return output.getvalue(), error


def test_a_run_ends_with_a_checkpoint_and_resumes(two_ranks, checkpoints, short_rows, tmp_path):
    refs = write_pictures(tmp_path, 64)
    options = "--max_steps 4 --batch_size 1 --gradient_accumulation_steps 2 --log_to stdout --deterministic"
    args = [*args_for(checkpoints(), short_rows, "lora"), *options.split()]
    args = [*map(str, args), "--output_dir"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert [error for _, error in two_ranks(run_with_images, [*args, str(whole)], refs)] == ["", ""]
    assert [line["images"] for line in lines(whole)] == [4] * 4, "of two ranks and two micro-batches"

    (output, error), (_, same) = two_ranks(run_with_images, [*args, str(stopped)], refs, 3)
    assert error == same and error.startswith("--dataset rows.jsonl, row ")
    assert f".png.gone: cannot be read (No such file or directory){PUT_BACK}" in error
    assert "stopped at step 2 of 4 (data that cannot be read); resume with: " in output
    assert checkpoint_steps(stopped) == [2]
    assert not (stopped / "adapter_model.safetensors").exists()

    resumed = two_ranks(run_with_images, [*args, str(stopped), "--resume", "auto"], refs)
    assert [error for _, error in resumed] == ["", ""]
    assert repeatable_metrics(stopped) == repeatable_metrics(whole)
    torch.testing.assert_close(adapter(stopped), adapter(whole), rtol=0, atol=0)


@pytest.mark.parametrize(("unreadable", "last"), [("evaluation", 3), *slow([("samples", 2)])])
def test_an_evaluation_in_a_run_ends_with_a_checkpoint(
    unreadable, last, two_ranks, checkpoints, short_rows, tmp_path
):
    """Also after the last step, whose result is then not saved before the run is resumed."""
    refs = write_pictures(tmp_path, 64)
    options = f"--max_steps {last} --batch_size 1 --log_to stdout"
    args = [*args_for(checkpoints(), short_rows, "lora"), *options.split()]
    out = tmp_path / "out"
    args = [*map(str, args), "--output_dir", str(out)]
    due = {"evaluation": ["--eval_dataset", str(short_rows), "--eval_every", "2"]}
    also = due.get(unreadable, ["--sample_every", "2"])
    (output, error), (_, same) = two_ranks(run_with_images, [*args, *also], refs, 0, unreadable)
    assert error == same and error.startswith("--dataset rows.jsonl, row ")
    assert error.endswith(f": cannot be read (No such file or directory){PUT_BACK}")
    assert f"stopped at step 2 of {last} (data that cannot be read); resume with: " in output
    assert checkpoint_steps(out) == [2] and len(lines(out)) == 2
    assert not (out / "adapter_model.safetensors").exists()

    resumed = two_ranks(run_with_images, [*args, "--resume", "auto"], refs)
    assert [error for _, error in resumed] == ["", ""]
    assert len(lines(out)) == last and (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("when", "step"), [("", 1), ("samples", 0)])
def test_before_the_first_step_there_is_nothing_to_save(
    when, step, two_ranks, checkpoints, short_rows, tmp_path
):
    refs = write_pictures(tmp_path, 64)
    args = [*args_for(checkpoints(), short_rows, "lora"), "--max_steps", "2", "--batch_size", "1"]
    args = [*map(str, args), "--output_dir", str(tmp_path / "out"), "--log_to", "stdout"]
    if when:
        Path(refs[-1].path).unlink()
        args += ["--sample_every", "1"]
    (_, error), (_, same) = two_ranks(run_with_images, args, refs, step, when)
    assert error == same and error.startswith("--dataset rows.jsonl, row ")
    assert error.endswith(f"{PUT_BACK}; no step was done, so there is no checkpoint")
    assert checkpoint_steps(tmp_path / "out") == []


def test_the_first_step_after_a_resume_leaves_the_checkpoint(two_ranks, checkpoints, short_rows, tmp_path):
    refs = write_pictures(tmp_path, 64)
    args = [*args_for(checkpoints(), short_rows, "lora"), "--batch_size", "1", "--save_every", "1"]
    args = [*map(str, args), "--output_dir", str(tmp_path / "out"), "--log_to", "stdout"]
    two_ranks(run_with_images, [*args, "--max_steps", "1"], refs)
    results = two_ranks(run_with_images, [*args, "--max_steps", "2", "--resume", "auto"], refs, 2)
    assert {error.partition(PUT_BACK)[2] for _, error in results} == {"; the checkpoint of step 1 stays"}
    assert checkpoint_steps(tmp_path / "out") == [1]


def test_an_image_that_no_step_needs_is_no_error(two_ranks, checkpoints, short_rows, tmp_path):
    """The step after --max_steps is made ahead, in vain."""
    args = [*args_for(checkpoints(), short_rows, "lora"), "--max_steps", "2", "--batch_size", "1"]
    args = [*map(str, args), "--output_dir", str(tmp_path / "out"), "--log_to", "stdout"]
    results = two_ranks(run_with_images, args, write_pictures(tmp_path, 64), 3)
    assert [error for _, error in results] == ["", ""]
    assert Path(tmp_path, "out", "adapter_model.safetensors").exists()
