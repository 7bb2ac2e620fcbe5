"""The host memory of a program's processes together, from /proc (Linux)."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a program's processes. Other programs beside it do not change them.

    Attributes:
        own: anonymous and shared memory, a page that several processes share counted once (proportional set
            size).
        files: pages of files, such as libraries, of the process that has most of them: the others map the
            same ones. Their proportional set size would fall with each program that maps them too.
    """

    own: int = 0
    files: int = 0

    @property
    def total(self) -> int:
        return self.own + self.files


def list_process_tree(root: int) -> list[int]:
    """Return the ids of a process and of all that descend from it."""
    children = defaultdict(list)
    for path in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # The name may hold spaces and brackets; the state and the parent's id follow the last one.
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children[parent].append(int(path.parent.name))
    tree = [root]
    for each in tree:
        tree += children[each]
    return tree


def read_host_memory(processes: list[int]) -> HostMemory:
    """Return the memory of these processes together; of those that have ended or are not ours, nothing."""
    own, files = 0, 0
    for process in processes:
        with contextlib.suppress(OSError):
            shares = _read_sizes(PROC / str(process) / "smaps_rollup")
            own += shares.get("Pss_Anon", 0) + shares.get("Pss_Shmem", 0)
            files = max(files, _read_sizes(PROC / str(process) / "status").get("RssFile", 0))
    return HostMemory(own, files)


def _read_sizes(path: Path) -> dict[str, int]:
    """Return {name: bytes} of the lines `name: N kB` of a file in /proc. Raises OSError."""
    lines = (line.split() for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
