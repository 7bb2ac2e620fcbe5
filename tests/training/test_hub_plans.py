"""Planned models on a hub: a small one on this machine, and its cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from benchmarks.make_checkpoint import make_checkpoint
from files.names import INDEX, SINGLE_FILE
from models.shapes import SHAPES
from options.errors import UserError
from tests.helpers.bnb_checkpoints import pack_like_the_hub
from tests.helpers.hub_cache import FIRST, add_to_hub_cache, raise_connection_error
from tests.helpers.hub_server import serve_hub
from tests.helpers.planned import parameters_of_plan, parameters_of_run
from training.planned_model import open_planned_model

HEADER_BYTES = 100_001  # huggingface_hub asks for so many of each file, since nearly all headers are shorter


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(folder) -> a context in which the folder is the hub's own/model, and the cache is empty."""
    return lambda folder: serve_hub(folder, FIRST, tmp_path / "hub", monkeypatch)


def test_16_gb_are_planned_by_their_headers(serve, tmp_path):
    folder = tmp_path / "8b"
    make_checkpoint(folder, "8b", empty=True)
    with serve(folder) as hub:
        planned = open_planned_model(f"own/model@{FIRST}")
        files = len(list(folder.glob("*.safetensors")))
        assert files == 4 and set(hub.sent) == {
            "config.json",
            INDEX,
            *(f.name for f in folder.glob("*.safe*s")),
        }
        assert hub.weight_bytes <= files * HEADER_BYTES < 2 * SHAPES["8b"].parameters() / 10_000
    assert not planned.by_config and planned.download == 2 * SHAPES["8b"].parameters()
    assert parameters_of_plan(planned, "qlora") == parameters_of_run(folder, "qlora")


def test_packed_weights(checkpoints, serve, tmp_path, monkeypatch):
    """The header has neither the packed weights' shapes nor their numbers; the config has the shapes."""
    folder = tmp_path / "4bit"
    pack_like_the_hub(checkpoints("llama_bias"), folder)
    with serve(folder):
        planned = open_planned_model("own/model")
        files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert planned.download == pytest.approx(files, rel=0.2) and planned.download < files, (
            "without headers"
        )
        assert parameters_of_plan(planned, "bnb_dora") == parameters_of_run(folder, "bnb_dora")
        monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", raise_connection_error)
        with pytest.raises(UserError, match=r"packed by bitsandbytes, and the hub cannot be reached"):
            open_planned_model("own/model")


def test_without_a_connection(checkpoints, serve, tmp_path, monkeypatch):
    """Once the config is in the cache, the hub is not needed; nor if the weights are."""
    with serve(checkpoints("gemma2")):
        by_headers = open_planned_model("own/model")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        by_config = open_planned_model("own/model")
    assert (by_headers.by_config, by_config.by_config) == (False, True)
    assert by_headers.download == by_config.download > 0
    assert parameters_of_plan(by_headers, "qlora") == parameters_of_plan(by_config, "qlora")
    folder = add_to_hub_cache(tmp_path / "hub", "own/other", checkpoints("phi3"), FIRST, "main")
    planned = open_planned_model("own/other")
    assert not planned.by_config and planned.download == 0, "its weights are in the cache"
    assert parameters_of_plan(planned, "qlora") == parameters_of_run(folder, "qlora")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own/gated", "no such folder, and on the hub it is gated: ask for access on its page"),
        ("own/none", "no such folder, and on the hub it does not exist"),
        ("own/private", "no such folder, and on the hub it does not exist, or needs `hf auth login`"),
        ("own/model@v9", "on the hub own/model has no branch, tag or commit v9"),
    ],
)
def test_a_hub_that_refuses(name, words, checkpoints, serve):
    with serve(checkpoints()), pytest.raises(UserError) as refused:
        open_planned_model(name)
    assert str(refused.value) == f"--model_name {name}: {words}"


def remove(*patterns: str):
    def damage(folder: Path) -> None:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink()

    return damage


def write_pickle(folder: Path) -> None:
    """Leave only weights that are never loaded."""
    remove("*.safetensors*")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def cut_a_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"version https://git-lfs.github.com/spec/v1")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (write_pickle, rf"no weights there \({SINGLE_FILE} or {INDEX}\)"),
        (remove("*2-of*"), rf"model-00002-of-00004.safetensors is missing; {INDEX} names it"),
        (cut_a_file, r"model-\d+-of-00004.safetensors is not a safetensors file"),
        (remove("config.json"), "no config.json"),
    ],
)
def test_repositories_of_no_use(damage, words, checkpoints, serve, tmp_path):
    folder = shutil.copytree(checkpoints(), tmp_path / "model")
    damage(folder)
    with serve(folder), pytest.raises(UserError, match=f"^--model_name own/model: {words}"):
        open_planned_model("own/model")
