"""Start many light ranks under torchrun's agents; measure how a run on many nodes starts and restarts.

    python -m benchmarks.light_ranks --nodes 2,4,8 --ranks_per_node 8 --out rows.jsonl
    python -m benchmarks.light_ranks --nodes 8 --lose rank --out rows.jsonl     a rank dies in the run
    python -m benchmarks.light_ranks --nodes 8 --lose node --out rows.jsonl     an agent dies with its ranks

All nodes are on this machine. A node is an agent of torchrun (`elastic_launch`) and its ranks, which are
forks of one process that has imported torch. A rank has no model, and no module of transformers. It does
what a rank of train.py does around its model: launch/torchrun.py starts it, launch/nodes.py checks a job of
the usual size, and it makes the groups of a run with `hybrid_full_shard` and checkpoints. Then it takes
part in the collectives that a step has on the host.

Writes a line of JSON for each number of nodes, and prints it. Times of a stage are those of the slowest
rank. They include waiting for the CPUs that all ranks share; `cpu_seconds` does not, so it is what a rank
with a CPU of its own would take at least.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.process_memory import list_process_tree, read_host_memory
from launch import torchrun
from launch.processes import find_free_port
from launch.program import exit_on_signals
from launch.ranks import RankInfo, gather_from_ranks
from launch.signals import StopRequests
from options.config import Config
from options.train import parse

POLLS = 20  # polls for requests to stop, one for each step of a run
DIGEST = 64  # characters of a SHA-256


@dataclass(frozen=True)
class LightJob:
    """A job as large as a real one, which checks nothing.

    Attributes:
        config: options of train.py.
        output_dir: as in `launch.nodes.CheckedJob`.
        tokens: in place of the data's.
        remarks: as in `launch.nodes.CheckedJob`.
    """

    config: Config
    output_dir: str
    tokens: torch.Tensor
    remarks: tuple[str, ...] = ()

    def facts_to_compare(self) -> dict[str, str]:
        """Return all options but two and some digests, as a real job does (training/job.py)."""
        options = {f"--{name}": str(value) for name, value in dataclasses.asdict(self.config).items()}
        del options["--output_dir"], options["--chat_date"]  # their defaults contain the time
        return options | {f"digest {i}": str(i) * DIGEST for i in range(4)}

    def with_shared_defaults(self, output_dir: str, chat_date: str | None, started: float) -> LightJob:
        """Return a copy with rank 0's folder."""
        return dataclasses.replace(self, output_dir=output_dir)


@dataclass(frozen=True)
class Work:
    """What the ranks do.

    Attributes:
        nodes, ranks_per_node: of the run.
        tokens: of the job's data.
        folder: where ranks write what they measure.
        lose: "" or what dies once in the run, on the last node: "rank", or "node" (agent and ranks).
        launcher: the process that starts the agents.
    """

    nodes: int
    ranks_per_node: int
    tokens: int
    folder: str
    lose: str = ""
    launcher: int = field(default_factory=os.getpid)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


class Clock:
    """Measures the stages of a rank.

    Attributes:
        seconds, cpu_seconds: {stage: time of it}; CPU time is that of all threads of this process.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.last = time.perf_counter(), time.process_time()

    def end(self, stage: str) -> None:
        """End a stage, which began when the one before ended."""
        now = time.perf_counter(), time.process_time()
        self.seconds[stage], self.cpu_seconds[stage] = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now


def run_light_rank(work: Work) -> None:
    """Run one rank, which torchrun's agent has started."""
    torch.set_num_threads(1)
    clock = Clock()

    def check(launcher) -> LightJob:
        clock.end("meet")
        job = launcher.check(lambda: LightJob(make_config(work), work.folder, torch.zeros(work.tokens)))
        clock.end("agree")
        return job

    status = torchrun.run_as_rank(lambda rank_info, job: _run(rank_info, job, work, clock), check)
    if status:
        sys.exit(status)


def make_config(work: Work) -> Config:
    """Return options of a run with `hybrid_full_shard` over groups of a node."""
    words = f"--model_name any --world_size {work.world} --hybrid_shard_size {work.ranks_per_node}"
    return parse([*words.split(), "--sharding_strategy", "hybrid_full_shard"])[0]


def _run(rank_info: RankInfo, job: LightJob, work: Work, clock: Clock) -> None:
    """Make the groups of a run, take part in its steps' collectives, and report. Collective."""
    clock.end("join")
    init_device_mesh("cpu", (work.nodes, work.ranks_per_node), mesh_dim_names=("replicate", "shard"))
    clock.end("mesh")
    group = dist.new_group(backend="gloo")  # as in checkpoints/manager.py
    clock.end("checkpoint group")
    stopping = StopRequests(rank_info.rank, time.time(), 0, 0)
    stopping.poll_all_ranks(last=False)  # makes the connections
    dist.all_reduce(torch.zeros(1))
    clock.end("first poll")
    for _ in range(POLLS):
        stopping.poll_all_ranks(last=False)
    clock.end("polls")
    requests = torch.zeros(5, dtype=torch.int64)
    for _ in range(POLLS):
        dist.all_reduce(requests, dist.ReduceOp.MAX)
    clock.end("ring")  # the same by gloo's all-reduce, to compare
    running = time.time()
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if work.lose and not Path(work.folder, "lost").exists():
        _lose_once(rank_info, work)
    own = {
        "running": running,
        "attempt": attempt,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "files": len(os.listdir("/proc/self/fd")),
    }
    reports = gather_from_ranks(own, rank_info.world, group)
    if rank_info.rank == 0:
        _write_report(reports, work)
    dist.barrier()


def _lose_once(rank_info: RankInfo, work: Work) -> None:
    """Kill the last rank of the run, or its whole node. The other ranks wait for it in a collective."""
    if rank_info.rank == rank_info.world - 1:
        Path(work.folder, "lost").write_text(str(time.time()))
        if work.lose == "node":
            os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _write_report(reports: list[dict[str, Any]], work: Work) -> None:
    """Write what the ranks measured as one object. Runs on rank 0."""
    slowest = {stage: max(r["seconds"][stage] for r in reports) for stage in reports[0]["seconds"]}
    cpu = [sum(r["cpu_seconds"].values()) for r in reports]
    memory = read_host_memory(list_process_tree(work.launcher))
    report = {
        "seconds": {stage: round(seconds, 3) for stage, seconds in slowest.items()},
        "poll_seconds": round(slowest["polls"] / POLLS, 5),
        "ring_seconds": round(slowest["ring"] / POLLS, 5),
        "cpu_seconds": {
            "rank 0": round(cpu[0], 3),
            "other ranks": round(sum(cpu[1:]) / max(len(cpu) - 1, 1), 3),
        },
        "open_files": max(r["files"] for r in reports),
        "memory_gib": round(memory.total / 2**30, 2),
        "running": max(r["running"] for r in reports),
        "attempt": max(r["attempt"] for r in reports),
    }
    Path(work.folder, "report.tmp").write_text(json.dumps(report))
    Path(work.folder, "report.tmp").rename(Path(work.folder, "report.json"))


def run_agent(work: Work, port: int, node: int) -> None:
    """Run one node: torchrun's agent, which starts the node's ranks. Ends this process."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if work.lose == "node":
        # Otherwise the new agent waits for an address that the others, who know it, do not publish again.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=work.nodes,
        max_nodes=work.nodes,
        nproc_per_node=work.ranks_per_node,
        run_id="light",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"is_host": node == 0, "join_timeout": 600},
        max_restarts=3,
        start_method="fork",
        local_addr="localhost",
    )
    try:
        elastic_launch(config, run_light_rank)(work)
    except Exception as e:
        print(f"node {node}: {type(e).__name__}: {str(e)[:2000]}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def measure(work: Work, time_limit: float) -> dict:
    """Run all nodes and return the row. Raises RuntimeError if they fail or take too long."""
    context, port = mp.get_context("fork"), find_free_port()
    gc.freeze()  # or collections would copy the pages that the forks share

    def make_agent(node: int) -> Any:
        return context.Process(target=run_agent, args=(work, port, node))

    began, agents = time.time(), [make_agent(node) for node in range(work.nodes)]
    for agent in agents:
        agent.start()
    deadline = time.monotonic() + time_limit
    try:
        while any(agent.is_alive() for agent in agents):
            time.sleep(0.1)
            if agents[-1].exitcode == -signal.SIGKILL:  # the lost node comes back
                agents[-1] = make_agent(work.nodes - 1)
                agents[-1].start()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{work.world} ranks: not done after {time_limit:g} s")
    finally:
        for agent in agents:
            if agent.is_alive():
                os.killpg(agent.pid, signal.SIGKILL)
            agent.join()
    report = Path(work.folder, "report.json")
    if not report.exists():  # later errors are of agents that still talk to the first one's store
        raise RuntimeError(f"{work.world} ranks: failed; see the lines above")
    row = json.loads(report.read_text())
    running = row.pop("running")
    row = {"nodes": work.nodes, "ranks": work.world, "start_seconds": round(running - began, 2)} | row
    if work.lose:
        lost = float(Path(work.folder, "lost").read_text())
        row |= {"lost": work.lose, "restart_seconds": round(running - lost, 2)}
        del row["start_seconds"]
    return row | {"cpus": os.cpu_count(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def main(argv: list[str]) -> None:
    """Measure each number of nodes, and print and append its row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.light_ranks")
    parser.add_argument("--nodes", default="2,4,8", help="numbers of nodes, comma-separated")
    parser.add_argument("--ranks_per_node", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the job's data, 4 bytes each")
    parser.add_argument("--lose", choices=("", "rank", "node"), default="", help="what dies once")
    parser.add_argument("--time_limit", type=float, default=600, help="seconds for each number of nodes")
    parser.add_argument("--out", type=Path, help="file to append the rows to")
    options = parser.parse_args(argv)
    exit_on_signals()  # so that `measure` ends its agents
    # torch looks up the name of each connection's other end. Without a DNS that takes 1 s then, not 5.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    for nodes in map(int, options.nodes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            work = Work(nodes, options.ranks_per_node, options.tokens, folder, options.lose)
            row = measure(work, options.time_limit)
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
