"""LoRA and DoRA on routed experts: a low-rank branch for each expert of a stack (quantization/stacked.py).

    y = W_e x + s B_e A_e x    e: the row's expert; s = `Config.expert_scaling`

Gate and up of an expert have one A, as in PEFT, which adapts transformers' fused parameter gate_up_proj. PEFT
has no DoRA and no dropout for parameters that are no linear's (target_parameters). DoRA is that of
models/dora.py, of each expert:

    W_e' = m_e * (W_e + s B_e A_e) / ||W_e + s B_e A_e||_row

Shapes: N rows, sorted by expert; E experts, O output features of a stack, I input features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from models.lora import LowRankModule, RowMagnitudes
from quantization.dora_operators import factored_norm, mark_saved
from quantization.grouped_adapters import scale_rows
from quantization.grouped_operators import ALIGNMENT, experts_of_rows, grouped_linear
from quantization.layer import Part
from quantization.operator_registry import compute_dtype
from quantization.quantizers import PackedWeight, Quantizer
from quantization.stacked import StackedLinear, StackedLinear4bit, StackedModule

Stack = StackedLinear | StackedLinear4bit
PEFT_PATHS = {"down": "", "gate_up": ".base_layer"}  # PEFT wraps a module once for each of its parameters


class StackedLoRA(LowRankModule):
    """A frozen stack with a trained low-rank branch for each expert: [N, I] -> [N, O].

    Args:
        base: the stack; its parameters keep their names.
        rank: R.
        scaling: s.
        dtype: of A and B for the optimizer; forward rounds them to x's dtype.
        alternates: whether transformers' parameter has gate and up in alternate rows (GPT-OSS), not one after
            the other.
    """

    def __init__(self, base: Stack, rank: int, scaling: float, dtype: torch.dtype, alternates: bool = False):
        features = (base.parts * base.out_features, base.in_features)
        device = next(base.parameters()).device
        super().__init__(features, rank, scaling, dtype, device, stack=(base.experts,))
        self.base, self.alternates = base, alternates

    def unwrap_base(self) -> nn.Module:
        return self.base

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return W x + s B A x + bias of each row's expert: [N, O]; within `adapters_off`, W x + bias.

        Args:
            x: [N, I].
            offsets: [E] int32, the end of each expert's rows.
        """
        y = self.base(x, offsets)
        return y + self.branch(x, offsets, self.lora_B * self.scaling) if self.active else y

    def branch(self, x: torch.Tensor, offsets: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return b A x of each row's expert: [N, O]. b [E, O, R]: B, scaled."""
        x = x.to(compute_dtype(x))
        a, b = self.lora_A.to(x.dtype), b.to(x.dtype)
        if x.is_cuda and (missing := -a.shape[1] % ALIGNMENT):  # the grouped matmul needs whole 16 bytes
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        return grouped_linear(grouped_linear(x, offsets, a, None), offsets, b, None)

    def peft_path(self, path: str) -> str:
        experts, _, stack = path.rpartition(".")
        return f"{experts}{PEFT_PATHS[stack]}"

    def peft_tensors(self, gather: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return {lora_A.weight [E R, I], lora_B.weight [O, R E]} as PEFT stores them. Collective."""
        a, b = gather(self.lora_A), gather(self.lora_B)
        if self.alternates:
            b = b.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return {"lora_A.weight": a.flatten(0, 1), "lora_B.weight": b.permute(1, 2, 0).flatten(1)}

    @torch.no_grad()
    def set_peft_tensors(
        self, tensors: dict[str, torch.Tensor], fill: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        a, b = split_peft_tensors(tensors, self.base.experts, self.alternates)
        fill(self.lora_A, a)
        fill(self.lora_B, b)
        if tensors:
            raise KeyError(next(iter(tensors)))

    def parameters_from(self, name: str) -> tuple[str, ...]:
        return tuple(f"base.{key}" for key in self.base.parameters_from(name))

    def part_of(self, name: str, parameter: str) -> Part | None:
        return self.base.part_of(name, parameter.removeprefix("base."))

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self.base.stored_shape(name)

    def quantizer_for(self, name: str) -> Quantizer | None:
        return self.base.quantizer_for(name)

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        return {f"base.{key}": value for key, value in self.base.convert_tensor(name, tensor).items()}


def split_peft_tensors(
    tensors: dict[str, torch.Tensor], experts: int, alternates: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take A [E, R, I] and B [E, O, R] out of the tensors that PEFT stores for a stack of experts.

    alternates: as for StackedLoRA.
    """
    a, b = tensors.pop("lora_A.weight"), tensors.pop("lora_B.weight")
    b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    if alternates:
        b = b.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return a.unflatten(0, (experts, -1)), b.contiguous()


class StackedDoRA(RowMagnitudes, StackedLoRA):
    """StackedLoRA with trained magnitudes of each expert's rows. Arguments as there.

    PEFT does not know the tensor of the magnitudes, lora_magnitude_vector [E, O].
    """

    def __init__(self, base: Stack, rank: int, scaling: float, dtype: torch.dtype, alternates: bool = False):
        super().__init__(base, rank, scaling, dtype, alternates)
        self.add_magnitudes(dtype)

    @torch.no_grad()
    def updated_norm(self) -> torch.Tensor:
        """Return ||W + s B A|| of each row: [E, O], fp32, detached."""
        update = self.lora_A, self.lora_B, self.scaling, self.squared_norm
        with torch.autocast(self.lora_A.device.type, enabled=False):  # fp32 must stay fp32 here
            return mark_saved(factored_norm(self.base.project(self.lora_A), *update))

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return m / norm * (W x + s B A x) + bias of each row's expert, as StackedLoRA.forward does."""
        if not self.active:
            return self.base(x, offsets)
        y = self.base(x, offsets, has_bias=False)
        g = self.magnitude() / self.updated_norm()
        b = self.lora_B * (self.scaling * g)[..., None]
        y = scale_rows(y, g, offsets) + self.branch(x, offsets, b)
        bias = self.base.cast_bias(y.dtype)
        return y if bias is None else y + bias[experts_of_rows(offsets, len(y))]

    def parameters_from(self, name: str) -> tuple[str, ...]:
        norms = ("squared_norm",) if name.endswith(".weight") else ()
        return (*super().parameters_from(name), *norms)

    def part_of(self, name: str, parameter: str) -> Part | None:
        if parameter != "squared_norm":
            return super().part_of(name, parameter)
        rows = self.base.out_features
        return Part(int(name.partition(".")[0]) * rows, rows)

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        """Return {parameter: contents} of a member's tensor; of a weight also its rows' squared norms."""
        if not name.endswith(".weight"):
            return super().convert_tensor(name, tensor)
        converted = self.base.convert_tensor(name, tensor)
        norm = self.compute_squared_norm(self.base.member_weight(converted))
        return {f"base.{key}": value for key, value in converted.items()} | {"squared_norm": norm}


def find_stacked_vectors(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that hold a vector for each expert: biases and magnitudes, [E, O]."""
    modules = list(model.modules())
    biases = [m.bias for m in modules if isinstance(m, StackedModule) and m.bias is not None]
    return biases + [m.magnitude_change for m in modules if isinstance(m, StackedDoRA)]


EXPERT_ADAPTERS: dict[str, type[StackedLoRA]] = {"lora": StackedLoRA, "dora": StackedDoRA}
