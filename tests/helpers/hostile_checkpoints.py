"""Hostile checkpoints for hostile.py: damaged copies of a RUN of one step."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.helpers.hostile import DEEP, GIB, Case, write_file
from tests.helpers.manifests import edit_manifest

PATH, STEP, RANK = "path", "checkpoints/step-00000001", "rank-00000.safetensors"
SOUND = "a sound checkpoint"  # the original of the damaged ones


def checkpoint(damage: Callable[[Path], object], resume: str = PATH) -> Case:
    """A damaged copy of the RUN in the parent folder.

    damage(folder) changes the checkpoint. resume: the value of --resume; PATH = the checkpoint's folder.
    """

    def write(folder: Path) -> dict:
        shutil.copytree(folder.parent / "run", folder / "out")
        damage(folder / "out" / STEP)
        return {"resume": folder / "out" / STEP if resume == PATH else resume, "world_size": 1}

    return write


def manifest(change: Callable[[dict], object], resume: str = PATH) -> Case:
    """A changed manifest with a valid checksum."""
    return checkpoint(lambda folder: edit_manifest(folder, change), resume)


def manifest_text(content: str | bytes) -> Case:
    return checkpoint(lambda folder: write_file(folder / "manifest.json", content))


def named(name: str) -> Case:
    """A manifest in which all tensors are in a file of this name."""

    def change(content: dict) -> None:
        content["files"][0]["name"] = name
        for stored in content["tensors"].values():
            for chunk in stored["chunks"]:
                chunk[2] = name

    return manifest(change)


def state(resume: str = "auto", **values) -> Case:
    """A manifest with other values of "run"; `a__b` is the key "b" in the object "a"."""

    def change(content: dict) -> None:
        for name, value in values.items():
            *path, last = name.split("__")
            inner = content["run"]
            for key in path:
                inner = inner[key]
            inner[last] = value

    return manifest(change, resume)


def first_tensor(**values) -> Case:
    """A manifest with another description of a parameter."""
    return manifest(
        lambda found: next(t for n, t in found["tensors"].items() if n.startswith("model.")).update(values),
        "auto",
    )


def instead(name: str, target: str, resume: str = "auto", size: int | None = None) -> Case:
    """A link instead of a file of the checkpoint; `size` is its size in the manifest."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    def write(folder: Path) -> dict:
        change = manifest(lambda content: content["files"][0].update(size=size)) if size is not None else None
        options = (change or checkpoint(lambda _: None))(folder)
        damage(folder / "out" / STEP)
        return options | {"resume": resume}

    return write


def moved(name: str) -> Case:
    """A folder of the RUN is moved out of it and replaced by a link."""

    def damage(folder: Path) -> None:
        out = folder.parents[1]
        (out / name).rename(out.parent / "elsewhere")
        (out / name).symlink_to(out.parent / "elsewhere")

    return checkpoint(damage, "auto")


def terabyte() -> Case:
    """A sparse file of 1 TiB, with that size in the manifest."""

    def write(folder: Path) -> dict:
        options = manifest(lambda found: found["files"][0].update(size=2**40), "auto")(folder)
        os.truncate(folder / "out" / STEP / RANK, 2**40)
        return options

    return write


def pipe(folder: Path) -> dict:
    """A pipe without a writer, with size 0 in the manifest."""
    options = manifest(lambda found: found["files"][0].update(size=0))(folder)
    (folder / "out" / STEP / RANK).unlink()
    os.mkfifo(folder / "out" / STEP / RANK)
    return options


class HarmfulPickle:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def use_torch_format(folder: Path) -> None:
    """Replace the manifest by a harmful pickle, the .metadata of torch.distributed.checkpoint."""
    (folder / "manifest.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(HarmfulPickle(folder / "pwned")))


def metrics(content: str | bytes) -> Case:
    """A metrics.jsonl with this content, padded to the length that the checkpoint records."""

    def damage(folder: Path) -> None:
        path = folder.parents[1] / "metrics.jsonl"
        raw, length = content if isinstance(content, bytes) else content.encode(), path.stat().st_size
        path.write_bytes(raw[: length - 1].ljust(length - 1) + b"\n")

    return checkpoint(damage, "auto")


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def sound(folder: Path) -> dict:
    return checkpoint(lambda _: None)(folder)


A_THIRD = "[]," * (2**25 // 3 - 20)  # of the largest accepted manifest
CHECKPOINTS = {
    "manifest nested": manifest_text(DEEP),
    "manifest a bomb of lists": manifest_text("[" + A_THIRD + "[]]"),
    "manifest a bomb of objects": manifest_text("[" + A_THIRD.replace("[]", "{}") + "{}]"),
    "manifest too large": checkpoint(lambda folder: os.truncate(folder / "manifest.json", GIB), "auto"),
    "manifest of NULs": manifest_text(b"\0" * 1000),
    "manifest not UTF-8": manifest_text(b'{"version": "\xff"}'),
    "manifest in UTF-16": manifest_text("{}".encode("utf-16")),
    "manifest a list": manifest_text("[1, 2]"),
    "manifest a number of digits": manifest_text('{"version": ' + "9" * 5000 + "}"),
    "manifest is a device": instead("manifest.json", "/dev/zero"),
    "manifest is a link out": instead("manifest.json", "../../../../run/" + STEP + "/manifest.json"),
    "manifest of another step": manifest(lambda found: found.update(step=7)),
    "step of 2**64": manifest(lambda found: found.update(step=2**64)),
    "step of NaN": manifest(lambda found: found.update(step=math.nan)),
    "file of less": manifest(lambda found: found["files"][0].update(size=1)),
    "file of negative size": manifest(lambda found: found["files"][0].update(size=-1)),
    "file above": named("../../../../run/" + STEP + "/" + RANK),
    "file from the root": named("/etc/passwd"),
    "file is the folder above": named(".."),
    "file holds a NUL": named("a\0b"),
    "file of half a character": named("\ud800"),
    "file of a long name": named("x" * 100_000),
    "file named as none is": named("weights.safetensors"),
    "file is a link out": instead(RANK, "../../../../run/" + STEP + "/" + RANK),
    "file is a device without end": instead(RANK, "/dev/zero", size=0),
    "file is a pipe": pipe,
    "file of a terabyte": terabyte(),
    "file cut": checkpoint(lambda folder: os.truncate(folder / RANK, 100)),
    "file with a bit flipped": checkpoint(lambda folder: flip(folder / RANK)),
    "checkpoints elsewhere": moved("checkpoints"),
    "checkpoint elsewhere": moved(STEP),
    "a pickle of torch's": checkpoint(use_torch_format),
    "tensor of another shape": first_tensor(chunks=[[[0, 0], [2**40, 2**40], RANK]]),
    "tensor of another dtype": first_tensor(dtype="float64"),
    "tensor of no dtype": manifest(lambda found: [t.update(dtype="load") for t in found["tensors"].values()]),
    "chunks of texts": manifest(
        lambda found: [t.update(chunks=[["a", "b", RANK]]) for t in found["tensors"].values()]),
    "run a list": manifest(lambda found: found.update(run=[])),
    "options a list": state(options=[]),
    "world of a text": state(world="2"),
    "files of a text": state(files={"metrics.jsonl": "9"}),
    "files of less than none": state(files={"metrics.jsonl": -5}),
    "files out of the run": state(files={"../../rows.jsonl": 0}),
    "best loss of a text": state(parts__evaluator__best_loss="1"),
    "best loss of NaN": state(parts__evaluator__best_loss=math.nan),
    "a count of less than none": state(parts__guard__count=-1),
    "a scale of infinity": state(parts__scaler={"scale": math.inf}),
    "lines of a number": state(parts__tracker={"held": 1}),
    "more lines than steps": state(parts__tracker={"held": "\n" * 1000}),
    "lines of half a character": state(parts__tracker={"held": "\ud800\n"}, files={}),
    "wandb's run above": state(parts__tracker={"held": "", "wandb": "../../x"}),
    "wandb's run a number": state(parts__tracker__wandb=5),
    "wandb's run a line": state(parts__tracker__wandb="a\nb"),
    "best/ of a text": state(parts__evaluator__kept_loss="1"),
    "a scale of many digits": state(parts__scaler={"scale": 10**400}),
    "metrics nested": metrics(DEEP),
    "metrics of NULs": metrics(b"\0" * 1000),
    "metrics of texts": metrics('{"step": "1"}'),
    "metrics of other names": metrics('{"x": 1}'),
}  # fmt: skip
