"""Folders of runs in a notebook: rows to train on, an earlier run to continue, losses and reports to show."""

from __future__ import annotations

import html
import io
import json
import math
import shutil
from pathlib import Path

from session import GB, SessionError, check_room, no_such_path, read_whole_number

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"  # as in options/config.py and checkpoints/storage.py
METRICS, ADAPTER = "metrics.jsonl", "adapter_model.safetensors"  # as in files/names.py
# The file of each kind of result that gets its name last, or that is all of it: an adapter; the new blocks of
# an expanded model; a whole model.
RESULTS = (ADAPTER, "new_blocks.safetensors", "config.json")


def write_rows(rows: list[dict], path: str) -> str:
    """Write rows as a .jsonl file, and return its path, for DATASET."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")
    return path


# An earlier run


def attach_run(previous: str, output: str, keep: int) -> None:
    """Copy an earlier run, from a read-only folder, to `output`, where `--resume auto` continues it.

    Unfinished checkpoints are left out. The copy is made under another name and renamed when it is whole. A
    run that `output` holds already stays as it is.

    Args:
        previous: the run's folder, or one above it, such as /kaggle/input/<notebook>; "" = none.
        output: --output_dir.
        keep: number of newest checkpoints to copy; -1 = all.

    Raises SessionError if there is no run, or several, if none of its checkpoints would be copied, and for
    too little room. Then `output` is unchanged.
    """
    target = Path(output)
    if not previous:
        return
    keep = read_whole_number("KEEP", keep, -1)
    if _is_run(target):
        print(f"{output} holds a run already, which goes on: {previous} is not copied")
        return
    source = find_run(previous)
    if target.is_dir() and any(target.iterdir()):
        raise SessionError(f"{output}: holds other files; choose another OUTPUT for the copy of {source}")
    steps = sorted(source.glob(f"{CHECKPOINTS}/step-*"), reverse=True)
    complete = [step for step in steps if not step.suffix and (step / MANIFEST).is_file()]
    unfinished = [step for step in steps if step not in complete]
    for step in unfinished:
        print(f"{step}: its save was interrupted; the checkpoint before it is used")
    kept = complete if keep == -1 else complete[:keep]
    if complete and not kept:
        raise SessionError(f"KEEP = {keep}: no checkpoint of {source} would be copied; -1 copies all")
    left_out = {*steps} - {*kept}
    files = [path for path in _regular_files(source) if not left_out & {*path.parents}]
    target.parent.mkdir(parents=True, exist_ok=True)
    check_room(str(target.parent), sum(path.stat().st_size for path in files) / GB)
    staging = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        for path in files:
            copy = staging / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)  # not its mode: the copy is writable
        staging.rename(target)
    except OSError as e:
        shutil.rmtree(staging, ignore_errors=True)
        problem = f"could not be copied to {output} ({e.strerror}); {output} is unchanged"
        raise SessionError(f"{source}: {problem}") from e
    print(f"{source} is copied to {output}; checkpoints: {len(kept)}")


def find_run(folder: str) -> Path:
    """Return the one RUN in a folder, or of several the one with checkpoints. Raises SessionError."""
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise no_such_path("PREVIOUS", folder, "folder")
    runs = sorted(p.parent for p in path.rglob("run.json") if _is_run(p.parent))
    runs = [run for run in runs if (run / CHECKPOINTS).is_dir()] or runs
    if len(runs) != 1:
        found = ", ".join(map(str, runs)) or "none; it has config.yaml and run.json"
        raise SessionError(f"PREVIOUS = {folder}: should hold one run of train.py, and holds {found}")
    return runs[0]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "run.json").is_file()


def _regular_files(folder: Path) -> list[Path]:
    """Return all files below a folder that are no links."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# Results


def read_losses(run_folder: str) -> list[float]:
    """Return the loss of each step of a run."""
    lines = Path(run_folder, METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def compare_losses(runs: dict[str, str], tolerance: float) -> None:
    """Show the losses of two runs as a table and a plot. Raises SessionError if they differ.

    Args:
        runs: {label: folder} of the two.
        tolerance: largest relative difference in any step.
    """
    from IPython.display import Image, display
    from matplotlib.figure import Figure

    (one, two), losses = runs, [read_losses(folder) for folder in runs.values()]
    print(f"{'step':>4} {one:>12} {two:>12}  difference")
    differences = []
    for step, (a, b) in enumerate(zip(*losses, strict=True), 1):
        differences.append(abs(a - b) / abs(a))
        print(f"{step:4} {a:12.6f} {b:12.6f}  {differences[-1]:.1e}")
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for label, values, style in zip(runs, losses, ("-", "--"), strict=True):
        axes.plot(range(1, len(values) + 1), values, style, marker="o", label=label)
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    display(Image(data=png.getvalue(), format="png"))
    if not all(d <= tolerance for d in differences):  # a NaN is larger than any tolerance
        largest = max(differences, key=lambda d: math.inf if math.isnan(d) else d)
        raise SessionError(f"the losses differ by {largest:.1e}, more than {tolerance:.0e}")
    print(f"The losses are equal within {tolerance:.0e}.")


def has_result(run_folder: str) -> bool:
    """Return whether a run has ended with a result; print how to go on if it was stopped before its end.

    A result that is older than the last step is that of a shorter run, which was continued and stopped.
    """
    metrics, *results = (Path(run_folder, name) for name in (METRICS, *RESULTS))
    if metrics.is_file():
        last_step = metrics.stat().st_mtime
        if any(result.is_file() and result.stat().st_mtime >= last_step for result in results):
            return True
    print("The run has not ended yet, so there is nothing to do here. The last section tells how to go on.")
    return False


def export_format(run_folder: str) -> str:
    """Return --to of export.py for a run with a result: an "adapter", or a whole model ("merged")."""
    return "adapter" if Path(run_folder, ADAPTER).is_file() else "merged"


def show_run(run_folder: str) -> None:
    """Show a run's loss.png and report.html in the notebook.

    The report stands in a frame that may run its scripts, but cannot reach the notebook's page.
    """
    from IPython.display import HTML, DisplayObject, Image, display

    folder, items = Path(run_folder), list[DisplayObject]()
    if (folder / "loss.png").is_file():
        items.append(Image(data=(folder / "loss.png").read_bytes(), format="png", width=700))
    if (folder / "report.html").is_file():
        page = html.escape((folder / "report.html").read_text(encoding="utf-8"))
        frame = f'<iframe srcdoc="{page}" sandbox="allow-scripts" width="100%" height="800"></iframe>'
        items.append(HTML(f"<div>{frame}</div>"))
    display(*items)
