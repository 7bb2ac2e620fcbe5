"""A disk that is full while best/ or the result is written.

tests/checkpoints/test_resume.py tests a disk that is full while a checkpoint is written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from checkpoints import trained_model
from checkpoints.model_writer import TensorEntry
from checkpoints.storage import checkpoint_folder, checkpoint_steps
from files.atomic_writes import replace_folder, write_text
from files.disk_room import warn_on_full_disk
from files.names import ADAPTER, BEST, BLOCKS, SCORE
from files.tensors import save_tensors
from launch.ranks import RankInfo
from monitoring.messages import describe_best
from monitoring.tracking import NoTracker
from options.errors import UserError, needs_no_traceback
from tests.helpers.products import products
from tests.helpers.programs import small
from tests.helpers.resuming import (
    CHECK_FREE_SPACE,
    DiskFiller,
    contents,
    fill,
    lines,
    repeatable_metrics,
    replace_free_space_check,
    run,
)
from training.evaluator import Evaluator
from training.run_folder import unsaved_error

KINDS = {  # (model, options)
    "bnb_dora": (
        "llama",
        "--train_type bnb_dora --lora_rank 32 --lr 1e-2 --lora_target_modules q_proj,down_proj",
    ),
    "full": ("llama", "--train_type full --lr 1e-3"),
    "bnb_llama_pro": ("llama_pro", "--train_type bnb_llama_pro --lr 1e-3"),
}
# The model of `full` is written tensor by tensor, as the expanded one is.
RUN = "--batch_size 1 --num_epochs 2 --max_steps 6 --context_length 256 --log_to stdout".split()
EVALUATING = "--eval_share 0.2 --eval_every 1".split()


def cases(quick: tuple[str, bool]) -> list:
    """Return (kind, whether free space is checked); all but `quick` are slow. Two tests share the values."""
    others = [*KINDS, True, False]
    return products(KINDS, [True, False], always=[quick], left_out=[v for v in others if v not in quick])


def options(kind: str, checkpoints, short_rows, *more: str) -> list[str]:
    model, text = KINDS[kind]
    return [
        "--model_name",
        str(checkpoints(model)),
        "--dataset",
        str(short_rows),
        *text.split(),
        *RUN,
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(two_ranks, tmp_path_factory):
    """undisturbed(argv) -> the folder of such a run, made once."""
    made: dict[tuple, Path] = {}

    def get(argv: list[str]) -> Path:
        if tuple(argv) not in made:
            made[tuple(argv)] = folder = tmp_path_factory.mktemp("undisturbed") / "whole"
            two_ranks(run, [*argv, "--output_dir", str(folder)])
        return made[tuple(argv)]

    return get


def same_weights(ours: Path, theirs: Path) -> bool:
    files = sorted(p.name for p in theirs.glob("*.safetensors"))
    assert files and files == sorted(p.name for p in ours.glob("*.safetensors"))
    pairs = [(load_file(ours / name), load_file(theirs / name)) for name in files]
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in b) for a, b in pairs)


def attempt(rank_info, argv: list[str], filling: DiskFiller) -> tuple[str, list]:
    """Run; return (output, or the error line that ended it; what `filling` saw)."""
    try:
        return run(rank_info, argv, filling), filling.seen
    except UserError as e:
        return str(e), filling.seen
    finally:
        replace_free_space_check(CHECK_FREE_SPACE)


@pytest.mark.parametrize(("kind", "checked"), cases(("bnb_dora", True)))
def test_the_best_step_before_stays(
    kind, checked, checkpoints, short_rows, two_ranks, undisturbed, small_disk
):
    """Steps 3 and 4, each the best so far, are not kept; the next better step is kept completely."""
    argv = options(kind, checkpoints, short_rows, *EVALUATING)
    whole, folder = undisturbed(argv), small_disk / "run"
    filling = DiskFiller(small_disk, 3, 5, checked)
    printed, (before, after) = two_ranks(attempt, [*argv, "--output_dir", str(folder)], filling)[0]
    assert before == after and b'"step": 2' in before["evaluation.json"]
    for step in (3, 4):
        assert f"WARNING: {folder / BEST}: step {step} could not be saved (OSError: " in printed, printed
    assert (
        printed.count("No space left") == printed.count("; that of step 2 stays, and training goes on") == 2
    )
    assert repeatable_metrics(folder) == repeatable_metrics(whole)
    found = [line["eval_loss"] for line in lines(folder)]
    best = found.index(min(found)) + 1
    assert best > 4 and f"at step {best}, in {folder / BEST}" in printed
    ours, theirs = folder / BEST, whole / BEST
    assert contents(ours).keys() == contents(theirs).keys() and same_weights(ours, theirs)
    assert not list(folder.glob("*.tmp"))


def test_a_best_step_that_was_not_kept_is_told(tmp_path):
    """The last lines of a run do not call an older step the best."""
    best = tmp_path / BEST
    assert describe_best(best, 7) == ", which could not be saved"
    best.mkdir()
    write_text(best / SCORE, '{"step": 6}')
    assert describe_best(best, 6) == f", in {best}"
    assert describe_best(best, 7) == f", which could not be saved; {best} has step 6"


@pytest.mark.parametrize(
    ("error", "made"), [(OSError, ["b", "c"]), (RuntimeError, []), (KeyboardInterrupt, [])]
)
def test_only_what_a_disk_does_not_take_is_made_all_the_same(error, made, monkeypatch, tmp_path):
    """After an OSError the remaining entries are made, in the other ranks' order.

    Their collectives need every rank.
    """
    monkeypatch.setattr(trained_model.dist, "get_rank", lambda: 0)
    found = []

    def entry(name: str) -> TensorEntry:
        def pieces():
            found.append(name)
            yield b""

        return TensorEntry(torch.float32, (0,), pieces, collective=True)

    def write(shards) -> None:
        list(shards["one"]["a"].chunks())
        raise error

    with pytest.raises(error):
        trained_model._write_collectively(
            tmp_path, {"one": {"a": entry("a"), "b": entry("b")}, "two": {"c": entry("c")}}, write
        )
    assert found == ["a", *made]


def test_what_cannot_take_the_place_of_a_folder_leaves_it(tmp_path):
    folder = tmp_path / BEST
    folder.mkdir()
    write_text(folder / SCORE, "{}")
    with pytest.raises(FileNotFoundError):
        replace_folder(folder)  # by one that is not there any more
    assert contents(tmp_path) == {f"{BEST}/{SCORE}": b"{}"}


@pytest.mark.parametrize(("full", "kept"), [({2}, [1, 3, 4]), ({1, 2, 3, 4}, [])])
def test_a_full_disk_does_not_change_when_a_run_stops(full, kept, tmp_path):
    """The same holds for a run that resumes after the second evaluation.

    The losses after the best, which is not kept, are worse than it, but better than the one in best/.
    """
    saved = []

    def save(folder: Path) -> None:
        if step in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(step)

    def evaluator() -> Evaluator:
        options = dict.fromkeys(("batch_size", "most_tokens", "sample_every", "sample_tokens"), 1)
        none = dict.fromkeys(("loss_sum", "context", "meter", "stopping", "tokenizer"))
        return Evaluator(
            None,
            None,
            RankInfo(0, 1, 0, 1, torch.device("cpu")),
            total_steps=9,
            eval_every=1,
            patience=2,
            save_best=True,
            folder=tmp_path,
            save=save,
            tracker=NoTracker(),
            **options,
            **none,
        )

    judging = evaluator()
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.2], 1):
        judging._update_best(step, loss, trained=True)
        state, judging = json.loads(json.dumps(judging.state_dict())), evaluator()
        judging.load_state_dict(state)
        assert judging.should_stop == (step == 4)
    assert (saved, judging.best_step, judging.saved_step) == (kept, 2, max(kept, default=0))
    del state["kept_step"], state["kept_loss"]  # as of a run that could only go on with its best kept
    judging.load_state_dict(state)
    assert (judging.saved_step, judging.saved_loss) == (2, 2.0)


@pytest.mark.parametrize(("kind", "checked"), cases(("bnb_llama_pro", False)))
def test_the_result_is_saved_when_there_is_room_again(
    kind, checked, checkpoints, short_rows, two_ranks, undisturbed, small_disk
):
    argv = options(kind, checkpoints, short_rows, "--save_every", "4")
    whole, folder = undisturbed(argv), small_disk / "run"
    argv += ["--output_dir", str(folder)]
    line = two_ranks(attempt, argv, DiskFiller(small_disk, 6, 7, checked))[0][0]
    assert line.startswith(f"--output_dir {folder}: the trained model could not be saved (OSError: "), line
    assert "No space left" in line and line.endswith("which saves it from the checkpoint of step 4")
    assert f"python train.py --config {folder}/config.yaml --resume auto, which" in line
    left = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    assert not left & {ADAPTER, "adapter_config.json", BLOCKS, "config.json"}
    assert not [name for name in left if name.endswith(".tmp") or name.startswith("model")]
    assert checkpoint_steps(folder) == [4] and repeatable_metrics(folder) == repeatable_metrics(whole)
    (small_disk / "others").unlink()
    damaged = checkpoint_folder(folder, 5)
    shutil.copytree(checkpoint_folder(folder, 4), damaged, copy_function=os.link)
    (damaged / "manifest.json").unlink()
    again = unsaved_error(SimpleNamespace(output_dir=str(folder)), OSError("full"))
    assert str(again).endswith("which saves it from the checkpoint of step 4")
    shutil.rmtree(damaged)
    printed = two_ranks(run, [*argv, "--resume", "auto"])[0]
    assert "6 steps, the last 2 of them" in printed
    assert same_weights(folder, whole)


def test_without_a_checkpoint_the_line_says_so(checkpoints, short_rows, small_disk, processes, capfd):
    """Exit status and error line; the metrics are complete."""
    fill(small_disk, leave=160 * 1024)
    out = small_disk / "out"
    args = small(checkpoints, short_rows, out, "--world_size", "2", "--lora_rank", "64")
    status, err = train.main(list(map(str, args))), capfd.readouterr().err
    assert status == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(
        f"error: rank 0: --output_dir {out}: the trained model could not be"
    )
    assert "MiB are needed, " in err and "there is no checkpoint to save it from; make room there" in err
    assert len(lines(out)) == 4 and not list(out.glob("*.tmp")) and not (out / ADAPTER).exists()


def test_a_disk_that_is_full_from_the_start_is_a_line(checkpoints, short_rows, small_disk, processes, capfd):
    fill(small_disk)
    args = small(checkpoints, short_rows, small_disk / "out", "--world_size", "1", "--verbose")
    status, err = train.main(list(map(str, args))), capfd.readouterr().err
    assert status == 2 and "Traceback" in err, "which --verbose asked for"
    expected = f"error: rank 0: OSError: [Errno 28] No space left on device: '{small_disk}/out/config.yaml'"
    assert err.splitlines()[-1] == expected


@pytest.mark.parametrize("more", [[], ["--verbose"]])
def test_a_disk_that_is_full_for_the_checks_is_a_line(more, monkeypatch, capsys):
    def check_run(config):
        raise OSError(errno.ENOSPC, "No space left on device", "rows.arrow")

    monkeypatch.setattr(train, "check_run", check_run)
    status, err = train.main(more), capsys.readouterr().err
    assert status == 2 and ("Traceback" in err) == bool(more)
    assert err.splitlines()[-1] == "error: OSError: [Errno 28] No space left on device: 'rows.arrow'"


def test_a_file_of_tensors_that_does_not_fit_is_known_as_a_full_disk(small_disk):
    fill(small_disk, leave=64 * 1024)
    with pytest.raises(OSError, match="No space left on device") as e:
        save_tensors({"weight": torch.zeros(2**16)}, small_disk / "a.safetensors")
    assert e.value.errno == errno.ENOSPC and needs_no_traceback(e.value)


def test_a_report_that_does_not_fit_costs_no_more_than_that(small_disk):
    """The same holds for the chart of the loss; other errors are raised."""
    fill(small_disk)
    with warn_on_full_disk(small_disk / "report.html"):
        write_text(small_disk / "report.html", "x" * 10_000)
    assert [p.name for p in small_disk.iterdir()] == ["others"]
    with pytest.raises(NotADirectoryError), warn_on_full_disk(small_disk / "others" / "a"):
        write_text(small_disk / "others" / "a", "x")
