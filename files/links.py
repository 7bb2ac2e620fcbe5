"""Links in folders that others made."""

from __future__ import annotations

import os
from pathlib import Path


def leads_out(path: Path) -> bool:
    """Whether a link leads out of its folder, and not to where the hub's cache keeps its files."""
    real = Path(os.path.realpath(path))
    return not real.is_relative_to(os.path.realpath(path.parent)) and real.parent.name != "blobs"
