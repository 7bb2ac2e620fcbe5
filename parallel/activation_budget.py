"""Chooses the layers that save more than their input, within a given memory (--activation_budget)."""

from __future__ import annotations

import torch
from torch import nn

from models.expert_adapters import StackedLoRA
from models.family import Family
from parallel.activation_checkpointing import CheckpointedModule, SavedActivations
from quantization.layer import Linear4bit
from quantization.stacked import StackedModule


class ActivationBudget:
    """Chooses the layers that save MATMULS, so that their results fit into a given amount of memory.

    The last layers are chosen first: backward frees their activations first.

    Args:
        gib: memory of this rank, or -1 for what is free after the second step, less a tenth of the GPU.
        tokens: tokens of the largest micro-batch.
        itemsize: bytes of an element of a matmul's result.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        device: torch.device,
        *,
        gib: float,
        tokens: int,
        itemsize: int,
    ):
        experts = getattr(family.text_model(model).config, "num_experts_per_tok", 0)
        in_layers = family.decoder_layers(model).modules()  # a vision tower's blocks save other widths
        modules = [m for m in in_layers if isinstance(m, CheckpointedModule)]
        self.layers = [m for m in modules if m.saved is SavedActivations.INPUT]
        self.layer_bytes = [tokens * itemsize * _saved_elements(m, family, experts) for m in self.layers]
        self.device, self.automatic, self.steps = device, gib == -1, 0
        if gib > 0:
            self._assign(int(gib * 2**30))

    def needs_metrics(self) -> bool:
        """Return whether the next `after_step` sets the budget, and so needs the step's true peak_gib."""
        return self.automatic and self.steps == 1

    def after_step(self, peak_gib: float) -> None:
        """Count a step, and set an automatic budget after the second one. Call it after every step.

        The second step is the first with the optimizer's states in memory. peak_gib: most memory that was
        allocated in the step.
        """
        if self.needs_metrics() and self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            available = free + torch.cuda.memory_reserved(self.device)
            self._assign(int(available - peak_gib * 2**30 - total / 10))
        self.steps += 1

    def _assign(self, budget_bytes: int) -> None:
        """Let the last layers save MATMULS, as many of them as fit into the budget."""
        for layer, n_bytes in zip(reversed(self.layers), reversed(self.layer_bytes), strict=True):
            budget_bytes -= n_bytes
            if budget_bytes < 0:
                break
            layer.saved = SavedActivations.MATMULS


def _saved_elements(layer: nn.Module, family: Family, experts_per_token: int) -> int:
    """Return how many elements per token the results of a layer's linears and attention have."""
    linears = [m for m in layer.modules() if isinstance(m, (nn.Linear, Linear4bit))]
    attention = next(m for m in layer.get_submodule(family.outputs[0]).modules() if m in linears)
    stacks = [m for m in layer.modules() if isinstance(m, StackedModule)]
    of_experts = sum(m.parts * m.out_features for m in stacks)
    branches = [m for m in layer.modules() if isinstance(m, StackedLoRA)]  # two more grouped matmuls each
    of_experts += sum(m.lora_A.shape[1] + m.lora_B.shape[1] for m in branches)
    of_linears = sum(m.out_features for m in linears)
    return of_linears + experts_per_token * of_experts + attention.in_features
