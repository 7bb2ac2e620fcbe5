"""--effective_batch_size: the accumulation or the batch that follows from it, and wrong numbers."""

from __future__ import annotations

import dataclasses

import pytest

from options.config import dump_yaml
from options.declaration import AUTO
from options.errors import UserError
from options.train import parse
from training.step_sizes import list_batches, settle_effective_batch


def settled(argv: str, world: int = 2):
    config, _ = parse(argv.split())
    return settle_effective_batch(dataclasses.replace(config, world_size=world))


@pytest.mark.parametrize(
    ("argv", "batch", "accumulation"),
    [
        ("--effective_batch_size 24 --batch_size 3", 3, 4),
        ("--effective_batch_size 24 --gradient_accumulation_steps 4", 3, 4),
        ("--effective_batch_size 24 --batch_size 3 --gradient_accumulation_steps 4", 3, 4),
        ("--effective_batch_size 24 --batch_size auto", AUTO, AUTO),
        ("--effective_batch_size 24 --batch_size auto --gradient_accumulation_steps 5", AUTO, AUTO),
        ("--batch_size auto --gradient_accumulation_steps 5", AUTO, 5),
        ("--effective_batch_size 24", 8, None),  # the default batch of the demo
        ("--effective_batch_size 24 --model_name some/model", 1, 12),  # that of other models
    ],
)
def test_what_is_not_given_follows(argv, batch, accumulation):
    if accumulation is None:
        with pytest.raises(UserError, match=r"2 processes x --batch_size 8 = 16$"):
            settled(argv)
        return
    config = settled(argv)
    assert (config.batch_size, config.gradient_accumulation_steps) == (batch, accumulation)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            "--effective_batch_size 25 --batch_size auto",
            "25: must be a multiple of the 2 processes; 24 or 26 would",
        ),
        ("--effective_batch_size 1", "1: must be a multiple of the 2 processes; 2 would be"),
        (
            "--effective_batch_size 24 --batch_size 5",
            "24: must be a multiple of 2 processes x --batch_size 5 = 10",
        ),
        (
            "--effective_batch_size 24 --gradient_accumulation_steps 5",
            "x --gradient_accumulation_steps 5 = 10",
        ),
        (
            "--effective_batch_size 24 --batch_size 4 --gradient_accumulation_steps 4",
            "2 processes x --batch_size 4 x --gradient_accumulation_steps 4 are 32; leave one of the three",
        ),
    ],
)
def test_numbers_that_do_not_agree_are_refused(argv, line):
    with pytest.raises(UserError) as error:
        settled(argv)
    assert line in str(error.value)


SIZES = ("effective_batch_size", "batch_size", "gradient_accumulation_steps")


@pytest.mark.parametrize(
    ("typed", "world", "sizes"),
    [
        ("", 2, (24, 3, 4)),  # the repetition
        ("--batch_size 4", 2, (24, 4, 3)),
        ("--effective_batch_size 48", 2, (48, 3, 8)),
        ("--world_size 4", 4, (24, 3, 2)),
        ("--resume auto", 8, (24, 3, 1)),  # under torchrun, on other GPUs
        ("--gradient_accumulation_steps 2", 2, (24, 6, 2)),
        ("--batch_size auto", 2, (24, AUTO, AUTO)),
        ("--batch_size 5 --gradient_accumulation_steps 1", 2, (None, 5, 1)),
    ],
)
def test_what_is_typed_displaces_the_sizes_of_a_runs_config(typed, world, sizes, tmp_path):
    """config.yaml records three numbers of which one follows from the others."""
    config = settled("--effective_batch_size 24 --batch_size 3", world=2)
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    (tmp_path / "run.json").write_text("{}")
    found = settled(f"--config {tmp_path / 'config.yaml'} {typed}", world)
    assert tuple(getattr(found, name) for name in SIZES) == sizes
    if not typed:
        assert found == dataclasses.replace(config, output_dir=str(tmp_path))


def test_three_numbers_of_another_file_must_agree(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("effective_batch_size: 24\nbatch_size: 4\ngradient_accumulation_steps: 4\n")
    with pytest.raises(UserError, match="x --gradient_accumulation_steps 4 are 32; leave one of the three"):
        settled(f"--config {path}")
    assert settled(f"--config {path} --batch_size 3").gradient_accumulation_steps == 4
    with pytest.raises(UserError, match="leave one of the three"):
        settled(f"--config {path} --batch_size 4 --gradient_accumulation_steps 4 --effective_batch_size 24")


def test_batches_divide_the_effective_one_and_none_exceeds_the_data():
    config = settled("--effective_batch_size 24 --batch_size auto")
    assert list_batches(config, items=1000) == [1, 2, 3, 4, 6, 12]
    assert list_batches(config, items=7) == [1, 2, 3, 4]
    config = settled("--batch_size auto --gradient_accumulation_steps 2")
    assert list_batches(config, items=17) == [1, 2, 3, 4, 5]
    assert list_batches(config, items=1000, most=3) == [1, 2, 3]


def test_auto_is_read_from_a_file_and_other_texts_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: auto\ncontext_length: AUTO\n")
    config, _ = parse(["--config", str(path)])
    assert config.unsettled == ["batch_size", "context_length"]
    with pytest.raises(UserError, match=r"^--batch_size: 'many' is not a whole number, or auto$"):
        parse(["--batch_size", "many"])
    with pytest.raises(UserError, match=r"^--batch_size -1: must be positive$"):
        parse(["--batch_size", "-1"])
    with pytest.raises(UserError, match=r"^--num_epochs: 'auto' is not a whole number$"):
        parse(["--num_epochs", "auto"])


def test_an_accumulation_that_is_not_read_is_told():
    _, remarks = parse("--effective_batch_size 24 --batch_size auto --gradient_accumulation_steps 5".split())
    assert remarks == [
        "--gradient_accumulation_steps 5: not read; with --batch_size auto it follows from"
        " --effective_batch_size 24"
    ]
