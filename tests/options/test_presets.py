"""Presets: what they give, what wins over them, and that a run keeps the values that it was started with."""

from __future__ import annotations

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from finished.model_card import render_card
from options import plan, presets
from options.config import PRESETS, Config, dump_yaml
from options.errors import UserError
from options.presets import FOLDER, PRESET_OPTIONS, describe_presets
from options.train import parse
from tests.helpers.programs import ROOT


@pytest.fixture
def changed(monkeypatch, tmp_path):
    """changed(text of chat.toml) -> presets are read from a folder with this file alone."""

    def change(text: str) -> Path:
        monkeypatch.setattr(presets, "FOLDER", tmp_path)
        (tmp_path / "chat.toml").write_text(text)
        return tmp_path / "chat.toml"

    return change


def chat_text(**values) -> str:
    """Return the text of chat.toml with other values; None removes one."""
    options = tomllib.loads((FOLDER / "chat.toml").read_text())["options"] | values
    lines = [f"{name} = {value!r}" for name, value in options.items() if value is not None]
    return "use = 'talk'\n[options]\n" + "\n".join(lines).replace("False", "false").replace("True", "true")


def config_of(*argv) -> Config:
    return dataclasses.replace(parse([str(word) for word in argv])[0], output_dir=None)


def values_of(config: Config) -> dict:
    return {name: getattr(config, name) for name in PRESET_OPTIONS}


def test_every_file_is_a_preset():
    assert {path.stem for path in FOLDER.iterdir()} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_values_of_its_file(name):
    """--help_presets shows the same as options, and docs/recipes.md has them in its table."""
    file = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    config = config_of("--preset", name, "--model_name", "some/model")
    assert config.preset == name and values_of(config) == file["options"]
    shown = describe_presets().partition(f"\n{name}: ")[2].partition("\n\n")[0]
    use, _, options = shown.partition("\n")
    typed = config_of(*shlex.split(options), "--model_name", "some/model")
    assert use == file["use"] and config == dataclasses.replace(typed, preset=name)
    row = re.search(rf"^\| `{name}` \|(.*)$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)[1]
    cells = [cell.strip() for cell in row.split("|")][: len(PRESET_OPTIONS)]
    written = parse([f"--{n}={cell}" for n, cell in zip(PRESET_OPTIONS, cells, strict=True)])[0]
    assert values_of(written) == file["options"]


def test_help_presets_ends_the_program(capsys):
    for command in (parse, plan.parse):
        with pytest.raises(SystemExit) as ended:
            command(["--help-presets"])
        assert ended.value.code == 0 and capsys.readouterr().out == describe_presets() + "\n"


def test_the_file_and_the_command_line_win(tmp_path):
    """defaults < preset < --config < command line, also over the defaults of the embedded model."""
    file = tmp_path / "base.yaml"
    file.write_text("preset: chat\nlora_rank: 4\nlora_dropout: 0.5\n")
    config = config_of("--config", file, "--lora_dropout", "0.25")
    (remark,) = parse(["--config", str(file)])[1]
    assert remark.startswith("--preset chat: lora_alpha 16.0, use_rslora false, lora_target_modules all, lr ")
    assert "lora_rank" not in remark and "lora_dropout" not in remark
    chat = tomllib.loads((FOLDER / "chat.toml").read_text())["options"]
    assert values_of(config) == chat | {"lora_rank": 4, "lora_dropout": 0.25}
    assert config.batch_size == 8, "the embedded model's own default"
    domain = tomllib.loads((FOLDER / "domain.toml").read_text())["options"]
    assert values_of(config_of("--config", file, "--preset", "domain")) == domain | {
        "lora_rank": 4,
        "lora_dropout": 0.5,
    }


def test_a_run_keeps_its_values_if_the_preset_changes(tmp_path, changed, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    before = config_of("--preset", "chat", "--lr", "1e-3")
    (run / "config.yaml").write_text(dump_yaml(before))
    (run / "run.json").write_text("{}")
    changed(chat_text(lora_rank=2, num_epochs=9))
    again = ["--preset", "chat", "--output_dir", run]
    assert config_of(*again).lora_rank == 2, "a new run"
    resumed = [*again, "--resume", "auto"], ["--preset", "chat", "--resume", run]
    for argv in (["--config", run / "config.yaml"], *resumed):
        assert dataclasses.replace(config_of(*argv), resume=None) == before
    assert parse(["--config", str(run / "config.yaml")])[1] == []
    assert config_of("--preset", "chat", "--resume", run / "checkpoints" / "step-3").lora_rank == 16
    (remark,) = parse(["--preset", "chat", "--resume", str(run)])[1]
    assert (
        remark.startswith("--preset chat, as this run has recorded: lora_rank 16, ") and "lr 0.001" in remark
    )
    assert config_of("--preset", "chat", "--resume", run, "--lora_rank", "5").lora_rank == 5
    monkeypatch.setattr(presets, "PRESETS", ())
    assert config_of("--config", run / "config.yaml") == before, "the preset is gone"
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"config\.yaml: preset: 'chat': must be one of "):
        config_of("--config", run / "config.yaml")


@pytest.mark.parametrize("command", [parse, plan.parse])
def test_a_run_of_an_older_version_is_no_place_for_a_preset(tmp_path, command):
    """An option that it has not recorded has its default: a preset's value would mix two recipes."""
    lines = dump_yaml(parse(["--model_name", "some/model"])[0]).splitlines()
    older = [line for line in lines if not line.startswith(("preset:", "use_rslora:"))]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(older))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError) as refused:
        command(["--config", str(file), "--preset", "domain"])
    words = f"--preset domain: has no effect: {file} is a run's, and gives all of its options; leave it out"
    assert str(refused.value) == words
    file.write_text("\n".join(["preset: domain", *older]))
    assert config_of("--config", file).use_rslora is False, "as it was trained"


def test_an_adapter_decides_its_own_options():
    config = config_of("--preset", "domain", "--adapter", "some/adapter")
    assert (config.lora_rank, config.lora_alpha, config.use_rslora) == (None, None, None)
    assert (config.lr, config.lr_scheduler) == (5e-5, "linear")


def test_the_card_names_options_with_other_values_than_the_preset(tmp_path):
    def row_of(*argv, **adapters) -> str:
        config = dataclasses.replace(config_of("--preset", "domain", *argv), **adapters)
        card = render_card(config, tmp_path, "owner/base", "title", "", "peft")
        return next(line for line in card.splitlines() if line.startswith("| preset"))

    assert row_of() == "| preset | domain |"
    of_adapter = {"lora_rank": 4, "lora_alpha": 32.0, "use_rslora": False, "lora_target_modules": "all"}
    row = row_of("--adapter", "some/adapter", "--num_epochs", "2", **of_adapter)
    assert row == "| preset | domain, with other values of lora_rank, use_rslora, num_epochs |"


def test_the_planner_takes_presets():
    """training/make_plan.py resolves `given` for each machine."""
    request = plan.parse(["--model_name", "some/model", "--preset", "code"])
    assert request.config.lora_rank == request.given["lora_rank"] == 64
    assert "--preset code" in request.command({})
    (remark,) = request.remarks
    assert remark.startswith("--preset code: lora_rank 64, lora_alpha 128.0, "), "as train.py prints it"


ALL = "--lora_rank 4 --lora_alpha 1 --use_rslora --lora_target_modules all --lora_dropout 0 --lr 1"
ALL += " --lr_scheduler linear --lr_warmup 0 --num_epochs 1"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            "--preset foo",
            "--preset: 'foo': must be one of instruct, chat, code, summarize, classify, domain;",
        ),
        ("--preset chat --train_type full", "--preset has no effect with --train_type full: it is for LoRA"),
        (f"--preset chat {ALL}", "--preset chat: has no effect: the command line gives all of its options"),
        (
            f"--preset chat --adapter a {ALL.partition(' --lora_target_modules all')[2]}",
            "--preset chat: has no effect: --adapter and the command line give all of its options",
        ),
    ],
)
def test_presets_without_effect_are_refused(argv, words):
    with pytest.raises(UserError) as refused:
        parse(argv.split())
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (chat_text(lora_rank=0), "--lora_rank 0: must be positive"),
        (chat_text(lr_scheduler="cubic"), "--lr_scheduler: 'cubic': must be one of"),
        (chat_text(lora_rnk=8), "a preset has `use`, and [options] with lora_rank, "),
        (chat_text(lora_rank=None), "a preset has `use`, and [options] with lora_rank, "),
        ("use = 'talk'\n", "not a preset ('options')"),
        ("use talk", "not a preset (Expected '='"),
    ],
)
def test_a_damaged_preset_is_named(text, words, changed):
    path = changed(text)
    with pytest.raises(UserError) as refused:
        parse(["--preset", "chat"])
    assert str(refused.value).startswith(f"{path}: {words}")
