"""The command line of benchmarks.run: what is wrong with it is found here, before anything is made or started."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import SHAPES
from benchmarks.systems import CHECKPOINTING, OURS, SYSTEMS, TRAIN_TYPES
from benchmarks.table import SETTLING
from files.disk_room import check_writable
from options.command_line import command_parser, suggest, with_underscores
from options.config import FIELDS, user_cache
from options.errors import UserError

PEERS = tuple(name for name in SYSTEMS if name != OURS)
NUMBERS = {
    "batch_size": (4, "rows per GPU and step"),
    "context_length": (2048, "tokens of a row"),
    "lora_rank": (64, "rank of the adapters, on all seven linears"),
    "steps": (12, f"optimizer steps of a run; the first {SETTLING} do not count"),
    "time_limit": (1800, "seconds that a run may take"),
}
TEXTS = {
    "gpus": ("1", "GPUs of a run; without any, CPU processes. One number, or several: 1,2"),
    "train_types": ("qlora", f"of {', '.join(TRAIN_TYPES)}"),
    "checkpointing": ("full", "of full (each layer is recomputed), none, offload (full, the layers' inputs kept on the host)"),
    "precision": ("auto", "of ours, as train.py takes it; auto has fp32 adapters, bf16 has bf16 ones. A peer's is its own"),
    "peers": (",".join(PEERS), "which; none = ours alone"),
    "fsdp_qlora": (None, "folder of a checkout of fsdp_qlora"),
    "pythons": (None, "interpreters that have the peers: unsloth=PATH,trl=PATH; unset = this one"),
    "train_options": ("", "more options for ours, as train.py takes them: --train_options='--wrap_policy sublayer'"),
    "checkpoints": (None, "folder where checkpoints are made and kept; unset = in the user's cache folder"),
    "out": (None, "folder for the results; unset = runs/<date-time>-benchmark"),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The command line, checked. pythons: {system: interpreter} where it is not this one; argv: as it was given."""

    shape: str
    gpus: list[int]
    train_types: list[str]
    checkpointing: list[str]
    precision: list[str]
    peers: list[str]
    batch_size: int
    context_length: int
    lora_rank: int
    steps: int
    time_limit: int
    fsdp_qlora: Path | None
    pythons: dict[str, str]
    train_options: str
    checkpoints: Path
    out: Path
    argv: list[str]

    def python(self, system: str) -> str:
        """The interpreter that runs it."""
        return self.pythons.get(system, sys.executable)


def parse(argv: list[str]) -> Options:
    """Raises UserError; exits 0 on --help."""
    parser = command_parser("-m benchmarks.run", "[--option value ...]", "Ours beside its peers.")
    parser.add_argument(
        "--shape",
        metavar="NAME",
        default="8b",
        help=f"of {', '.join(SHAPES)} [8b]; 8b takes 16 GB of disk, 70b 141 GB",
    )
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{text} [{default}]")
    for name, (default, text) in TEXTS.items():
        shown = f"{text} [{default}]" if default else text
        parser.add_argument(f"--{name}", metavar="TEXT", default=default, help=shown)
    given, rest = parser.parse_known_args(with_underscores(argv))
    if rest:
        known = ["shape", *NUMBERS, *TEXTS]
        raise UserError(f"unknown option {rest[0]}{suggest(rest[0].split('=')[0], known)}")
    if given.shape not in SHAPES:
        raise UserError(f"--shape {given.shape}: is none of {', '.join(SHAPES)}")
    for name in NUMBERS:
        if getattr(given, name) <= 0:
            raise UserError(f"--{name} {getattr(given, name)}: must be positive")
    if given.steps <= SETTLING:
        raise UserError(f"--steps {given.steps}: the first {SETTLING} do not count; use more")
    home = Path(given.checkpoints).expanduser() if given.checkpoints else user_cache() / "benchmarks"
    out = given.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-benchmark"
    folders = {"checkpoints": home.absolute(), "out": Path(out).expanduser().absolute()}
    for name, folder in folders.items():
        check_writable(folder, f"--{name}")
    if folders["out"].is_dir() and any(folders["out"].iterdir()):
        raise UserError(f"--out {out}: is not empty; name another folder")
    return Options(
        **{name: getattr(given, name) for name in ("shape", "train_options", *NUMBERS)},
        **folders,
        gpus=_gpus(given.gpus),
        train_types=_names("train_types", given.train_types, TRAIN_TYPES),
        checkpointing=_names("checkpointing", given.checkpointing, CHECKPOINTING),
        precision=_names("precision", given.precision, FIELDS["precision"].metadata["choices"]),
        peers=[] if given.peers == "none" else _names("peers", given.peers, PEERS),
        fsdp_qlora=_checkout(given.fsdp_qlora),
        pythons=_pythons(given.pythons),
        argv=argv,
    )


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    for i, name in enumerate(names):
        if name not in known:
            raise UserError(f"--{option}: {name!r} is none of {', '.join(known)}")
        if name in names[:i]:
            raise UserError(f"--{option}: {name} is named twice")
    return names


def _gpus(text: str) -> list[int]:
    names = text.split(",")
    if not all(name.isdecimal() and int(name) for name in names) or len(set(names)) < len(names):
        raise UserError(f"--gpus {text}: one or more different numbers from 1 on, comma-separated")
    return [int(name) for name in names]


def _checkout(text: str | None) -> Path | None:
    if text is None:
        return None
    folder = Path(text).expanduser().absolute()
    if not (folder / "train.py").is_file():
        raise UserError(f"--fsdp_qlora {text}: is no checkout of fsdp_qlora (no train.py)")
    return folder


def _pythons(text: str | None) -> dict[str, str]:
    pythons = {}
    for part in text.split(",") if text else []:
        name, equals, path = part.partition("=")
        if not equals or name not in PEERS:
            raise UserError(
                f"--pythons {part}: expected <peer>=<interpreter>, the peer of {', '.join(PEERS)}"
            )
        found = shutil.which(str(Path(path).expanduser()))
        if found is None:
            raise UserError(f"--pythons {part}: no such program")
        if subprocess.run([found, "-c", "import json"], capture_output=True).returncode:
            raise UserError(f"--pythons {part}: is no Python interpreter")
        pythons[name] = str(Path(found).absolute())  # not resolved: a virtual environment's is a link
    return pythons
