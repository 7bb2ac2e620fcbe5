"""Several machines: the first rank of each node checks the run by itself, over the files that this node
reads, and all of them must have found the same.

A node that has another model, other data or other options than the rest would train something that no one
asked for, without an error: here it ends the run, on all nodes, before a GPU is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch.distributed as dist

from launch.ranks import RankInfo, local_world_size
from options.config import Config
from options.errors import UserError, describe, needs_no_traceback

PATIENCE = 90  # seconds: NFS's clients believe for up to 60 that a name is not there


@dataclass(frozen=True)
class Finding:
    """What the first rank of a node found. error: what is wrong with the run there; described: what all nodes
    must have in common, as texts by name; output_dir, chat_date: their defaults have the time in them, so
    rank 0's are everybody's."""

    host: str
    error: str = ""
    described: dict[str, str] = dataclasses.field(default_factory=dict)
    output_dir: str = ""
    chat_date: str | None = None


class Checked(Protocol):
    """A checked run, as far as nodes look into it."""

    @property
    def config(self) -> Config: ...

    @property
    def output_dir(self) -> str: ...

    def described(self) -> dict[str, str]:
        """What all nodes must have in common, as texts by name."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines to print once."""

    def settled(self, output_dir: str, chat_date: str | None, began: float) -> Self:
        """The same with rank 0's folder and day, and the time when the run began."""


AnyJob = TypeVar("AnyJob", bound=Checked)


def prepare(check: Callable[[], AnyJob], rank: int, world: int, local_rank: int, began: float) -> AnyJob:
    """The checked run, on every rank. check: makes it on the first rank of a node; began: when the run did,
    as time.time() says it. Collective, over all ranks. Raises UserError on all of them, if it is wrong on any
    node or if nodes disagree: a node's own error there, which may be the OSError of a full disk, elsewhere
    with the node's number."""
    job, failure, finding = None, None, None
    if local_rank == 0:
        try:
            job = check()
            described = job.described() if world > local_world_size(world) else {}
            host, config = socket.gethostname(), job.config
            finding = Finding(host, "", described, job.output_dir, config.chat_date)
        except (UserError, OSError) as e:
            if not needs_no_traceback(e):
                raise
            failure, finding = e, Finding(socket.gethostname(), describe(e))
    everyone: list[Finding | None] = [None] * world
    dist.all_gather_object(everyone, finding)
    if failure:
        raise failure
    nodes = {i: found for i, found in enumerate(everyone) if found}
    compare(list(nodes.values()))
    if job:
        job = job.settled(nodes[0].output_dir, nodes[0].chat_date, began)
    return _within_node(job, rank - local_rank, len(nodes), world)


def _within_node(job: AnyJob | None, first: int, nodes: int, world: int) -> AnyJob:
    """The Job of the node's first rank, on all ranks of the node."""
    group = dist.new_subgroups(world // nodes)[0] if nodes > 1 else None
    box = [job]
    dist.broadcast_object_list(box, src=first, group=group)
    received = box[0]
    assert received is not None
    return received


def compare(nodes: list[Finding]) -> None:
    """Raises UserError unless all nodes found a run, and the same one."""
    for i, node in enumerate(nodes):
        if node.error:
            raise UserError(f"node {i} ({node.host}): {node.error}")
    first = nodes[0]
    for i, node in enumerate(nodes[1:], 1):
        for name in first.described | node.described:  # other versions of this program have others
            if node.described.get(name) != first.described.get(name):
                raise UserError(_disagreement(name, first, i, node))


def check_shared(file: Path, rank_info: RankInfo) -> None:
    """Raises UserError on ranks of other nodes that do not see what the first has just written, as
    checkpoints need. Collective."""
    if rank_info.local_world == rank_info.world:
        return
    written = [file.read_bytes() if rank_info.rank == 0 else b""]
    dist.broadcast_object_list(written, src=0)
    ends = time.monotonic() + PATIENCE
    while not _holds(file, written[0]):
        if time.monotonic() > ends:
            raise UserError(
                f"--output_dir {file.parent}: what the first node writes there is not seen here; for checkpoints all nodes"
                " must share it"
            )
        time.sleep(0.2)


def _holds(file: Path, text: bytes) -> bool:
    # A network's file system may say that a file is stale that has been replaced.
    with contextlib.suppress(OSError):
        return file.read_bytes() == text
    return False


def _disagreement(name: str, first: Finding, number: int, other: Finding) -> str:
    values = [node.described.get(name, "unknown") for node in (first, other)]
    hosts = f"node 0 ({first.host})", f"node {number} ({other.host})"
    if max(map(len, values)) >= 64:  # digests, which tell nobody anything
        return (
            f"{hosts[0]} and {hosts[1]} disagree on {name}: each reads its own files, which must be the same"
        )
    return f"the nodes disagree on {name}: {values[0]} on {hosts[0]}, {values[1]} on {hosts[1]}"
