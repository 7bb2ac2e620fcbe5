"""DoRA (Liu et al., arXiv 2402.09353, sections 4.1 and 4.3): W' = m * (W + s B A) / ||W + s B A||_row.

The norm is detached (section 4.3). m starts as ||W||_row of the weight that training computes with - the
dequantized one - so step 0 is the base model. A bias is added after the scaling; dropout acts on the low-rank
branch only. Equal to PEFT's DoRA on the same weights.

Shapes: O output features, I input features, R rank, T tokens.

The norm is `factored_norm` in quantization/operators.py, with ||W||^2 computed once, in fp32, at load. What
is trained is m - ||W||, not m: with bf16 adapters (--precision bf16) m itself would be rounded by up to 0.4%,
more than it moves in most runs, while the difference is rounded by 0.4% of the difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from models.lora import LoRALinear
from quantization.layer import Linear4bit
from quantization.operators import TINY, factored_norm, kept, project4bit
from quantization.quantizers import PackedWeight

_same_operators = False  # switched by `same_operators`


def _recomputing() -> bool:
    """Whether this forward is activation checkpointing's second one. Only backward can have started it, and
    then the weights are those of the first: the norm need not be taken again."""
    return torch._C._current_graph_task_id() != -1 and not _same_operators


@contextlib.contextmanager
def same_operators() -> Iterator[None]:
    """Within, a second forward runs the operators of the first: a selective policy of checkpointing finds what it
    kept by counting them."""
    global _same_operators
    _same_operators = True
    try:
        yield
    finally:
        _same_operators = False


class DoRALinear(LoRALinear):
    """A frozen linear layer, dense or 4-bit, with a trained low-rank update and row magnitudes.

    Arguments as for LoRALinear. The base's bias, if any, moves here, because it is not rescaled.
    """

    def __init__(
        self,
        base: nn.Linear | Linear4bit,
        features: tuple[int, int],
        rank: int,
        alpha: float,
        dropout: float,
        dtype,
    ):
        super().__init__(base, features, rank, alpha, dropout, dtype)
        self.bias = base.bias
        base.bias = None  # type: ignore[assignment]
        empty = torch.empty(features[0], device=self.lora_B.device)
        self.magnitude_change = nn.Parameter(empty.to(dtype))
        self.squared_norm = nn.Parameter(empty.clone(), requires_grad=False)  # ||W||^2 of each row, fp32
        self.last_norm: torch.Tensor | None = None
        self.fixed = False  # switched by `fixed_norms`

    @torch.no_grad()
    def updated_norm(self) -> torch.Tensor:
        """||W + s B A|| of each row: [O], fp32, detached."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.last_norm is not None and (self.fixed or _recomputing()):
            return self.last_norm
        update = self.lora_A, self.lora_B, self.scaling, self.squared_norm
        with torch.autocast(self.lora_A.device.type, enabled=False):  # fp32 means fp32 here
            norm = factored_norm(self.base_times(self.lora_A), *update)
        norm = kept(norm)  # by the checkpointing policy (parallel/activation_checkpointing.py)
        if not compiling:
            self.last_norm = norm
        return norm

    def base_times(self, a: torch.Tensor) -> torch.Tensor:
        """W a^T: [R, I] -> [O, R] in the compute dtype."""
        if isinstance(self.base, Linear4bit):
            packed = self.base.codes, self.base.scales, self.base.table
            return project4bit(*packed, self.base.quantizer_name, self.base.shape, a.to(self.base.dtype))
        return F.linear(self.base.weight, a.to(self.base.weight.dtype))

    def magnitude(self) -> torch.Tensor:
        """m: [O], fp32."""
        return self.squared_norm.sqrt() + self.magnitude_change.float()

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def released(self) -> nn.Module:
        self.base.bias = self.bias
        return self.base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return self.plain(x)
        g = self.magnitude() / self.updated_norm()
        y = self.adapted(x, self.lora_B * (self.scaling * g)[:, None], g)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # fp32 under autocast

    def norm_of(self, weight: torch.Tensor) -> torch.Tensor:
        """`squared_norm` of a base weight [O, I]: [O], fp32."""
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        # A row of zeros has no direction. With the floor its scale is 1 and its output 0, instead of 0 / 0.
        return norm.square().clamp_min(TINY)

    def packs(self, name: str) -> tuple[str, ...]:
        return ("bias",) if name == "bias" else (*super().packs(name), "squared_norm")

    def pack(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        if name == "bias":
            assert isinstance(tensor, torch.Tensor)
            return {"bias": tensor}
        packed = super().pack(name, tensor)
        if isinstance(self.base, Linear4bit):
            weight = self.base.unpack(packed["base.codes"], packed["base.scales"])
        else:
            weight = packed["base.weight"].to(self.base.weight.dtype)
        return packed | {"squared_norm": self.norm_of(weight)}

    def initial_values(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return super().initial_values(generator) | {
            "magnitude_change": torch.zeros(self.magnitude_change.shape)
        }

    def peft_tensors(self, gather: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        magnitude = gather(self.squared_norm).sqrt() + gather(self.magnitude_change).float()
        return super().peft_tensors(gather) | {"lora_magnitude_vector": magnitude}

    @torch.no_grad()
    def set_peft_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        magnitude = tensors.pop("lora_magnitude_vector")
        if magnitude.shape != self.squared_norm.shape:
            raise RuntimeError(f"magnitude of shape {list(magnitude.shape)}")
        self.magnitude_change.copy_(magnitude.to(self.squared_norm.device) - self.squared_norm.sqrt())
        super().set_peft_tensors(tensors)


@contextlib.contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """Within, where no weight changes, each layer takes its norm once: to generate a token would otherwise cost as
    much again as R tokens."""
    layers = [m for m in model.modules() if isinstance(m, DoRALinear)]
    try:
        for layer in layers:
            layer.fixed, layer.last_norm = True, None
        yield
    finally:
        for layer in layers:
            layer.fixed, layer.last_norm = False, None
