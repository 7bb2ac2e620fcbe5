"""The lock that lets one run at a time write a folder: flock(2) on the folder itself."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from options.errors import UserError

WAIT_SECONDS = 10  # for an ending run to release its folder


class FolderLock:
    """A lock that keeps other runs out of a folder, from `acquire` to the end of the context.

    If two runs wrote into one folder, neither could be resumed. The system releases the lock when the process
    ends.
    """

    def __init__(self, folder: Path):
        self.folder, self.descriptor = folder, -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def acquire(self) -> None:
        """Make and lock the folder. Raises UserError if another run holds it for WAIT_SECONDS, and OSError.

        The ranks of a killed run release it within a second. Without an error the folder stays unlocked if
        its file system has no locks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.folder, os.O_RDONLY)
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                return fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"--output_dir {self.folder}: another run is writing in it") from None
                time.sleep(0.2)
            except OSError:
                return None
