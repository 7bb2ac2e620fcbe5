"""Run both notebooks whole on a CPU, as `make notebooks` does: a tiny model, rows made here, no internet.

    python -m tools.run_notebooks [--keep FOLDER]     # FOLDER: where executed notebooks and runs stay

The notebook for Kaggle runs three times. The second run gets the first one's output, write-protected, as the
earlier run to continue. It must leave that as it is, and the steps must go on where the first run ended. The
third has another rank than the earlier run: train.py must refuse that, and lose nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).parent.parent
STEPS = 6  # of the first run
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def write_rows(path: Path) -> None:
    """Write rows with the columns of the data set on Uganda's clinical guidelines."""
    rows = [
        {
            "instruction": f"How is condition {i} treated in {group}?",
            "input": "",
            "output": f"Give {5 * i} mg of medicine {i} {1 + i % 3} times a day for {i + 2} days.",
        }
        for i in range(1, 31)
        for group in ("adults", "children")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parameters(folder: Path, output: Path) -> dict:
    """Return values for the `parameters` cell of both notebooks. folder: for code, data and caches."""
    return {
        "REPO": str(ROOT),
        "CODE": str(folder / "code"),
        "SCRATCH": str(folder / "scratch"),
        "MODEL": "toy",
        "DATASET": str(folder / "rows.jsonl"),
        "OUTPUT": str(output),
        "LORA_RANK": 8,
        "CONTEXT_LENGTH": 128,
        "ROWS_PER_STEP": 4,
        "MAX_STEPS": STEPS,
        "NEEDED_GB": 0.1,
        "PROMPT": "How is condition 3 treated in adults?",
        "MAX_NEW_TOKENS": 16,
    }


def execute(name: str, output: Path, values: dict) -> str:
    """Execute a notebook whole. Return what its cells printed, and the kinds of what they showed.

    Raises PapermillExecutionError if a cell fails.
    """
    began = time.monotonic()
    node = papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        output,
        values,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(output.parent),
    )
    print(f"{output.name}: {time.monotonic() - began:.0f} s", flush=True)
    outputs = [each for cell in node.cells for each in cell.get("outputs", [])]
    return "".join(each["text"] if "text" in each else " ".join(each["data"]) + "\n" for each in outputs)


def execute_until_error(name: str, output: Path, values: dict) -> str:
    """Execute a notebook of which a cell fails. Return the error's message."""
    try:
        execute(name, output, values)
    except PapermillExecutionError as e:
        return e.evalue
    raise AssertionError(f"{output.name}: no cell failed")


def digests(folder: Path) -> dict[str, str]:
    """Return {path in the folder: SHA-256} of its files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def protect(folder: Path, writable: bool = False) -> None:
    """Take write permission from a folder and all in it, or give it back. Root can write all the same."""
    for path in (folder, *folder.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | 0o200 if writable else mode & ~0o222)


def read_metrics(run: Path) -> list[str]:
    """Return the lines of a run's metrics.jsonl."""
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def run_notebooks(folder: Path) -> None:
    """Run the notebooks in a folder. Raises AssertionError if one of them does not do what it should."""
    write_rows(folder / "rows.jsonl")
    names = "first", "second", "refused", "colab"
    first, second, refused, colab = (folder / name / "run" for name in names)
    for run in (first, second, refused, colab):
        run.parent.mkdir()
    two_ranks = {"GPUS": 2, "PARITY_TOLERANCE": 1e-4}
    text = execute("kaggle_2xT4", folder / "first.ipynb", {**parameters(folder, first), **two_ranks})
    assert "The losses are equal within 1e-04." in text and "all requirements are installed" in text
    assert text.count("image/png") == 2 and text.count("text/html") == 1  # losses, loss.png, the report
    assert len(read_metrics(first)) == STEPS

    before = digests(first.parent)
    protect(first.parent)
    try:
        continued = {**two_ranks, "PREVIOUS": str(first.parent), "MAX_STEPS": 2 * STEPS}
        execute("kaggle_2xT4", folder / "second.ipynb", {**parameters(folder, second), **continued})
        values = {**parameters(folder, refused), **continued, "LORA_RANK": 16}
        message = execute_until_error("kaggle_2xT4", folder / "refused.ipynb", values)
    finally:
        protect(first.parent, writable=True)
    assert digests(first.parent) == before, "a later run changed the first one's output"
    assert "the run has --lora_rank 8, not 16" in message, message
    assert digests(refused) == digests(first), "the refused run changed the copy"
    lines = read_metrics(second)
    assert lines[:STEPS] == read_metrics(first), "the second run did not continue the first"
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 2 * STEPS + 1))

    execute("colab", folder / "colab.ipynb", {**parameters(folder, colab), "GPUS": 1})
    for run in (first, second, colab):
        assert (run.parent / "run-adapter" / "README.md").is_file(), f"{run}: was not exported"


def main() -> None:
    """Parse the options and run the notebooks, in a temporary folder unless one is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for all files")
    keep = parser.parse_args().keep
    os.environ.update(OFFLINE)
    # The kernel is this Python, whatever kernels the user has.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix, "share", "jupyter"))
    if keep:
        keep.mkdir(parents=True)
        run_notebooks(keep.absolute())
        return
    with tempfile.TemporaryDirectory() as folder:
        run_notebooks(Path(folder))


if __name__ == "__main__":
    main()
