"""LoRA (Hu et al., arXiv 2106.09685, section 4.1): y = W x + s B A dropout(x), s = `Config.lora_scaling`.

A [R, I] starts Kaiming-uniform with a = sqrt(5), as in PEFT, which is uniform within 1 / sqrt(I). B [O, R]
starts at zero, so step 0 is the base model.

Shapes: O output features, I input features, R rank, T tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from models.vocabulary import has_two_weights, swap_parameters
from quantization.dora_operators import TINY
from quantization.layer import ConvertingModule, Linear4bit, convert_tensor, parameters_from, quantizer_for
from quantization.quantizers import PackedWeight, Quantizer


class LowRankModule(ConvertingModule):
    """A module with trained A [R, I] and B [O, R], as PEFT stores them: `LoRALinear`, or one of a family.

    Args:
        features: (O, I).
        rank: R.
        scaling: s.
        dtype: of A and B for the optimizer.
        device: of A and B.
        stack: leading dimensions of A and B; () = one matrix.
    """

    def __init__(
        self,
        features: tuple[int, int],
        rank: int,
        scaling: float,
        dtype: torch.dtype,
        device: torch.device,
        stack: tuple[int, ...] = (),
    ):
        super().__init__()
        out_features, in_features = features
        self.scaling = scaling
        self.active = True  # switched by `adapters_off`
        self.lora_A = nn.Parameter(torch.empty(*stack, rank, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(*stack, out_features, rank, dtype=dtype, device=device))

    def unwrap_base(self) -> nn.Module:
        """Return the module as it was before it got this adapter."""
        raise NotImplementedError

    def initial_values(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return {lora_A: Kaiming-uniform values, lora_B: zeros}, both on the CPU."""
        bound = 1 / math.sqrt(self.lora_A.shape[-1])
        a = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        return {"lora_A": a, "lora_B": torch.zeros(self.lora_B.shape)}

    def peft_path(self, path: str) -> str:
        """Return the path of PEFT's module for this one, whose path is `path`."""
        return path

    def peft_tensors(self, gather: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return {PEFT's name below the module: full tensor}. Collective: every rank must call it.

        gather: makes a full tensor of a sharded parameter.
        """
        return {"lora_A.weight": gather(self.lora_A), "lora_B.weight": gather(self.lora_B)}

    @torch.no_grad()
    def set_peft_tensors(
        self, tensors: dict[str, torch.Tensor], fill: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Copy the full tensors of `peft_tensors` into this module, sharded or not, and empty the dict.

        fill(parameter, full tensor): copies this rank's shard, and raises AssertionError for another shape.
        Raises KeyError for a name that is missing or not known.
        """
        fill(self.lora_A, tensors.pop("lora_A.weight"))
        fill(self.lora_B, tensors.pop("lora_B.weight"))
        if tensors:
            raise KeyError(next(iter(tensors)))


class RowMagnitudes(LowRankModule):
    """What all DoRA modules do with the magnitudes of their rows; the first base, before a module of LoRA.

    Attributes:
        magnitude_change: m - ||W||, trained: [..., O].
        squared_norm: ||W||^2 of each row: [..., O] fp32.
    """

    magnitude_change: nn.Parameter
    squared_norm: nn.Parameter

    def add_magnitudes(self, dtype: torch.dtype) -> None:
        """Add the two parameters, without contents. dtype: of magnitude_change, for the optimizer."""
        empty = torch.empty(self.lora_B.shape[:-1], device=self.lora_B.device)
        self.magnitude_change = nn.Parameter(empty.to(dtype))
        self.squared_norm = nn.Parameter(empty.clone(), requires_grad=False)

    def magnitude(self) -> torch.Tensor:
        """Return DoRA's magnitude of each row, m = ||W|| + magnitude_change: [..., O], fp32."""
        return self.squared_norm.sqrt() + self.magnitude_change.float()

    def compute_squared_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ||row||^2, at least TINY, of each row of weights [..., O, I]: [..., O], fp32."""
        norm = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32)
        # A row of zeros has no direction. With the floor its scale is 1 and its output 0, instead of 0 / 0.
        return norm.square().clamp_min(TINY)

    def initial_values(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        zeros = torch.zeros(self.magnitude_change.shape)
        return super().initial_values(generator) | {"magnitude_change": zeros}

    def peft_tensors(self, gather: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        magnitude = gather(self.squared_norm).sqrt() + gather(self.magnitude_change).float()
        return super().peft_tensors(gather) | {"lora_magnitude_vector": magnitude}

    @torch.no_grad()
    def set_peft_tensors(
        self, tensors: dict[str, torch.Tensor], fill: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Load A, B and the magnitudes from PEFT's tensors, as LowRankModule does; also empties `tensors`."""
        magnitude = torch.empty_like(self.squared_norm)  # fp32, and sharded as magnitude_change is
        fill(magnitude, tensors.pop("lora_magnitude_vector"))
        self.magnitude_change.copy_(magnitude - self.squared_norm.sqrt())
        super().set_peft_tensors(tensors, fill)


class LoRALinear(LowRankModule):
    """A frozen linear layer, dense or 4-bit, with a trained low-rank branch: [T, I] -> [T, O].

    Its parameters are made on base's device.

    Args:
        base: the frozen layer; its parameters keep their checkpoint names.
        features: (O, I).
        rank: R.
        scaling: s.
        dropout: probability, on the low-rank branch.
        dtype: of A and B for the optimizer; forward rounds them to x's dtype.
    """

    def __init__(
        self,
        base: nn.Linear | Linear4bit,
        features: tuple[int, int],
        rank: int,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
    ):
        super().__init__(features, rank, scaling, dtype, next(base.parameters()).device)
        self.base, self.dropout = base, dropout
        self.saves_output = False  # for backward instead of a recompute; set by wrapping.py

    def base_output(self, x: torch.Tensor) -> torch.Tensor:
        """Return the result without the adapter: W x + bias."""
        return self.base(x)

    def unwrap_base(self) -> nn.Module:
        return self.base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W x + bias + s B A dropout(x); within `adapters_off`, W x + bias."""
        if not self.active:
            return self.base_output(x)
        return self.adapted_output(x, self.lora_B * self.scaling)

    def adapted_output(
        self, x: torch.Tensor, b: torch.Tensor, row_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return g * (W x) + b A dropout(x), plus the base's bias, if any: [T, I] -> [T, O].

        b [O, R]: B, scaled. row_scale: g [O] fp32, or None for ones.
        """
        dropout = self.dropout if self.training else 0.0
        if isinstance(self.base, Linear4bit) and (row_scale is None or self.base.supports_row_scale):
            return self.base(x, row_scale, self.lora_A, b, dropout, self.saves_output)
        y = self.base(x, save_output=self.saves_output) if isinstance(self.base, Linear4bit) else self.base(x)
        if row_scale is not None:  # y * g, written as y + y * (g - 1): g is near 1, where bf16 is coarse
            y = torch.addcmul(y, y, (row_scale - 1).to(y.dtype))
        h = F.linear(F.dropout(x, dropout), self.lora_A.to(x.dtype))
        return y + F.linear(h, b.to(x.dtype))

    def parameters_from(self, name: str) -> tuple[str, ...]:
        return tuple(f"base.{key}" for key in parameters_from(self.base, name))

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        return {f"base.{key}": value for key, value in convert_tensor(self.base, name, tensor).items()}

    def quantizer_for(self, name: str) -> Quantizer | None:
        return quantizer_for(self.base, name)


def lora_b_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return B of each module of the model with LoRA or DoRA."""
    return [module.lora_B for module in model.modules() if isinstance(module, LowRankModule)]


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Context in which all modules of the model with LoRA or DoRA compute only what their base does.

    An embedding and a head that were trained beside them have the base's weights.
    """
    layers = [m for m in model.modules() if isinstance(m, LowRankModule)]
    vocabulary = [m for m in model.modules() if has_two_weights(m)]
    try:
        for layer in layers:
            layer.active = False
        for module in vocabulary:
            swap_parameters(module)
        yield
    finally:
        for layer in layers:
            layer.active = True
        for module in vocabulary:
            swap_parameters(module)
