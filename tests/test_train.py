"""Whole runs: what they leave, how they repeat, how they fail. Those about processes are started as a user starts
them; in the others the pool's ranks stand for the processes that a run would start, which take seconds each."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import launch
import train
from checkpoint_files import newest_whole
from command_line import parse
from config import TOY_PROMPT
from optimizers import lr_factor
from stopping import SAVE
from tests.runs import train_run, whole_run

ROOT = Path(__file__).parent.parent
METRICS = (
    "step epoch loss lr grad_norm tokens trained_tokens step_seconds tokens_per_second memory_allocated_gib"
    " memory_reserved_gib memory_after_forward_gib memory_after_backward_gib"
).split()


def start(args, *launcher: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env
    )


def run(args, *launcher: str, **env: str) -> str:
    """Output of a run that must succeed."""
    process = start(args, *launcher, **env)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, f"{out}\n{err}"
    return out + err


@pytest.fixture
def run_here(one_rank, two_ranks, monkeypatch, capsys):
    """run_here(args) -> output of a run that must succeed: all of the program but the start of processes."""
    pools, started, printed = {1: one_rank, 2: two_ranks}, launch.start, []

    def start(run, world, args, *where):
        if world not in pools:  # a machine with more GPUs
            return started(run, world, args, *where)
        printed.extend(pools[world](whole_run, *args))
        return 0

    def run_here(args) -> str:
        printed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(launch, "start", start)
            status, shown = train.main(list(map(str, args))), capsys.readouterr()
        assert status == 0, shown.err
        return "".join([shown.out, shown.err, *printed])

    return run_here


def with_environment(rank: int, environment: dict[str, str], run: Callable, *args) -> None:
    os.environ.update(environment)
    run(rank, *args)


@pytest.fixture
def processes(monkeypatch):
    """The rank processes that launch.py starts in this test, in order. They come from the fork server of
    tests/distributed.py, where there is one, instead of a new interpreter each, which takes seconds to import all."""
    started, spawn = [], launch.mp.spawn

    def fork(run, args, **options):
        args = (dict(os.environ), run, *args)
        return launch.mp.start_processes(with_environment, args, start_method="forkserver", **options)

    def start(*args, **options):
        context = (spawn if torch.cuda.is_available() else fork)(*args, **options)
        started.extend(context.processes)
        return context

    monkeypatch.setattr(launch.mp, "spawn", start)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # it goes to the ranks, and is put back
    before = signal.getsignal(SAVE)
    yield started
    signal.signal(SAVE, before)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def small(checkpoints, alpaca_file, out, *more) -> list:
    options = ["--max_steps", "4", "--batch_size", "2", "--lora_rank", "8", "--lr", "2e-3", *more]
    return ["--model_name", checkpoints(), "--dataset", alpaca_file, "--output_dir", out, *options]


@pytest.mark.slow
def test_the_embedded_default_learns(tmp_path):
    """No options but a shorter run: two processes, 4-bit DoRA, a loss below 60% of its first value. The command in
    its last line, typed as it stands, shows the data's answer beside the base's noise."""
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    out = run(["--output_dir", tmp_path / "out", "--max_steps", "120"], **cache)
    losses = [m["loss"] for m in metrics(tmp_path / "out")]
    assert len(losses) == 120 and sum(losses[-5:]) / 5 < 0.6 * losses[0]
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["train_type"] == "bnb_dora"
    assert config["world_size"] == (torch.cuda.device_count() or 2)
    assert re.search(r"data: [\d,]+ rows kept, 0 dropped; [\d,]+ tokens.* padding \d+%", out)
    typed = re.findall(r"^try: (.*)$", out, re.MULTILINE)[-1]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        typed, shell=True, cwd=ROOT, capture_output=True, text=True, env=os.environ | cache | {"PATH": path}
    )
    assert done.returncode == 0 and "pip install" not in done.stderr, done.stderr
    rows = map(json.loads, (ROOT / "datasets" / "toy.jsonl").read_text().splitlines())
    (answer,) = [r["output"] for r in rows if r["instruction"] == TOY_PROMPT and not r["input"]]
    prompt, base, tuned = re.fullmatch(
        r"prompt: (.*?)\nbase: (.*)\ntuned: (.*)", done.stdout.strip(), re.S
    ).groups()
    assert (prompt, tuned) == (TOY_PROMPT, answer) and answer not in base


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in metrics(folder)]


@pytest.fixture(scope="module")
def losses_of_two(checkpoints, alpaca_file, two_ranks, tmp_path_factory) -> list[float]:
    """Of `small` in two ranks, however they are started."""
    out = tmp_path_factory.mktemp("two") / "out"
    config, _ = parse(list(map(str, small(checkpoints, alpaca_file, out, "--world_size", "2"))))
    two_ranks(whole_run, train.check(config))
    return losses(out)


def test_the_command_of_the_write_up(checkpoints, alpaca_file, tmp_path, run_here):
    """DESIGN.md's command, word for word but for the model, the data and where it is written."""
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
    """The command that a run prints as the next one repeats it, in processes of its own."""
    first = tmp_path / "a run"
    more = ["--lr_scheduler", "cosine", "--lora_dropout", "0.1", "--world_size", "1"]
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
    """As huggingface_hub lays it out on disk after a download; the adapter then names the id, not a path."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    shutil.copytree(checkpoints(), repository / "snapshots" / "0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--world_size", "1")
    args[1] = "someone/tiny"
    run_here(args)
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "someone/tiny"


def test_torchrun_gives_the_same_run(checkpoints, alpaca_file, tmp_path, losses_of_two):
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--log_to", "stdout", "--world_size", "2")
    out = run(args, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert "step 4/4: loss" in out
    assert losses(tmp_path / "out") == losses_of_two


@pytest.mark.slow
def test_torchrun_reports_bad_input_once(checkpoints, alpaca_file, tmp_path):
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--lora_target_modules", "nothing")
    process = start(args, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count("error: --lora_target_modules") == 1
    assert not (tmp_path / "out").exists()


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
    """The program's own exit status and only line, before torch is imported, which takes seconds."""
    process = start(args, "-X", "importtime")
    shown, imported = process.communicate(timeout=60)
    imports = [line for line in imported.splitlines(keepends=True) if line.startswith("import time:")]
    assert process.returncode == status and shown.startswith(out)
    assert "".join(line for line in imported.splitlines(keepends=True) if line not in imports) == err
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert "argparse" in names and not names & {"torch", "transformers", "numpy", "huggingface_hub"}


def test_overwrite_replaces_a_run(checkpoints, alpaca_file, tmp_path, run_here, capsys):
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--save_model", "false", "--world_size", "1")
    run_here(args)
    assert train.main(list(map(str, args))) == 2
    assert "holds a run" in capsys.readouterr().err
    assert len(metrics(tmp_path / "out")) == 4, "a refused run must not touch the earlier one"
    run_here([*args, "--overwrite", "--max_steps", "2"])
    assert len(metrics(tmp_path / "out")) == 2
    assert not list((tmp_path / "out").glob("adapter*"))


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The rank processes, in order: those that multiprocessing spawned."""
    children = psutil.Process(process.pid).children()
    return sorted(
        (c for c in children if "spawn_main" in " ".join(c.cmdline())), key=lambda c: c.create_time()
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 90):
    """What the condition gives as soon as it is true."""
    deadline = time.time() + seconds
    while time.time() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited in vain: {process.communicate()}")


def wait_for_steps(process: subprocess.Popen, path: Path) -> None:
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= 2, process)


def test_a_killed_rank_ends_the_others_with_its_name(checkpoints, alpaca_file, tmp_path, processes, capsys):
    path, killed = tmp_path / "out" / "metrics.jsonl", []

    def kill_one():
        deadline = time.time() + 90
        while time.time() < deadline and not (path.exists() and path.read_text().count("\n") >= 2):
            time.sleep(0.1)
        killed.append(time.time())
        processes[1].kill()

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--world_size", "2")
    status = train.main([*map(str, args), "--max_steps", "100000", "--num_epochs", "100000"])
    assert time.time() - killed[0] < 30
    assert status == 1 and "error: rank 1 was ended by SIGKILL" in capsys.readouterr().err.splitlines()[-1]
    assert len(metrics(tmp_path / "out")) >= 2 and not any(p.is_alive() for p in processes)


def raises_in_its_third_step(place, job) -> None:
    original, calls = train.loss_sum, itertools.count(1)

    def loss_sum(*args):
        if next(calls) == 3 and place.rank == 1:
            raise RuntimeError("the disk of rank 1 is on fire")
        return original(*args)

    train.loss_sum = loss_sum
    train.run_rank(place, job)


def test_a_rank_that_raises_ends_the_others_with_its_message(
    checkpoints, alpaca_file, tmp_path, losses_of_two, processes, monkeypatch, capsys
):
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--world_size", "2")
    monkeypatch.setattr(train, "run_rank", raises_in_its_third_step)
    begun = time.time()
    assert train.main(list(map(str, args))) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "error: rank 1: RuntimeError: the disk of rank 1 is on fire"
    assert losses(tmp_path / "out") == losses_of_two[:2], "both ranks were training until then"
    assert time.time() - begun < 90 and not any(p.is_alive() for p in processes)


def test_ranks_do_not_outlive_a_killed_parent(checkpoints, alpaca_file, tmp_path):
    """Started as a shell starts a background job: with SIGINT ignored, which is what torch would send to its ranks. A
    rank by itself, which no other's end ends, before training, which takes SIGINT for a request."""
    args = small(checkpoints, alpaca_file, tmp_path / "out", "--world_size", "1")
    args += ["--max_steps", "100000", "--num_epochs", "100000"]
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start(args)
    signal.signal(signal.SIGINT, previous)
    assert any(line.startswith("data: ") for line in process.stdout), process.stderr.read()
    ranks = ranks_of(process)
    process.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=15)
    for rank in alive:
        rank.kill()
    assert len(gone) == len(ranks) == 1 and not alive


def test_signals_save_and_stop(checkpoints, alpaca_file, tmp_path):
    """SIGUSR1 to the program: a checkpoint, and training goes on. Ctrl-C, which a terminal sends to the whole group:
    the end, with one more."""
    out = tmp_path / "out"
    args = small(checkpoints, alpaca_file, out, "--max_steps", "100000", "--num_epochs", "100000")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    process = start(args)
    signal.signal(signal.SIGINT, previous)
    wait_for_steps(process, out / "metrics.jsonl")
    process.send_signal(signal.SIGUSR1)
    (saved,) = wait_for(lambda: list(out.glob("checkpoints/step-????????/manifest.json")), process)
    steps = len(losses(out))
    wait_for(lambda: len(losses(out)) > steps, process)
    ranks = ranks_of(process)
    for each in (process, *ranks):
        each.send_signal(signal.SIGINT)
    timer = threading.Timer(40, process.kill)
    timer.start()
    shown, err = process.communicate()
    timer.cancel()
    assert process.returncode == 0 and "Traceback" not in err
    step = len(losses(out))
    assert f"stopped at step {step} of 100000 (SIGINT); go on with:" in shown
    assert {p.name for p in out.glob("checkpoints/*")} == {saved.parent.name, f"step-{step:08d}"}
    assert not any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in ranks)


SLEEPING = """
import sys, time; sys.path.insert(0, {root!r})
import train
original, calls = train.loss_sum, 0
def loss_sum(*args):
    global calls
    calls += 1
    if calls == 3:
        time.sleep(100)
    return original(*args)
train.loss_sum = loss_sum
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""


def test_a_second_signal_ends_a_step_that_does_not(checkpoints, alpaca_file, tmp_path):
    """The first waits for the end of the step, which lasts; after the second nothing is left but whole checkpoints."""
    script, out = tmp_path / "sleeping.py", tmp_path / "out"
    script.write_text(SLEEPING.format(root=str(ROOT)))
    args = small(checkpoints, alpaca_file, out, "--save_every", "1", "--max_steps", "9", "--num_epochs", "9")
    command = [sys.executable, str(script), *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(out.glob("checkpoints/step-00000002/manifest.json")), process)
    process.terminate()
    time.sleep(1.5)
    assert process.poll() is None, "it waits for the step"
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and err.endswith("ended by SIGTERM\n")
    assert newest_whole(out, pytest.fail).step == 2


def wandb_records(path: Path) -> list:
    """All records of a finished run's .wandb file. wandb writes it in a process of its own, which may be behind."""
    deadline = time.time() + 30
    while time.time() < deadline:
        records = list(parse_wandb(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} was not finished")


def parse_wandb(path: Path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, type, data) behind
    a 7-byte header, each record a protobuf. wandb 0.31 brings the messages but no reader of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, position, parts = path.read_bytes(), 7, b""
    assert raw[:4] in (b":W&B", b"")
    while position + 7 <= len(raw):
        if 32768 - position % 32768 < 7:  # too short for a header: padding
            position += 32768 - position % 32768
            continue
        _crc, length, kind = struct.unpack_from("<IHB", raw, position)
        if position + 7 + length > len(raw):  # being written
            return
        parts += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline_holds_every_step(checkpoints, alpaca_file, tmp_path, run_here):
    """Read back from the file that wandb itself wrote."""
    names = ["--project_name", "p", "--name", "n", "--group", "g", "--world_size", "1"]
    run_here(small(checkpoints, alpaca_file, tmp_path / "out", "--log_to", "wandb", *names))
    (file,) = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    (described,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (described.project, described.display_name, described.run_group) == ("p", "n", "g")
    config = {u.key: json.loads(u.value_json) for u in described.config.update}
    assert config["train_type"] == "bnb_dora" and config["lora_rank"] == 8
    items = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    history = [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in row} for row in items]
    assert [h["loss"] for h in history] == [m["loss"] for m in metrics(tmp_path / "out")]
    assert set(METRICS) - {"step"} <= set(history[0])
    known = json.loads((tmp_path / "out" / "run.json").read_text())["memory"]
    told = {u.key: json.loads(u.value_json) for r in records for u in r.summary.update}
    for name, gib in known.items():
        assert told[f"memory_{name}"] == pytest.approx(gib, abs=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adadelta"])
def test_optimizers_learn(optimizer, checkpoints, alpaca_file, one_rank):
    lr = {"adam": "2e-3", "sgd": "0.5", "adadelta": "0.5"}[optimizer]
    args = [
        "--model_name",
        checkpoints(),
        "--dataset",
        alpaca_file,
        "--train_type",
        "bnb_dora",
        "--lora_rank",
        "8",
    ]
    args += ["--optimizer", optimizer, "--lr", lr, "--max_steps", "6", "--num_epochs", "6"]
    args += ["--dataset_samples", "8", "--batch_size", "8"]  # the same rows at each step
    values = one_rank(train_run, args)[0][0]
    assert values[-1] < 0.97 * values[0]
