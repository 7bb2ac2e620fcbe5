"""Meaning of --precision: the dtype of each kind of tensor, autocast, and the loss scaling that fp16 needs.

auto                    bf16, with fp32 trained weights, where the GPU has bf16; fp16_autocast on older GPUs;
                        fp32 on a CPU
fp32                    everything in fp32
bf16                    everything in bf16, including the trained weights and the optimizer's states
fp16_autocast           weights in fp32; autocast runs matmuls and attention in fp16; the loss is scaled
bf16_autocast           weights in fp32; autocast runs matmuls and attention in bf16
bf16_buffers_autocast   weights in bf16, under autocast to bf16; operations that autocast does not cover run
                        in the weights' dtype, bf16 as well, so the losses are those of bf16

Packed weights are dequantized into the dtype of the matmul. Buffers (rotary tables) and gradient reduction
are fp32 always.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        frozen: of weights that are not trained.
        trained: of weights that the optimizer updates.
        autocast: of matmuls under torch.autocast; None without autocast.
    """

    frozen: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        cast = f" under autocast to {self.autocast}" if self.autocast else ""
        trained = f", trained weights in {self.trained}" if self.trained != self.frozen else ""
        return f"{self.frozen}{cast}{trained}".replace("torch.", "")

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype that linears compute in."""
        return self.autocast or self.frozen

    @property
    def gather_dtype(self) -> torch.dtype | None:
        """The dtype that FSDP casts a unit to before gathering it, if all its parameters are trained.

        None: no cast, because computation uses the parameters' own dtype, or because autocast casts them.
        """
        return None if self.autocast or self.frozen == self.trained else self.frozen

    def context(self, device_type: str) -> torch.autocast:
        """Return the autocast context for a forward pass; it does nothing in the modes without autocast.

        The cache of cast weights is off: it would hold the weights of all layers until the context ends, also
        of layers that FSDP has freed.
        """
        enabled = self.autocast is not None
        return torch.autocast(device_type, dtype=self.autocast, enabled=enabled, cache_enabled=False)

    def scaler(self, device_type: str) -> torch.amp.GradScaler:
        """Return the loss scaler for fp16, disabled in other modes. device_type: where the gradients are.

        fp16 gradients underflow below 6e-8. The loss is scaled up before backward, the gradients are scaled
        down before clipping, and a step whose gradients overflowed on any rank is skipped on all.
        """
        scaler = torch.amp.GradScaler(device_type, enabled=self.autocast == torch.float16)
        # GradScaler creates its scale where it is first used. With --use_cpu_offload that must be the CPU:
        # GradScaler copies it from a GPU without waiting, so the CPU would read it before it arrives.
        scaler.scale(torch.zeros((), device=device_type))
        return scaler


def choose_precision(mode: str, has_gpu: bool, has_bf16_gpu: bool) -> Precision:
    """Return the dtypes of `--precision mode`; only those of auto depend on the GPU."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    if mode == "auto" and has_bf16_gpu:
        return Precision(bf16, fp32)
    if mode == "auto":
        mode = "fp16_autocast" if has_gpu else "fp32"
    return {
        "fp32": Precision(fp32, fp32),
        "bf16": Precision(bf16, bf16),
        "fp16_autocast": Precision(fp32, fp32, autocast=fp16),
        "bf16_autocast": Precision(fp32, fp32, autocast=bf16),
        "bf16_buffers_autocast": Precision(bf16, bf16, autocast=bf16),
    }[mode]


def has_bf16_gpu() -> bool:
    """Whether this process computes on GPUs that support bf16 in hardware."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def detect_precision(mode: str) -> Precision:
    """Return the dtypes of `--precision mode`; those of auto depend on this machine's GPU."""
    return choose_precision(mode, torch.cuda.is_available(), has_bf16_gpu())


def enable_determinism() -> None:
    """Make torch use deterministic operations from here on, for --deterministic.

    An operation that has no deterministic implementation raises RuntimeError.
    """
    # cuBLAS reads this for its first workspace: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling takes time, and the load checks by itself that it fills every weight. mypy takes the name for a
    # module, which torch replaces by an object.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
