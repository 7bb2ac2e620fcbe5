"""Options of train.py: spelling, conversion, YAML file, errors, defaults. Texts in, Config out."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import yaml

from options.config import FIELDS, TOY_DEFAULTS, Config, dump_yaml
from options.declaration import format_value
from options.errors import UserError
from options.methods import METHODS
from options.train import COMMAND, parse
from tests.helpers.fsdp_qlora import CHOICES

REAL = ["--model_name", "some/model"]  # any model but the demo model, which has its own defaults


def resolved(*argv: str) -> Config:
    return parse(list(argv))[0]


def error_of(*argv: str) -> str:
    """Return the error for these options."""
    with pytest.raises(UserError) as error:
        parse(list(argv))
    return str(error.value)


@pytest.fixture
def from_file(tmp_path):
    """from_file(text or bytes) -> the arguments that read it as a YAML file."""

    def write(content: str | bytes) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--config", str(path)]

    return write


# The command line


@pytest.mark.parametrize(
    "argv",
    [
        ["--train_type", "qlora", "--lora_rank", "8"],
        ["--train-type", "qlora", "--lora-rank", "8"],
        ["--train_type=qlora", "--lora-rank=8"],
        ["--train-type=qlora", "--lora_rank=8"],
    ],
)
def test_spellings_of_an_option(argv):
    assert (resolved(*argv).train_type, resolved(*argv).lora_rank) == ("qlora", 8)


def test_dashes_are_replaced_in_the_option_not_in_its_value():
    config = resolved("--project-name=a-b_c", "--model-name", "own/some-model", "--name=--x-y")
    assert (config.project_name, config.model_name, config.name) == ("a-b_c", "own/some-model", "--x-y")


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("option", ["save_model", "no_sync"])  # on and off by default
def test_booleans(option, value):
    spellings = ("true", "True", "TRUE", "1", "yes") if value else ("false", "False", "FALSE", "0", "no")
    for text in spellings:
        assert getattr(resolved(f"--{option}", text), option) is value


def test_a_bare_switch_is_true_and_takes_nothing_from_its_neighbours():
    config = resolved("--no_sync", "--lora_rank", "8", "--overwrite")
    assert (config.no_sync, config.lora_rank, config.overwrite) == (True, 8, True)


@pytest.mark.parametrize(
    "argv",
    [
        ["--profile_memory"],
        ["--profile-memory"],
        ["--profile_memory", "--no_sync"],
        ["--profile_memory", "true"],
        ["--profile_memory=yes"],
    ],
)
def test_profile_memory_in_all_its_forms(argv):
    assert resolved(*argv).profile_memory is True


@pytest.mark.parametrize("argv", [["--profile_memory", "false"], ["--profile-memory=0"], []])
def test_no_profile_memory(argv):
    assert resolved(*argv).profile_memory is False


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--lora_rnk", ["--lora_rnk", "did you mean --lora_rank?"]),
        ("--lora-rnk=8", ["did you mean --lora_rank?"]),
        ("--train_typ", ["did you mean --train_type?"]),  # no abbreviations: they would change meaning
        ("--zzzzzz", ["--zzzzzz", "see --help"]),
        ("stray", ["stray", "see --help"]),
    ],
)
def test_unknown_option(argument, words):
    message = error_of(argument)
    assert message.startswith("unknown option") and all(word in message for word in words)


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_choice_lists_the_choices(name):
    message = error_of(f"--{name}", "nonsense")
    assert f"--{name}" in message and "'nonsense'" in message
    assert set(CHOICES[name].split()) <= set(re.findall(r"\w+", message))


@pytest.mark.parametrize(
    "name, text, noun",
    [
        ("lora_rank", "eight", "a whole number"),
        ("lora_rank", "1.5", "a whole number"),
        ("lora_rank", "", "a whole number"),
        ("master_port", "none", "a whole number"),
        ("lr", "fast", "a number"),
        ("wd", "1,5", "a number"),
        ("lr", "nan", "nan"),
        ("save_model", "maybe", "true or false"),
        ("save_model", "2", "true or false"),
    ],
)
def test_bad_value(name, text, noun):
    message = error_of(f"--{name}={text}")
    assert message.startswith(f"--{name}: ") and text in message and noun in message


def test_an_option_without_its_value():
    assert "--lora_rank" in error_of("--lora_rank") and "--config" in error_of("--config")


BELOW_ABOVE = {  # option: values just out of range
    "batch_size": "0 -1",
    "context_length": "0 -1 1",
    "gradient_accumulation_steps": "0",
    "num_epochs": "0",
    "lora_rank": "0 -8",
    "grad_norm": "0 -1",
    "max_steps": "0 -2",
    "dataset_samples": "0 -2",
    "world_size": "0 -2",
    "lr": "-1e-9 inf",
    "lora_plus_ratio": "0 0.9 inf",
    "wd": "-1 inf",
    "lora_dropout": "-0.1 1",
    "lora_alpha": "0 -1 inf",
    "lr_warmup": "-0.1 1.1",
    "master_port": "0 65536",
    "seed": f"-1 {2**63}",
}
WITHIN = {  # option: the outermost values that are allowed
    "batch_size": "1",
    "context_length": "2",
    "max_steps": "-1 1",
    "dataset_samples": "-1 1",
    "world_size": "-1 1",
    "lr": "0",
    "lora_plus_ratio": "1",
    "wd": "0",
    "lora_dropout": "0 0.99",
    "lr_warmup": "0 1",
    "master_port": "1 65535",
    "seed": f"0 {2**63 - 1}",
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in BELOW_ABOVE.items() for v in values.split()])
def test_out_of_range(name, value):
    assert error_of(f"--{name}={value}").startswith(f"--{name} ")


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WITHIN.items() for v in values.split()])
def test_within_range(name, value):
    assert getattr(resolved(f"--{name}={value}"), name) == (float(value) if "." in value else int(value))


# The YAML file


def test_yaml_values(from_file):
    text = "lora-rank: 8\nlr: 1e-4\nsave_model: no\nname: 5\nlora_alpha: 3\ndataset: null\n"
    config = resolved(*from_file(text))
    assert (config.lora_rank, config.lr, config.save_model) == (8, 1e-4, False)  # YAML 1.1: 1e-4 is a text
    assert (config.name, config.lora_alpha) == ("5", 3.0)
    assert config.dataset == FIELDS["dataset"].default  # null: not given


# Texts that YAML 1.1 reads as numbers, booleans, dates or times.
YAML_TYPED = [
    "1e3", "007", "010", "on", "No", "y", "TRUE", "2026-11-29", "2024-13-45", "2026-11-29 10:00:00", "0x10",
    "0b1", "1_000", "1.10", "+1", "-0", "3.", ".5", "1:30", ".inf", ".NaN", "<<", "=", "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", YAML_TYPED)
def test_a_text_option_keeps_its_characters(from_file, text):
    given = f"name: {text}\nmodel_name: {text}\nlora_target_modules: [{text}, q_proj]\n"
    config = resolved(*from_file(given))
    assert (config.name, config.model_name) == (text, text)
    assert config.lora_target_modules == f"{text},q_proj"
    for quoted in (f"'{text}'", f'"{text}"', f"!!str {text}", f"|-\n  {text}"):
        assert resolved(*from_file(f"name: {quoted}\n")).name == text


@pytest.mark.parametrize("text", ["null", "~", "Null", "NULL"])
def test_null_is_unset_and_quoted_a_text(from_file, text):
    unset = resolved(*from_file(f"name: {text}\nmodel_name: {text}\noutput_dir: out\n"))
    assert unset == resolved(*from_file("name:\noutput_dir: out\n"))
    assert resolved(*from_file(f"name: '{text}'\n")).name == text


@pytest.mark.parametrize(
    ("line", "value"),
    [
        *[(f"lr: {text}", 1e-4) for text in ("1e-4", "1.0e-4", "1E-4", ".0001", "0.000_1", "'1e-4'")],
        *[(f"grad_norm: {text}", float("inf")) for text in (".inf", ".Inf", "+.INF", "inf")],
        *[(f"seed: {text}", 7) for text in ("7", "007", "+7", "'7'")],
        ("seed: 010", 10),  # YAML 1.1: 8
        ("seed: 1_000", 1000),
        *[(f"no_sync: {text}", True) for text in ("true", "True", "on", "yes", "1", "'true'")],
        *[(f"no_sync: {text}", False) for text in ("false", "FALSE", "off", "no", "0")],
        ("compile: true", "true"),
        ("chat_date: 2026-11-29", "2026-11-29"),
        ("lora_target_modules: [q_proj, v_proj]", "q_proj,v_proj"),
        ("lora_target_modules: q_proj,v_proj", "q_proj,v_proj"),
    ],
)
def test_other_options_are_read_as_on_the_command_line(from_file, line, value):
    name = line.partition(":")[0]
    found = getattr(resolved(*from_file(line)), name)
    assert found == value and type(found) is type(value)


def test_the_command_line_wins(from_file):
    config = resolved("--lora_rank", "4", *from_file("lora_rank: 8\nseed: 1\n"))
    assert (config.lora_rank, config.seed) == (4, 1)


@pytest.mark.parametrize(
    "content, words",
    [
        ("lora_rnk: 8\n", ["unknown option lora_rnk", "did you mean --lora_rank?"]),
        ("config: other.yaml\n", ["unknown option config"]),
        ("seed: 1\nname: a: b\n", ["line 2", "not YAML"]),
        ("name: !!python/object:os.system x\n", ["line 1", "not YAML"]),
        (b"name: \xff\n", ["not a UTF-8 text"]),
        ("lora_rank: [8]\n", ["lora_rank", "not a whole number"]),
        ("lora_rank: true\n", ["lora_rank", "not a whole number"]),
        ("lora_rank: 8.5\n", ["lora_rank", "not a whole number"]),
        ("save_model: 3\n", ["save_model", "not true or false"]),
        ("lora_rank: 0x10\n", ["lora_rank", "not a whole number"]),
        ("lora_rank: 1:30\n", ["lora_rank", "not a whole number"]),  # YAML 1.1: 90
        ("lr: 1:30.5\n", ["lr", "not a number"]),
        ("lr: .nan\n", ["lr", "not a number"]),
        ("name: {a: 1}\n", ["name", "not a text"]),
        ("name: !!binary YQ==\n", ["line 1", "not YAML", "binary"]),
        ("name: !mine a\n", ["line 1", "not YAML", "!mine"]),
        ("name: [a, b]\n", ["name", "not a text"]),
        ("dataset: [a.jsonl]\n", ["dataset", "not a text"]),
        ("chat_date: [2026-11-29]\n", ["chat_date", "not a day"]),
        ("save_model: [true]\n", ["save_model", "not true or false"]),
        ("lora_target_modules: [q_proj, null]\n", ["lora_target_modules", "not one value"]),
        ("lora_target_modules: [q_proj, 'v_proj,o_proj']\n", ["lora_target_modules", "not one value"]),
        ("lora_target_modules: {q_proj: v_proj}\n", ["lora_target_modules", "not a text"]),
        ("lr: 1e-4\nseed: 1\nlr: 1e-3\n", ["line 3", "lr", "second time"]),
        ("lora_rank: 4\nlora-rank: 8\n", ["line 2", "lora-rank", "second time"]),
        ("<<: {lr: 1}\n", ["unknown option <<"]),
        ("? [lr]\n: 1\n", ["line 1", "option: value"]),
        ("lr_scheduler: fast\n", ["lr_scheduler", "constant, linear, cosine"]),
        ("- lora_rank\n", ["option: value"]),
        ("lora_rank 8\n", ["option: value"]),
        ("", ["option: value"]),
    ],
)
def test_bad_yaml(from_file, content, words):
    argv = from_file(content)
    message = error_of(*argv)
    assert argv[1] in message and all(word in message for word in words)


def test_yaml_file_that_cannot_be_read(tmp_path):
    assert "No such file" in error_of("--config", str(tmp_path / "none.yaml"))
    assert "directory" in error_of("--config", str(tmp_path))


def test_yaml_options_are_checked_like_the_command_lines(from_file):
    assert "no effect with --train_type full" in error_of(*from_file("train_type: full\nlora_rank: 8\n"))
    assert "--batch_size 0" in error_of(*from_file("batch_size: 0\n"))


@pytest.mark.parametrize("model", [[], REAL])
@pytest.mark.parametrize("train_type", METHODS)
def test_the_saved_config_repeats_the_run(from_file, train_type, model):
    if METHODS[train_type].expansion:  # never of the demo model
        model = ["--llama_pro_path", "some/expanded", "--llama_pro_save", "blocks"]
    odd = ["--name", "007", "--group", "null", "--lr", "3e-5", "--seed", str(2**60), "--no_sync"]
    for more in ([], odd):
        config = resolved("--train_type", train_type, *model, *more)
        assert parse(from_file(dump_yaml(config))) == (config, [])


ODD_TEXTS = [
    *YAML_TYPED, "", " ", "null", "~", " a", "a ", "a: b", "a:", "- a", "#c", "a #c", "*a", "&a", "!a", "%a",
    "@a", "`a", "'", '"', "a\nb", "\n", "a\n\n ", "a\tb", "\\", "\\n", "é", "日本", "🙂", "\x85", "\u2028",
    "\ufeffa", "\x07", "{a}", "[a", "a, b", "a] b", "--x", "---", "...", "? a", "| a", "> a", "word " * 60,
    "\udc80", "  {%- if a -%}\n b \n\n\t{{ '\\n' }}\n{% endif %}\n",
]  # fmt: skip


def test_a_text_of_several_lines_is_named_in_one():
    """Texts that differ anywhere are named differently: nodes compare options by their names."""
    one, other = (format_value(f"{{# ChatML #}}\n{end}") for end in "ab")
    assert one.startswith("{# ChatML #} ... (14 characters, SHA-256 ") and one != other


def odd_values(name: str) -> list:
    """Return values that an option accepts according to its declaration, with unusual ones among them."""
    kind, _ = COMMAND.value_type(name)
    meta = FIELDS[name].metadata
    if meta["choices"]:
        return list(meta["choices"])
    if name == "chat_date":
        return ["2026-11-29"]
    if name == "eval_fold":
        return ["1/2", "10/10"]
    if name == "columns":
        return ["a=b", "question=a: b=c,answer=#d", "text=日本"]
    numbers = [-1, 0, 1, 2, 7, 8, 64, 65535, 2**31 - 1, 2**62]
    numbers += [0.1, 1e-5, 1e-10, 123456.789, 1 / 3, 1e300, float("inf")] if kind is float else []
    values = {str: ODD_TEXTS, bool: [True, False], int: numbers, float: list(map(float, numbers))}[kind]
    within = meta["within"]
    has_upper_bound = within and within.has_upper_bound
    values = [v for v in values if not within or within.contains(v)]
    return [v for v in values if kind is not int or has_upper_bound or abs(v) < 2**31]


def test_written_options_are_read_back(from_file):
    """Every option with each of its values, in its own type. Each file holds all options."""
    values = {name: odd_values(name) for name in FIELDS if name not in ("resume", "overwrite")}
    for turn in range(max(map(len, values.values()))):
        given = {name: of[(turn + i) % len(of)] for i, (name, of) in enumerate(values.items())}
        read = COMMAND.read(from_file(dump_yaml(Config(**given))))
        assert read == given | {"overwrite": False}
        assert {n: type(v) for n, v in read.items()} == {n: type(v) for n, v in given.items()} | {
            "overwrite": bool
        }


def test_the_saved_config_holds_every_option():
    assert list(yaml.safe_load(dump_yaml(resolved()))) == list(FIELDS)
    assert yaml.safe_load(dump_yaml(resolved("--train_type", "full")))["lora_rank"] is None


# Refusals


def test_images_per_pack_needs_packs():
    message = "--images_per_pack: has no effect without --packing"
    assert message in error_of("--images_per_pack", "3")
    assert resolved("--images_per_pack", "3", "--packing").images_per_pack == 3


ADAPTER_ONLY = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")


@pytest.mark.parametrize("name", ADAPTER_ONLY)
def test_option_without_effect(name):
    default = FIELDS[name].default
    message = error_of("--train_type", "full", f"--{name}", str(default))  # even at its default
    assert f"--{name} has no effect with --train_type full" in message
    assert getattr(resolved("--train_type", "full"), name) is None
    assert getattr(resolved("--train_type", "lora", f"--{name}", str(default)), name) == default


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_may_be_given_at_its_default(name):
    default = FIELDS[name].default
    if default is not None:
        train_type = (
            "llama_pro" if FIELDS[name].metadata["needs"] == "expansion" else FIELDS["train_type"].default
        )
        assert getattr(resolved(*REAL, "--train_type", train_type, f"--{name}={default}"), name) == default


# Checkpoints


@pytest.mark.parametrize(
    "given, words",
    [
        ("--save_every -1", "--save_every -1: must be 0 or more"),
        ("--save_minutes inf", "--save_minutes inf: must be 0 or more, and finite"),
        ("--max_minutes -0.5", "--max_minutes -0.5: must be 0 or more"),
        ("--keep 0", "--keep 0: must be positive, or -1"),
        ("--resume=", "--resume: needs auto, or the folder"),
        ("--resume auto --overwrite", "--overwrite: contradicts --resume"),
        ("--quantized_cache=", "--quantized_cache: needs a folder"),
    ],
)
def test_wrong_options_of_checkpoints(given, words):
    assert words in error_of(*given.split())


def test_a_run_is_resumed_in_its_folder():
    for path in ("some/run", "some/run/checkpoints/step-00000010"):
        folder = resolved("--resume", path).output_dir
        assert os.path.relpath(folder) == "some/run"
    assert resolved("--resume", "some/run", "--output_dir", "other").output_dir == "other"
    assert resolved("--resume", "auto").output_dir.startswith("runs/")


def test_the_saved_config_does_not_say_how_the_run_was_started():
    for given in (["--resume", "auto"], ["--overwrite"]):
        saved = yaml.safe_load(dump_yaml(resolved(*given)))
        assert saved["resume"] is None and saved["overwrite"] is False


# Compatibility with fsdp_qlora


def test_remarks_are_only_about_options_without_effect():
    assert parse(["--low_memory", "false"])[1][0].startswith("--low_memory false")
    assert parse(["--low_memory", "true", "--reentrant_checkpointing", "false"])[1] == []


def test_an_expanded_model_by_either_option():
    pro = ["--train_type", "bnb_llama_pro"]
    for argv in (["--llama_pro_path", "a/b"], ["--llama_pro_path", "a/b", "--model_name", "a/b"]):
        config, remarks = parse([*pro, *argv])
        assert (config.model_name, config.batch_size, remarks) == ("a/b", 1, [])  # without the toy's defaults
    config, remarks = parse([*pro, "--llama_pro_path", "a/b", "--model_name", "base"])
    assert config.model_name == "a/b" and len(remarks) == 1
    assert remarks[0].startswith("--model_name base: ignored: weights and config come from")
    assert resolved(*pro, "--model_name", "a/b").llama_pro_path is None


@pytest.mark.parametrize("model", [[], ["--model_name", "toy"]])
@pytest.mark.parametrize("train_type", ["llama_pro", "bnb_llama_pro"])
def test_llama_pro_needs_an_expanded_model(train_type, model):
    message = error_of("--train_type", train_type, *model)
    assert f"--train_type {train_type}" in message and "`python block_expansion.py`" in message


@pytest.mark.parametrize("name, value", [("llama_pro_path", "a/b"), ("llama_pro_save", "model")])
@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
def test_llama_pro_options_need_new_blocks(train_type, name, value):
    message = error_of(*REAL, "--train_type", train_type, f"--{name}", value)
    assert (
        f"--{name} has no effect with --train_type {train_type}: it is for the llama_pro train types"
        in message
    )


# Methods and defaults


def test_methods():
    assert set(METHODS) == set(CHOICES["train_type"].split())
    parts = {name: (m.quantizer, m.adapter, m.expansion) for name, m in METHODS.items()}
    assert parts["full"] == (None, None, False) and METHODS["full"].saves == "model"
    assert parts["qlora"] == ("bnb", "lora", False) and METHODS["qlora"].saves == "adapter"
    assert parts["hqq_dora"] == ("hqq", "dora", False)
    assert parts["bnb_llama_pro"] == ("bnb", None, True) and METHODS["bnb_llama_pro"].saves == "model"
    assert len(set(parts.values())) == len(parts) - 2  # all different, but for the two custom_ ones


@pytest.mark.parametrize("plain", ["lora", "qlora"])
def test_custom_types_equal_their_plain_twins(plain):
    assert METHODS[f"custom_{plain}"] == METHODS[plain]


@pytest.mark.parametrize("train_type", METHODS)
def test_learning_rate_by_method(train_type):
    expected = 1e-5 if train_type == "full" else 2e-4
    assert resolved("--train_type", train_type, *REAL).lr == expected
    assert resolved("--train_type", train_type, *REAL, "--lr", "0.5").lr == 0.5


@pytest.mark.parametrize("scheduler, warmup", [("constant", 0.0), ("linear", 0.1), ("cosine", 0.1)])
def test_warmup_by_scheduler(scheduler, warmup):
    assert resolved(*REAL, "--lr_scheduler", scheduler).lr_warmup == warmup
    assert resolved(*REAL, "--lr_scheduler", scheduler, "--lr_warmup", "0.3").lr_warmup == 0.3


def test_toy_defaults_only_for_the_toy_model(from_file):
    toy, real = dataclasses.asdict(resolved()), dataclasses.asdict(resolved(*REAL))
    assert {name: toy[name] for name in TOY_DEFAULTS} == TOY_DEFAULTS
    for name in TOY_DEFAULTS.keys() - {"lr"}:
        assert real[name] == FIELDS[name].default
    assert resolved(*from_file("model_name: some/model\n")).lora_rank == real["lora_rank"]
    assert resolved("--lora_rank", "4").lora_rank == 4  # a given option overrides the default


def test_output_dir(monkeypatch, from_file):
    monkeypatch.setenv("HOME", "/home/someone")
    assert re.fullmatch(r"runs/\d{8}-\d{6}-qlora", resolved("--train_type", "qlora").output_dir)
    assert resolved(*from_file("output_dir: ~/runs/a\n")).output_dir == "/home/someone/runs/a"


def test_when_the_best_step_is_kept():
    evaluated = ["--eval_share", "0.1", "--eval_every", "2"]
    assert resolved(*evaluated).saves_best
    assert not resolved("--eval_share", "0.1").saves_best  # with one evaluation, the result is the best
    assert not resolved(*evaluated, "--save_model", "false").saves_best


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved().lr = 1.0


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert {f"--{name}" for name in FIELDS} | {"--config"} <= set(re.findall(r"--\w+", shown))
    for field in FIELDS.values():
        assert f"\n{field.metadata['group']}:\n" in shown and field.metadata["help"]
