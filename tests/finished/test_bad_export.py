"""Errors of export.py: status 2, one line on stderr, nothing written. Uploads happen only on request."""

from __future__ import annotations

import json
import shutil
import time
from collections import namedtuple
from typing import ClassVar

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file, save_file

import export
import finished.export
from files.digests import digest_weights
from files.model_folder import CheckpointFiles
from files.names import ADAPTER
from finished import finished_run
from finished.export_folder import check_space
from options.errors import UserError
from tests.helpers.adapters import args_for
from tests.helpers.distributed import process_context
from tests.helpers.finished_runs import damage_adapter, edit_base_metadata, write_random_run
from tests.helpers.hub_cache import raise_connection_error


@pytest.fixture(scope="module")
def made(checkpoints, alpaca_file, one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    write_random_run(one_rank, folder, args_for(checkpoints(), alpaca_file, "qlora"))
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def refused(run, tmp_path, capsys):
    """refused(*words, run=, **options): export.py must fail with one line that holds the words.

    It must write nothing.
    """

    def attempt(*words: str, **options) -> None:
        given = {"run": run, "to": "merged", "out": tmp_path / "out"} | options
        folder = given.pop("run")
        before = sorted(tmp_path.rglob("*"))
        argv = [*([folder] if folder else []), *(f"--{k}={v}" for k, v in given.items() if v is not None)]
        status = export.main(list(map(str, argv)))
        shown = capsys.readouterr()
        assert status == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
        assert [word for word in words if word not in shown.err] == [], shown.err
        assert sorted(tmp_path.rglob("*")) == before and not shown.out

    return attempt


@pytest.mark.parametrize(
    "options, words",
    [
        ({"run": None}, ["give a RUN"]),
        ({"to": None}, ["--to is missing"]),
        ({"out": None}, ["--out is missing"]),
        ({"to": "gguf"}, ["--to", "'gguf'", "gguf-ready"]),
        ({"base": "int8"}, ["--base", "dequantized"]),
        ({"dtype": "int8"}, ["--dtype", "bfloat16"]),
        ({"bse": "original"}, ["unknown option --bse", "did you mean --base?"]),
        ({"to": "gguf-ready", "dtype": "float32"}, ["--dtype float32", "16 bits"]),
        ({"to": "adapter", "base": "original"}, ["--base has no effect"]),
        ({"to": "adapter", "dtype": "float16"}, ["--dtype has no effect"]),
        ({"to": "adapter", "check": "true"}, ["--check has no effect"]),
        ({"run": "no/such/run"}, ["no/such/run", "no run of train.py"]),
        ({"base_model": "no/such/model"}, ["--base_model no/such/model", "no such folder"]),
        ({"push_to_hub": "only-a-name"}, ["--push_to_hub only-a-name", "owner/name"]),
    ],
)
def test_bad_options(refused, options, words):
    refused(*words, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_gpu(refused):
    refused("--device cuda", "no GPU", device="cuda")


def test_bad_runs(refused, run, checkpoints):
    refused("trained on another model", base_model=checkpoints("mistral"))
    (run / ADAPTER).write_bytes((run / ADAPTER).read_bytes()[:-9])
    refused("truncated")
    (run / ADAPTER).unlink()
    refused("half written", to="adapter")
    (run / "adapter_config.json").unlink()
    refused("holds no result")
    (run / "config.yaml").write_text("train_type: bnb_door\n")
    refused("config.yaml", "bnb_door")
    (run / "config.yaml").unlink()
    refused("no config.yaml")


def test_a_base_that_is_gone(refused, run):
    text = (run / "config.yaml").read_text()
    lines = [
        "model_name: /gone/model" if line.startswith("model_name:") else line for line in text.split("\n")
    ]
    (run / "config.yaml").write_text("\n".join(lines))
    refused("base model /gone/model: no such folder", "--base_model")


def test_a_base_without_a_tokenizer(refused, checkpoints, tmp_path):
    base = shutil.copytree(checkpoints(), tmp_path / "base")
    for path in base.glob("tokenizer*"):
        path.unlink()
    refused("no usable tokenizer (there is no tokenizer.json)", base_model=base)


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_an_adapter_that_does_not_fit(to, refused, run):
    damage_adapter(run, "shape")
    refused("layers.1.mlp.up_proj.lora_B.weight has shape [160, 1]", to=to)


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_an_adapter_of_no_numbers(to, refused, run):
    damage_adapter(run, "nan")
    refused("layers.1.mlp.up_proj.lora_B.weight holds NaN or infinity", to=to)


def test_output_folders(refused, run, checkpoints, tmp_path):
    (tmp_path / "file").write_text("")
    refused("--out", "cannot be written", out=tmp_path / "file")
    refused("cannot be written", out=tmp_path / "file" / "below")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    refused("holds a model already", "--overwrite", out=model)
    refused("holds a run of train.py", out=run, overwrite="true")
    refused("is in the folder of RUN", out=run / "merged")
    refused("is in the folder of the base model", out=checkpoints() / "merged")
    refused("is in the folder of the base model", out=checkpoints(), overwrite="true")


def test_files_of_others_stay(refused, run, monkeypatch, tmp_path):
    """Files that appear while the model is made stay, too."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer_config.json").write_text("mine")
    refused("holds tokenizer_config.json already", "--overwrite", out=out)
    (out / "tokenizer_config.json").rename(out / "notes.txt")
    write = finished.export.write_merged

    def filled_meanwhile(*args) -> None:
        write(*args)
        (out / "config.yaml").write_text("train_type: full\n")

    monkeypatch.setattr(finished.export, "write_merged", filled_meanwhile)
    assert export.main([str(run), "--to=merged", f"--out={out}", "--overwrite"]) == 2
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "notes.txt"]


def test_a_config_that_lost_options(refused, run):
    """A truncated config.yaml is valid YAML, but describes another base (n_bits), prompt or scaling."""
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    for name in finished_run.REQUIRED_OPTIONS:
        kept = "".join(line for line in lines if not line.startswith(f"{name}:"))
        (run / "config.yaml").write_text(kept)
        refused(f"{run}/config.yaml: has no {name}", "damaged")
    other = ["lora_alpha: 3.0\n" if line.startswith("lora_alpha:") else line for line in lines]
    (run / "config.yaml").write_text("".join(other))
    refused("adapter_config.json: lora_alpha", "but config.yaml makes it 3.0", "damaged")
    other = [line.replace("use_rslora: false", "use_rslora: true") for line in lines]
    (run / "config.yaml").write_text("".join(other))
    refused("adapter_config.json: use_rslora False", "but config.yaml makes it True", "damaged")


@pytest.mark.parametrize(
    "change", [{"use_qalora": True}, {"rank_pattern": {"q_proj": 2}}, {"lora_bias": True}]
)
def test_an_adapter_with_settings_that_no_run_writes(change, refused, run):
    """PEFT would compute something else with them. With its defaults written out it is the same adapter."""
    path = run / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | change))
    refused(f"{path}: {next(iter(change))} ", "is not supported here")
    path.write_text(json.dumps(written | {"use_rslora": False, "rank_pattern": {}, "modules_to_save": None}))
    finished_run.open_run(run)
    del written["use_rslora"]  # as earlier versions wrote it
    path.write_text(json.dumps(written))
    finished_run.open_run(run)


@pytest.mark.parametrize("to", ["merged", "gguf-ready", "adapter"])
def test_a_full_disk_is_seen_before_writing(to, refused, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(finished.export.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(finished.export, "write_model", None)
    monkeypatch.setattr(finished.export.shutil, "copyfile", None)
    refused("MiB are needed", "0.00 MiB free", to=to, out=tmp_path / "a" / "b")


def test_the_space_of_a_folder_whose_name_is_too_long(tmp_path):
    with pytest.raises(UserError, match="too long"):
        check_space(tmp_path / ("a" * 300), 1)


def test_values_that_a_dtype_cannot_hold(refused, run, checkpoints, tmp_path):
    base = shutil.copytree(checkpoints(), tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for name in ("model.norm.weight", "model.layers.2.mlp.down_proj.weight"):
        kept = load_file(base / index[name])
        changed = kept | {name: kept[name] * 1e6}
        save_file(changed, base / index[name], metadata={"format": "pt"})
        edit_base_metadata(run / ADAPTER, base_contents=digest_weights(CheckpointFiles(base)).text())
        refused(name, "float16 cannot hold", base_model=base, dtype="float16")
        save_file(kept, base / index[name], metadata={"format": "pt"})


def write_half(command: list[str], written) -> None:
    finished.export.write_card = lambda *_: (written.set(), time.sleep(100))
    export.main(command)


def test_what_a_killed_export_left_is_removed_by_the_next(run, tmp_path):
    """The folder of an export that is still writing is not touched."""
    out, command = tmp_path / "out", [str(run), "--to", "adapter", "--out", str(tmp_path / "out")]

    def half_done():
        written = process_context().Event()
        process = process_context().Process(target=write_half, args=(command, written))
        process.start()
        assert written.wait(60)
        return process

    killed = half_done()
    killed.kill()
    killed.join()
    assert len(list(out.glob(".export-*/*"))) > 1
    writing = half_done()
    try:
        assert export.main(command) == 0
        assert [path.name for path in out.glob(".export-*")] == [f".export-{writing.pid}.tmp"]
        assert all((folder / ADAPTER).is_file() for folder in (out, out / f".export-{writing.pid}.tmp"))
    finally:
        writing.kill()
        writing.join()


def test_what_cannot_be_opened_is_left_alone(run, tmp_path):
    """A folder that another export has just removed, or that belongs to another user."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".export-1.tmp").symlink_to(tmp_path / "gone")
    assert export.main([str(run), "--to", "adapter", "--out", str(out)]) == 0
    assert (out / ".export-1.tmp").is_symlink() and (out / ADAPTER).is_file()


# Uploads


class Hub:
    """Replaces HfApi: records the calls."""

    calls: ClassVar[list] = []

    def __getattr__(self, name):
        return lambda *args, **options: Hub.calls.append((name, args, options))


@pytest.fixture
def hub(monkeypatch):
    Hub.calls = []
    monkeypatch.setattr(finished.export, "HfApi", Hub)
    return Hub


def test_upload(hub, run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    command = [str(run), "--to", "adapter", "--out", str(out)]
    assert export.main(command) == 0 and not hub.calls
    assert export.main([*command, "--overwrite", "--push-to-hub", "me/it"]) == 0
    assert "https://huggingface.co/me/it" in capsys.readouterr().out
    assert [name for name, *_ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    (_, repo, created), (_, _, sent) = hub.calls[1:]
    assert repo == ("me/it",) and created == {"private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/it", out)
    assert set(sent["allow_patterns"]) == {p.name for p in out.iterdir()} - {"notes.txt"}


def test_upload_without_a_login(refused, hub, monkeypatch):
    def missing(self):
        raise LocalTokenNotFoundError("Token is required\n(hf auth login)")

    monkeypatch.setattr(Hub, "whoami", missing, raising=False)
    refused("--push_to_hub", "not logged in", "Token is required", push_to_hub="me/it")
    monkeypatch.setattr(Hub, "whoami", raise_connection_error)
    refused("--push_to_hub", "the hub cannot be reached (gone)", push_to_hub="me/it")


def test_upload_that_fails(hub, run, tmp_path, monkeypatch, capsys):
    """The folder stays, so that the export need not run again."""
    monkeypatch.setattr(Hub, "upload_folder", raise_connection_error, raising=False)
    assert (
        export.main([str(run), "--to", "adapter", "--out", str(tmp_path / "out"), "--push_to_hub", "me/it"])
        == 2
    )
    assert "failed (gone)" in capsys.readouterr().err and (tmp_path / "out" / ADAPTER).is_file()
