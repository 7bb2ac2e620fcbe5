"""What a run leaves: the adapter in PEFT's format, or a Hugging Face model folder.

Formats: https://huggingface.co/docs/peft/developer_guides/checkpoint (adapter_config.json,
adapter_model.safetensors), and safetensors shards with an index (see model_files). Files are written under
a temporary name and renamed when whole, the one that makes the folder loadable last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from files.model_folder import INDEX, SINGLE, CheckpointFiles
from files.tensors import save_tensors
from launch.memory import size
from models.family import clean
from models.lora import LoRALinear
from options.config import CHECKPOINTS, Config
from options.errors import UserError

PATIENCE = 10  # seconds for a run that ends to leave its folder
ADAPTER, BLOCKS = "adapter_model.safetensors", "new_blocks.safetensors"
BEST, SCORE = "best", "evaluation.json"  # the folder of the best step, and the file in it that names the step
RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl", "bad_steps.jsonl", "samples.jsonl", "loss.png", "report.html", "memory*.html",
             "memory*.png", "memory_snapshot*.pickle", "adapter_config.json", ADAPTER, BLOCKS)  # fmt: skip
MODEL_FILES = ("config.json", INDEX, "model.safetensors", "model-*.safetensors")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json",
             "chat_template.*")  # fmt: skip
# A model folder's small files that go along with retrained weights, as they are.
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER)


def holds_run(folder: Path) -> bool:
    return any(True for pattern in RUN_FILES + MODEL_FILES for _ in folder.glob(pattern))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises UserError if the folder holds a run and may not be replaced, or cannot be written, or has a link where a run
    writes and removes files."""
    check_writable(folder, "--output_dir")
    for name in (CHECKPOINTS, "wandb"):
        if (folder / name).is_symlink():
            raise UserError(
                f"--output_dir {folder}: its {name} is a link; a run writes in folders of its own"
            )
    if holds_run(folder) and not overwrite:
        raise UserError(
            f"--output_dir {folder}: holds a run already; choose another folder, or add --overwrite"
        )


def check_writable(folder: Path, option: str) -> None:
    """Raises UserError if the folder cannot be made or written to. Creates nothing: other runs may be checking as
    well."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)  # raises, as exists() does not, where a part of the path is a file
        existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise UserError(f"{option} {folder}: cannot be written ({getattr(e, 'strerror', e)})") from None


class Alone:
    """Keeps other runs out of a folder, from `take` to the end of the context: of two that wrote into it neither could be
    resumed. The lock is the folder's own, and goes with its process."""

    def __init__(self, folder: Path):
        self.folder, self.descriptor = folder, -1

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def take(self) -> None:
        """Raises UserError if another run does not leave it, which the ranks of one that was killed do in a second. A
        file system without locks is taken as it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.descriptor, ends = os.open(self.folder, os.O_RDONLY), time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > ends:
                    raise UserError(f"--output_dir {self.folder}: another run is writing in it") from None
                time.sleep(0.2)
            except OSError:
                return None


def clear_output(folder: Path) -> None:
    """Makes the folder, and removes from it the files of an earlier run, whole or cut, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in RUN_FILES + MODEL_FILES:
        for path in (*folder.glob(pattern), *folder.glob(f"{pattern}.tmp")):
            path.unlink()
    for name in (BEST, f"{BEST}.tmp", f"{BEST}.old"):
        if (folder / name).is_symlink():  # what it leads to is not ours
            (folder / name).unlink()
        for pattern in (*RUN_FILES, *MODEL_FILES, *COMPANIONS, SCORE, "*.tmp"):
            for path in (folder / name).glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):  # there is none, or it holds files of others
            (folder / name).rmdir()


def beside(folder: Path) -> Path:
    """Where what is to be `folder` is made."""
    return folder.with_name(f"{folder.name}.tmp")


def fresh_folder(folder: Path) -> None:
    """Makes an empty folder beside `folder`, to be filled and put in its place by `replace_folder`."""
    remove(beside(folder))
    beside(folder).mkdir(parents=True)


def replace_folder(folder: Path) -> None:
    """Puts the whole folder beside `folder` in its place. At no time does a half written one have the name; the
    older one is deleted last (as <name>.old)."""
    old = folder.with_name(f"{folder.name}.old")
    remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        beside(folder).rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    remove(old)


def remove(folder: Path, ignore_errors: bool = True) -> None:
    """Removes a folder, if it is there and lets itself be; of a link only the link, as what it leads to is not ours."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Gives stage(name): where to write what is to be `name` in the folder. Once all are whole they get their names, in
    the order of the calls; after an error none of them is left."""
    paths: dict[str, Path] = {}

    def stage(name: str) -> Path:
        paths[name] = folder / f"{name}.tmp"
        paths[name].unlink(missing_ok=True)  # a cut run's, or a link, which would have another file written
        return paths[name]

    try:
        yield stage
        for name, path in paths.items():
            path.rename(folder / name)
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Raises OSError that names the file."""
    try:
        with staged(path.parent) as stage:
            stage(path.name).write_text(text, encoding="utf-8")
    except OSError as e:
        e.filename = e.filename or str(path)  # a disk that is full names none
        raise


def as_json(value):
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {name: as_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_room(folder: Path, needed: int) -> None:
    """Raises OSError if the folder's disk has no room for so many bytes: one that ran full in the middle would stop
    everything else that writes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left: {size(needed)} are needed, {size(free)} free")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full contents of a DTensor (collective), or a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(param: nn.Parameter) -> torch.Tensor:
    """The full contents of a parameter, sharded or not, on the CPU. Collective."""
    return whole(param).detach().cpu()


def base_digest(config: PretrainedConfig, files: CheckpointFiles) -> str:
    """Names the model that an adapter belongs to: its config and the names and shapes of its weights, not the
    version of transformers that wrote it or the folder where it lies."""
    ignored = (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "quantization_config",
    )
    described = {k: v for k, v in config.to_dict().items() if k not in ignored}
    shapes = {name: stored.shape for name, stored in sorted(files.tensors.items())}
    return hashlib.sha256(json.dumps([described, shapes], sort_keys=True, default=str).encode()).hexdigest()


def save_adapter(
    model: nn.Module, folder: Path, config: Config, base: str, digest: str, targets: list[str]
) -> None:
    """Writes PEFT's two files. base, digest: the name and `base_digest` of the model below; targets: the names in
    PEFT's target_modules. Collective; rank 0 writes, and raises OSError when the others are done."""
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            for name, full in module.peft_tensors(gather).items():
                if dist.get_rank() == 0:
                    tensors[f"base_model.model.{clean(path)}.{name}"] = full.contiguous()
    if dist.get_rank() != 0:
        return
    alpha = config.lora_alpha
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "use_dora": config.method.adapter == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    check_room(folder, sum(t.nbytes for t in tensors.values()))
    with staged(folder) as stage:
        save_tensors(tensors, stage(ADAPTER), {"base_digest": digest})
        stage("adapter_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def companions(source: Path, patterns: tuple[str, ...] = COMPANIONS) -> list[Path]:
    """A model folder's small files, config.json last: with it a copy is a model folder."""
    found = sorted({p for pattern in patterns for p in source.glob(pattern) if p.is_file()})
    return sorted(found, key=lambda p: p.name == "config.json")


def copy_companions(
    source: Path, folder: Path, config: dict | None = None, patterns: tuple[str, ...] = COMPANIONS
) -> None:
    """Copies `companions`. config: what config.json is to hold instead."""
    for path in companions(source, patterns):
        if path.name == "config.json" and config is not None:
            write_text(folder / path.name, json.dumps(config, indent=2) + "\n")
            continue
        with staged(folder) as stage:
            shutil.copyfile(path, stage(path.name))


def shard_name(number: int, shards: int) -> str:
    """Hugging Face's name of a weights file; number counts from 1."""
    return f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else SINGLE


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `limit` bytes (a larger tensor stands alone)."""
    shards, used = [[]], 0
    for name, nbytes in sizes.items():
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return shards
