"""DoRA (Liu et al., arXiv 2402.09353, sections 4.1 and 4.3): W' = m * (W + s B A) / ||W + s B A||_row.

The norm is detached (section 4.3). m starts as ||W||_row of the weight that training computes with - the
dequantized one - so step 0 is the base model. A bias is added after the scaling; dropout acts on the
low-rank branch only. Equal to PEFT's DoRA on the same weights.

Shapes: O output features, I input features, R rank, T tokens.

The norm is never taken of a materialised W + s B A, which would round it to the compute dtype:

    ||W + s B A||^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

with ||W||^2 computed once, in fp32, at load. What is trained is m - ||W||, not m: FSDP gathers trained
parameters in the compute dtype, and bf16 would round m itself by up to 0.4%, more than it moves in most
runs, while it rounds the difference by 0.4% of the difference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from models.lora import LoRALinear
from quantize_layers import Linear4bit, as_storage


class DoRALinear(LoRALinear):
    """A frozen linear layer, dense or 4-bit, with a trained low-rank update and row magnitudes.

    compute_dtype: of the frozen weights; ||W||^2 is kept as fp32 bytes in it, for FSDP (see
    quantize_layers). The base's bias, if any, moves here, because it is not rescaled.
    """

    def __init__(
        self,
        base: nn.Module,
        features: tuple[int, int],
        rank: int,
        alpha: float,
        dropout: float,
        dtype,
        compute_dtype,
    ):
        super().__init__(base, features, rank, alpha, dropout, dtype)
        self.bias, base.bias = base.bias, None
        self.compute_dtype = compute_dtype
        device, n = self.lora_B.device, features[0]
        self.magnitude_change = nn.Parameter(torch.empty(n, dtype=dtype, device=device))
        stored = torch.empty(n * 4 // compute_dtype.itemsize, dtype=compute_dtype, device=device)
        self.squared_norm = nn.Parameter(stored, requires_grad=False)

    def _squared_norm(self) -> torch.Tensor:
        """||W||^2 of each row: [O], fp32."""
        return self.squared_norm.view(torch.uint8).view(torch.float32)

    @torch.no_grad()
    def updated_norm(self) -> torch.Tensor:
        """||W + s B A|| of each row: [O], fp32. Detached, and built on the weights that forward uses."""
        a, b, s = self.lora_A.float(), self.lora_B.float(), self.scaling
        cross = F.linear(self.base.weight, self.lora_A).float()  # W A^T: [O, R]
        change = 2 * s * (cross * b).sum(1) + s * s * (b @ (a @ a.T) * b).sum(1)
        # A row that is zero has no direction; the floor keeps its output 0 instead of NaN.
        return (self._squared_norm() + change).clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def magnitude(self) -> torch.Tensor:
        """m: [O], fp32."""
        return self._squared_norm().sqrt() + self.magnitude_change.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        # y * (m / norm), written as y + y * (m / norm - 1): the factor is near 1, where bf16 is coarse.
        y = torch.addcmul(y, y, (self.magnitude() / self.updated_norm() - 1).to(y.dtype))
        return y if self.bias is None else y + self.bias

    def packs(self, name: str) -> tuple[str, ...]:
        return ("bias",) if name == "bias" else (*super().packs(name), "squared_norm")

    def pack(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name == "bias":
            return {"bias": tensor}
        packed = super().pack(name, tensor)
        if isinstance(self.base, Linear4bit):
            weight = self.base.unpack(packed["base.codes"], packed["base.scales"])
        else:
            weight = packed["base.weight"].to(self.compute_dtype)
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return packed | {"squared_norm": as_storage(norm.square(), self.compute_dtype)}

    def initial_values(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return super().initial_values(generator) | {
            "magnitude_change": torch.zeros(self.magnitude_change.shape)
        }

    def peft_tensors(self, gather: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        norm = gather(self.squared_norm).contiguous().view(torch.uint8).view(torch.float32).sqrt()
        magnitude = norm + gather(self.magnitude_change).float()
        return super().peft_tensors(gather) | {"lora_magnitude_vector": magnitude}
