"""Compute the tables of docs/hardware.md: the longest rows that fit on each hardware.

python -m tools.make_hardware_table

The arithmetic is the one that advises after an out-of-memory error (monitoring/memory_model.py). No GPU is
needed: it reads the headers of checkpoints whose files have no contents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path

from benchmarks.make_checkpoint import make_checkpoint
from files.model_folder import CheckpointFiles
from launch.precision import choose_precision
from models.registry import build_on_meta, read_config
from monitoring.memory_model import estimate_memory
from monitoring.run_sizes import run_sizes
from options import train
from options.config import Config

PAGE = Path(__file__).parent.parent / "docs" / "hardware.md"
BEGIN, END = "<!-- computed: python -m tools.make_hardware_table -->", "<!-- end of the computed part -->"
LENGTHS = [2**i for i in range(17, 8, -1)]  # tokens of a row, from the longest
RANKS = 16, 64
# The estimate was 0.96 to 1.39 times the measured peak (docs/hardware.md). The rest is CUDA's context, NCCL's
# buffers and what the allocator cannot use.
MARGIN, RESERVED_GIB = 1.05, 1.0
OFFLOAD = ["--use_cpu_offload", "true", "--use_activation_cpu_offload", "true"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs of one host.

    Attributes:
        name: as the tables show it.
        gpus: their number.
        gib: memory of each, as torch reports it.
        has_bf16: whether they compute in bf16.
    """

    name: str
    gpus: int
    gib: float
    has_bf16: bool = True


MACHINES = [
    Machine("1 x T4", 1, 14.6, has_bf16=False),
    Machine("2 x T4", 2, 14.6, has_bf16=False),
    Machine("1 x L4", 1, 22.0),
    Machine("1 x 3090 or 4090", 1, 23.6),
    Machine("2 x 3090 or 4090", 2, 23.6),
    Machine("1 x A100, 40 GB", 1, 39.4),
    Machine("8 x H100", 8, 79.1),
    Machine("8 x H200", 8, 139.8),
]
MODELS = "8b", "14b", "32b", "70b"


class Estimator:
    """Estimates the memory of runs on checkpoints without contents, which lie in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def estimate_gib(self, model: str, options: list[str], has_bf16: bool, tokens: int) -> float:
        """Return the estimated peak of each GPU in GiB.

        Args:
            model: a name of models/shapes.py.
            options: of train.py, without the model and the data.
            has_bf16: whether the GPUs compute in bf16.
            tokens: of the longest row.
        """
        folder = self.folder / model
        if not folder.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                make_checkpoint(folder, model, empty=True)
        config = self._parse(folder, options)
        model_config, family = read_config(folder)
        precision = choose_precision(config.precision, has_gpu=True, has_bf16_gpu=has_bf16)
        built = build_on_meta(model_config, family)
        sizes = run_sizes(built, family, config, precision, CheckpointFiles(folder), tokens)
        return estimate_memory(config, precision, sizes, None).peak / 2**30

    def find_longest(self, machine: Machine, model: str, rank: int, more: list[str]) -> int:
        """Return the most tokens of one row of QDoRA that fit, of LENGTHS; 0 if none does.

        more: further options of train.py.
        """
        options = ["--world_size", str(machine.gpus), "--lora_rank", str(rank), "--batch_size", "1", *more]
        for tokens in LENGTHS:
            needed = self.estimate_gib(model, options, machine.has_bf16, tokens)
            if needed * MARGIN + RESERVED_GIB <= machine.gib:
                return tokens
        return 0

    @staticmethod
    def _parse(folder: Path, options: list[str]) -> Config:
        fixed = ["--model_name", str(folder), "--dataset", "dummy", "--use_gradient_checkpointing", "true"]
        return train.parse([*fixed, "--sharding_strategy", "full_shard", *options])[0]


def make_tables(folder: Path) -> str:
    """Return both tables in Markdown. folder: for the checkpoints."""
    estimator, lines = Estimator(folder), []
    for title, more in (("Everything on the GPUs", []), (f"`{' '.join(OFFLOAD)}`", OFFLOAD)):
        lines += [f"\n{title}:\n", f"| hardware | {' | '.join(m.upper() for m in MODELS)} |"]
        lines += ["|---" * (len(MODELS) + 1) + "|"]
        for machine in MACHINES:
            cells = []
            for model in MODELS:
                longest = [estimator.find_longest(machine, model, rank, more) for rank in RANKS]
                cells.append(" / ".join(f"{tokens:,}" if tokens else "-" for tokens in longest))
            lines.append(f"| {machine.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def replace_tables(page: str, tables: str) -> str:
    """Return the page with `tables` between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        PAGE.write_text(replace_tables(PAGE.read_text("utf-8"), make_tables(Path(name))), "utf-8")
