"""What benchmarks.memory runs: the settings, and its command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from files.disk_room import check_writable
from options.command_line import Command
from options.declaration import argument, option
from options.errors import UserError

ROWS_OF_ALPACA = "alpaca"  # rows with Alpaca's lengths, of benchmarks.alpaca_lengths
NO_CHECKPOINTING = "--use_gradient_checkpointing false"


@dataclass(frozen=True)
class Setting:
    """Options of train.py whose memory is measured.

    Attributes:
        name: in the table and for --only.
        model: "8b", "1b", or "8b-pro" for the 8B shape with four new blocks.
        options: as train.py takes them.
        gpus: ranks.
        dataset: "dummy", whose rows fill the context, or ROWS_OF_ALPACA.
        is_edge: whether --edges tries it with a little more and a little less memory than predicted.
    """

    name: str
    model: str
    options: str
    gpus: int = 1
    dataset: str = "dummy"
    is_edge: bool = False


SETTINGS = (
    Setting("qlora", "8b", "--train_type qlora --batch_size 4 --context_length 2048", is_edge=True),
    Setting("qlora-all-saved", "8b", f"--train_type qlora --batch_size 2 --context_length 2048"
            f" {NO_CHECKPOINTING}", is_edge=True),
    Setting("qlora-16k", "8b", "--train_type qlora --batch_size 1 --context_length 16384"),
    Setting("qlora-64k", "8b", "--train_type qlora --batch_size 1 --context_length 65536"),
    Setting("qlora-32k-offload", "8b", "--train_type qlora --batch_size 1 --context_length 32768"
            " --use_activation_cpu_offload true"),
    Setting("qlora-cpu-offload", "8b", "--train_type qlora --batch_size 4 --context_length 2048"
            " --use_cpu_offload true"),
    Setting("qlora-packed", "8b", "--train_type qlora --batch_size 1 --context_length 8192 --packing true",
            dataset=ROWS_OF_ALPACA),
    Setting("bnb_dora", "8b", "--train_type bnb_dora --batch_size 4 --context_length 2048", is_edge=True),
    Setting("bnb_dora-all-saved", "8b", f"--train_type bnb_dora --batch_size 2 --context_length 2048"
            f" {NO_CHECKPOINTING}"),
    Setting("hqq_lora", "8b", "--train_type hqq_lora --batch_size 4 --context_length 2048", is_edge=True),
    Setting("lora", "8b", "--train_type lora --batch_size 2 --context_length 2048"),
    Setting("bnb_llama_pro", "8b-pro", "--train_type bnb_llama_pro --batch_size 2 --context_length 2048",
            is_edge=True),
    Setting("full-1b", "1b", "--train_type full --batch_size 4 --context_length 2048", is_edge=True),
    Setting("full-1b-all-saved", "1b", f"--train_type full --batch_size 4 --context_length 2048"
            f" {NO_CHECKPOINTING}"),
    Setting("full-1b-8bit", "1b", "--train_type full --batch_size 4 --context_length 2048"
            " --optimizer adamw_8bit"),
    Setting("qlora-1b-64k", "1b", "--train_type qlora --batch_size 1 --context_length 65536"),
    Setting("qlora-2-ranks", "8b", "--train_type qlora --batch_size 4 --context_length 2048", gpus=2),
    Setting("bnb_dora-2-ranks-cpu-offload", "8b", "--train_type bnb_dora --batch_size 2"
            " --context_length 2048 --use_cpu_offload true", gpus=2),
    Setting("full-1b-2-ranks", "1b", "--train_type full --batch_size 4 --context_length 2048", gpus=2),
)  # fmt: skip


def parse_names(text: str) -> tuple[str, ...]:
    """Parse comma-separated names of settings. Raises UserError for an unknown one."""
    known = [setting.name for setting in SETTINGS]
    for name in text.split(","):
        if name not in known:
            raise UserError(f"--only: {name!r}: must be one of {', '.join(known)}")
    return tuple(text.split(","))


@dataclass(frozen=True)
class Options:
    """Options of benchmarks.memory."""

    # fmt: off
    model_8b: Path = argument("FOLDER_8B", "a checkpoint of the 8B shape; it may be `empty`")
    model_1b: Path = argument("FOLDER_1B", "a checkpoint of the 1B shape; it may be `empty`")
    only: tuple[str, ...] = option((), "Runs", "names of settings, comma-separated; unset = all",
        convert=parse_names)
    edges: bool = option(False, "Runs", "also run some settings limited to 1.06 and 0.9 times the predicted"
        " memory")
    gpus: int = option(-1, "Runs", "GPUs to use; -1 = all", ge=1, sentinel=-1)
    parallel: int = option(5, "Runs", "programs on a GPU at a time, if their memory has room", ge=1)
    run_limit: int = option(170, "Runs", "seconds that a program may take", ge=1)
    time_limit: int = option(480, "Runs", "seconds for all; then what runs is ended, and the same command"
        " goes on later", ge=1)
    out: Path = option(Path("runs/memory-benchmark"), "Folders", "for the results and the output of each run")
    # fmt: on


COMMAND = Command(
    "-m benchmarks.memory",
    "FOLDER_8B FOLDER_1B [--option value ...]",
    "Predicted and measured memory of train.py.",
    Options,
)


def parse(argv: list[str]) -> Options:
    """Parse and check the command line. Raises UserError; exits with status 0 on --help."""
    options = Options(**COMMAND.read(argv))
    for folder in (options.model_8b, options.model_1b):
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: is no checkpoint; `python -m benchmarks.make_checkpoint FOLDER 8b` makes one"
            )
    check_writable(options.out.absolute(), "--out")
    return options
