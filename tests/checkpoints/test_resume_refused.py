"""Another run or a damaged checkpoint is not resumed; one line says why."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file, save_file

import train
from benchmarks.make_checkpoint import byte_tokenizer
from checkpoints import manager
from checkpoints import storage as checkpoint_files
from checkpoints.same_run import check_same_run, describe_changes, recorded_option
from checkpoints.storage import checkpoint_folder, find_newest_checkpoint
from launch.precision import choose_precision
from options.errors import UserError
from options.train import parse
from tests.helpers.bnb_checkpoints import QLORA, make_single_rank_job, pack_like_the_hub
from tests.helpers.hostile_checkpoints import HarmfulPickle
from tests.helpers.resuming import QUIET, check_resumed_job, edit_copied_manifest, run
from training import job

OTHERS = {
    "--lora_rank 8": "the run has --lora_rank 6, not 8",
    "--train_type qlora": "--train_type bnb_dora, not qlora",
    "--lr 1e-3": "--lr 0.01, not 0.001",
    "--seed 1": "--seed 42, not 1",
    "--precision bf16": "--precision auto, not bf16",
    "--optimizer adam": "--optimizer adamw, not adam",
    "--eval_share 0.5": "--eval_share 0.0, not 0.5",
    "--context_length 200": "--context_length 256, not 200",
    "--batch_size 2": "has 4 rows; 2 processes x --batch_size 2 x --gradient_accumulation_steps 2 would make"
    " it 8",
    "--world_size 1": "has 4 rows; 1 processes",
    "--resume /nonexistent": "/nonexistent: no such folder",
    "--resume .": "a run can only be resumed in its own folder",
}


@pytest.mark.parametrize("option", OTHERS)
def test_another_run_is_refused(option, source, copied):
    with pytest.raises(UserError) as refused:
        check_resumed_job(source, copied, *option.split())
    assert OTHERS[option] in str(refused.value)


@pytest.mark.parametrize(("train_type", "value"), [("lora", "none"), ("full", None)])
def test_an_option_that_older_runs_lack(train_type, value):
    """It has the value that a run of this train type has by default."""
    run = {"options": {"train_type": train_type}}
    assert recorded_option(run, "vision_targets") == parse(["--train_type", train_type])[0].vision_targets
    assert recorded_option(run, "vision_targets") == value


def test_another_machines_precision_is_refused(source, copied, monkeypatch):
    """auto is fp16 on GPUs without bf16, where a run in a CPU's fp32 must not be resumed."""
    assert check_resumed_job(source, copied, "--precision", "fp32").saved.step == 3, "what auto is here"
    monkeypatch.setattr(job, "detect_precision", lambda name: choose_precision(name, True, False))
    with pytest.raises(
        UserError, match="which on this machine is float32 under autocast to float16, not float32"
    ):
        check_resumed_job(source, copied)


FREE = "--max_steps 9 --save_every 5 --log_to tqdm --wrap_policy sublayer --use_gradient_checkpointing false"


@pytest.mark.parametrize("where", ["auto", "run", "checkpoint"])
def test_options_that_change_no_result_may_differ(where, source, copied):
    paths = {"auto": "auto", "run": str(copied), "checkpoint": str(checkpoint_folder(copied, 3))}
    found = check_resumed_job(source, copied, *FREE.split(), "--resume", paths[where])
    assert found.saved.step == 3 and found.saved.folder == checkpoint_folder(copied, 3)
    assert "--max_steps 9 instead of 7: the learning rate follows it" in "".join(found.remarks)


def test_other_data_are_refused(source, copied, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(Path(source[3]).read_text().replace("Count from 1 ", "Count from 7 ", 1))
    with pytest.raises(UserError, match="no longer gives the rows that the run was started with"):
        check_resumed_job(source, copied, "--dataset", str(other))
    other.write_text(Path(source[3]).read_text())
    assert check_resumed_job(source, copied, "--dataset", str(other)).saved.step == 3, (
        "the same rows from elsewhere"
    )


def test_another_evaluation_set_is_refused(source, copied, tmp_path):
    """The best step would be one of two sets. Without a set before, or now, there is nothing to compare."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"instruction": "a", "output": "b"}\n')
    evaluated = ["--eval_dataset", str(other), "--eval_every", "2"]
    now = check_resumed_job(source, copied, *evaluated)
    assert now.saved.step == 3 and now.saved.run["evaluation"] == ""
    now.saved.run["evaluation"] = now.run_identity()["evaluation"]
    check_same_run(now.saved, now.config, now.run_identity())
    check_same_run(now.saved, now.config, now.run_identity() | {"evaluation": ""})
    other.write_text('{"instruction": "a", "output": "c"}\n')
    changed = check_resumed_job(source, copied, *evaluated).run_identity()
    with pytest.raises(
        UserError, match="--eval_dataset no longer gives the rows that the run is evaluated on"
    ):
        check_same_run(now.saved, now.config, changed)


def test_another_model_is_refused(source, copied, tmp_path):
    other = shutil.copytree(source[1], tmp_path / "other")
    assert check_resumed_job(source, copied, "--model_name", str(other)).saved.step == 3
    file = sorted(other.glob("*.safetensors"))[0]
    tensors = load_file(file)
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not the model that the run was started with"):
        check_resumed_job(source, copied, "--model_name", str(other))


def test_a_packed_model_is_compared_by_its_packed_weights(checkpoints, alpaca_file, copied, tmp_path):
    """Checkpoints of older versions hold no digest of them; they are resumed with a remark."""
    pack_like_the_hub(checkpoints(), tmp_path / "4bit")
    job = make_single_rank_job(tmp_path / "4bit", alpaca_file, *QLORA)
    now, saved = job.run_identity(), find_newest_checkpoint(copied, warn=print)

    def refused_for(base: str, reason: str) -> list[str]:
        before = dataclasses.replace(saved, run=saved.run | now | {"base": base, "data": "others"})
        with pytest.raises(UserError, match=reason):
            check_same_run(before, job.config, now)
        return describe_changes(before, job.config, now["base"])

    rows = "no longer gives the rows"  # are compared after the model
    assert refused_for(now["base"], rows) == []
    described, plain, packed = now["base"].split("-")
    (line,) = refused_for(f"{described}-{plain}", rows)
    assert "without a digest of 4-bit weights" in line
    for other in (f"{described}-{plain}-{plain}", f"{described}-{packed}", f"{described}-{plain[:-1]}"):
        refused_for(other, "is not the model that the run was started with")
    change = load_file(tmp_path / "4bit" / "model.safetensors")
    change["model.layers.0.self_attn.q_proj.weight"][-1] ^= 1
    save_file(change, tmp_path / "4bit" / "model.safetensors", metadata={"format": "pt"})
    assert make_single_rank_job(tmp_path / "4bit", alpaca_file, *QLORA).run_identity()["base"] != now["base"]


def test_a_run_without_its_metrics_is_refused(source, copied):
    path = copied / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"metrics.jsonl: is missing or truncated: it ends before step 3"):
        check_resumed_job(source, copied)


@pytest.mark.parametrize("name", checkpoint_files.GROWING_FILES)
def test_a_link_among_its_files_is_not_followed(name, source, copied, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(10**6))
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(other)
    with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
        check_resumed_job(source, copied)


def test_a_damaged_checkpoint_is_refused_or_skipped(source, copied, capsys):
    (checkpoint_folder(copied, 3) / "rank-00001.safetensors").unlink()
    for path in (copied, checkpoint_folder(copied, 3)):
        with pytest.raises(UserError, match="no complete checkpoint"):
            check_resumed_job(source, copied, "--resume", str(path))
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        check_resumed_job(source, copied)
    assert "step-00000003: no complete checkpoint (rank-00001.safetensors" in capsys.readouterr().out
    (checkpoint_folder(copied, 3) / "manifest.json").unlink()  # an interrupted removal
    assert check_resumed_job(source, copied).saved is None
    assert "has no checkpoint yet; starting from the beginning" in capsys.readouterr().out
    (copied / "adapter_config.json").touch()
    with pytest.raises(UserError, match="holds a finished run without checkpoints"):
        check_resumed_job(source, copied)


A = "model.model.layers.0.self_attn.q_proj.lora_A"
FALSE_MANIFESTS = {
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


@pytest.mark.parametrize("kind", FALSE_MANIFESTS)
def test_a_false_manifest_ends_in_one_line(kind, source, copied, two_ranks):
    change, reason = FALSE_MANIFESTS[kind]
    edit_copied_manifest(copied, change)
    for error in two_ranks(refused, [*source, *QUIET, "--output_dir", str(copied), "--resume", "auto"]):
        assert reason in error and str(checkpoint_folder(copied, 3)) in error


def rewrite(folder: Path, change) -> None:
    """Change the tensors in each file of the copied checkpoint, and fit the manifest."""

    def fit(manifest: dict) -> None:
        for i, path in enumerate(sorted(checkpoint_folder(folder, 3).glob("rank-*"))):
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
            manifest["files"][i] = dataclasses.asdict(checkpoint_files._measure(path))
            for name, tensor in tensors.items():
                manifest["tensors"][name]["dtype"] = str(tensor.dtype).removeprefix("torch.")

    edit_copied_manifest(folder, fit)


IMPOSSIBLE_TENSORS = {
    "NaN": (lambda t: t[A].view(-1)[3].fill_(math.nan), "holds NaN"),
    "infinity": (lambda t: t[A].view(-1)[3].fill_(-math.inf), "holds NaN or infinity"),
    "NaN in a moment": (lambda t: t[A.replace("model", "optimizer.exp_avg", 1)].fill_(math.nan), "holds NaN"),
    "another dtype": (lambda t: t.update({A: t[A].double()}), "holds other parameters"),
    "random states of none": (
        lambda t: [x.fill_(255) for n, x in t.items() if "random" in n],
        "cannot be loaded (random.cpu@",
    ),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE_TENSORS)
def test_impossible_tensors_end_in_one_line(kind, source, copied, two_ranks):
    change, reason = IMPOSSIBLE_TENSORS[kind]
    rewrite(copied, change)
    argv = [*source, *QUIET, "--output_dir", str(copied), "--resume", "auto"]
    error = two_ranks(refused_by_loading, argv)[0]
    assert error and reason in error and str(checkpoint_folder(copied, 3)) in error


def refused_by_loading(rank_info, argv: list[str]) -> str:
    """Return the error like `refused`, but end all ranks before training, where accepted ones would wait."""
    restore_tensors = manager.restore_tensors

    def restore_and_stop(*args) -> None:
        try:
            restore_tensors(*args)
        except UserError as e:
            error = str(e)
        else:
            error = ""
        raise UserError(error)

    manager.restore_tensors = restore_and_stop
    try:
        return refused(rank_info, argv)
    finally:
        manager.restore_tensors = restore_tensors


def test_a_pickle_beside_a_checkpoint_is_not_read(source, copied, two_ranks, tmp_path):
    """torch.distributed.checkpoint's own storage would load this file, and so run its code."""
    (checkpoint_folder(copied, 3) / ".metadata").write_bytes(pickle.dumps(HarmfulPickle(tmp_path / "pwned")))
    argv = [*source, *QUIET, "--output_dir", str(copied), "--resume", str(checkpoint_folder(copied, 3))]
    assert "7 steps, the last 4 of them" in two_ranks(run, argv)[0]
    assert not (tmp_path / "pwned").exists()
    with contextlib.suppress(Exception):
        dcp.FileSystemReader(checkpoint_folder(copied, 3)).read_metadata()
    assert (tmp_path / "pwned").exists(), "the pickle does nothing"


def refused(rank_info, argv: list[str]) -> str:
    try:
        run(rank_info, argv)
    except UserError as e:
        return str(e)


DATED = (
    "{{ strftime_now('%Y-%m-%d') }}"
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
)


def test_a_run_whose_template_writes_the_date_resumes_on_another_day(one_rank, checkpoints, tmp_path):
    """The date stays that of the first start; another date makes other rows."""
    base = shutil.copytree(checkpoints(), tmp_path / "base")
    (base / "chat_template.jinja").write_text(DATED)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    options = ["--model_name", str(base), "--dataset", str(tmp_path / "rows.jsonl")]
    options += ["--output_dir", str(tmp_path / "run"), "--train_type", "qlora", "--max_steps", "1"]
    options += "--save_every 1 --world_size 1 --log_to stdout --compile false".split()
    one_rank(run, [*options, "--chat_date", "2024-02-29"])
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["chat_date"] == "2024-02-29"
    job = train.check_run(parse([*options, "--resume", "auto"])[0])
    text = byte_tokenizer().decode(job.rows.tokens[: job.rows.starts[1]])
    assert job.config.chat_date == "2024-02-29" and text.startswith("2024-02-29user: Hi")
    with pytest.raises(UserError, match="the run has --chat_date 2024-02-29, not 2024-03-01"):
        train.check_run(parse([*options, "--resume", "auto", "--chat_date", "2024-03-01"])[0])
    today = datetime.date.today().isoformat()
    assert (
        train.check_run(parse([*options, "--output_dir", str(tmp_path / "other")])[0]).config.chat_date
        == today
    )
