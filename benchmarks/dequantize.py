"""How long the 4-bit weights of one linear take to become 16-bit ones, by each quantizer.

    python -m benchmarks.dequantize [O I]      # 14336 4096, an MLP's of the 8B shape, without

On a GPU that Triton supports by our kernels and by plain operations, elsewhere by those only. bf16, one weight, median.
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

TIMES = 50


def milliseconds(compute: Callable[[], object], device: torch.device) -> float:
    """The median, on a GPU by Triton's do_bench, which empties the cache between."""
    if triton_runs_on(device):
        from triton.testing import do_bench

        return do_bench(compute, return_mode="median")
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        compute()
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken)


def times(quantizer: Quantizer, shape: tuple[int, int], device: torch.device) -> list[float]:
    """Milliseconds: by the kernel, where there is one, and by plain operations."""
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    packed = *quantizer.quantize(weight), quantizer.table(device)

    def expand() -> torch.Tensor:
        return quantizer.dequantize(*packed, shape, torch.bfloat16)

    ours = [milliseconds(expand, device)] if triton_runs_on(device) else []
    by_plain = {"triton_runs_on": lambda _: False}
    with mock.patch.multiple(nf4, **by_plain), mock.patch.multiple(hqq, **by_plain):
        return [*ours, milliseconds(expand, device)]


def main(argv: list[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (int(argv[0]), int(argv[1])) if argv else (14336, 4096)
    for quantizer in (NF4(), *map(HQQ, HQQ_BITS)):
        taken = ", ".join(f"{t:.3f} ms" for t in times(quantizer, shape, device))
        print(f"{quantizer} {shape[0]} x {shape[1]}: {taken}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
