"""The lock of a folder that one run at a time may write: flock(2) on the folder itself."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from options.errors import UserError

PATIENCE = 10  # seconds for a run that ends to leave its folder


class FolderLock:
    """Keeps other runs out of a folder, from `take` to the end of the context: of two that wrote into it
    neither could be resumed. The lock is the folder's own, and goes with its process."""

    def __init__(self, folder: Path):
        self.folder, self.descriptor = folder, -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def take(self) -> None:
        """Raises UserError if another run does not leave it, which the ranks of one that was killed do in a
        second. A file system without locks is taken as it is."""
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
