"""Measure how long each quantizer takes to dequantize the 4-bit weight of one linear to bf16.

    python -m benchmarks.dequantize [O I]      # default: 14336 4096, an MLP's of the 8B shape

Prints the median by our Triton kernels, on GPUs that Triton supports, and by plain operations.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from unittest import mock

import torch

from launch.devices import triton_runs_on
from options.methods import HQQ_BITS
from quantization import hqq, nf4
from quantization.hqq import HQQ
from quantization.nf4 import NF4
from quantization.quantizers import Quantizer

REPEATS = 50


def measure_milliseconds(compute: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of a call. On a GPU, do_bench empties the cache between calls."""
    if triton_runs_on(device):
        from triton.testing import do_bench

        return do_bench(compute, return_mode="median")
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        compute()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def measure_quantizer(quantizer: Quantizer, shape: tuple[int, int], device: torch.device) -> list[float]:
    """Return [milliseconds by the Triton kernel, by plain operations], or only the latter on a CPU."""
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    packed = *quantizer.quantize(weight), quantizer.table(device)

    def dequantize() -> torch.Tensor:
        return quantizer.dequantize(*packed, shape, torch.bfloat16)

    kernel_time = [measure_milliseconds(dequantize, device)] if triton_runs_on(device) else []
    no_kernels = {"triton_runs_on": lambda _: False}
    with mock.patch.multiple(nf4, **no_kernels), mock.patch.multiple(hqq, **no_kernels):
        return [*kernel_time, measure_milliseconds(dequantize, device)]


def main(argv: list[str]) -> None:
    """Print one line for each quantizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (int(argv[0]), int(argv[1])) if argv else (14336, 4096)
    for quantizer in (NF4(), *map(HQQ, HQQ_BITS)):
        times = ", ".join(f"{t:.3f} ms" for t in measure_quantizer(quantizer, shape, device))
        print(f"{quantizer} {shape[0]} x {shape[1]}: {times}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
