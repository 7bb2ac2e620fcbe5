"""A RUN made with relative paths is opened, evaluated, exported and repeated from any folder."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import evaluate
import export
import generate
from options.train import parse
from tests.helpers.adapters import args_for
from tests.helpers.finished_runs import save_job
from training.preflight import check_run

RECIPE = 'source = "rows.jsonl"\nformat = "alpaca"\n'


def check_args(*argv):
    return check_run(parse([*map(str, argv), "--world_size", "1"])[0])


def save_in(rank_info, current: Path, *rest) -> None:
    """Call `save_job` with another current folder than the pool's processes have."""
    with contextlib.chdir(current):
        save_job(rank_info, *rest)


@pytest.fixture
def make_run(checkpoints, alpaca_file, one_rank, tmp_path, monkeypatch):
    """make_run(*options) -> the Job of the RUN "run", made in the folder of its model and data.

    The current folder is another one afterwards.
    """
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(checkpoints(), there / "models" / "tiny")
    shutil.copytree(checkpoints("llama_bias_pro"), there / "models" / "pro")
    shutil.copy(alpaca_file, there / "rows.jsonl")
    (there / "mine.toml").write_text(RECIPE)
    (there / "ask.txt").write_text("Say one.\n")
    monkeypatch.setenv("HOME", str(there))

    def make_run(*argv):
        monkeypatch.chdir(there)
        job = check_args(*argv, "--output_dir", "run")
        (there / "run").mkdir()
        (there / "run" / "config.yaml").write_text(job.options_file())
        one_rank(save_in, there, job, there / "run")
        monkeypatch.chdir(elsewhere)
        return job

    return make_run


@pytest.mark.parametrize("model, data", [("models/tiny", "rows.jsonl"), ("~/models/tiny", "./mine.toml")])
def test_a_run_from_another_folder(model, data, make_run, tmp_path, capsys):
    there = tmp_path / "there"
    more = "--eval_dataset rows.jsonl --eval_samples 2 --sample_every 9 --sample_prompts ask.txt".split()
    job = make_run(*args_for(model, data, "bnb_dora", *more))
    written = yaml.safe_load((there / "run" / "config.yaml").read_text())
    names = ("model_name", "dataset", "eval_dataset", "sample_prompts", "output_dir")
    assert {name: written[name] for name in names} == {
        "model_name": str(there / "models" / "tiny"),
        "dataset": str(there / Path(data).name),
        "eval_dataset": str(there / "rows.jsonl"),
        "sample_prompts": str(there / "ask.txt"),
        "output_dir": str(there / "run"),
    }
    described = json.loads((there / "run" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == written["model_name"] and described["revision"] is None
    run = "../there/run"
    assert generate.main([run, "--prompt", "Hi", "--max_new_tokens", "2"]) == 0
    assert evaluate.main([run, "--metrics", "perplexity"]) == 0
    assert f"on 2 rows of {there / 'rows.jsonl'}" in capsys.readouterr().out
    assert export.main([run, "--to", "merged", "--out", "merged"]) == 0
    assert "rows of the data" in capsys.readouterr().out
    assert parse(["--config", f"{run}/config.yaml", "--resume", "auto"])[0].output_dir == str(there / "run")
    again = check_args("--config", f"{run}/config.yaml", "--output_dir", "again")
    assert again.base == job.base and again.rows.tokens.equal(job.rows.tokens)
    assert again.evaluation.prompts == job.evaluation.prompts
    assert again.config.model_name == job.config.model_name


def test_a_moved_run_resumes_in_its_new_folder(tmp_path):
    """Its config.yaml names the old folder."""
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/config.yaml").write_text(f"output_dir: {tmp_path}/made\n")
    given = ["--config", str(tmp_path / "moved/config.yaml")]
    assert parse(given)[0].output_dir == f"{tmp_path}/made"  # a copied file of options
    (tmp_path / "moved/run.json").write_text("{}")
    assert parse([*given, "--resume", "auto"])[0].output_dir == f"{tmp_path}/moved"
    assert parse([*given, "--output_dir", "other"])[0].output_dir == "other"


def test_an_expanded_model_from_another_folder(make_run, tmp_path):
    there = tmp_path / "there"
    options = ["--train_type", "llama_pro", "--llama_pro_path", "models/pro", "--llama_pro_save", "blocks"]
    make_run(*options, "--dataset", "rows.jsonl")
    written = yaml.safe_load((there / "run" / "config.yaml").read_text())
    assert written["model_name"] == written["llama_pro_path"] == str(there / "models" / "pro")
    assert generate.main(["../there/run", "--prompt", "Hi", "--max_new_tokens", "2"]) == 0
    config, remarks = parse(["--config", "../there/run/config.yaml"])
    assert not remarks and config.llama_pro_path == str(there / "models" / "pro")


@pytest.mark.parametrize("name", ["toy", "dummy"])
def test_names_of_recipes_are_unchanged(name, checkpoints, tmp_path, monkeypatch):
    """Also if a folder has the same name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    job = check_args(*args_for(checkpoints(), name, "lora", "--dataset_samples", "4"))
    assert job.config.dataset == name
    assert re.search(rf"^dataset: {name}$", job.options_file(), re.MULTILINE)


def test_the_demo_model_keeps_its_name(alpaca_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = check_args("--dataset", alpaca_file)
    assert job.config.model_name == "toy" and job.base.name == str(job.files.folder.resolve())
