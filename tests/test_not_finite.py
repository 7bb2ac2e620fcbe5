"""NaN and infinity: an error before training if in the base model, and never a result.

A run that trains nothing, or NaN, has no result.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
from checkpoints.storage import find_newest_checkpoint
from files.finite import NONFINITE_MESSAGE
from files.names import ADAPTER, BEST, BLOCKS, SINGLE_FILE
from finished.finished_run import load_model, open_run
from options.errors import UserError
from tests.helpers.adapters import args_for
from tests.helpers.bad_rows import EMBEDDING
from tests.helpers.bnb_checkpoints import pack_like_the_hub
from tests.helpers.expansion import edit_config, expand
from tests.helpers.finished_runs import write_random_run
from tests.helpers.layers import weights_far_from_zero
from tests.helpers.programs import run_here, small
from tests.helpers.resuming import lines, run
from tests.helpers.runs import set_up
from tests.helpers.saving import SmallRun
from tests.helpers.stored import find_tensor_file, put_tensor, read_stored_tensor
from training import evaluator, run_folder
from training.saved_result import save_best

PACKED, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"
HEAD = "lm_head.weight"
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"
QUIET = "--log_to stdout --compile false --batch_size 2 --max_steps 3".split()


def spoil(folder: Path, name: str, value: float = math.nan) -> Path:
    """Put `value` into a tensor of a model, in a row that the base's digest does not read.

    Return its file.
    """
    tensor = read_stored_tensor(folder, name)
    tensor[min(1, len(tensor) - 1)].view(-1)[-1] = value
    return put_tensor(folder, name, tensor)


def spoilt(base: Path, folder: Path, name: str, value: float = math.nan) -> Path:
    """Copy a model and spoil one of its tensors."""
    shutil.copytree(base, folder)
    spoil(folder, name, value)
    return folder


def caught(rank_info, function, *args) -> str:
    """Return the text of the UserError that `function` raises."""
    try:
        function(rank_info, *args)
    except UserError as e:
        return str(e)
    return "nothing was raised"


# The base


@pytest.mark.parametrize(
    "kind, train_type, name, value",
    [
        ("llama", "qlora", PACKED, math.nan),
        ("llama", "bnb_dora", NORM, math.inf),
        ("llama", "hqq_lora", PACKED, -math.inf),
        ("llama", "full", EMBEDDING, math.nan),
        ("qwen2", "lora", "model.layers.0.self_attn.q_proj.bias", math.inf),
        ("qwen3_moe", "qlora", EXPERT, math.nan),
        ("llama_pro", "bnb_llama_pro", PACKED, math.nan),
    ],
)
def test_it_is_named_on_every_rank(
    kind, train_type, name, value, checkpoints, short_rows, two_ranks, tmp_path
):
    folder = spoilt(checkpoints(kind), tmp_path / "model", name, value)
    errors = two_ranks(caught, set_up, args_for(folder, short_rows, train_type))
    assert errors == [f"{find_tensor_file(folder, name)}: {name} {NONFINITE_MESSAGE}"] * 2


@pytest.mark.parametrize("train_type", ["qlora", "hqq_lora"])
def test_several_are_counted(train_type, checkpoints, short_rows, two_ranks, tmp_path):
    folder = spoilt(checkpoints(), tmp_path / "model", PACKED)
    spoil(folder, NORM)
    spoil(folder, EMBEDDING)
    errors = two_ranks(caught, set_up, args_for(folder, short_rows, train_type))
    assert errors[0] == errors[1] and errors[0].endswith("; 2 more of its tensors cannot be used")


def test_what_hqq_cannot_pack_is_named_on_every_rank(checkpoints, short_rows, two_ranks, tmp_path):
    """The weights are finite, but a zero point is not."""
    folder = shutil.copytree(checkpoints(), tmp_path / "model")
    weight = read_stored_tensor(folder, PACKED)
    weight.view(-1, 64)[2] = weights_far_from_zero(1)[0]
    put_tensor(folder, PACKED, weight)
    errors = two_ranks(caught, set_up, args_for(folder, short_rows, "hqq_lora", "--n_bits", "8"))
    assert errors[0] == errors[1]
    assert errors[0].startswith(
        f"{find_tensor_file(folder, PACKED)}: {PACKED} has a block whose weights lie too far from 0"
    )


def test_large_numbers_are_loaded(checkpoints, short_rows, one_rank, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "model")
    put_tensor(folder, NORM, torch.full_like(read_stored_tensor(folder, NORM), 3e38))
    assert one_rank(caught, set_up, args_for(folder, short_rows, "qlora")) == ["nothing was raised"]


@pytest.mark.parametrize("double", [True, False])
def test_scales_of_a_packed_base(double, checkpoints, short_rows, two_ranks, tmp_path):
    pack_like_the_hub(checkpoints(), tmp_path / "model", double)
    scales = f"{PACKED}.{'nested_absmax' if double else 'absmax'}"
    path = spoil(tmp_path / "model", scales)
    errors = two_ranks(caught, set_up, args_for(tmp_path / "model", short_rows, "qlora"))
    assert errors == [f"{path}: {scales} {NONFINITE_MESSAGE}"] * 2


def test_a_run_over_it_ends_in_a_line_and_leaves_nothing(checkpoints, short_rows, tmp_path):
    """The earlier run, which --overwrite would replace, stays, and no cache is made."""
    folder = spoilt(checkpoints(), tmp_path / "model", PACKED)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ADAPTER).write_text("of an earlier run")
    before = {str(path): path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    options = ["--overwrite", "--world_size", "2", "--quantized_cache", tmp_path / "cache"]
    status, _, err = run_here(small(lambda: folder, short_rows, tmp_path / "out", *options))
    lines = err.splitlines()
    assert status == 2 and len(lines) == 1, err
    assert re.match(
        rf"error: rank [01]: {find_tensor_file(folder, PACKED)}: {PACKED} holds NaN or infinity", lines[0]
    )
    assert {str(path): path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


# Other commands


@pytest.mark.parametrize("name", [PACKED, NORM])
@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_finished_runs_over_it(train_type, name, checkpoints, alpaca_file, one_rank, tmp_path, capsys):
    base = shutil.copytree(checkpoints(), tmp_path / "base")
    write_random_run(one_rank, tmp_path / "run", args_for(base, alpaca_file, train_type))
    path = spoil(base if train_type == "bnb_dora" else tmp_path / "run", name)
    with pytest.raises(UserError, match=re.escape(f"{path}: {name} holds NaN or infinity")):
        load_model(open_run(tmp_path / "run"), torch.device("cpu"), torch.float32)
    for more in ([], ["--dtype", "bfloat16"]):
        argv = [str(tmp_path / "run"), "--to", "merged", "--out", str(tmp_path / "out"), *more]
        assert export.main(argv) == 2
        assert f"error: {path}: {name} holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_expansion_of_it(checkpoints, tmp_path, capsys):
    folder = spoilt(checkpoints(), tmp_path / "model", NORM, math.inf)
    with pytest.raises(AssertionError):
        expand(folder, tmp_path / "out", "--new_blocks", 1)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {find_tensor_file(folder, NORM)}: {NORM} holds NaN or infinity")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_new_blocks_with_it(checkpoints, alpaca_file, one_rank, tmp_path, capsys):
    base = checkpoints("llama_pro")
    write_random_run(
        one_rank, tmp_path / "run", args_for(base, alpaca_file, "llama_pro", "--llama_pro_save", "blocks")
    )
    with safe_open(tmp_path / "run" / BLOCKS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "run" / BLOCKS)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, tmp_path / "run" / BLOCKS, metadata=metadata)
    with pytest.raises(AssertionError):
        expand(base, tmp_path / "out", "--blocks", tmp_path / "run" / BLOCKS)
    assert f"{BLOCKS}: {name} holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The result


@pytest.fixture(scope="module")
def hopeless(checkpoints, tmp_path_factory) -> Path:
    """A finite model that computes NaN for every row: its epsilon fits no weights."""
    folder = shutil.copytree(checkpoints(), tmp_path_factory.mktemp("hopeless") / "model")
    edit_config(folder, rms_norm_eps=-1e6)
    return folder


@pytest.mark.parametrize(
    "train_type, more",
    [
        ("bnb_dora", ""),
        ("bnb_dora", "--max_bad_steps 1"),
        ("full", "--save_every 1 --eval_share 0.2 --eval_every 1"),
        ("lora", "--precision fp16_autocast"),
    ],
)
def test_a_run_without_a_good_step_has_no_result(train_type, more, hopeless, short_rows, two_ranks, tmp_path):
    argv = [
        *args_for(hopeless, short_rows, train_type, *QUIET, *more.split()),
        "--output_dir",
        tmp_path / "run",
    ]
    errors = two_ranks(caught, run, list(map(str, argv)))
    steps = 2 if "--max_bad_steps" in more else 3
    assert errors[0] == errors[1]
    assert errors[0].startswith(
        f"none of {steps} steps had a finite loss and gradient; of the last one, nan and "
    )
    assert "no result is saved" in errors[0] and "--lr" not in errors[0]
    assert ("--precision fp32" in errors[0]) == ("fp16" in more)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {ADAPTER, "adapter_config.json", "config.json", SINGLE_FILE, BEST}
    assert {"report.html", "metrics.jsonl", "bad_steps.jsonl"} <= left
    if "--save_every" in more:  # resuming does not help
        again = two_ranks(caught, run, [*map(str, argv), "--resume", "auto"])
        assert again[0].startswith("none of 3 steps had a finite loss and gradient: nothing was trained")


def test_nor_has_one_whose_gradients_all_overflow(checkpoints, short_rows, two_ranks, tmp_path):
    """In fp16 the scaler skips such steps, and they do not count as bad.

    The loss and the evaluations are finite, and the evaluation is the best so far.
    """
    model = shutil.copytree(checkpoints(), tmp_path / "model")
    put_tensor(model, HEAD, read_stored_tensor(model, HEAD) * 1e4)
    more = [*QUIET, *"--precision fp16_autocast --eval_share 0.2 --eval_every 1 --save_every 1".split()]
    argv = [*args_for(model, short_rows, "lora", *more), "--output_dir", tmp_path / "run"]
    errors = two_ranks(caught, run, list(map(str, argv)))
    steps = lines(tmp_path / "run")
    assert [set(step) >= {"eval_loss", "loss"} for step in steps] == [True] * 3
    assert all(
        math.isfinite(step["eval_loss"] + step["loss"]) and step["grad_norm"] is None for step in steps
    )
    assert "bad_steps" not in steps[-1] and "applied_steps" not in steps[-1]
    assert errors[0] == errors[1]
    assert re.match(
        r"none of 3 steps had a finite loss and gradient; of the last one, \d+\.?\d* and (inf|nan):",
        errors[0],
    )
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {ADAPTER, BEST} and "checkpoints" in left
    again = two_ranks(caught, run, [*map(str, argv), "--resume", "auto"])
    assert again[0].startswith("none of 3 steps had a finite loss and gradient: nothing was trained")


def evaluated_well(rank_info, argv) -> list[str]:
    """Run with finite evaluation losses; return the error, and the summary printed at the end."""
    printed, describe, mean_loss = [], run_folder.describe_end, evaluator.mean_loss
    run_folder.describe_end = lambda *args: printed.append(describe(*args)) or printed[0]
    evaluator.mean_loss = lambda *_: 3.0
    try:
        return [caught(rank_info, run, argv), *printed]
    finally:
        run_folder.describe_end, evaluator.mean_loss = describe, mean_loss


def test_nor_a_best_step_nor_does_it_tell_of_one(hopeless, short_rows, one_rank, tmp_path):
    more = ["--eval_share", "0.2", "--eval_every", "1", "--output_dir", tmp_path / "run"]
    argv = list(map(str, args_for(hopeless, short_rows, "bnb_dora", *QUIET, *more)))
    error, printed = one_rank(evaluated_well, argv)[0]
    assert error.startswith("none of 3 steps") and not (tmp_path / "run" / BEST).exists()
    assert ADAPTER not in printed and "generate.py" not in printed and "loss nan" in printed


@pytest.mark.parametrize("train_type", ["bnb_dora", "full", "llama_pro"])
def test_weights_that_diverged_are_no_result(train_type, checkpoints, short_rows, two_ranks, tmp_path):
    """The loss and the gradient of the only step are finite, but its update is not."""
    model = checkpoints("llama_pro" if train_type == "llama_pro" else "llama")
    more = ["--max_steps", "1", "--lr", "1e39", "--precision", "fp32", "--output_dir", tmp_path / "run"]
    errors = two_ranks(caught, run, list(map(str, args_for(model, short_rows, train_type, *QUIET, *more))))
    assert errors[0] == errors[1]
    assert re.match(r"\S+ holds NaN or infinity after training \(\d+ such tensors?\)", errors[0])
    assert "a lower --lr helps" in errors[0]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {ADAPTER, "adapter_config.json", "config.json", SINGLE_FILE} and "report.html" in left


def save_diverged(rank_info, args, folder) -> str:
    """Save the best step with one infinite weight in the last rank's shard; return the error."""
    job, model = set_up(rank_info, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    if rank_info.rank == rank_info.world - 1:
        part = trained[-1].data
        (part.to_local() if hasattr(part, "to_local") else part).view(-1)[-1] = math.inf
    return caught(rank_info, lambda _: save_best(job, model, folder))


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_neither_is_the_best_step(train_type, checkpoints, short_rows, two_ranks, tmp_path):
    errors = two_ranks(save_diverged, args_for(checkpoints(), short_rows, train_type), tmp_path)
    assert errors[0] == errors[1] and "holds NaN or infinity after training (1 such tensor)" in errors[0]
    assert list(tmp_path.iterdir()) == []


def checkpoint_of_infinity(rank_info, folder: str) -> list[str]:
    """Write three checkpoints, the second with an infinite weight; return the warnings.

    The third has finite weights whose sum is infinite.
    """
    small, warned = SmallRun(rank_info, folder, every=1), []
    small.checkpoints._warn = lambda step, reason, then: warned.append(f"{step}: {reason}")
    small.step()
    small.checkpoints._wait_for_write()
    weight = small.model.weight
    with torch.no_grad():
        before = weight[0, 0].item()
        if rank_info.rank == rank_info.world - 1:
            weight[0, 0] = math.inf
    small.checkpoints.save(2)
    small.checkpoints._wait_for_write()
    warned.append(f"whole: {small.checkpoints.last_written}")
    with torch.no_grad():
        weight[0, 0] = before
        weight[1:] = torch.finfo(weight.dtype).max
    small.checkpoints.save(3)
    small.checkpoints.finish()
    return [*warned, f"whole: {small.checkpoints.last_written}"]


def test_a_checkpoint_of_it_does_not_take_the_place_of_a_good_one(two_ranks, tmp_path):
    warnings = two_ranks(checkpoint_of_infinity, str(tmp_path))
    assert warnings == [
        ["2: a trained weight is NaN or infinite", "whole: 1", "whole: 3"],
        ["whole: 1", "whole: 3"],
    ]
    assert find_newest_checkpoint(tmp_path, warn=print).step == 3
