"""A worker of a sweep: the file that shows others whether it is alive, and its shares of the GPUs.

Every process of sweep.py holds OUT/workers/<id>: it keeps it locked and renews its time. Its trials name it.

- On the same machine the lock decides, at once: the system releases it when the process is gone. The runs
  that it started hold the lock too, so a trial is taken over only after its run has ended.
- On other machines, whose locks a network file system may not show, the file's time decides: a worker whose
  file has not changed for STALE_SECONDS, by the observer's clock, is dead. Clocks need not agree.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from launch.ranks import resolve_world_size
from options.errors import UserError

RENEW_SECONDS = 10.0
STALE_SECONDS = 120.0  # network file systems show a file's new time up to 60 s late
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine, new at each boot


class Worker:
    """This process as a worker of a sweep, within the context.

    Attributes:
        identity: what the trials that it runs record: its id, machine, host and process.
        descriptor: the locked file, which the runs that it starts inherit.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic):
        """folder: where the files of all workers are. clock: the time in seconds."""
        self.folder, self.clock = folder, clock
        self.identity = {
            "id": uuid.uuid4().hex[:12],
            "machine": _machine_id(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self.descriptor = -1
        self._seen: dict[str, tuple[int | None, float]] = {}  # {id: (time of its file, when that was new)}
        self._ended = threading.Event()

    @property
    def path(self) -> Path:
        """The worker's file."""
        return self.folder / str(self.identity["id"])

    def __enter__(self) -> Worker:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks: then times alone decide
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self.descriptor)

    def _renew(self) -> None:
        """Renew the file's time until the context ends. Runs in a thread."""
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is full or away for a moment
                os.utime(self.path)

    def is_alive(self, other: dict) -> bool:
        """Whether another worker, known by its `identity`, or a run that it started, is alive.

        One on another machine counts as alive until it was observed for STALE_SECONDS.
        """
        if other["id"] == self.identity["id"]:
            return True
        path = self.folder / str(other["id"])
        if other["machine"] == self.identity["machine"]:
            is_locked = _is_locked(path)
            if is_locked is not None:
                return is_locked
        changed = path.stat().st_mtime_ns if path.exists() else None
        before, since = self._seen.get(other["id"], (-1, 0.0))
        if changed != before:
            self._seen[other["id"]] = changed, (since := self.clock())
        return self.clock() - since < STALE_SECONDS


def _is_locked(path: Path) -> bool | None:
    """Return whether a process of this machine holds a file's lock; None if the file system has no locks."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _machine_id() -> str:
    """Return a text that two processes have in common only if one kernel runs both."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return f"{socket.gethostname()}-{uuid.getnode():x}"


def share_gpus(workers: int) -> list[dict[str, str]]:
    """Return the environment variables of each of several trials at a time, with an equal share of the GPUs.

    Without a GPU all are empty: each trial has its CPU processes. Raises UserError if the GPUs cannot be
    shared evenly.
    """
    if workers == 1:
        return [{}]
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = (named or [str(i) for i in range(count)])[:count]
    if count % workers:
        raise UserError(
            f"--workers {workers}: this machine's {count} GPUs cannot be shared evenly by as many"
        )
    share = count // workers
    shares = [names[i * share : (i + 1) * share] for i in range(workers)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(each)} if each else {} for each in shares]


def count_processes(world_size: int, workers: int) -> int:
    """Return the number of processes of a trial. Raises UserError if this machine cannot have so many.

    Args:
        world_size: --world_size.
        workers: --workers: trials at a time, which share the GPUs.
    """
    gpus = torch.cuda.device_count() // workers
    return gpus if gpus and world_size < 0 else resolve_world_size(world_size)
