"""A recorder of the operations for which the host waits for a GPU."""

from __future__ import annotations

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ops = torch.ops.aten


class SyncRecorder(TorchDispatchMode):
    """Record where the host reads a tensor's contents: on a GPU it would wait."""

    def __init__(self):
        super().__init__()
        self.syncs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (ops._local_scalar_dense.default, ops.nonzero.default, ops.equal.default):
            frames = traceback.extract_stack()[-8:]
            self.syncs.append([f"{f.filename}:{f.lineno} {f.name}" for f in frames])
        return func(*args, **(kwargs or {}))
