"""Hostile model folders and chat templates for hostile.py: damaged copies of a sound model."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from options.limits import MAX_TOKENIZER_BYTES
from tests.helpers.hostile import BOMB, DEEP, GIB, Case, write_file

SHARD = "model-00002-of-00004.safetensors"


def model(damage: Callable[[Path], object], of: str = "model", **more) -> Case:
    """A damaged copy of the folder `of`. damage(the copy); more: further options."""

    def write(folder: Path) -> dict:
        shutil.copytree(folder.parent / of, folder / "model")
        damage(folder / "model")
        return {"model_name": folder / "model", **more}

    return write


def text(name: str, content: str | bytes) -> Case:
    return model(lambda folder: write_file(folder / name, content))


def json_of(name: str, **values) -> Case:
    """A JSON file of the folder with other values."""

    def damage(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | values))

    return model(damage)


def shard(content: Callable[[dict, bytes], bytes]) -> Case:
    """A replaced shard. content(header, bytes of the tensors) -> bytes of the file."""

    def damage(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        (folder / SHARD).write_bytes(content(json.loads(raw[8 : 8 + length]), raw[8 + length :]))

    return model(damage)


def packed(header: dict | bytes, tensors: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file; length: the claimed length of its header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + tensors


def lying(**values) -> Case:
    """A shard whose header describes its first tensor by other values."""

    def content(header: dict, tensors: bytes) -> bytes:
        name = next(n for n in header if n != "__metadata__")
        return packed(header | {name: header[name] | values}, tensors)

    return shard(content)


def index(file: object) -> Case:
    """An index that maps its first tensor to `file`."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        found = json.loads(path.read_text())
        found["weight_map"][next(iter(found["weight_map"]))] = file
        path.write_text(json.dumps(found))

    return model(damage)


def shard_link(target: str) -> Case:
    """A link instead of a shard."""

    def damage(folder: Path) -> None:
        (folder / SHARD).unlink()
        (folder / SHARD).symlink_to(target)

    return model(damage)


def template(source: str) -> Case:
    """A model with this chat template, and a conversation as data."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    turns = json.dumps({"messages": messages})

    def damage(folder: Path) -> None:
        write_file(folder / "chat_template.jinja", source)

    def write(folder: Path) -> dict:
        return model(damage)(folder) | {"dataset": write_file(folder / "chat.jsonl", turns)}

    return write


def edit_vocabulary(folder: Path, number: int) -> None:
    """Give the letter e another id."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["vocab"]["e"] = number
    path.write_text(json.dumps(found))


TEMPLATES = {
    "division by zero": template("{{ 1 // 0 }}"),
    "a range without end": template("{{ range(10**9) | list }}"),
    "recursion": template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "the way out of the sandbox": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "no message there": template("{{ messages[99]['content'] + 1 }}"),
    "not a template": template("{% for %}"),
    "a text of a hundred million letters": template("{{ 'a' * 100_000_000 }}"),
}


MODELS = {
    "index leads above": index("../secret.safetensors"),
    "index leads to the root": index("/etc/passwd"),
    "index leads below": index("sub/model.safetensors"),
    "index holds a NUL": index("a\0b.safetensors"),
    "index holds a list": index(["a"]),
    "index nested": text("model.safetensors.index.json", '{"weight_map": ' + DEEP),
    "index too large": model(lambda folder: os.truncate(folder / "model.safetensors.index.json", GIB)),
    "shard is a link out": shard_link("../../model/" + SHARD),
    "shard is a link to a device": shard_link("/dev/zero"),
    "shard is a link to itself": shard_link(SHARD),
    "shard is a link to nothing": shard_link("nothing"),
    "shard is a text": text(SHARD, "GET /"),
    "shard is empty": text(SHARD, ""),
    "header of 2**63 bytes": shard(lambda header, tensors: packed(header, tensors, 2**63)),
    "header of 99 MB that are not there": shard(lambda header, tensors: packed(header, tensors, 99_000_000)),
    "header of no bytes": shard(lambda header, tensors: packed(header, tensors, 0)),
    "header of spaces": shard(lambda header, tensors: packed(b" " * 50_000_000, tensors)),
    "header nested": shard(lambda header, tensors: packed(DEEP.encode(), tensors)),
    "header of many tensors": shard(lambda header, tensors: packed(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}, b"")),
    "header not UTF-8": shard(lambda header, tensors: packed(b'{"\xff": 1}', tensors)),
    "index of half a character": index("\ud800.safetensors"),
    "offsets beyond the end": lying(data_offsets=[0, 10**12]),
    "offsets that overlap": lying(data_offsets=[4, 8]),
    "offsets before the start": lying(data_offsets=[-8, 8]),
    "offsets backwards": lying(data_offsets=[8, 0]),
    "shape beyond 64 bits": lying(shape=[2**40, 2**40]),
    "shape of less": lying(shape=[1]),
    "no such dtype": lying(dtype="F17"),
    "a path for a tensor's name": shard(lambda header, tensors: packed(
        {n if n == "__metadata__" else f"../{n}": value for n, value in header.items()}, tensors)),
    "config of 2**63 layers": json_of("config.json", num_hidden_layers=2**63),
    "config of a million layers": json_of("config.json", num_hidden_layers=10**6),
    "config of 1e18 heads": json_of("config.json", num_attention_heads=10**18, head_dim=64),
    "config of a huge vocabulary": json_of("config.json", vocab_size=10**18),
    "config of no size": json_of("config.json", hidden_size=0),
    "config of NaN": json_of("config.json", hidden_size=float("nan")),
    "config of code": json_of("config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "config nested": text("config.json", '{"a": ' + DEEP),
    "config not UTF-8": text("config.json", b'{"model_type": "\xff"}'),
    "config in UTF-16": text("config.json", "{}".encode("utf-16")),
    "config too large": text("config.json", '{"a": "' + "x" * 2**22 + '"}'),
    "config a bomb": text("config.json", '{"a": ' + BOMB + "}"),
    "config a number of digits": text("config.json", '{"hidden_size": ' + "9" * 5000 + "}"),
    "tokenizer of a number": json_of("tokenizer_config.json", model_max_length="x"),
    "tokenizer without its unknown": text("tokenizer_config.json", '{"backend": 1, "bos_token": "<s>"}'),
    "tokenizer of huge ids": model(lambda folder: edit_vocabulary(folder, 2**31)),
    "tokenizer nested": text("tokenizer.json", DEEP),
    "tokenizer too large": model(
        lambda folder: os.truncate(folder / "tokenizer.json", MAX_TOKENIZER_BYTES + 1)),
    "tokenizer is a device": model(
        lambda folder: (folder / "tokenizer.json").unlink()
        or (folder / "tokenizer.json").symlink_to("/dev/zero")),
    "generation config of nulls": json_of("generation_config.json", eos_token_id=[None]),
    "generation config of a fraction": json_of("generation_config.json", eos_token_id=1.5),
    "generation config nested": text("generation_config.json", DEEP),
}  # fmt: skip
