"""Symbolic links in folders that others made."""

from __future__ import annotations

import os
from pathlib import Path


def points_outside(path: Path) -> bool:
    """Return whether a path is a link out of its own folder, other than into a hub cache's folder `blobs`."""
    real = Path(os.path.realpath(path))
    return not real.is_relative_to(os.path.realpath(path.parent)) and real.parent.name != "blobs"
