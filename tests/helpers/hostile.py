"""Hostile inputs, and a process that runs train.py on one after the other.

`python -m tests.helpers.hostile FOLDER` runs those that FOLDER/names.json lists, and writes the outcome of
each as JSON lines; test_hostile_input.py checks them. A case is a function that writes its files into a
folder and returns the options that use them. Cases of models and checkpoints are in hostile_models.py and
hostile_checkpoints.py.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

Case = Callable[[Path], dict[str, object]]
GIB = 2**30
WORLD = ("model", "rows.jsonl", "secret.jsonl", "chat", "run")  # in the parent of each case's folder
ROW = '{"instruction": "Say one.", "output": "one"}\n'
BOMB = "[" + "[]," * 3_000_000 + "[]]"  # 9 MB of text, 24 times as much memory as lists
DEEP = "[" * 200_000


def options(**values) -> Case:
    return lambda folder: values


def write_file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def config_file(content: str | bytes) -> Case:
    return lambda folder: {"config": write_file(folder / "run.yaml", content)}


def recipe(content: str | bytes) -> Case:
    """A recipe beside rows and a link out of the folder."""

    def write(folder: Path) -> dict:
        write_file(folder / "rows.jsonl", ROW)
        (folder / "link.jsonl").symlink_to("../secret.jsonl")
        return {"dataset": write_file(folder / "mine.toml", content)}

    return write


def recipe_of_links(name: str, target: str) -> Case:
    """A recipe of a folder with a link to `target`."""

    def write(folder: Path) -> dict:
        write_file(folder / "rows" / "a.jsonl", ROW)
        (folder / "rows" / name).symlink_to(target)
        return {"dataset": write_file(folder / "mine.toml", 'source = "rows"')}

    return write


def data_folder(**files: str) -> Case:
    """A folder with two kinds of data, and these files."""

    def write(folder: Path) -> dict:
        for name, content in ({"a.jsonl": ROW, "b.csv": "text\na\n"} | files).items():
            write_file(folder / "rows" / name, content)
        return {"dataset": folder / "rows"}

    return write


def data(name: str, content: str | bytes, **more) -> Case:
    return lambda folder: {"dataset": write_file(folder / name, content), **more}


def packed(name: str, content: bytes) -> Case:
    return lambda folder: {"dataset": write_file(folder / name, gzip.compress(content, 1))}


def sparse(name: str, size: int, start: bytes = b"") -> Case:
    """A file of NULs after `start` that takes no space on the disk."""

    def write(folder: Path) -> dict:
        os.truncate(write_file(folder / name, start), size)
        return {"dataset": folder / name}

    return write


def link(name: str, target: str, option: str = "dataset") -> Case:
    """An option that names a link."""

    def write(folder: Path) -> dict:
        (folder / name).symlink_to(target)
        return {option: folder / name}

    return write


def parquet(rows: int, text: str) -> Case:
    """One value in all rows: a small file for any number of rows."""

    def write(folder: Path) -> dict:
        import pyarrow as pa
        import pyarrow.parquet as pq

        column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
        pq.write_table(pa.table({"text": column}), folder / "a.parquet", compression="zstd")
        return {"dataset": folder / "a.parquet"}

    return write


def laughs(levels: int) -> str:
    """YAML aliases, ten times as much text on each level (billion laughs)."""
    lines = ["a0: &a0 [lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def numbers() -> dict[str, Case]:
    """Return cases of every numeric option with impossible numbers."""
    from options.train import COMMAND

    cases = {}
    for name in COMMAND.fields:
        kind = COMMAND.value_type(name)[0]
        if kind not in (int, float):
            continue
        values = {int: ("9" * 5000, "1e3"), float: ("nan", "-1e400")}[kind]
        more = {"n_bits": {"train_type": "hqq_lora"}, "group_size": {"train_type": "hqq_lora"}}.get(name, {})
        cases |= {f"--{name} {value[:9]}": options(**{name: value}, **more) for value in values}
    return cases


OPTIONS = {
    "NUL in a path": options(output_dir="a\0b"),
    "NUL in the model's name": options(model_name="a\0b"),
    "NUL in the cache's": options(quantized_cache="a\0b"),
    "half a character": options(dataset="\udc80.jsonl"),
    "too long a name": options(model_name="x" * 100_000),
    "output below a device": options(output_dir="/dev/null/x"),
    "output in a loop of links": link("out", "out", "output_dir"),
    "a hundred thousand processes": options(world_size=100_000),
    "a rank of a billion": options(lora_rank=10**9),
    "a billion threads": options(loading_workers=10**9),
    "a batch of 2**63": options(batch_size=2**63),
    "rows without end": options(dataset="dummy", dataset_samples=2**31 - 1),
    "rows of two gigabytes": options(dataset="dummy", context_length=2**31 - 1),
    "a million target modules": options(lora_target_modules=",".join(["x"] * 1_000_000)),
    "prompts out of a device": options(sample_every=1, sample_prompts="zero.txt"),
    "a value that is none": lambda folder: {"config": "--"},
    "another host": options(master_addr="192.0.2.1"),
    "a privileged or taken port": options(master_port=1, master_addr="no.such.host.invalid"),
    "a recipe by a path": options(dataset="../pyproject"),
}
YAML = {
    "aliases that grow": config_file(laughs(12)),
    "aliases in a value": config_file(laughs(9).replace("a8: &a8", "name:")),
    "merges that grow": config_file(
        "a: &a {lr: 1}\n"
        + "\n".join(
            f"{c}: &{c} {{<<: [{', '.join([f'*{p}'] * 10)}]}}"
            for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        )
    ),
    "depth": config_file("lr: " + DEEP),
    "depth in braces": config_file("{a: " * 100_000),
    "depth by indentation": config_file("\n".join(" " * i + "a:" for i in range(800))),
    "a mebibyte": config_file("# " + "x" * 2**20),
    "NULs": config_file("lr: 1\0\n"),
    "UTF-16": config_file("lr: 1\n".encode("utf-16")),
    "code": config_file("name: !!python/object/apply:os.system ['touch pwned']\n"),
    "a module": config_file("!!python/module:os\n"),
    "a timestamp that is none": config_file("lr: !!timestamp 1- \\\n"),
    "an int that is none": config_file("lora_rank: !!int '='\n"),
    "a number of thousands of digits": config_file("lora_rank: " + "9" * 5000),
    "a key that is a list": config_file("? [a, b]\n: 1\n"),
    "two documents": config_file("lr: 1\n---\nlr: 2\n"),
    "a device without end": options(config="/dev/zero"),
    "sixty thousand keys": config_file("".join(f"k{i}:\n" for i in range(60_000)) + "k1:\n"),
    "six thousand keys": config_file("".join(f"k{i}:\n" for i in range(6_000)) + "k1:\n"),
}
RECIPES = {
    "source above": recipe('source = "../secret.jsonl"'),
    "source by way of below": recipe('source = "a/../../secret.jsonl"'),
    "source from the root": recipe('source = "/etc/passwd.jsonl"'),
    "source is a link that leads out": recipe('source = "link.jsonl"'),
    "source is a URL": recipe('source = "https://example.invalid/rows"'),
    "source is a folder": recipe('source = "../"'),
    "a folder with a link to the root": recipe_of_links("x", "/"),
    "a folder with a link to a file above": recipe_of_links("b.jsonl", "../../secret.jsonl"),
    "source holds a NUL": recipe('source = "a\\u0000.jsonl"'),
    "files above": recipe('source = "some/data"\ndata_files = "../../secret.jsonl"'),
    "files by URL": recipe('source = "some/data"\ndata_files = "https://example.invalid/a.jsonl"'),
    "a list without end": recipe("markers = " + DEEP),
    "a number of thousands of digits": recipe("samples = " + "9" * 5000),
    "too large": recipe("# " + "x" * 2**20),
    "not UTF-8": recipe(b'source = "\xff.jsonl"'),
    "a fill of terabytes": recipe(
        'fill = {instruction = "a", output = "' + "b" * 1000 + '"}\nsamples = 1000000000'
    ),
    "a folder": lambda folder: {"dataset": (folder / "x.toml").mkdir() or folder / "x.toml"},
    "a device": link("x.toml", "/dev/zero"),
}
DATA = {
    "NULs": data("a.jsonl", b"\0" * 1000),
    "UTF-16": data("a.jsonl", ROW.encode("utf-16")),
    "Latin-1": data("a.jsonl", ROW.replace("one", "\xe9").encode("latin-1")),
    "half a character": data("a.jsonl", ROW.replace('"one"', '"\\ud800"')),
    "a line of gigabytes": sparse("a.jsonl", 3 * GIB),
    "a line of gigabytes in a .csv": sparse("a.csv", 3 * GIB, b"instruction,output\n"),
    "a list of gigabytes": sparse("a.json", 3 * GIB, b"["),
    "a packed line without end": packed("a.jsonl.gz", b" " * 2**25),
    "a packed list without end": packed("a.json.gz", b"[" + b" " * 2**25),
    "a bomb of packed rows": packed("a.jsonl.gz", ROW.replace("one", "a" * 1000).encode() * 2**14),
    "a packed file that is cut": data("a.jsonl.gz", gzip.compress(ROW.encode())[:-4]),
    "a bomb of lists": data("a.json", BOMB),
    "a bomb in a row": data("a.jsonl", '{"instruction": ' + BOMB + ', "output": "b"}'),
    "a bomb of objects": data("a.json", "[" + "{}," * 2_000_000 + "{}]"),
    "depth": data("a.jsonl", DEEP),
    "depth in objects": data("a.json", "[" + '{"a":' * 100_000),
    "a number of thousands of digits": data("a.jsonl", '{"instruction": ' + "9" * 5000 + "}"),
    "a row of five million letters": data("a.jsonl", ROW.replace("Say one.", "a" * 5_000_000)),
    "empty fields": data("a.jsonl", '{"instruction": "", "output": ""}\n' * 5),
    "empty objects": data("a.jsonl", "{}\n" * 5),
    "NaN": data("a.jsonl", ROW + ROW.replace('"one"', "NaN")),
    "a list of texts": data("a.json", '["a", "b"]'),
    "empty columns' names": data("a.csv", ",\n1,2\n"),
    "a quote that never ends": data("a.csv", 'instruction,output\n"' + "a,b\n" * 1000),
    "NULs in a .csv": data("a.csv", "instruction,output\n\0,\0\n,\n"),
    "no table": data("a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1"),
    "ten million rows of one value": parquet(10**7, ""),
    "a value of megabytes in many rows": parquet(1000, "x" * 10**7),
    "a link to a device": link("a.jsonl", "/dev/zero"),
    "a link to itself": link("a.jsonl", "a.jsonl"),
    "a link to nothing": link("a.jsonl", "nothing"),
    "a hundred thousand keys, the last twice": data(
        "a.jsonl", "{" + "".join(f'"k{i}": 0, ' for i in range(100_000)) + '"k99999": 0}'
    ),
    "a README of line breaks": data_folder(**{"README.md": "---" + "\n" * 2**18}),
    "conversation of numbers": data("a.jsonl", '{"messages": [1, 2]}'),
    "conversation of nothing": data("a.jsonl", '{"messages": []}'),
    "roles of lists": data("a.jsonl", '{"messages": [{"role": [], "content": {}}]}'),
}


# Cases of 2 to 8 seconds, which `make test-slow` runs. Others of the same kind: "data: a bomb of lists",
# "checkpoint: manifest a bomb of lists" and "yaml: six thousand keys".
HEAVY = {
    "data: a bomb of objects",
    "data: a bomb in a row",
    "checkpoint: manifest a bomb of objects",
    "yaml: sixty thousand keys",
}


def cases() -> dict[str, Case]:
    """Return all cases by "group: name"."""
    from tests.helpers.hostile_checkpoints import CHECKPOINTS
    from tests.helpers.hostile_models import MODELS, TEMPLATES

    groups = {"option": OPTIONS | numbers(), "yaml": YAML, "recipe": RECIPES, "data": DATA,
              "template": TEMPLATES, "model": MODELS, "checkpoint": CHECKPOINTS}  # fmt: skip
    return {f"{group}: {name}": case for group, table in groups.items() for name, case in table.items()}


def list_files(root: Path) -> set[tuple]:
    """Return all paths below a folder, files with the size and time that show a write."""
    entries = set()
    for path in root.rglob("*"):
        stat = path.lstat()
        entries.add((str(path), stat.st_size, stat.st_mtime_ns) if path.is_file() else (str(path),))
    return entries


def run_case(case: Case, folder: Path, main: Callable[[list[str]], int]) -> dict:
    """Run main() on a case; return its outcome."""
    folder.mkdir()
    root = folder.parent
    good = {"model_name": root / "model", "dataset": root / "rows.jsonl", "output_dir": folder / "out"}
    argv = [f"--{name}={value}" for name, value in (good | case(folder)).items()]
    before, stderr, start = list_files(root), io.StringIO(), time.monotonic()
    raised = ""
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            status = main(argv)
    except BaseException as e:  # of any kind: the test looks for them
        status, raised = None, repr(e)[:300]
    result = {"status": status, "raised": raised, "seconds": time.monotonic() - start,
              "lines": [line[:2000] for line in stderr.getvalue().splitlines()],
              "written": sorted(str(x) for x in list_files(root) ^ before),
              "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    return result


def run(root: Path) -> None:
    """Run the cases of names.json and write results.jsonl."""
    import train
    from launch import processes as launch
    from tests.helpers.hostile_checkpoints import SOUND, sound

    def start(*_):
        raise AssertionError("the run was started")

    launch.start = start
    with (root / "results.jsonl").open("w") as file:
        all_cases = cases() | {SOUND: sound}
        for i, name in enumerate(json.loads((root / "names.json").read_text())):
            case = all_cases[name]
            line = {"name": name} | run_case(case, root / "world" / str(i), train.main)
            file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
