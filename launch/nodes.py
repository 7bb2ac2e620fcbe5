"""Checks of a run on several machines: each node checks it over the files that it reads, and all must agree.

A node with another model, other data or other options would train something that nobody asked for, without an
error. Here it ends the run on all nodes, before a GPU is touched.
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

from launch.ranks import RankInfo, gather_from_ranks, local_world_size
from options.config import Config
from options.errors import UserError, describe, needs_no_traceback

PATIENCE = 90  # seconds; an NFS client may cache for up to 60 that a file does not exist


@dataclass(frozen=True)
class NodeResult:
    """Result of the check on the first rank of a node.

    Attributes:
        host: the node's host name.
        error: what is wrong with the run there, or "".
        facts: the facts that must be equal on all nodes, {name: text}.
        output_dir, chat_date: as options. Their defaults contain the time, so all nodes use rank 0's.
    """

    host: str
    error: str = ""
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    output_dir: str = ""
    chat_date: str | None = None


class CheckedJob(Protocol):
    """Interface: the part of a checked run that this module needs (training/job.py)."""

    @property
    def config(self) -> Config: ...

    @property
    def output_dir(self) -> str: ...

    def facts_to_compare(self) -> dict[str, str]:
        """Return the facts that must be equal on all nodes, {name: text}. Abstract."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines to print once. Abstract."""

    def with_shared_defaults(self, output_dir: str, chat_date: str | None, started: float) -> Self:
        """Return a copy with these values, which are rank 0's, in place of this node's. Abstract."""


AnyJob = TypeVar("AnyJob", bound=CheckedJob)


def check_on_nodes(
    check: Callable[[], AnyJob], rank: int, world: int, local_rank: int, started: float
) -> AnyJob:
    """Call check() on each node's first rank, compare the nodes' jobs, return the job everywhere. Collective.

    Raises UserError on all ranks if the run is wrong on any node or if nodes disagree. The rank that found an
    error raises it as it is, which may also be the OSError of a full disk; the others name its node.

    Args:
        check: checks the run and makes the job. Raises UserError for what is wrong with it.
        rank, world: this rank and the number of ranks.
        local_rank: this rank within its node.
        started: time.time() when the run started.
    """
    job, failure, result = None, None, None
    if local_rank == 0:
        try:
            job = check()
            facts = job.facts_to_compare() if world > local_world_size(world) else {}
            host, config = socket.gethostname(), job.config
            result = NodeResult(host, "", facts, job.output_dir, config.chat_date)
        except (UserError, OSError) as e:
            if not needs_no_traceback(e):
                raise
            failure, result = e, NodeResult(socket.gethostname(), describe(e))
    results = gather_from_ranks(result, world)
    if failure:
        raise failure
    nodes = [found for found in results if found]
    check_agreement(nodes)
    if job:
        job = job.with_shared_defaults(nodes[0].output_dir, nodes[0].chat_date, started)
    return _broadcast_within_node(job, rank - local_rank, len(nodes), world)


def _broadcast_within_node(job: AnyJob | None, first_rank: int, n_nodes: int, world: int) -> AnyJob:
    """Return the job of the node's first rank on all ranks of the node. Collective.

    Args:
        job: the job on that rank; None on the others.
        first_rank: its global rank.
        n_nodes, world: number of nodes and of ranks.
    """
    group = dist.new_subgroups(world // n_nodes)[0] if n_nodes > 1 else None
    objects = [job]
    dist.broadcast_object_list(objects, src=first_rank, group=group)
    received = objects[0]
    assert received is not None
    return received


def check_agreement(nodes: list[NodeResult]) -> None:
    """Raise UserError if the check failed on a node, or if the facts of two nodes differ."""
    for i, node in enumerate(nodes):
        if node.error:
            raise UserError(f"node {i} ({node.host}): {node.error}")
    first = nodes[0]
    for i, node in enumerate(nodes[1:], 1):
        for name in first.facts | node.facts:  # another version of this program may have other facts
            if node.facts.get(name) != first.facts.get(name):
                raise UserError(_describe_disagreement(name, first, i, node))


def check_output_is_shared(file: Path, rank_info: RankInfo) -> None:
    """Raise UserError on ranks that do not see what rank 0 has just written into this file. Collective.

    They wait for it up to PATIENCE. On a single node nothing is checked.
    """
    if rank_info.local_world == rank_info.world:
        return
    written = [file.read_bytes() if rank_info.rank == 0 else b""]
    dist.broadcast_object_list(written, src=0)
    deadline = time.monotonic() + PATIENCE
    while not _has_content(file, written[0]):
        if time.monotonic() > deadline:
            raise UserError(
                f"--output_dir {file.parent}: what the first node writes there is not seen here; for"
                " checkpoints all nodes must share it"
            )
        time.sleep(0.2)


def _has_content(file: Path, content: bytes) -> bool:
    """Whether the file can be read and holds exactly this content."""
    # A network file system may report a replaced file as stale.
    with contextlib.suppress(OSError):
        return file.read_bytes() == content
    return False


def _describe_disagreement(name: str, first: NodeResult, number: int, other: NodeResult) -> str:
    """Return the error line for a fact that differs between node 0 and node `number`."""
    values = [node.facts.get(name, "unknown") for node in (first, other)]
    hosts = f"node 0 ({first.host})", f"node {number} ({other.host})"
    if max(map(len, values)) >= 64:  # digests say nothing to a reader
        return (
            f"{hosts[0]} and {hosts[1]} disagree on {name}: each reads its own files, which must be the same"
        )
    return f"the nodes disagree on {name}: {values[0]} on {hosts[0]}, {values[1]} on {hosts[1]}"
