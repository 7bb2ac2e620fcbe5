"""RUNs on a command line, checked before the slow imports, and the RUN that a --config file is of."""

from __future__ import annotations

import os
from collections.abc import Sequence

from options.errors import UserError


def check_runs(runs: Sequence[str]) -> list[str]:
    """Return the folders with ~ expanded. Raises UserError if one has no config.yaml or is given twice."""
    folders = [os.path.expanduser(run) for run in runs]
    for i, folder in enumerate(folders):
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder; expected a RUN, the --output_dir of train.py")
        if not os.path.isfile(os.path.join(folder, "config.yaml")):
            raise UserError(f"{folder}: is no run of train.py (no config.yaml)")
        if any(os.path.samefile(folder, other) for other in folders[:i]):
            raise UserError(f"{folder}: is given twice")
    return folders


def recorded_run(path: str) -> str | None:
    """Return the folder of the RUN whose config.yaml a --config file is; None for any other file."""
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    is_run = name == "config.yaml" and os.path.isfile(os.path.join(folder, "run.json"))
    return folder if is_run else None
