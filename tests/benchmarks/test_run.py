"""benchmarks.run: a whole run on a CPU, systems that misbehave, the arithmetic, and bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections import namedtuple

import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import AutoConfig, LlamaForCausalLM

from benchmarks import dequantize, run
from benchmarks.limited import read_filled
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.options import parse
from benchmarks.systems import PEERS, SYSTEMS, Setting, System
from benchmarks.table import Row, format_markdown, make_row, ratio_to_ours
from files import model_folder as model_files
from files.model_folder import CheckpointFiles
from models.shapes import SHAPES
from monitoring.host_time import BUSY, PARTS, WAITING, format_host_time
from options.methods import HQQ_BITS
from quantization.hqq import HQQ
from quantization.nf4 import NF4

QLORA = Setting(gpus=1, train_type="qlora", checkpointing="full")
WORK = ["--batch_size", "2", "--context_length", "256", "--lora_rank", "4", "--steps", "4"]
RESULT = {"step_seconds": [9.0, 9.0, 9.0, 0.5], "tokens": 512, "peak_gib": 3.0, "adapters": "float32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of the tiny shape's checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.subprocess, "run", make_here)
        run.ensure_checkpoint("tiny", folder)
    return folder


def make_here(command: list, cwd) -> subprocess.CompletedProcess:
    """Make the checkpoint in this process: a child would import torch and transformers again."""
    assert command[1:3] == ["-m", "benchmarks.make_checkpoint"]
    make_checkpoint(*command[3:])
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture(scope="module")
def outcome(models, tmp_path_factory):
    """The folder with the results of ours and all peers on the tiny shape."""
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    argv = ["--shape", "tiny", *WORK, "--host_context", "0", "--out", str(folder)]
    argv += ["--checkpoints", str(models)]
    assert run.main(argv) == 0
    return folder


@pytest.mark.slow
def test_a_whole_run(outcome):
    rows = {row["system"]: row for row in json.loads((outcome / "results.json").read_text())["rows"]}
    assert list(rows) == list(SYSTEMS)
    for name in ("ours", "peft"):
        assert not rows[name]["problem"], rows[name]
        assert rows[name]["tokens_per_second_per_gpu"] * rows[name]["step_seconds"] == pytest.approx(512)
        assert rows[name]["peak_gib"] > 0.1 and rows[name]["adapters"] == "float32"
    assert "--fsdp_qlora" in rows["fsdp_qlora"]["problem"]
    for name in ("trl", "unsloth", "torchtune"):
        assert rows[name]["problem"] or rows[name]["step_seconds"]
    table = (outcome / "results.md").read_text()
    assert f"torch {torch.__version__}" in table and "python -m benchmarks.run --shape tiny" in table
    assert "| ours --precision auto |" in table and "|  | peft |" in table
    assert (outcome / "speed_memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ours_counts_the_tokens_that_the_peers_count(outcome):
    """Rows fill the context, without padding."""
    folder = outcome / "ours-1-qlora-full-auto"
    data = json.loads((folder / "run.json").read_text())["data"]
    assert data["tokens"] == 256 * data["rows_kept"] == 256 * 2 * 4
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["tokens"] for step in steps] == [2 * 256] * 4


def test_a_checkpoint_is_made_once(models, monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", None)
    folder = run.ensure_checkpoint("tiny", models)
    assert [path.name for path in models.iterdir()] == [folder.name] == ["random-tiny"]
    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    assert sum(p.numel() for p in model.parameters()) == SHAPES["tiny"].parameters()


# Systems that misbehave


@pytest.fixture
def row_of(tmp_path, monkeypatch):
    """row_of(text of a script, *options) -> the row of a peer that is this script."""

    def measure(text: str, *options: str) -> Row:
        script = tmp_path / "script.py"
        script.write_text(text)
        monkeypatch.setitem(SYSTEMS, "peft", System(str(script), ()))
        (tmp_path / "out").mkdir(exist_ok=True)
        parsed = dataclasses.replace(parse([*WORK, *options]), out=tmp_path / "out")
        return run.measure_system(parsed, "peft", QLORA, tmp_path)

    return measure


def script_that_prints(result: dict) -> str:
    return f"print('RESULT', {json.dumps(json.dumps(result))})"


def test_a_peer_that_works(row_of):
    """The result follows a progress bar that leaves no end of line."""
    row = row_of("print('50%|##', end='\\r'); print('75%|###', end='');" + script_that_prints(RESULT))
    assert row == Row(QLORA, "peft", "peft", 0.5, 1024.0, 3.0, "float32", host_seconds=0.5)


def test_short_rows_show_the_hosts_part(row_of):
    """A second run. Its rows have --host_context tokens, and only its time counts."""
    text = """
import json, sys
n = next(int(word.split("=")[1]) for word in sys.argv if word.startswith("--context_length="))
result = {"step_seconds": [9, 9, 9, n / 256], "tokens": 2 * n, "peak_gib": n, "adapters": "float32"}
print("RESULT", json.dumps(result))
"""
    row = row_of(text, "--host_context", "64")
    assert (row.step_seconds, row.host_seconds, row.peak_gib) == (1.0, 0.25, 256)
    assert row_of(text, "--host_context", "0").host_seconds is None


def test_the_hosts_parts_are_those_of_a_run_under_the_profiler(tmp_path, monkeypatch):
    """A third run of ours, on short rows. Its speed does not count."""
    script, parts = tmp_path / "ours.py", dict.fromkeys((*PARTS, WAITING), 0.125)
    script.write_text(f"""
import json, pathlib, shlex, sys
words = dict(word[2:].split("=", 1) for word in sys.argv[1:])
more = shlex.split(words["train_options"])
if "--profile" in more:
    folder = pathlib.Path(more[more.index("--profiling_output") + 1], "iteration_4")
    folder.mkdir(parents=True)
    (folder / "rank0_host_time.txt").write_text({format_host_time(parts, 2)!r})
seconds = 9 if "--profile" in more else int(words["context_length"]) / 256
tokens = 2 * int(words["context_length"])
print("RESULT", json.dumps(dict({RESULT!r}, tokens=tokens, step_seconds=[9, 9, 9, seconds])))
""")
    monkeypatch.setitem(SYSTEMS, "ours", System(str(script), ()))
    out = tmp_path / "an out"
    out.mkdir()
    options = dataclasses.replace(parse([*WORK, "--host_context", "64"]), out=out)
    row = run.measure_system(options, "ours", QLORA, tmp_path, "auto")
    assert (row.step_seconds, row.host_seconds) == (1.0, 0.25)
    assert row.host_parts == parts | {BUSY: 0.125 * len(PARTS)}
    run.write_results(out, [], [row])
    line = (out / "results.md").read_text().splitlines()[-1]
    assert line == f"| {QLORA} | ours --precision auto |{' 0.125 s |' * len(PARTS)} 0.750 s | 0.125 s |"
    none = dataclasses.replace(options, host_parts=False)
    assert run.measure_system(none, "ours", QLORA, tmp_path, "auto").host_parts is None


@pytest.mark.slow
def test_the_hosts_parts_of_a_real_run(models, tmp_path):
    argv = ["--shape", "tiny", *WORK, "--peers", "none", "--out", str(tmp_path / "out")]
    assert run.main([*argv, "--checkpoints", str(models)]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    parts = row["host_parts"]
    assert parts[BUSY] == pytest.approx(sum(parts[part] for part in PARTS), abs=1e-3) and parts[BUSY] > 0


@pytest.mark.parametrize(
    "text, problem",
    [
        ("raise ValueError('no such kernel')", "failed: ValueError: no such kernel"),
        ("import sys; print('error: out of luck'); print('bye'); sys.exit(2)", "failed: error: out of luck"),
        (
            "print('[rank1]: torch.OutOfMemoryError: CUDA out of memory');"
            " raise RuntimeError('ChildFailedError')",
            "failed: [rank1]: torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("import sys; sys.exit('it is over')", "failed: it is over"),
        ("import os; os.kill(os.getpid(), 9)", "failed: exit status -9"),
        ("print('done')", "printed no result"),
        (script_that_prints(RESULT | {"tokens": 480}), "took 480 tokens per step, not 512"),
        ("print('RESULT {broken}')", "Expecting property name"),
    ],
)
def test_a_peer_that_fails_is_a_row(row_of, text, problem):
    row = row_of(text)
    assert row.problem.startswith(problem) and row.step_seconds is None


def test_a_run_that_takes_too_long_is_ended_with_all_its_processes(row_of, tmp_path):
    text = "import subprocess; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True); p.wait()"
    assert row_of(text, "--time_limit", "2").problem == "took longer than 2 s"
    (log,) = (tmp_path / "out").glob("*.log")
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(log.read_text()))
        deadline = time.monotonic() + 20
        while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert child.status() == psutil.STATUS_ZOMBIE


def test_a_peer_that_is_not_there(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "trl", System("none.py", ("torch", "no-such-package")))
    assert run.find_missing(parse([]), "trl") == "not installed: no-such-package"
    assert "--fsdp_qlora" in run.find_missing(parse([]), "fsdp_qlora")
    assert not run.find_missing(parse([]), "peft")


def test_what_a_system_cannot_do():
    two = dataclasses.replace(QLORA, gpus=2)
    assert SYSTEMS["unsloth"].find_obstacle(QLORA, on_gpus=False) == "needs a GPU"
    assert SYSTEMS["unsloth"].find_obstacle(two, on_gpus=True) == "runs on 1 GPU only"
    assert SYSTEMS["trl"].find_obstacle(two, on_gpus=False) == "runs on 1 CPU process only"
    offload = dataclasses.replace(QLORA, checkpointing="offload")
    assert SYSTEMS["peft"].find_obstacle(offload, on_gpus=True) == "has no offload checkpointing"
    for name in ("ours", "peft", "trl", "fsdp_qlora"):
        assert not SYSTEMS[name].find_obstacle(two, on_gpus=True)


def test_how_several_processes_are_started():
    """accelerate and torchrun accept the command lines and would run the script."""
    *started, script = SYSTEMS["trl"].command("python", 2)[3:]
    given = launch_command_parser().parse_args([*started, script])
    assert (given.num_processes, given.fsdp_version, given.fsdp_use_orig_params) == (2, "1", "false")
    *started, script = SYSTEMS["peft"].command("python", 2)[3:]
    given = get_args_parser().parse_args([*started, script])
    assert (given.nproc_per_node, given.training_script) == ("2", str(PEERS / "peft_loop.py"))
    assert SYSTEMS["peft"].command("python", 1) == ["python", str(PEERS / "peft_loop.py")]


def test_one_process_sees_only_its_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert run.run_process([sys.executable, "-c", show], tmp_path / "log", 60, gpus=2) == ""
    assert (tmp_path / "log").read_text() == "3,5\n"


# Replaces fsdp_qlora's train.py: options as fastcore spells them, its progress bar and its memory lines.
CHECKOUT = """
import sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
given = {name.lstrip("-").replace("-", "_"): value for name, value in given.items()}
assert given["train_type"] == "custom_qlora" and given["dataset_samples"] == "8"
assert given["use_gradient_checkpointing"] == "True" and given["use_cpu_offload"] == "False"
for i in range(5):
    sys.stderr.write(f"\\rEpoch 0, Loss 1.234, LR 1.00e-05:  20%|##   | {i}/4 [00:01<00:03, 1.2it/s]")
    sys.stderr.flush()
    time.sleep(0.2)
for rank in range(2):
    print(f"Rank {rank}: Peak allocated memory: {5 + rank}.25 GiB")
"""


def test_the_times_and_memory_of_fsdp_qlora(tmp_path):
    (tmp_path / "train.py").write_text(CHECKOUT)
    given = {"model_name": "m", "train_type": "qlora", "checkpointing": "full", "gpus": 1, "batch_size": 2}
    given |= {"context_length": 256, "lora_rank": 4, "steps": 4, "fsdp_qlora": tmp_path}
    argv = [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        [sys.executable, PEERS / "fsdp_qlora.py", *argv], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.partition("RESULT ")[2])
    assert len(result["step_seconds"]) == 3 and all(0.1 < s < 2 for s in result["step_seconds"])
    assert (result["tokens"], result["peak_gib"], result["adapters"]) == (512, 6.25, "bfloat16")


# The table


def test_the_step_is_the_median_of_the_later_ones():
    """A script that times from step end to step end has one time less; the same steps count."""
    for first in ([50.0, 50.0, 50.0], [50.0, 50.0]):
        result = RESULT | {"step_seconds": [*first, 1.0, 2.0, 4.0], "tokens": 4096}
        row = make_row(dataclasses.replace(QLORA, gpus=2), "peft", "peft", result, 4096, total_steps=6)
        assert (row.step_seconds, row.tokens_per_second_per_gpu) == (2.0, 1024.0)


def test_ratios_are_to_the_first_row_of_ours_with_the_same_setting():
    dora = dataclasses.replace(QLORA, train_type="bnb_dora")
    rows = [
        Row(QLORA, "ours", "ours --precision auto", 1.0, 8000.0, 10.0, "float32"),
        Row(QLORA, "ours", "ours --precision bf16", 0.8, 10000.0, 9.0, "bfloat16", 0.25),
        Row(QLORA, "trl", "trl", 2.0, 4000.0, 12.0, "bfloat16"),
        Row(dora, "ours", "ours --precision auto", problem="failed: a | b"),
        Row(dora, "trl", "trl", 4.0, 2000.0, 15.0, "bfloat16"),
    ]
    assert [ratio_to_ours(row, rows, "tokens_per_second_per_gpu") for row in rows] == [
        1,
        1.25,
        0.5,
        None,
        None,
    ]
    assert [ratio_to_ours(row, rows, "peak_gib") for row in rows] == [1, 0.9, 1.2, None, None]
    lines = format_markdown(rows).splitlines()
    assert "| 0.800 s | 0.250 s | 9.00 GiB |" in lines[3]
    assert lines[4] == "|  | trl | 4,000 | 0.50 | 2.000 s |  | 12.00 GiB | 1.20 | bfloat16 |"
    assert lines[5].startswith(
        "| bnb_dora, 1 GPU, full checkpointing | ours --precision auto | failed: a \\| b |"
    )
    assert lines[6] == "|  | trl | 2,000 |  | 4.000 s |  | 15.00 GiB |  | bfloat16 |"
    assert {line.replace("\\|", "").count("|") for line in lines} == {10}


# Bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ("--shape 9b", "--shape: '9b': must be one of tiny, thin, 1b, 3b, 7b, 8b"),
        ("--shpae 8b", "unknown option --shpae; did you mean --shape?"),
        ("--gpus 0", "--gpus 0: one or more"),
        ("--gpus 1,1", "--gpus 1,1: one or more different"),
        ("--gpus two", "--gpus two: one or more"),
        ("--batch_size 0", "--batch_size 0: must be positive"),
        ("--context_length x", "--context_length: 'x' is not a whole number"),
        ("--steps 3", "--steps 3: the first 3 do not count"),
        ("--train_types qlora,full", "--train_types: 'full': must be one of qlora, bnb_dora"),
        ("--train_types qlora,qlora", "--train_types: qlora is named twice"),
        ("--checkpointing some", "--checkpointing: 'some': must be one of"),
        ("--precision fp8", "--precision: 'fp8': must be one of auto"),
        ("--peers ours", "--peers: 'ours': must be one of peft"),
        ("--peers axolotl", "--peers: 'axolotl': must be one of peft"),
        ("--fsdp_qlora no/such/folder", "is no checkout of fsdp_qlora"),
        ("--pythons trl", "--pythons trl: expected <peer>=<interpreter>"),
        ("--pythons trl=/no/such/python", "--pythons trl=/no/such/python: no such program"),
        ("--pythons trl=false", "--pythons trl=false: is no Python"),
        ("--out {full}", "is not empty"),
        ("--out {file}", "cannot be written"),
        ("--checkpoints {file}", "cannot be written"),
        ("--shape 70b --checkpoints {free}", "141.1 GB are needed"),
    ],
)
def test_bad_options(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**11, 10**11))
    (tmp_path / "file").write_text("")
    for name in ("full", "free"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes").write_text("")
    before = sorted(tmp_path.rglob("*"))
    paths = {name: tmp_path / name for name in ("full", "file", "free")}
    assert run.main(options.format(**paths).split()) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out
    assert words in shown.err, shown.err
    assert sorted(tmp_path.rglob("*")) == before


def test_more_gpus_than_there_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.main(["--gpus", "1,4", "--out", str(tmp_path / "out")]) == 2
    assert "--gpus 4: this machine has 2" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_empty_checkpoint_is_filled_as_it_is_read(tmp_path, monkeypatch):
    """The checkpoint takes no disk room before or after reading.

    train.py's own reading finds the files and tensors of a real checkpoint.
    """
    for folder, empty in (("real", False), ("empty", True)):
        make_checkpoint(tmp_path / folder, "tiny", empty)
    monkeypatch.setattr(model_files, "read_tensor", read_filled)
    real, files = (CheckpointFiles(tmp_path / folder) for folder in ("real", "empty"))
    described = [{n: (t.file, t.shape, t.dtype) for n, t in f.tensors.items()} for f in (real, files)]
    assert described[0] == described[1]
    norm, weight = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    first = files.read(weight)
    assert first.shape == (160, 64) and abs(first.float().std() - 0.02) < 1e-3
    assert torch.equal(files.read(weight), first)
    assert not torch.equal(files.read("model.layers.0.mlp.up_proj.weight"), first)
    assert torch.equal(files.read(norm), torch.ones(64, dtype=torch.bfloat16))
    sizes = [path.stat() for path in (tmp_path / "empty").glob("*.safetensors")]
    # A hole consists of complete blocks: a tensor's first and last block also belong to its neighbours.
    assert sum(s.st_blocks * 512 for s in sizes) < 2**15 < sum(s.st_size for s in sizes)


@pytest.mark.slow
def test_the_command_limits_a_run(tmp_path, capfd):
    make_checkpoint(tmp_path / "empty", "tiny", empty=True)
    command = f"-m benchmarks.limited 1 --model_name {tmp_path / 'empty'} --output_dir {tmp_path / 'run'}"
    command += " --dataset dummy --world_size 1 --train_type qlora --context_length 256 --max_steps 2"
    command += " --save_model false --log_to stdout"
    assert subprocess.run([sys.executable, *command.split()], cwd=run.ROOT).returncode == 0
    assert "2 steps in" in capfd.readouterr().out


def test_each_quantizer_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(dequantize, "REPEATS", 2)
    dequantize.main(["64", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" 64 x 128: ")[0] for line in lines] == [str(q) for q in (NF4(), *map(HQQ, HQQ_BITS))]
    assert all(re.search(r": \d+\.\d{3} ms", line) for line in lines)
