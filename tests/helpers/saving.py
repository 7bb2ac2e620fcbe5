"""A run of a small model that writes checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from checkpoints.manager import CheckpointManager
from checkpoints.storage import checkpoint_folder, read_checkpoint
from checkpoints.training_state import Tensors, collect_tensors
from launch.signals import NoStopRequests
from monitoring.deferred import DeferredCalls

TENSORS = {  # comments: bytes of each, rounded up to ALIGNMENT
    "half": torch.randn(7).bfloat16(),  # 64
    "codes": torch.arange(250, dtype=torch.uint8),  # 256
    "number": torch.tensor(3.0),  # 64
    "empty": torch.empty(0, 5),
    "matrix": torch.randn(30, 40).t(),  # 4800
    "count": torch.tensor([2**40]),  # 64
    "many": torch.randn(450),  # 1856
    "more": torch.randn(100),  # 448
}


class SaveRequest(NoStopRequests):
    """Requests a checkpoint after the step `at`, as a signal does; records the saves."""

    def __init__(self, at: int):
        self.at, self.done = at, 0
        self.expected, self.saves = 0.0, []

    def poll_all_ranks(self, last):
        self.done += 1
        return False, self.done == self.at

    def expect_save(self, seconds):
        self.expected = seconds

    def record_save(self, seconds, complete=True):
        self.saves.append((seconds, complete))


class SmallRun:
    """A run of a small model, with checkpoints every `every` steps and after the step `asked`."""

    def __init__(self, rank_info, folder: str, every: int, asked: int = 0):
        self.model, self.rank_info, self.done = nn.Linear(5, 3).to(rank_info.device), rank_info, 0
        self.optimizer, self.printed = torch.optim.AdamW(self.model.parameters()), []
        self.checkpoints = CheckpointManager(
            self.model,
            self.optimizer,
            {},
            rank_info,
            folder=Path(folder),
            save_every=every,
            save_at_end=every > 0,
            keep=-1,
            describe_run=dict,
            deferred=DeferredCalls(),
            stopping=SaveRequest(asked),
            print_line=self.printed.append,
            checkpoint=None,
        )

    def step(self, left_out: bool = False) -> None:
        """Train one step. left_out: skip the optimizer, as in a bad step."""
        self.done += 1
        self.model(torch.randn(2, 5, device=self.rank_info.device)).sum().backward()
        if not left_out:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.checkpoints.save_if_due(self.done, last=False)

    def buffers(self) -> Tensors:
        """Wait for the background thread and return the host copies."""
        self.checkpoints.pool.submit(int).result()  # runs after all earlier work
        return self.checkpoints.host_copy.buffers

    def local(self) -> Tensors:
        """Return the state of this rank."""
        return collect_tensors(self.checkpoints.trained, self.optimizer, self.rank_info.rank)[1]

    def check_saved(self) -> None:
        """Check that the last step's checkpoint holds the current state."""
        self.buffers()
        folder = read_checkpoint(checkpoint_folder(self.checkpoints.folder, self.done)).folder
        saved = load_file(folder / "rank-00000.safetensors")
        assert saved.keys() == self.local().keys()
        assert all(torch.equal(saved[name], tensor.cpu()) for name, tensor in self.local().items())
