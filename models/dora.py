"""DoRA (Liu et al., arXiv 2402.09353, sections 4.1 and 4.3): W' = m * (W + s B A) / ||W + s B A||_row.

The norm is detached (section 4.3). m starts as ||W||_row of the weight that training computes with (a packed
weight: the dequantized one), so step 0 is the base model. A bias is added after the scaling; dropout acts on
the low-rank branch only. Equal to PEFT's DoRA on the same weights.

The norm is `factored_norm` in quantization/dora_operators.py; its ||W||^2 is computed once, in fp32, at load.
The trained parameter is m - ||W||, not m: bf16 adapters (--precision bf16) would round m by up to 0.4%, more
than it moves in most runs. The difference is rounded by 0.4% of the difference only.

Shapes: O output features, I input features, R rank, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from models.lora import LoRALinear, RowMagnitudes
from quantization.dora_operators import factored_norm, mark_saved, project4bit
from quantization.layer import Linear4bit
from quantization.quantizers import PackedWeight

_reuses_norms = True  # switched by `without_norm_reuse`


def _may_reuse_norm() -> bool:
    """Return whether this runs in a recompute within backward, outside of `without_norm_reuse`.

    A forward within backward is a recompute. Its weights are the first forward's, so the norm is the same.
    """
    return torch._C._current_graph_task_id() != -1 and _reuses_norms


@contextlib.contextmanager
def without_norm_reuse() -> Iterator[None]:
    """Context in which a recomputed DoRA layer computes its norm anew instead of reusing the first forward's.

    A selective checkpointing policy needs the same operators as in the first forward: it finds saved results
    by counting them.
    """
    global _reuses_norms
    _reuses_norms = False
    try:
        yield
    finally:
        _reuses_norms = True


class DoRALinear(RowMagnitudes, LoRALinear):
    """A frozen linear layer, dense or 4-bit, with a trained low-rank update and row magnitudes.

    Args:
        base: as for LoRALinear; its bias, if any, moves here, because it is not rescaled.
        features, rank, scaling, dropout: as for LoRALinear.
        dtype: of A, B and the magnitudes for the optimizer.
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
        super().__init__(base, features, rank, scaling, dropout, dtype)
        self.bias = base.bias
        base.bias = None  # type: ignore[assignment]
        self.add_magnitudes(dtype)
        self.last_norm: torch.Tensor | None = None
        self.caches_norm = False  # switched by `cached_norms`

    @torch.no_grad()
    def updated_norm(self) -> torch.Tensor:
        """Return ||W + s B A|| of each row: [O], fp32, detached. Maybe the result of an earlier call."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.last_norm is not None and (self.caches_norm or _may_reuse_norm()):
            return self.last_norm
        update = self.lora_A, self.lora_B, self.scaling, self.squared_norm
        with torch.autocast(self.lora_A.device.type, enabled=False):  # fp32 must stay fp32 here
            norm = factored_norm(self.project_base(self.lora_A), *update)
        norm = mark_saved(
            norm
        )  # marks it for the checkpointing policy (parallel/activation_checkpointing.py)
        if not compiling:
            self.last_norm = norm
        return norm

    def project_base(self, a: torch.Tensor) -> torch.Tensor:
        """Return W a^T: [R, I] -> [O, R] in the compute dtype."""
        if isinstance(self.base, Linear4bit):
            packed = self.base.codes, self.base.scales, self.base.table
            return project4bit(*packed, self.base.quantizer_name, self.base.shape, a.to(self.base.dtype))
        return F.linear(self.base.weight, a.to(self.base.weight.dtype))

    def base_output(self, x: torch.Tensor) -> torch.Tensor:
        return self._add_bias(self.base(x))

    def unwrap_base(self) -> nn.Module:
        self.base.bias = self.bias
        return self.base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return m / norm * (W x + s B A dropout(x)) + bias; within `adapters_off`, W x + bias."""
        if not self.active:
            return self.base_output(x)
        g = self.magnitude() / self.updated_norm()
        return self._add_bias(self.adapted_output(x, self.lora_B * (self.scaling * g)[:, None], g))

    def _add_bias(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)  # the bias is fp32 under autocast

    def parameters_from(self, name: str) -> tuple[str, ...]:
        return ("bias",) if name == "bias" else (*super().parameters_from(name), "squared_norm")

    def convert_tensor(self, name: str, tensor: torch.Tensor | PackedWeight) -> dict[str, torch.Tensor]:
        """Return {parameter: contents} of the base's tensor `name`; for the weight also `squared_norm`."""
        if name == "bias":
            assert isinstance(tensor, torch.Tensor)
            return {"bias": tensor}
        converted = super().convert_tensor(name, tensor)
        if isinstance(self.base, Linear4bit):
            weight = self.base.dequantize(converted["base.codes"], converted["base.scales"])
        else:
            weight = converted["base.weight"].to(self.base.weight.dtype)
        return converted | {"squared_norm": self.compute_squared_norm(weight)}


@contextlib.contextmanager
def cached_norms(model: nn.Module) -> Iterator[None]:
    """Context in which each DoRA layer of the model computes its norm only once: no weight may change.

    Without it each generated token would cost the work of R tokens more.
    """
    layers = [m for m in model.modules() if isinstance(m, DoRALinear)]
    try:
        for layer in layers:
            layer.caches_norm, layer.last_norm = True, None
        yield
    finally:
        for layer in layers:
            layer.caches_norm, layer.last_norm = False, None
