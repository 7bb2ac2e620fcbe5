"""Whole runs: their files, repetition and failures.

Tests about processes start them as a user does. In the others the pool's ranks replace the processes of a
run, which take seconds each.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from unittest import mock

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import load_file

import train
from checkpoints.manager import CheckpointManager
from launch import processes as launch
from launch.program import parse_or_exit
from monitoring.metrics import Meter
from options.config import TOY_PROMPT
from options.train import parse
from parallel.optimizers import lr_factor
from tests.helpers.hub_cache import FIRST, add_to_hub_cache
from tests.helpers.products import slow
from tests.helpers.programs import ROOT, losses, metrics, run, small, start
from tests.helpers.runs import full_run, train_run
from tools.toy_corpus import documents
from training.bad_steps import BadStepGuard
from training.evaluator import Evaluator

METRICS = (
    "step epoch loss lr grad_norm tokens trained_tokens step_seconds tokens_per_second memory_allocated_gib"
    " memory_reserved_gib memory_after_forward_gib memory_after_backward_gib"
).split()


@pytest.fixture
def run_here(one_rank, two_ranks, monkeypatch, capsys):
    """run_here(args) -> output of a run that must succeed: the whole program except starting processes."""
    pools, started, printed = {1: one_rank, 2: two_ranks}, launch.start, []

    def start(run, world, args, *where):
        if world not in pools:  # a machine with more GPUs
            return started(run, world, args, *where)
        printed.extend(pools[world](full_run, *args))
        return 0

    def run_here(args) -> str:
        printed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(launch, "start", start)
            status, shown = train.main(list(map(str, args))), capsys.readouterr()
        assert status == 0, shown.err
        return "".join([shown.out, shown.err, *printed])

    return run_here


def answers(folder: Path) -> dict[int, dict[str, str]]:
    """Return {step: {prompt: answer}} of a run's samples."""
    found: dict[int, dict[str, str]] = {}
    for line in map(json.loads, (folder / "samples.jsonl").read_text().splitlines()):
        found.setdefault(line["step"], {})[line["prompt"]] = line["text"]
    return found


@pytest.mark.slow
def test_the_embedded_default_learns(tmp_path):
    """A run without options: the base answers with words, the tuned model is right.

    So is its answer to the command in the last line, run unchanged, which asks what no row asks.
    """
    out = run(["--output_dir", tmp_path / "out"])
    losses = [m["loss"] for m in metrics(tmp_path / "out")]
    assert sum(losses[-5:]) / 5 < 0.1 * losses[0]
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["train_type"] == "bnb_dora"
    assert config["world_size"] == (torch.cuda.device_count() or 2)
    assert re.search(r"data: [\d,]+ rows kept, 0 dropped; [\d,]+ tokens.* padding \d+%", out)

    words = set(re.findall(r"\w+", " ".join(itertools.islice(documents(0), 5000))))
    rows = [json.loads(line) for line in (ROOT / "datasets" / "toy.jsonl").read_text().splitlines()]
    before, after = answers(tmp_path / "out").values()
    assert list(after.values()) == [row["output"] for row in rows[:3]]
    for text, answer in zip(before.values(), after.values(), strict=True):
        said = re.findall(r"\w+", text)[:-1]  # the last word may be cut
        assert text != answer and len(said) > 3 and set(said) <= words

    typed = re.findall(r"^try: (.*)$", out, re.MULTILINE)[-1]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        typed, shell=True, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0 and "pip install" not in done.stderr, done.stderr
    prompt, base, tuned = re.fullmatch(
        r"prompt: (.*?)\nbase: (.*)\ntuned: (.*)", done.stdout.strip(), re.S
    ).groups()
    digits = re.findall(r"\d", TOY_PROMPT)
    assert (prompt, tuned) == (TOY_PROMPT, " ".join(sorted(digits))) and tuned not in base
    assert set(re.findall(r"\w+", base)[:-1]) <= words
    texts = [f"{row['instruction']} {row['input']}" for row in rows]
    assert not any(" ".join(mixed) in text for mixed in itertools.permutations(digits) for text in texts)


def test_the_command_of_the_write_up(checkpoints, alpaca_file, tmp_path, run_here):
    """DESIGN.md's command, unchanged except for the model, the data and the output folder."""
    command = f"""--train_type bnb_dora --model_name {checkpoints()}
      --dataset {alpaca_file} --dataset_samples 130 --batch_size 4
      --context_length 2048 --gradient_accumulation_steps 2 --sharding_strategy full_shard
      --use_gradient_checkpointing true --reentrant_checkpointing true --use_cpu_offload false
      --use_activation_cpu_offload false --project_name "fsdp-quantized-ucg"
      --save_model true --output_dir {tmp_path}/models/Llama-3-70b-ucg-bnb-QDoRA"""
    out = run_here(command.replace('"', "").split())
    folder = tmp_path / "models" / "Llama-3-70b-ucg-bnb-QDoRA"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "report.html",
        "run.json",
    }
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "--reentrant_checkpointing" in out and str(folder) in out and "train.py --config" in out


def test_metrics_and_repeating_a_run(checkpoints, alpaca_file, tmp_path, run_here, processes):
    """The next command that a run prints repeats it, in its own processes."""
    first = tmp_path / "a run"
    more = "--lr_scheduler cosine --lora_dropout 0.1 --lora_plus_ratio 4 --world_size 1".split()
    out = run_here(small(checkpoints, alpaca_file, first, *more))
    lines = metrics(first)
    assert [list(m) for m in lines] == [METRICS] * 4
    assert [m["lr"] for m in lines] == pytest.approx(
        [2e-3 * lr_factor(i, 4, 0.1, "cosine") for i in range(4)]
    )
    assert len({m["lr"] for m in lines}) > 1
    assert [m["step"] for m in lines] == [1, 2, 3, 4]
    assert all(0 < m["trained_tokens"] < m["tokens"] and m["step_seconds"] > 0 for m in lines)
    assert all(m["memory_allocated_gib"] > 0.01 for m in lines)

    python, *command = shlex.split(re.search(r"next: (.*)", out)[1])
    assert python == "python" or os.path.samefile(ROOT / python, sys.executable)
    assert command == ["train.py", "--config", f"{first}/config.yaml", "--output_dir", f"{first}-again"]
    assert train.main(command[1:]) == 0 and len(processes) == 1
    again = tmp_path / "a run-again"
    assert losses(first) == losses(again)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (first, again)]
    assert all(torch.equal(weights[1][k], v) for k, v in weights[0].items())


def test_a_hub_id_from_the_cache(checkpoints, alpaca_file, tmp_path, run_here, monkeypatch):
    """A folder as huggingface_hub writes it after a download; the adapter names the id, not a path."""
    add_to_hub_cache(tmp_path / "hub", "someone/tiny", checkpoints(), FIRST, "main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--world_size", "1")
    args[1] = "someone/tiny"
    run_here(args)
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("someone/tiny", FIRST)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<title>tiny · bnb_dora</title>" in page and f"model <b>someone/tiny@{FIRST}</b>" in page


def test_torchrun_reports_a_wrong_option_once(tmp_path, capsys, monkeypatch):
    for rank, lines in (("0", 1), ("1", 0)):
        for name, value in (
            ("RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_RANK", rank),
            ("MASTER_ADDR", "localhost"),
        ):
            monkeypatch.setenv(name, value)
        assert train.main(["--lora_rank", "0"]) == 2
        assert capsys.readouterr().err.count("error: --lora_rank") == lines


@pytest.mark.parametrize(
    "args, status, out, err",
    [
        (["--lora_rnk", "8"], 2, "", "error: unknown option --lora_rnk; did you mean --lora_rank?\n"),
        (["--help"], 0, "usage: python train.py", ""),
    ],
)
def test_options_are_answered_at_once(args, status, out, err):
    """The program's own exit status and only line, before it imports torch, which takes seconds."""
    process = start(args, "-X", "importtime")
    shown, imported = process.communicate(timeout=60)
    imports = [line for line in imported.splitlines(keepends=True) if line.startswith("import time:")]
    assert process.returncode == status and shown.startswith(out)
    assert "".join(line for line in imported.splitlines(keepends=True) if line not in imports) == err
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert "argparse" in names and not names & {"torch", "transformers", "numpy", "huggingface_hub"}


def test_without_room_for_temporary_files_there_is_a_line(monkeypatch, capsys):
    """Libraries ask for a temporary folder when they are imported."""
    why = "No usable temporary directory found in ['/tmp']"
    monkeypatch.setattr(tempfile, "gettempdir", mock.Mock(side_effect=FileNotFoundError(errno.ENOENT, why)))
    with pytest.raises(SystemExit) as e:
        parse_or_exit([], parse)
    expected = f"error: {why}; the disk is full, or TMPDIR should name another folder\n"
    assert e.value.code == 2 and capsys.readouterr().err == expected


def test_overwrite_replaces_a_run(checkpoints, alpaca_file, tmp_path, run_here, capsys):
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--save_model", "false", "--world_size", "1")
    run_here(args)
    assert train.main(list(map(str, args))) == 2
    assert "holds a run" in capsys.readouterr().err
    assert len(metrics(tmp_path / "out")) == 4, "a refused run must not touch the earlier one"
    run_here([*args, "--overwrite", "--max_steps", "2"])
    assert len(metrics(tmp_path / "out")) == 2
    assert not list((tmp_path / "out").glob("adapter*"))


def test_piped_output_has_plain_lines(checkpoints, alpaca_file, tmp_path, run_here):
    """Their values are those of metrics.jsonl; an evaluation is told once; nothing rewrites a line."""
    more = "--log_every 2 --eval_share 0.2 --eval_every 3 --max_steps 5 --world_size 1".split()
    printed = run_here(small(checkpoints, alpaca_file, tmp_path / "out", *more))
    assert not re.search(r"[^\n -~]", printed)
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    times = [re.search(r", \d\d:\d\d elapsed, (\d\d:\d\d left|time left unknown)$", line) for line in lines]
    assert [line[: time.start()] for line, time in zip(lines, times, strict=True)] == [
        f"step {m['step']}/5: loss {m['loss']:.4f}"
        + (f", eval_loss {m['eval_loss']:.4f}" if "eval_loss" in m else "")
        + f", lr {m['lr']:.2e}, {m['tokens_per_second']:,.0f} tok/s, {m['memory_allocated_gib']:.2f} GiB"
        for m in metrics(tmp_path / "out")
        if m["step"] > 1
    ]
    assert lines[-1].endswith(", 00:00 left") and sum("eval_loss" in line for line in lines) == 2


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adadelta"])
def test_optimizers_learn(optimizer, checkpoints, short_rows, one_rank):
    lr = {"adam": "2e-3", "sgd": "0.5", "adadelta": "0.5"}[optimizer]
    args = [
        "--model_name",
        checkpoints(),
        "--dataset",
        short_rows,
        "--train_type",
        "bnb_dora",
        "--lora_rank",
        "8",
    ]
    args += ["--optimizer", optimizer, "--lr", lr, "--max_steps", "6", "--num_epochs", "6"]
    args += ["--dataset_samples", "8", "--batch_size", "8"]  # the same rows at each step
    values = one_rank(train_run, args)[0][0]
    assert values[-1] < 0.97 * values[0]


@pytest.mark.parametrize(
    "options, order",
    [
        ("--save_every 4 --eval_share 0.2 --eval_every 2", "F1 F2 T1 T2 E F3 F4 T3 T4 E C F5 F6 T5 T6 E C"),
        ("--sample_every 3 --sample_tokens 2", "A F1 F2 T1 F3 T2 T3 A F4 F5 T4 F6 T5 T6 A"),
        ("--gradient_accumulation_steps 2 --max_steps 3", "F1 F2 F3 T1 F4 F5 T2 F6 T3"),
        ("--max_bad_steps 0 --max_steps 3", "F1 T1 F2 T2 F3 T3"),
        ("--precision fp16_autocast --max_steps 3", "F1 T1 F2 T2 F3 T3"),
        ("--activation_budget -1 --max_steps 4", "F1 F2 T1 T2 F3 F4 T3 T4"),
    ],
)
def test_a_step_is_told_while_the_next_one_computes(
    options, order, checkpoints, short_rows, one_rank, tmp_path
):
    """The exceptions need the step's result, or may not run in the middle of a forward."""
    args = small(checkpoints, short_rows, tmp_path / "out", "--max_steps", "6", *options.split())
    events = one_rank(order_of_a_run, [*map(str, args), "--log_to", "stdout", "--world_size", "1"])[0]
    assert events == order.split()
    steps = [m["step"] for m in metrics(tmp_path / "out")]
    assert steps == list(range(1, 1 + sum(s[0] == "T" for s in events)))


def order_of_a_run(rank_info, argv: list[str]) -> list[str]:
    """Return the events of a run in order.

    F: a training forward; T: report of a step; E: an evaluation; A: samples; C: a checkpoint.
    """
    config, _ = parse(argv)
    seen = []

    def before(kind: type, name: str, note) -> None:
        original = getattr(kind, name)

        def noted(self, *args):
            seen.append(note(self, *args))
            return original(self, *args)

        patch.setattr(kind, name, noted)

    def loss_sum(model, batch):
        if model.training:
            seen.append(f"F{1 + sum(s[0] == 'F' for s in seen)}")
        return original(model, batch)

    original = train.loss_sum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "loss_sum", loss_sum)
        before(Meter, "measure", lambda _, reading, lap: f"T{reading.index}")
        before(Evaluator, "_compute_loss", lambda _: "E")
        before(Evaluator, "_write_samples", lambda _, step: "A")
        before(CheckpointManager, "_collect_state", lambda _: "C")
        full_run(rank_info, train.check_run(config))
    return seen


@pytest.mark.parametrize(
    "more", ["--precision fp32", "--grad_norm inf", *slow(["--precision fp16_autocast"])]
)
def test_gradients_are_freed_before_the_next_forward(more, checkpoints, short_rows, two_ranks, tmp_path):
    """Held longer they would be in memory twice, once the next backward has made its own."""
    args = small(checkpoints, short_rows, tmp_path / "out", "--max_steps", "3", *more.split())
    for seen in two_ranks(gradients_alive_in_forward, [*map(str, args), "--world_size", "2"]):
        assert len(seen) == 3 and seen[0] == (0, 0)
        assert all(made > 0 and alive == 0 for made, alive in seen[1:])


def gradients_alive_in_forward(rank_info, argv: list[str]) -> list[tuple[int, int]]:
    """Return, for each training forward, (gradients made so far, those that still exist)."""
    config, _ = parse(argv)
    seen, made = [], []
    loss_sum, guard_step = train.loss_sum, BadStepGuard.step

    def forward(model, batch):
        seen.append((len(made), sum(ref() is not None for ref in made)))
        return loss_sum(model, batch)

    def step(self, optimizer, reading):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        made.extend(weakref.ref(p.grad) for p in parameters if p.grad is not None)
        return guard_step(self, optimizer, reading)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "loss_sum", forward)
        patch.setattr(BadStepGuard, "step", step)
        full_run(rank_info, train.check_run(config))
    return seen
