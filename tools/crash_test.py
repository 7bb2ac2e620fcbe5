"""python -m tools.crash_test --kills 50

Kills a training run at random moments, again and again, resumes it each time, and compares what it leaves with what
an undisturbed run leaves: every loss and gradient norm, and the adapter, bit for bit. Two CPU ranks over gloo, each
the whole program as torchrun starts it; SIGKILL, to both at once or to one after the other. In turn a kill comes while
the run starts, between steps, and while a checkpoint is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from files.names import ADAPTER, METRICS
from files.tensors import read_header
from launch.processes import find_free_port
from options.config import CHECKPOINTS

WORLD = 2
KINDS = ("starting", "training", "saving")
PATIENCE_SECONDS = 120
OPTIONS = (
    "--train_type bnb_dora --lora_rank 4 --lora_dropout 0.1 --dataset_samples 60 --num_epochs 1000 --batch_size 1"
    " --gradient_accumulation_steps 2 --lr_scheduler cosine --sample_tokens 2 --log_to stdout --save_every 2"
    " --resume auto"
).split()
REPEATED = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens")


def rank_process(rank: int, port: int, argv: list[str], log: str) -> None:
    """One rank, in a process of its own."""
    import train  # loaded by the fork server, once for all processes

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in (ranks | where).items()})
    sys.exit(train.main(argv))


class Attempt:
    """The run, started once more; it goes on from where it was."""

    def __init__(self, folder: Path, steps: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train"])
        self.folder, self.log = folder, folder.with_suffix(".log")
        argv = [*OPTIONS, "--max_steps", str(steps), "--output_dir", str(folder)]
        shared = find_free_port(), argv, str(self.log)
        self.ranks = [context.Process(target=rank_process, args=(rank, *shared)) for rank in range(WORLD)]
        self.lines = count_lines(folder)
        for process in self.ranks:
            process.start()

    def wait_until(self, condition, pause: float = 0.01) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > end or not all(process.is_alive() for process in self.ranks):
                raise RuntimeError(f"the run does not go on:\n{self.log.read_text()[-3000:]}")
            time.sleep(pause)

    def finish(self) -> None:
        """Until its end, which must be a good one. Patience ends where no step comes, however many there are."""
        lines, until = -1, 0.0
        while any(process.is_alive() for process in self.ranks):
            if (now := count_lines(self.folder)) != lines:
                lines, until = now, time.monotonic() + PATIENCE_SECONDS
            if time.monotonic() > until:
                self.kill([], 0)
            time.sleep(0.05)
        if any(process.exitcode != 0 for process in self.ranks):
            raise RuntimeError(f"the run failed:\n{self.log.read_text()[-3000:]}")

    def kill(self, first: list[int], seconds: float) -> None:
        """SIGKILL to some ranks, and a little later to the rest, as their launcher does it."""
        for process in [self.ranks[rank] for rank in first]:
            process.kill()
        time.sleep(seconds)
        for process in self.ranks:
            process.kill()
            process.join()


def count_lines(folder: Path) -> int:
    try:  # a run that begins anew takes it away
        return (folder / METRICS).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def half_written(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("step-*.tmp"))


def kill_once(folder: Path, steps: int, kind: str, chance: random.Random, start_seconds: float) -> bool:
    """Starts the run and kills it. Returns whether that left a half-written checkpoint."""
    attempt = Attempt(folder, steps)
    if kind == "starting":
        time.sleep(chance.uniform(0, start_seconds))
    else:
        more = chance.randint(1, 3)
        attempt.wait_until(lambda: count_lines(folder) >= attempt.lines + more)
        if kind == "saving":
            attempt.wait_until(lambda: half_written(folder), pause=0.0005)
            time.sleep(chance.uniform(0, 0.01))
        else:
            time.sleep(chance.uniform(0, 0.1))
    attempt.kill(chance.choice([[0], [1], [0, 1]]), chance.uniform(0, 0.5))
    return half_written(folder)


def result(folder: Path) -> tuple[list[dict], bytes]:
    """What must repeat: (of every step, the adapter's tensors)."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    adapter = folder / ADAPTER
    return [{name: line[name] for name in REPEATED} for line in lines], adapter.read_bytes()[
        read_header(adapter)[1] :
    ]


def crash_test(where: Path, kills: int, seed: int) -> str:
    """Raises AssertionError if the killed run left anything else than the undisturbed one. Returns a line about
    what was done."""
    steps, chance = 8 + 2 * kills, random.Random(seed)
    torn: Counter[str] = Counter()
    undisturbed, killed = where / "undisturbed", where / "killed"
    attempt, began = Attempt(undisturbed, steps), time.monotonic()
    attempt.wait_until(lambda: count_lines(undisturbed) > 0)
    start_seconds = time.monotonic() - began
    attempt.finish()
    for i in range(kills):
        kind = KINDS[i % len(KINDS)]
        torn[kind] += kill_once(killed, steps, kind, chance, start_seconds)
    assert count_lines(killed) < steps, "the run ended before the last kill"
    Attempt(killed, steps).finish()
    (theirs, weights), (ours, other_weights) = result(undisturbed), result(killed)
    assert len(theirs) == steps and theirs == ours, "the losses differ"
    assert weights == other_weights, "the weights differ"
    return (
        f"{kills} kills, {sum(torn.values())} of which left half a checkpoint; losses of all {steps} steps and weights"
        " are those of the undisturbed run"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        print(crash_test(Path(where), options.kills, options.seed))


if __name__ == "__main__":
    main()
