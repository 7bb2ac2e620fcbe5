"""Checkpoints that were made to do harm, for hostile.py: a RUN of one step, in the folder above each case's, is copied,
and then changed."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.helpers.hostile import DEEP, GIB, Case, put
from tests.helpers.manifests import edit

PATH, STEP, RANK = "path", "checkpoints/step-00000001", "rank-00000.safetensors"
SOUND = "a sound checkpoint"  # which the damaged ones are made of


def checkpoint(damage: Callable[[Path], object], resume: str = PATH) -> Case:
    """A RUN that was whole. damage(its folder of the only checkpoint); resume: what --resume says, PATH = that folder."""

    def write(folder: Path) -> dict:
        shutil.copytree(folder.parent / "run", folder / "out")
        damage(folder / "out" / STEP)
        return {"resume": folder / "out" / STEP if resume == PATH else resume, "world_size": 1}

    return write


def manifest(change: Callable[[dict], object], resume: str = PATH) -> Case:
    """A manifest that was changed, with the checksum of what it says now."""

    return checkpoint(lambda folder: edit(folder, change), resume)


def manifest_text(content: str | bytes) -> Case:
    return checkpoint(lambda folder: put(folder / "manifest.json", content))


def named(name: str) -> Case:
    """All tensors lie in a file of this name."""

    def change(found: dict) -> None:
        found["files"][0]["name"] = name
        for stored in found["tensors"].values():
            for chunk in stored["chunks"]:
                chunk[2] = name

    return manifest(change)


def state(resume: str = "auto", **values) -> Case:
    """Of the run; a name with __ in it leads deeper."""

    def change(found: dict) -> None:
        for name, value in values.items():
            *path, last = name.split("__")
            inner = found["run"]
            for part in path:
                inner = inner[part]
            inner[last] = value

    return manifest(change, resume)


def first_tensor(**values) -> Case:
    """What the manifest says of a parameter."""
    return manifest(
        lambda found: next(t for n, t in found["tensors"].items() if n.startswith("model.")).update(values),
        "auto",
    )


def instead(name: str, target: str, resume: str = "auto", size: int | None = None) -> Case:
    """A link in the place of a file of the checkpoint, of a size that the manifest agrees with."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    def both(folder: Path) -> dict:
        change = manifest(lambda found: found["files"][0].update(size=size)) if size is not None else None
        options = (change or checkpoint(lambda _: None))(folder)
        damage(folder / "out" / STEP)
        return options | {"resume": resume}

    return both


def moved(what: str) -> Case:
    """A folder of the RUN is a link to where it was moved, out of the RUN."""

    def damage(folder: Path) -> None:
        out = folder.parents[1]
        (out / what).rename(out.parent / "elsewhere")
        (out / what).symlink_to(out.parent / "elsewhere")

    return checkpoint(damage, "auto")


def terabyte() -> Case:
    """Without taking room; the manifest agrees."""

    def write(folder: Path) -> dict:
        options = manifest(lambda found: found["files"][0].update(size=2**40), "auto")(folder)
        os.truncate(folder / "out" / STEP / RANK, 2**40)
        return options

    return write


def pipe(folder: Path) -> dict:
    """That nobody writes to; the manifest agrees."""
    options = manifest(lambda found: found["files"][0].update(size=0))(folder)
    (folder / "out" / STEP / RANK).unlink()
    os.mkfifo(folder / "out" / STEP / RANK)
    return options


class Pickled:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torchs_own(folder: Path) -> None:
    """As torch.distributed.checkpoint's own storage has it: without our manifest, with a pickle that does harm."""
    (folder / "manifest.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Pickled(folder / "pwned")))


def metrics(content: str | bytes) -> Case:
    """A metrics.jsonl of another content, of the length that the checkpoint knows."""

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


A_THIRD = "[]," * (2**25 // 3 - 20)  # of the largest manifest that is read
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
    "a pickle of torch's": checkpoint(torchs_own),
    "tensor of another shape": first_tensor(chunks=[[[0, 0], [2**40, 2**40], RANK]]),
    "tensor of another dtype": first_tensor(dtype="float64"),
    "tensor of no dtype": manifest(lambda found: [t.update(dtype="load") for t in found["tensors"].values()]),
    "chunks of texts": manifest(lambda found: [t.update(chunks=[["a", "b", RANK]]) for t in found["tensors"].values()]),
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
