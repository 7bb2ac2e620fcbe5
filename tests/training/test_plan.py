"""Plans of every train type, family and strategy, their text and their JSON; wrong requests."""

from __future__ import annotations

import json
import shlex
from itertools import cycle

import pytest

import plan
from launch.memory import GIB
from monitoring.host_memory import COMPILER_BYTES
from options.errors import UserError
from options.methods import METHODS
from options.plan import parse
from options.train import parse as parse_train
from tests.helpers import tiny
from tests.helpers.adapters import save_peft_adapter
from tests.helpers.layers import R
from training.machine import RESERVED_GIB
from training.make_plan import make_plan
from training.plan_report import describe

TRAIN_TYPES = [name for name in METHODS if not name.startswith("custom_")]
FAMILIES = [name for name in tiny.CONFIGS if name not in ("llama3", "llama_bias")]
STRATEGIES = ["auto", "full_shard", "shard_grad_op", "ddp", "hybrid_full_shard"]
MORE = ["--packing", "--use_cpu_offload", "--use_activation_cpu_offload", "--wrap_policy=sublayer",
        "--use_gradient_checkpointing=false", "--precision=fp32", "--optimizer=adamw_8bit"]  # fmt: skip
# Each value at least once: a plan of any combination runs the same code.
RUNS = list(zip(TRAIN_TYPES, cycle(FAMILIES), cycle(STRATEGIES), cycle(["t4", "4090", "h100"]), cycle(MORE)))


def plan_of(*options: str, **machine: str):
    return make_plan(parse(["--model_name", "1b", *options, *[f"--{k}={v}" for k, v in machine.items()]]))


def answer(capsys, *options: str) -> dict:
    """Return the JSON object of plan.py, alone on standard output."""
    capsys.readouterr()  # of what makes checkpoints
    assert plan.main([*options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.mark.parametrize("train_type, family, sharding_strategy, gpu, more", RUNS)
def test_every_kind_of_run(train_type, family, sharding_strategy, gpu, more, checkpoints, capsys):
    """The verdict turns where the memory does; a proposal is a command whose plan is what it says."""
    folder = str(checkpoints(f"{family}_pro" if METHODS[train_type].expansion else family))
    run = ["--model_name", folder, "--train_type", train_type, "--context_length", "256", more]
    run += ["--sharding_strategy", sharding_strategy]
    rank = ["--lora_rank", "16"] if METHODS[train_type].adapter else []
    machine = ["--gpus", "4", "--gpu", gpu]
    found = answer(capsys, *run, *rank, "--batch_size=8", *machine)
    peak, phases = found["peak_gib"], found["phases"]
    assert found["fits"] and peak == phases["peak"] == max(phases.values()) > 0
    # Four ranks, also where the command is pasted on a machine with eight GPUs.
    words = [*run, *rank, "--batch_size=8", "--world_size", "4"]
    assert found["command"] == shlex.join(["python", "train.py", *words])
    assert found["left_gib"] == pytest.approx(found["machine"]["gib"] - RESERVED_GIB - peak)
    edge = RESERVED_GIB + peak
    assert answer(capsys, *run, *rank, "--batch_size=8", *machine, f"--gib={edge + 1e-9}")["fits"]
    near = answer(capsys, *run, *rank, "--batch_size=8", *machine, f"--gib={edge * (1 - 1e-6)}")
    assert not near["fits"] and near["changes"]
    for change in near["changes"]:
        argv = shlex.split(change["command"])
        assert argv[:2] == ["python", "train.py"] and parse_train(argv[2:])
        again = answer(capsys, *argv[2:], *machine, f"--gib={edge * (1 - 1e-6)}")
        assert again["fits"] and again["peak_gib"] == change["peak_gib"] < peak


def test_the_text_has_what_json_has(capsys):
    options = [
        "--model_name",
        "8b",
        "--train_type",
        "qlora",
        "--gpu",
        "t4",
        "--lr",
        "1e-4",
        "--save_every",
        "5",
        "--keep",
        "2",
        "--preset",
        "code",
    ]
    found = answer(capsys, *options)
    assert plan.main(options) == 0
    text = capsys.readouterr().out
    for phase, gib in found["phases"].items():
        assert f"{phase} " in text and f"{gib:.2f}" in text
    assert f"host memory in all: {found['host_gib']:.2f} GiB" in text
    assert found["command"] in text and "1 x T4" in text and "fp" not in found["machine"]["gpu"]
    assert found["without_effect"] == ["lr", "keep"]
    assert "without effect on memory: --lr --keep" in text
    assert found["disk_gib"]["checkpoints"] > 0 and "disk: checkpoints" in text
    assert found["longest_context"]["limited_by"] == "memory" and "float16" in found["run"]["precision"]
    assert f"the longest context that fits: {found['longest_context']['tokens']:,} tokens" in text
    table = found["batch_table"]
    for peaks, fits in zip(table["peaks"][:8], table["fits"], strict=False):
        for gib, is_enough in zip(peaks, fits, strict=True):
            assert (f" {gib:.2f} " if is_enough else f"[{gib:.2f}]") in text


def test_without_a_context_one_row_is_searched_and_the_step_stays_the_same():
    found = plan_of("--batch_size=4", "--gradient_accumulation_steps=2")
    assert found.is_models_limit and found.tokens == 131_072
    assert "the model's limit" in "\n".join(describe(found))
    assert found.command().endswith("--batch_size 1 --gradient_accumulation_steps 8 --context_length 131072")
    assert found.command().count("--batch_size") == 1, "the option that was typed is replaced"
    nothing = plan_of("--train_type=full", gib="8")
    assert not nothing.fits and nothing.table is None and nothing.tokens == 512
    assert all("--context_length 512" in nothing.command(p.options) for p in nothing.proposals)


def test_a_command_names_its_ranks_and_a_model_that_train_can_load(checkpoints, capsys):
    """A shape has no weights, so a placeholder stands for it, in all commands and as a remark."""
    short = "--context_length=512"
    found = answer(capsys, "--model_name", "8b", "--train_type=full", short)
    commands = [found["command"], *(change["command"] for change in found["changes"])]
    assert len(commands) > 1 and any("8b is a shape only" in line for line in found["remarks"])
    for command in commands:
        config, _ = parse_train(shlex.split(command)[2:])
        assert (config.model_name, config.world_size) == ("MODEL", 1)
    folder = str(checkpoints())
    real = answer(capsys, "--model_name", folder, short, "--gpus=4", "--world_size=2")
    assert real["command"] == f"python train.py --model_name {folder} {short} --world_size=2"
    assert real["remarks"] == [], "as typed"
    every = answer(capsys, "--model_name", folder, short, "--gpus=4", "--world_size=-1")
    assert every["command"].endswith(f"{short} --world_size 4")


def test_sizes_that_are_auto():
    """As train.py would set them, but by the model of memory alone."""
    options = "--context_length=2048", "--batch_size=auto"
    found = plan_of(*options, gib="12")
    batch = found.config.batch_size
    assert found.fits and found.command().endswith(f"--world_size 1 --batch_size {batch}") and batch > 1
    assert not plan_of(options[0], f"--batch_size={batch + 1}", gib="12").fits
    shared = plan_of(*options, "--effective_batch_size=24", gib="12", gpus="2")
    divisors = [n for n in (1, 2, 3, 4, 6, 12) if n <= batch]
    assert shared.config.batch_size == divisors[-1]
    assert shared.config.gradient_accumulation_steps == 12 // divisors[-1]
    both = plan_of("--context_length=auto", "--batch_size=auto", gib="12")
    assert both.searched["context_length"] == plan_of(gib="12").tokens and both.table
    nothing = plan_of("--train_type=full", *options, gib="8")
    assert not nothing.fits and nothing.config.batch_size == 1


def test_the_machine():
    assert plan_of().machine.gpu.name == "RTX 4090" and "no GPU here" in plan_of().assumption
    found = plan_of(gpu="T4", gpus="2", gib="12", host_gib="64")
    assert str(found.machine) == "2 x T4, 12.0 GiB each, 64.0 GiB of host memory" and not found.assumption
    assert found.machine.gpu.gib == 12 and found.config.world_size == 2
    assert plan_of("--world_size=1", gpus="2").config.world_size == 1


def test_host_memory_is_judged_if_it_is_given():
    options = "--train_type=full", "--use_cpu_offload", "--context_length=512"
    gib = plan_of(*options).estimate.host / GIB
    assert plan_of(*options, host_gib=f"{gib * 1.01}").fits
    found = plan_of(*options, host_gib=f"{gib * 0.9}")
    assert not found.fits and f"{gib:.2f} of {gib * 0.9:.2f} GiB of host memory" in "\n".join(describe(found))
    with pytest.raises(UserError, match=r"no option makes it fit .* GiB of host memory: .*it needs .*"):
        plan_of(*options, host_gib="0.5")


def test_the_ranks_share_the_cpus_of_the_host():
    """As many processes compile for each rank, at most 32; 4 where the CPUs are not known."""
    options = "--train_type=qlora", "--context_length=512"
    host = [
        plan_of(*options, gpus="2", **more).estimate.host / GIB
        for more in ({}, {"cpus": "8"}, {"cpus": "9"}, {"cpus": "48"}, {"cpus": "64"}, {"cpus": "1000"})
    ]
    assert host[0] == host[1] == host[2] < host[3] < host[4] == host[5]
    assert host[3] - host[0] == pytest.approx(2 * (24 - 4) * COMPILER_BYTES / GIB)
    assert "(with 4 CPUs per rank; --cpus)" in "\n".join(describe(plan_of(*options)))


def test_new_blocks_that_do_not_exist_yet():
    found = plan_of("--train_type=bnb_llama_pro", "--new_blocks=4", "--context_length=512")
    assert (
        found.planned.model.config.num_hidden_layers == 20
        and "--model_name EXPANDED_MODEL" in found.command()
    )
    first = "python block_expansion.py --model_name MODEL --new_blocks 4 --output_dir EXPANDED_MODEL"
    assert f"before the run: {first}" in describe(found)


def test_the_data_are_not_looked_at():
    found = plan_of("--context_length=512", "--dataset=none.jsonl")
    assert "--dataset: the data are not looked at; --probe reads them" in describe(found)


def test_what_the_numbers_leave_out_is_not_without_effect():
    found = plan_of("--context_length=512", "--loading_workers=8", "--lora_dropout=0.1", "--keep=3")
    assert found.without_effect == ["keep"]
    assert "what these take is not in the numbers: --loading_workers --lora_dropout" in describe(found)


def test_the_options_of_a_saved_run(tmp_path, capsys):
    """A file of options may hold those of train.py only, and its options are not reported as typed."""
    file = tmp_path / "run.yaml"
    file.write_text("model_name: 1b\ncontext_length: 700\nlr: 1.0e-3\ntrain_type: qlora\n")
    found = answer(capsys, "--config", str(file))
    assert (found["run"]["train_type"], found["run"]["context_length"]) == ("qlora", 700)
    command = f"python train.py --config {file} --model_name MODEL --world_size 1"
    assert found["command"] == command and found["without_effect"] == []
    file.write_text("model_name: 1b\ngpus: 2\n")
    assert plan.main(["--config", str(file)]) == 2
    assert (
        capsys.readouterr().err
        == "error: --config: gpus is no option of train.py; give --gpus on the command line\n"
    )


def test_a_saved_adapter_decides_its_rank(checkpoints, tmp_path, capsys):
    folder = save_peft_adapter(checkpoints(), tmp_path / "adapter")
    run = ["--model_name", str(checkpoints()), "--train_type", "qlora", "--context_length", "256"]
    found, same = (
        answer(capsys, *run, *more)
        for more in (
            ["--adapter", str(folder)],
            [f"--lora_rank={R}", "--lora_target_modules=q_proj,down_proj"],
        )
    )
    assert found["phases"] == same["phases"] and found["disk_gib"]["result"] == same["disk_gib"]["result"]
    assert plan.main([*run, "--adapter", str(folder), "--train_type=bnb_dora"]) == 2
    assert "is a LoRA adapter" in capsys.readouterr().err


def test_a_curve(tmp_path, capsys):
    file = tmp_path / "memory.png"
    options = ["--model_name", "1b", "--gib", "8", "--curve", "batch", "--curve_file", str(file)]
    assert plan.main([*options, "--context_length=2048"]) == 0
    assert "too much" in capsys.readouterr().out and file.read_bytes().startswith(b"\x89PNG")
    points = answer(capsys, *options, "--context_length=2048")["curve"]
    assert [batch for batch, _ in points] == [2**i for i in range(len(points))] and points[-1][1] > 7
    for batch, gib in points[:2]:
        again = answer(capsys, "--model_name=1b", "--gib=8", "--context_length=2048", f"--batch_size={batch}")
        assert again["peak_gib"] == gib
    options[5] = "context"
    assert [tokens for tokens, _ in answer(capsys, *options)["curve"]][:2] == [512, 1024]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--gpu", "t5"], ["--gpu t5: unknown", "h100"]),
        (["--gpus", "0"], ["--gpus 0: must be from 1 to 1024"]),
        (["--new_blocks", "4"], ["--new_blocks: has no effect with --train_type"]),
        (["--gpus", "1025"], ["--gpus 1025: must be from 1 to 1024"]),
        (["--cpus", "0"], ["--cpus 0: must be positive"]),
        (["--gib", "0"], ["--gib 0: must be above 0"]),
        (["--gib", "-1"], ["--gib -1: must be above 0"]),
        (["--host_gib", "0"], ["--host_gib 0"]),
        (["--world_size", "3", "--gpus", "2"], ["--world_size 3: the machine has 2"]),
        (["--gpu", "t4", "--precision", "bf16"], ["--precision bf16: a T4 has no bf16"]),
        (["--batch_size", "0"], ["--batch_size 0: must be positive"]),
        (["--batchsize", "1"], ["did you mean --batch_size"]),
        (["--lora_rank", "8", "--train_type", "full"], ["--lora_rank has no effect with --train_type full"]),
        (["--lora_target_modules", "nothing"], ["matches no linear"]),
        (["--model_name", "no such model"], ["no such model"]),
        (["--model_name", "owner/name"], ["owner/name"]),
        (["--curve_file", "x.png"], ["--curve_file"]),
        (["--curve", "batch", "--curve_file", "x.jpg"], ["x.jpg: must end in one of .png, .pdf, .svg"]),
        (["--curve", "batch", "--curve_file", "no/such/folder/x.png"], ["--curve_file no/such/folder/x.png"]),
        (
            ["--model_name", "8b", "--train_type", "full", "--gib", "1.1", "--context_length", "4096"],
            ["no option makes it fit 1 x RTX 4090, 1.1 GiB", "GiB on each GPU", "GPUs of this kind would do"],
        ),
        (["--gib", "1.01", "--context_length", "4096"], ["; not even 64 GPUs of this kind would do"]),
    ],
)  # fmt: skip
def test_wrong_requests_are_one_line(options, words, capsys):
    assert plan.main(["--model_name", "1b", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_the_model_must_be_named(capsys):
    assert plan.main(["--gpus", "2"]) == 2
    assert capsys.readouterr().err == "error: --model_name is missing; see --help\n"


IMAGES = ["--model_name=gemma3-4b", "--lora_rank=16", "--gpu=t4"]


def test_a_plan_with_images(capsys):
    """A pack has as many as fit, at most --images_per_pack; no context is shorter than a row's images."""
    text = answer(capsys, *IMAGES, "--context_length=512")
    assert any("--images_per_row N" in line for line in text["remarks"]) and text["run"]["images"] == 0
    one = answer(capsys, *IMAGES, "--context_length=512", "--images_per_row=1")
    assert one["peak_gib"] > text["peak_gib"] + 0.7 and one["run"]["images"] == 1
    assert one["peak_gib"] < 8 and one["command"] == (
        "python train.py --lora_rank=16 --context_length=512 --model_name MODEL --world_size 1"
    )
    packed = answer(capsys, *IMAGES, "--context_length=2048", "--images=true", "--packing")
    assert packed["run"]["images"] == 8
    limited = answer(
        capsys, *IMAGES, "--context_length=2048", "--images=true", "--packing", "--images_per_pack=3"
    )
    assert limited["run"]["images"] == 3 and limited["peak_gib"] <= packed["peak_gib"]
    longest = answer(capsys, *IMAGES, "--images_per_row=3")
    assert longest["batch_table"]["contexts"][0] == 1024
    assert plan.main([*IMAGES, "--context_length=512", "--images_per_row=1"]) == 0
    assert "; 1 image of 896 x 896 pixels per row\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model_name=8b --images_per_row=1", "^--model_name 8b: the shape .* take images: tiny-gemma3, "),
        ("--images_per_row=4 --context_length=1024", "^--images_per_row 4: its images take 1,024 tokens"),
        ("--images_per_row=1 --image_size=400", "^--image_size 400: this model takes images of 896 x 896"),
        ("--images_per_row=1 --images=false", "^--images_per_row: contradicts --images false"),
        ("--images_per_row=0", "^--images_per_row 0"),
    ],
)
def test_wrong_requests_about_images(options, words):
    with pytest.raises(UserError, match=words):
        make_plan(parse([*IMAGES, *options.split()]))


def test_a_plan_proposes_fewer_images_and_a_packed_tower():
    options = "--gpu=3080 --gib=6 --images_per_row=2 --packing --batch_size=2 --context_length=4096"
    found = make_plan(parse(["--model_name=gemma3-4b", *options.split()]))
    changed = {name for proposal in found.proposals for name in proposal.options}
    assert not found.fits and {"vision_bits", "images_per_pack"} <= changed
