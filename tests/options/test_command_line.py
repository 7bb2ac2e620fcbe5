"""Option handling shared by all commands: spelling, YAML files, checks and suggestions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from options import block_expansion, evaluate, export, generate, plan, report, sweep, train
from options.config import COMPATIBILITY, FIELDS
from options.declaration import Range
from options.errors import UserError

COMMANDS = {
    each.COMMAND.program: each
    for each in (block_expansion, evaluate, export, generate, plan, report, sweep, train)
}
REQUIRED = {  # the required arguments of each command
    "block_expansion.py": ["--model_name", "toy", "--output_dir", "out"],
    "evaluate.py": ["RUN"],
    "export.py": ["RUN", "--to", "merged", "--out", "out"],
    "generate.py": ["RUN"],
    "plan.py": [],
    "report.py": ["RUN"],
    "sweep.py": ["--space", "space.yaml"],
    "train.py": [],
}
OPTIONAL = {"evaluate.py": ("samples", 7), "export.py": ("dtype", "float16"), "generate.py": ("top_k", 5),
            "block_expansion.py": ("new_blocks", 2), "plan.py": ("batch_size", 7),
            "sweep.py": ("trials", 7), "train.py": ("lora_rank", 3)}  # fmt: skip


def error_of(program: str, *argv: str) -> str:
    """Return the error for these arguments after the required ones."""
    with pytest.raises(UserError) as error:
        COMMANDS[program].COMMAND.read([*REQUIRED[program], *argv])
    return str(error.value)


@pytest.mark.parametrize("program", OPTIONAL)
def test_options_come_from_a_file_too(program, tmp_path):
    """The command line overrides the file. Required options may be in the file."""
    read, (name, value), file = COMMANDS[program].COMMAND.read, OPTIONAL[program], tmp_path / "options.yaml"
    options = dict(
        zip(
            *[iter(REQUIRED[program][program in ("evaluate.py", "export.py", "generate.py") :])] * 2,
            strict=True,
        )
    )
    lines = [f"{option.removeprefix('--')}: {text}" for option, text in options.items()]
    file.write_text("\n".join([*lines, f"{name.replace('_', '-')}: {value}"]))
    runs = {"evaluate.py": ["RUN"], "export.py": ["RUN"], "generate.py": ["RUN"]}.get(program, [])
    given = read([*runs, "--config", str(file)])
    assert given[name] == value and set(given) == {name, *(key for key in read(REQUIRED[program]))}
    other = {"dtype": "float32"}.get(name, "1")
    assert str(read([*runs, "--config", str(file), f"--{name}", other])[name]) == other


@pytest.mark.parametrize("program", COMMANDS)
def test_typos_have_the_same_error_in_all_commands(program, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("no_such_option: 1\n")
    assert error_of(program, "--no_such_option=1").startswith("unknown option --no_such_option=1")
    assert error_of(program, "--config", str(file)).startswith(
        f"--config {file}: unknown option no_such_option"
    )
    if program in OPTIONAL:
        name, typo = OPTIONAL[program][0], f"{OPTIONAL[program][0]}s"
        assert error_of(program, f"--{typo}", "1") == f"unknown option --{typo}; did you mean --{name}?"


def test_a_pattern_that_the_shell_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [f"sh/train-{i:05d}-of-00003.jsonl" for i in (0, 1, 2)]
    (tmp_path / "sh").mkdir()
    for path in paths:
        (tmp_path / path).write_text("")
    for option in ("--dataset", "--eval_dataset", "--sample_prompts"):
        assert error_of("train.py", option, *paths, "--lr", "1") == (
            f"{option}: {paths[1]} is a second value; the shell expands a pattern without quotes:"
            f" {option} 'sh/train-0000*-of-00003.jsonl'"
        )
    assert error_of("train.py", "--dataset", "a.jsonl", "absent.jsonl").startswith("unknown option absent")


@pytest.mark.parametrize("program", ["evaluate.py", "export.py", "generate.py", "report.py"])
def test_without_a_run(program):
    with pytest.raises(UserError, match=r"^give a RUN, the --output_dir of a run of train.py.*; see --help$"):
        COMMANDS[program].COMMAND.read(REQUIRED[program][1:])


def test_a_switch_does_not_take_the_run_as_its_value(tmp_path, monkeypatch):
    """An existing folder after a switch is the RUN; only true and false are its value."""
    read = evaluate.COMMAND.read
    for argv in (
        ["--verbose", str(tmp_path)],
        ["--verbose", "true", str(tmp_path)],
        [str(tmp_path), "--verbose"],
    ):
        assert read(argv) == {"run": str(tmp_path), "verbose": True}
    assert read(["--verbose", "false", str(tmp_path)])["verbose"] is False
    monkeypatch.chdir(tmp_path)
    (tmp_path / "true").touch()
    assert read(["RUN", "--verbose", "true"]) == {"run": "RUN", "verbose": True}


@pytest.mark.parametrize(
    ("program", "argv", "words"),
    [
        ("export.py", ["RUN", "--to", "merged", "--out", ""], "--out"),  # not the current folder
        ("export.py", ["RUN", "--to", "", "--out", "out"], "--to"),
        ("export.py", ["", "--to", "merged", "--out", "out"], "give a RUN"),
        ("evaluate.py", [""], "give a RUN"),
        ("evaluate.py", ["RUN", "--out", ""], "--out: needs a path"),
        ("report.py", [""], "needs a path"),
        ("block_expansion.py", ["--model_name", "", "--output_dir", "out"], "--model_name is missing"),
        ("generate.py", ["--config", "none.yaml"], "give a RUN"),
    ],
)
def test_empty_values_are_refused(program, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.yaml").write_text("runs: []\n")
    with pytest.raises(UserError, match=words):
        COMMANDS[program].COMMAND.read(argv)


def test_a_list_in_a_file_equals_comma_separated_values(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("run: RUN\nmetrics: [perplexity, exact_match]\n")
    assert evaluate.COMMAND.read(["--config", str(file)])["metrics"] == ("perplexity", "exact_match")
    file.write_text("model_name: toy\noutput_dir: out\nafter: [0, 2]\n")
    assert block_expansion.parse(["--config", str(file)]).after == [0, 2]
    file.write_text("runs: [one, two]\nprompt: [a, '--b']\n")
    assert generate.COMMAND.read(["--config", str(file)]) == {"runs": ["one", "two"], "prompt": ["a", "--b"]}
    file.write_text("runs: [007, 1e3]\nprompt: [no, 1.10, 2026-11-29]\nprompts: 1_0\n")
    assert generate.COMMAND.read(["--config", str(file)]) == {
        "runs": ["007", "1e3"], "prompt": ["no", "1.10", "2026-11-29"], "prompts": Path("1_0"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("program", "lines", "words"),
    [
        ("generate.py", "device: [cpu]", "device: .* is not one of cpu, cuda"),
        ("generate.py", "prompts: [a.txt, b.txt]", "prompts: .* is not a text"),
        ("generate.py", "prompt: [a, null]", "prompt: 'None' is not a text"),
        ("generate.py", "prompt: [[a]]", "nested"),
        ("export.py", "base_model: [a]", "base_model: .* is not a text"),
        ("evaluate.py", "samples: [3]", "samples: .* is not a whole number"),
        ("evaluate.py", "metrics: [perplexity, ~]", "metrics: None is not one value of the list"),
        ("evaluate.py", "metrics: [bleu, 1e3]", "--metrics: '1e3': must be one of"),
        ("block_expansion.py", "after: [1:30]", "--after: '1:30' is not the number of a layer"),
    ],
)
def test_a_list_elsewhere_is_refused(program, lines, words, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(f"{lines}\n")
    with pytest.raises(UserError, match=words):
        COMMANDS[program].COMMAND.read([*REQUIRED[program], "--config", str(file)])


def test_values_in_older_runs_are_still_read():
    assert train.parse(["--grad_norm", "inf"])[0].grad_norm == math.inf
    assert train.parse(["--profile", "--repeat", "2", "--profiling_frequency", "0"])[0].repeat == 2


@pytest.mark.parametrize("program", COMMANDS)
def test_every_option_is_in_help_with_its_range(program, capsys):
    command = COMMANDS[program].COMMAND
    with pytest.raises(SystemExit) as ended:
        command.read(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for name, field in command.fields.items():
        meta = field.metadata
        assert (meta["positional"] or f"--{name} ") in shown
        if meta["within"] and meta["within"].has_upper_bound:
            assert f"; {meta['within']}]" in shown


def test_options_without_effect_are_last_in_help(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    last = capsys.readouterr().out.partition(f"{COMPATIBILITY}:")[2]
    assert {name for name in FIELDS if f"--{name} " in last} == {"low_memory", "reentrant_checkpointing"}


@pytest.mark.parametrize(
    ("within", "inside", "outside", "text"),
    [
        (Range(ge=1), [1, 9], [0, -1], "positive"),
        (Range(ge=2), [2], [1], "2 or more"),
        (Range(ge=1, sentinel=-1), [1, -1], [0, -2], "positive, or -1"),
        (Range(gt=0), [1e-9], [0, -1, math.inf, math.nan], "above 0"),
        (Range(ge=0, lt=1), [0, 0.99], [1, -0.1, math.nan], "at least 0 and below 1"),
        (Range(ge=0, le=1), [0, 1], [1.1, -0.1], "from 0 to 1"),
        (Range(ge=1, le=256, sentinel=-1), [1, 256, -1], [0, 257], "from 1 to 256, or -1"),
        (Range(gt=0, le=1), [1, 0.1], [0, 1.1], "above 0 and at most 1"),
    ],
)
def test_ranges(within, inside, outside, text):
    assert all(map(within.contains, inside)) and not any(map(within.contains, outside))
    assert str(within) == text


def test_a_number_with_a_fraction_can_be_positive_and_too_small():
    with pytest.raises(UserError, match=r"^--lora_plus_ratio 0\.5: must be 1 or more, and finite$"):
        train.parse(["--lora_plus_ratio", "0.5"])


def test_tilde_in_a_path_is_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert export.parse(["RUN", "--to", "merged", "--out", "~/model"]).out == Path("/home/someone/model")
