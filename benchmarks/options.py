"""Command line of benchmarks.run. It reports errors before anything is made or started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks.systems import CHECKPOINTING, OURS, SYSTEMS, TRAIN_TYPES
from benchmarks.table import WARMUP_STEPS
from files.disk_room import check_writable
from models.shapes import SHAPES, MixtureShape, Shape
from options.command_line import Command
from options.config import FIELDS
from options.declaration import option
from options.errors import UserError

PEERS = tuple(name for name in SYSTEMS if name != OURS)
PRECISIONS = FIELDS["precision"].metadata["choices"]


def _user_cache() -> Path:
    """Return the folder of this program's caches. It may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fsdp-finetune"


def _parse_names(option_name: str, known: Iterable[str], text: str) -> tuple[str, ...]:
    """Parse comma-separated names. Raises UserError if one is not in `known`, or is repeated."""
    names = tuple(text.split(","))
    for i, value in enumerate(names):
        if value not in known:
            raise UserError(f"--{option_name}: {value!r}: must be one of {', '.join(known)}")
        if value in names[:i]:
            raise UserError(f"--{option_name}: {value} is named twice")
    return names


def _parse_peers(text: str) -> tuple[str, ...]:
    return () if text == "none" else _parse_names("peers", PEERS, text)


def _parse_gpus(text: str) -> tuple[int, ...]:
    """Parse comma-separated integers. Raises UserError if one is not positive, or is there twice."""
    names = text.split(",")
    if not all(name.isdecimal() and int(name) for name in names) or len(set(names)) < len(names):
        raise UserError(f"--gpus {text}: one or more different numbers from 1 on, comma-separated")
    return tuple(int(name) for name in names)


def _parse_checkout(text: str) -> Path:
    """Return the absolute folder of a checkout of fsdp_qlora. Raises UserError if it has no train.py."""
    folder = Path(text).expanduser().absolute()
    if not (folder / "train.py").is_file():
        raise UserError(f"--fsdp_qlora {text}: is no checkout of fsdp_qlora (no train.py)")
    return folder


def _parse_pythons(text: str) -> dict[str, str]:
    """Parse <peer>=<interpreter>,... into {peer: absolute path}. Raises UserError if one does not run."""
    pythons = {}
    for item in text.split(","):
        name, equals, path = item.partition("=")
        if not equals or name not in PEERS:
            raise UserError(
                f"--pythons {item}: expected <peer>=<interpreter>, the peer of {', '.join(PEERS)}"
            )
        found = shutil.which(str(Path(path).expanduser()))
        if found is None:
            raise UserError(f"--pythons {item}: no such program")
        if subprocess.run([found, "-c", "import json"], capture_output=True).returncode:
            raise UserError(f"--pythons {item}: is no Python interpreter")
        pythons[name] = str(Path(found).absolute())  # not resolved: in a virtual environment it is a link
    return pythons


@dataclass(frozen=True)
class Options:
    """Options of benchmarks.run.

    pythons: {system: interpreter} of systems that do not use this interpreter; argv: the command line.
    """

    # fmt: off
    shape: str = option("8b", "Runs", "8b takes 16 GB of disk, 70b 141 GB",
        choices=tuple(name for name, shape in SHAPES.items() if isinstance(shape, (Shape, MixtureShape))))
    gpus: tuple[int, ...] = option((1,), "Runs", "GPUs of a run; without any, CPU processes. One number, or"
        " several: 1,2", convert=_parse_gpus)
    train_types: tuple[str, ...] = option(("qlora",), "Runs", f"of {', '.join(TRAIN_TYPES)}",
        convert=partial(_parse_names, "train_types", TRAIN_TYPES))
    checkpointing: tuple[str, ...] = option(("full",), "Runs", "of full (each layer is recomputed), none,"
        " offload (full, the layers' inputs kept on the host)",
        convert=partial(_parse_names, "checkpointing", CHECKPOINTING))
    precision: tuple[str, ...] = option(("auto",), "Runs", "of ours, as train.py takes it; auto has fp32"
        " adapters, bf16 has bf16 ones. A peer's is its own",
        convert=partial(_parse_names, "precision", PRECISIONS))
    batch_size: int = option(4, "Runs", "rows per GPU and step", ge=1)
    context_length: int = option(2048, "Runs", "tokens of a row", ge=1)
    host_context: int = option(256, "Runs", "tokens of a row in a second run of each system: with so few, a"
        " step of a large model takes about as long as the host; 0 = no such run", ge=1, sentinel=0)
    host_parts: bool = option(True, "Runs", "also run ours on rows of host_context tokens under the profiler:"
        " what the host does in a step, by part")
    lora_rank: int = option(64, "Runs", "rank of the adapters, on all seven linears; in a mixture of"
        " experts on the four of attention", ge=1)
    steps: int = option(12, "Runs", f"optimizer steps of a run; the first {WARMUP_STEPS} do not count",
        ge=1)
    time_limit: int = option(1800, "Runs", "seconds that a run may take", ge=1)
    train_options: str = option("", "Runs", "more options for ours, as train.py takes them:"
        " --train_options='--wrap_policy sublayer'")
    peers: tuple[str, ...] = option(PEERS, "Peers", "which; none = ours alone", convert=_parse_peers)
    fsdp_qlora: Path | None = option(None, "Peers", "folder of a checkout of fsdp_qlora",
        convert=_parse_checkout)
    pythons: dict | None = option(None, "Peers", "interpreters that have the peers: unsloth=PATH,trl=PATH;"
        " unset = this one", convert=_parse_pythons)
    checkpoints: Path | None = option(None, "Folders", "where checkpoints are made and kept; unset = in the"
        " user's cache folder")
    out: Path | None = option(None, "Folders", "for the results; unset = runs/<date-time>-benchmark")
    # fmt: on
    argv: list[str] = field(default_factory=list)

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return isinstance(SHAPES[self.shape], MixtureShape)

    def python(self, system: str) -> str:
        """Return the interpreter that runs a system."""
        return (self.pythons or {}).get(system, sys.executable)


COMMAND = Command("-m benchmarks.run", "[--option value ...]", "Ours beside its peers.", Options)


def parse(argv: list[str]) -> Options:
    """Parse and check the command line and its folders. Raises UserError; exits with status 0 on --help."""
    options = Options(**COMMAND.read(argv), argv=argv)
    if options.steps <= WARMUP_STEPS:
        raise UserError(f"--steps {options.steps}: the first {WARMUP_STEPS} do not count; use more")
    checkpoints = options.checkpoints or _user_cache() / "benchmarks"
    out = options.out or Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-benchmark")
    for name, folder in (("checkpoints", checkpoints.absolute()), ("out", out.absolute())):
        check_writable(folder, f"--{name}")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; name another folder")
    return replace(options, checkpoints=checkpoints.absolute(), out=out.absolute())
