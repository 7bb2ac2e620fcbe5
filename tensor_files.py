"""safetensors files, read tensor by tensor and written with the permissions that other files get."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# The process's mask can only be read by setting it, which threads must not do at once: so once, at import.
UMASK = os.umask(0)
os.umask(UMASK)


def read_tensors(path: Path, names: Iterable[str]) -> list[torch.Tensor]:
    """Those tensors of a file, on the CPU, mapped rather than copied where the platform can. Raises OSError or
    SafetensorError."""
    with safe_open(path, framework="pt") as f:
        return [f.get_tensor(name) for name in names]


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a file. safetensors makes it readable by its owner only; others who may read the folder may read
    this file too."""
    save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
    path.chmod(0o666 & ~UMASK)
