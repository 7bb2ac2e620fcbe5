"""What --precision means: the dtype of each kind of tensor, autocast, and the scaling that fp16 needs.

auto                    bf16, with fp32 trained weights, where the GPU has bf16; fp16_autocast on older GPUs;
                        fp32 on a CPU
fp32                    everything in fp32
bf16                    everything in bf16, the trained weights and the optimizer's states as well
fp16_autocast           weights in fp32; autocast runs matmuls and attention in fp16; the loss is scaled
bf16_autocast           weights in fp32; autocast runs matmuls and attention in bf16
bf16_buffers_autocast   bf16 under autocast, which leaves what it does not know in the weights' dtype: the losses
                        are those of bf16

Packed weights are dequantized into the dtype of the matmul. Buffers (rotary tables) and gradient reduction
are fp32 always.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """frozen: of weights that are not trained; trained: of what the optimizer updates; autocast: the dtype
    that torch.autocast runs matmuls in, or None without it."""

    frozen: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        cast = f" under autocast to {self.autocast}" if self.autocast else ""
        trained = f", trained weights in {self.trained}" if self.trained != self.frozen else ""
        return f"{self.frozen}{cast}{trained}".replace("torch.", "")

    @property
    def matmul(self) -> torch.dtype:
        """In which the linears compute."""
        return self.autocast or self.frozen

    @property
    def gathered(self) -> torch.dtype | None:
        """In which FSDP gathers a unit whose parameters are all trained; None: as they are, because they are
        computed with as they are, or because autocast casts them."""
        return None if self.autocast or self.frozen == self.trained else self.frozen

    def context(self, device_type: str) -> torch.autocast:
        """Around every forward. Without the cache of cast weights: it would keep them all until the end of
        the context, of every layer that FSDP has long freed."""
        enabled = self.autocast is not None
        return torch.autocast(device_type, dtype=self.autocast, enabled=enabled, cache_enabled=False)

    def scaler(self, home: str) -> torch.amp.GradScaler:
        """fp16 gradients underflow below 6e-8: the loss is scaled up before backward, the gradients down
        before clipping, and a step whose gradients overflowed on any rank is skipped on all. Inactive
        otherwise. home: the type of device that holds the gradients.
        """
        scaler = torch.amp.GradScaler(home, enabled=self.autocast == torch.float16)
        # The scale lies where it is first used. With --use_cpu_offload that must be the CPU: GradScaler copies it
        # from the GPU without waiting, and the CPU would read what is not there yet.
        scaler.scale(torch.zeros((), device=home))
        return scaler


def choose_precision(name: str, gpu: bool, bf16_gpu: bool) -> Precision:
    """The meaning of --precision on this hardware."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    if name == "auto" and bf16_gpu:
        return Precision(bf16, fp32)
    if name == "auto":
        name = "fp16_autocast" if gpu else "fp32"
    return {
        "fp32": Precision(fp32, fp32),
        "bf16": Precision(bf16, bf16),
        "fp16_autocast": Precision(fp32, fp32, autocast=fp16),
        "bf16_autocast": Precision(fp32, fp32, autocast=bf16),
        "bf16_buffers_autocast": Precision(bf16, bf16, autocast=bf16),
    }[name]


def bf16_gpu() -> bool:
    """Whether this process computes on GPUs that have bf16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_here(name: str) -> Precision:
    """`choose_precision` for the hardware at hand."""
    return choose_precision(name, torch.cuda.is_available(), bf16_gpu())


def use_deterministic() -> None:
    """Of --deterministic: from here on, operations without a deterministic implementation raise RuntimeError, and of
    those with a choice the deterministic one is taken."""
    # Read when cuBLAS makes its first workspace: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # The load checks that it fills all; this is speed. torch puts an object in the place of this module.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
