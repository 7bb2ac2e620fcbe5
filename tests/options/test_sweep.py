"""options/sweep.py: spaces, what is refused of them, and the same space as a sweep of wandb."""

from __future__ import annotations

import itertools

import pytest
import yaml

from options import train
from options.errors import UserError
from options.sweep import cache_name, parse
from options.wandb_sweep import make_wandb_sweep, write_wandb_sweep

BASE = ["--eval_share", "0.1", "--eval_every", "10"]


@pytest.fixture
def request_of(tmp_path):
    def make(space: str, *argv, base=BASE):
        path = tmp_path / "space.yaml"
        path.write_text(space)
        return parse([*base, "--space", str(path), *argv])

    return make


def test_the_grid_has_all_values_as_they_are_typed(request_of):
    space = "lora_rank: [8, 16]\nlr: {min: 0.1, max: 0.4, step: 0.1}\npacking: [yes, false]\n"
    space += "batch_size: [4, auto]"
    found = request_of(space, "--sampler", "grid")
    assert [list(each.grid) for each in found.space.dimensions] == [
        ["8", "16"], ["0.1", "0.2", "0.3", "0.4"], ["true", "false"], ["4", "auto"]
    ]  # fmt: skip
    combinations = list(found.space.combinations())
    assert found.trials == found.space.size == len(combinations) == 32
    assert combinations[1] == {"lora_rank": "8", "lr": "0.1", "packing": "true", "batch_size": "auto"}
    config, _ = train.parse(found.arguments(combinations[1]))
    assert (config.lora_rank, config.lr, config.packing, config.unsettled) == (8, 0.1, True, ["batch_size"])
    assert request_of("seed: {min: 1, max: 9}").trials == 9, "a finite space has no more trials"
    assert request_of("lr: {min: 1e-5, max: 1, log: true}").trials == 20


@pytest.mark.parametrize(
    ("space", "argv", "words"),
    [
        ("learning_rat: [1]", "", "unknown option --learning_rat"),
        ("lora_rnk: [1]", "", "unknown option --lora_rnk; did you mean --lora_rank?"),
        ("help: [1]", "", "unknown option --help"),
        ("{}", "", "expected lines of `option: [value, value]`"),
        ("lr: []", "", "lr has no value"),
        ("lr: 1", "", "lr: expected [value, value] or {min: x, max: y}"),
        ("lr: [1e-4, -1]", "", "--lr -1: must be 0 or more, and finite"),
        ("lr: [0.1, 1e-1]", "", "lr has the value 0.1 twice"),
        ("lr: [null]", "", "lr: null is not a value"),
        ("lora_rank: [8]\nlora-rank: [16]", "", "lora-rank is given a second time"),
        ("optimizer: [adamw, lion]", "", "'lion': must be one of adamw"),
        ("lora_rank: {min: 0, max: 8}", "", "--lora_rank 0: must be positive"),
        ("max_steps: {min: -1, max: 8}", "", "max_steps: -1 cannot be an end of a range"),
        ("lora_rank: {min: 8, max: 8}", "", "lora_rank: min 8 must be below max 8"),
        ("lora_rank: {min: 8}", "", "lora_rank: max is missing"),
        ("lr: {min: 0, max: 1, log: true}", "", "lr: log: true needs min above 0"),
        ("lr: {min: 1, max: 2, log: true, step: 1}", "", "lr: step has no effect with log: true"),
        ("lr: {min: 1, max: 2, steps: 1}", "", "lr: unknown key steps; a range has min, max, log, step"),
        ("lora_rank: {min: 8, max: 20, step: 8}", "", "max 20 is not a whole number of steps above min; 16"),
        ("wd: {min: 0, max: 0.1, step: 0.03}", "", "max 0.1 is not a whole number of steps above min; 0.09"),
        ("wd: {min: 0, max: 0.1, step: 0.07}", "", "max 0.1 is not a whole number of steps above min; 0.07"),
        ("lora_rank: {min: 1, max: 1000000000, step: 1}", "", "step 1 makes more than 10,000 values"),
        ("lr: {min: 0, max: 1, step: 1e-300}", "", "step 1e-300 makes more than 10,000 values; leave it out"),
        ("lora_rank: {min: [8], max: 16}", "", "lora_rank: min is not a number"),
        ("lora_rank: {min: 8, max: 16, step: 0.5}", "", "step 0.5 is not a positive whole number"),
        ("lora_target_modules: {min: 1, max: 2}", "", "lora_target_modules takes no range of numbers"),
        ("n_bits: {min: 2, max: 4}", "--train_type hqq_lora", "n_bits takes no range of numbers"),
        ("eval_share: [0.1, 0.2]", "", "eval_share is the same in all trials of a sweep"),
        ("output_dir: [a, b]", "", "output_dir is the same in all trials"),
        ("train_type: [qlora, full]\nlora_rank: [8]", "", "with --train_type full --lora_rank 8: --lora"),
        ("lr: {min: 1, max: 2}", "--sampler grid", "--sampler grid: lr in --space"),
        ("lr: [1, 2]", "--lr 1", "--lr: is in --space"),
        ("lr: [1, 2]", "--trials 0", "--trials 0: must be positive"),
        ("lr: [1, 2]", "--resume auto", "--resume: has no effect in a sweep: the same command goes on"),
        ("lr: [1, 2]", "--max_minutes 5", "--max_minutes: has no effect in a sweep"),
        ("lr: [1, 2]", "--workers 2 --wandb_sweep w.yaml", "--workers: has no effect with --wandb_sweep"),
        ("lr: [1, 2]", "--output_dir o --wandb_sweep w.yaml", "--output_dir: has no effect with --wandb"),
        ("lr: [1, 2]", "--folds 3", "--eval_share: has no effect with --folds 3"),
        ("lr: [1, 2]", "--hybrid_shard_size 2", "--hybrid_shard_size: has no effect"),
    ],
)  # fmt: skip
def test_refusals(space, argv, words, request_of):
    with pytest.raises(UserError) as refused:
        request_of(space, *argv.split())
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_more_refusals(request_of, tmp_path):
    with pytest.raises(UserError, match=r"^--eval_share, --eval_dataset or --folds is missing"):
        request_of("lr: [1, 2]", base=[])
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        parse([*BASE, "--space", str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match=r"^--space is missing"):
        parse(BASE)
    assert "no trial is stopped early" in request_of("lr: [1, 2]", base=BASE[:-2]).remarks[0]
    (remark,) = request_of("context_length: [64, 128]").remarks
    assert "context_length may change the rows or tokens" in remark


def test_trials_that_pack_differently_have_caches_of_their_own(request_of):
    """Also two models whose folders have the same name."""
    argvs = [["--model_name", "a/llama"], ["--model_name", "b/llama"], ["--model_name", "a/llama@v2"],
             ["--train_type", "hqq_lora"], ["--train_type", "hqq_lora", "--n_bits", "2"],
             ["--train_type", "bnb_llama_pro", "--llama_pro_path", "a/llama"]]  # fmt: skip
    names = [cache_name(train.parse(argv)[0]) for argv in argvs]
    assert len(set(names)) == len(names) and not any({"/", "@"} & set(name) for name in names)
    same = ["--model_name", "a/llama", "--train_type", "qlora", "--lora_rank", "8"]
    assert cache_name(train.parse(same)[0]) == names[0]
    for space in ("model_name: [a/llama, b/llama]", "train_type: [qlora, bnb_dora, hqq_dora]"):
        with pytest.raises(UserError, match=r"^--quantized_cache: holds one model, .* pack in 2 ways; leave"):
            request_of(space, "--quantized_cache", "packed")
    assert request_of("train_type: [qlora, bnb_dora]", "--quantized_cache", "packed").trials == 2


def test_a_grid_of_wandb_runs_the_same_commands(request_of, tmp_path):
    """Its own reader reads the file, and its own code makes the arguments of an agent's commands."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    space = "lora_rank: [8, 16]\nlr: [1e-5, 0.0003, 2e-4]\npacking: [true, false]\ncompile: ['true', auto]\n"
    space += "lora_target_modules: ['q_proj,v_proj', all]\nlora_dropout: {min: 0, max: 0.2, step: 0.1}\n"
    found = request_of(space, "--sampler", "grid")
    write_wandb_sweep(found, tmp_path / "wandb.yaml")
    read = utils.load_sweep_config(str(tmp_path / "wandb.yaml"))
    assert read["method"] == "grid" and read["metric"] == {"name": "eval_loss", "goal": "minimize"}
    values = [found.space.names, *(read["parameters"][name]["values"] for name in found.space.names)]
    commands = set()
    for texts in itertools.product(*values[1:]):
        chosen = {name: {"value": value} for name, value in zip(values[0], texts, strict=True)}
        arguments = utils.create_sweep_command_args({"args": chosen})["args"]
        command = [word for word in utils.create_sweep_command(list(read["command"])) if word != "${args}"]
        commands.add((*command, *arguments))
    start = ("${env}", "${interpreter}", "${program}")
    own = {
        (*start, *found.base, "--log_to=wandb", *found.arguments(c)[len(found.base) :])
        for c in found.space.combinations()
    }
    assert commands == own and len(own) == 2 * 3 * 2 * 2 * 2 * 3


def test_runs_of_wandb_do_not_share_the_folder_of_the_config(request_of, tmp_path):
    """config.yaml of a run names its folder, which holds that run."""
    (tmp_path / "config.yaml").write_text("eval_share: 0.1\noutput_dir: runs/one\n")
    found = request_of("lr: [1, 2]", base=["--config", str(tmp_path / "config.yaml")])
    command = make_wandb_sweep(found)["command"]
    config, _ = train.parse([word for word in command[3:] if word != "${args}"])
    assert config.output_dir.startswith("runs/2") and found.folder.name == "sweep-space"


def test_ranges_for_wandb(request_of, tmp_path):
    space = "lr: {min: 1e-5, max: 1e-3, log: true}\nlora_rank: {min: 8, max: 64, log: true}\n"
    space += (
        "lora_dropout: {min: 0, max: 0.2}\nlora_alpha: {min: 8, max: 24, step: 8}\nseed: {min: 1, max: 5}"
    )
    write_wandb_sweep(request_of(space), tmp_path / "wandb.yaml")
    read = yaml.safe_load((tmp_path / "wandb.yaml").read_text())
    assert read["method"] == "bayes" and read["run_cap"] == 20
    assert read["parameters"] == {
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
        "lora_rank": {"distribution": "q_log_uniform_values", "q": 1, "min": 8, "max": 64},
        "lora_dropout": {"distribution": "uniform", "min": 0.0, "max": 0.2},
        "lora_alpha": {"values": [8.0, 16.0, 24.0]},
        "seed": {"distribution": "int_uniform", "min": 1, "max": 5},
    }
