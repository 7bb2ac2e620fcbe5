"""Kill a training run at random moments, resume it, and compare its results with an undisturbed run's.

    python -m tools.crash_test --kills 50

Every loss and gradient norm, and the adapter, must be equal bit for bit. Two CPU ranks run over gloo, each
the whole program as torchrun starts it. SIGKILL hits both at once or one after the other; in turn while the
run starts, between steps, and while a checkpoint is written.
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
from collections.abc import Callable
from pathlib import Path

from files.names import ADAPTER, METRICS
from files.tensors import read_header
from launch.processes import find_free_port
from options.config import CHECKPOINTS

WORLD_SIZE = 2
MOMENTS = ("starting", "training", "saving")
TIMEOUT_SECONDS = 120  # for one step
OPTIONS = (
    "--train_type bnb_dora --lora_rank 4 --lora_dropout 0.1 --dataset_samples 60 --num_epochs 1000"
    " --batch_size 1 --gradient_accumulation_steps 2 --lr_scheduler cosine --sample_tokens 2 --log_to stdout"
    " --save_every 2 --resume auto"
).split()
COMPARED_METRICS = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens")


def run_rank_process(rank: int, port: int, argv: list[str], log: str) -> None:
    """Run train.py as one rank in this process, append its output to the file `log`, and exit.

    Args:
        rank: this rank, of WORLD_SIZE on this machine.
        port: MASTER_PORT, where the ranks meet.
        argv: options of train.py.
        log: path of the file that gets stdout and stderr of all ranks.
    """
    import train  # preloaded by the fork server

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in (ranks | rendezvous).items()})
    sys.exit(train.main(argv))


class Attempt:
    """One start of the run, which resumes from its last checkpoint. steps: its --max_steps."""

    def __init__(self, folder: Path, steps: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train"])
        self.folder, self.log = folder, folder.with_suffix(".log")
        argv = [*OPTIONS, "--max_steps", str(steps), "--output_dir", str(folder)]
        shared = find_free_port(), argv, str(self.log)
        self.ranks = [
            context.Process(target=run_rank_process, args=(rank, *shared)) for rank in range(WORLD_SIZE)
        ]
        self.lines = count_lines(folder)
        for process in self.ranks:
            process.start()

    def wait_until(self, condition: Callable[[], bool], pause_seconds: float = 0.01) -> None:
        """Wait until the condition holds. Raises RuntimeError if a rank ends or TIMEOUT_SECONDS pass."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            if time.monotonic() > deadline or not all(process.is_alive() for process in self.ranks):
                raise RuntimeError(f"the run has stopped:\n{self.log.read_text()[-3000:]}")
            time.sleep(pause_seconds)

    def finish(self) -> None:
        """Wait for the run's end.

        Raises RuntimeError if it fails, or if one step takes longer than TIMEOUT_SECONDS.
        """
        lines, deadline = -1, 0.0
        while any(process.is_alive() for process in self.ranks):
            if (now := count_lines(self.folder)) != lines:
                lines, deadline = now, time.monotonic() + TIMEOUT_SECONDS
            if time.monotonic() > deadline:
                self.kill([], 0)
            time.sleep(0.05)
        if any(process.exitcode != 0 for process in self.ranks):
            raise RuntimeError(f"the run failed:\n{self.log.read_text()[-3000:]}")

    def kill(self, first: list[int], seconds: float) -> None:
        """Send SIGKILL to the ranks `first`, and `seconds` later to the rest, as their launcher does."""
        for process in [self.ranks[rank] for rank in first]:
            process.kill()
        time.sleep(seconds)
        for process in self.ranks:
            process.kill()
            process.join()


def count_lines(folder: Path) -> int:
    """Count the lines of metrics.jsonl; 0 without that file."""
    try:  # a run that starts anew removes the file
        return (folder / METRICS).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def has_half_written_checkpoint(folder: Path) -> bool:
    """Return whether the run left a checkpoint's staging folder."""
    return any((folder / CHECKPOINTS).glob("step-*.tmp"))


def kill_once(folder: Path, steps: int, moment: str, rng: random.Random, start_seconds: float) -> bool:
    """Start the run and kill it. Return whether that left a half-written checkpoint.

    Args:
        folder: the RUN's folder.
        steps: --max_steps.
        moment: one of MOMENTS.
        rng: draws the moment and the order of kills.
        start_seconds: seconds that a start takes.
    """
    attempt = Attempt(folder, steps)
    if moment == "starting":
        time.sleep(rng.uniform(0, start_seconds))
    else:
        more = rng.randint(1, 3)
        attempt.wait_until(lambda: count_lines(folder) >= attempt.lines + more)
        if moment == "saving":
            attempt.wait_until(lambda: has_half_written_checkpoint(folder), pause_seconds=0.0005)
            time.sleep(rng.uniform(0, 0.01))
        else:
            time.sleep(rng.uniform(0, 0.1))
    attempt.kill(rng.choice([[0], [1], [0, 1]]), rng.uniform(0, 0.5))
    return has_half_written_checkpoint(folder)


def read_result(folder: Path) -> tuple[list[dict], bytes]:
    """Return what must repeat: (compared metrics of every step, bytes of the adapter's tensors)."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    adapter = folder / ADAPTER
    tensors = adapter.read_bytes()[read_header(adapter)[1] :]
    return [{name: line[name] for name in COMPARED_METRICS} for line in lines], tensors


def crash_test(folder: Path, kills: int, seed: int) -> str:
    """Run the test in `folder` and return a line about it.

    Raises AssertionError if the results differ, RuntimeError if a run fails or hangs.
    """
    steps, rng = 4 + 2 * kills, random.Random(seed)
    half_written: Counter[str] = Counter()
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    attempt, start = Attempt(undisturbed, steps), time.monotonic()
    attempt.wait_until(lambda: count_lines(undisturbed) > 0)
    start_seconds = time.monotonic() - start
    attempt.finish()
    for i in range(kills):
        moment = MOMENTS[i % len(MOMENTS)]
        half_written[moment] += kill_once(killed, steps, moment, rng, start_seconds)
    assert count_lines(killed) < steps, "the run ended before the last kill"
    Attempt(killed, steps).finish()
    (expected_metrics, expected_weights), (metrics, weights) = read_result(undisturbed), read_result(killed)
    assert len(expected_metrics) == steps and expected_metrics == metrics, "the losses differ"
    assert expected_weights == weights, "the weights differ"
    return (
        f"{kills} kills, {sum(half_written.values())} of which left half a checkpoint; losses of all {steps}"
        " steps and weights are those of the undisturbed run"
    )


def main() -> None:
    """Parse the options and run the test in a temporary folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(crash_test(Path(folder), options.kills, options.seed))


if __name__ == "__main__":
    main()
