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
    """Chooses the layers that save ATTENTION or MATMULS, so that their results fit into a given memory.

    A byte of a linear's result saves `in_features` FLOP of recomputation. A byte of the result of attention
    saves as many FLOP as a row has tokens. So with rows of at least `hidden_size` tokens layers first save
    ATTENTION, and then MATMULS with what is left. With shorter rows layers save MATMULS only.

    The last layers are chosen first: backward frees their activations first.

    Args:
        gib: memory of this rank, or -1 for what is free after the second step, less a tenth of the GPU.
        tokens: tokens of the largest micro-batch.
        row_length: tokens of a row, on average over all tokens (data/packing.py).
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
        row_length: float,
        itemsize: int,
    ):
        config = family.text_model(model).config
        experts = getattr(config, "num_experts_per_tok", 0)
        in_layers = family.decoder_layers(model).modules()  # a vision tower's blocks save other widths
        modules = [m for m in in_layers if isinstance(m, CheckpointedModule)]
        self.layers = [m for m in modules if m.saved is SavedActivations.INPUT]
        softmax_bytes = 4 * config.num_attention_heads  # the logarithm of the softmax's sum, in fp32
        # (layer, what it saves, bytes that this adds), the best use of memory first
        self.upgrades: list[tuple[CheckpointedModule, SavedActivations, int]] = []
        matmuls = []
        for layer in reversed(self.layers):
            n_bytes = tokens * (itemsize * _saved_elements(layer, family, experts) + softmax_bytes)
            if _attention_span(layer, family, row_length) >= config.hidden_size:
                elements = _attention_output(layer, family).in_features
                attention_bytes = tokens * (itemsize * elements + softmax_bytes)
                self.upgrades.append((layer, SavedActivations.ATTENTION, attention_bytes))
                n_bytes -= attention_bytes
            matmuls.append((layer, SavedActivations.MATMULS, n_bytes))
        self.upgrades += matmuls
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
        """Let layers save more, in the order of `upgrades`, as long as the budget lasts."""
        for layer, saved, n_bytes in self.upgrades:
            budget_bytes -= n_bytes
            if budget_bytes < 0:
                break
            layer.saved = saved


def _attention_span(layer: nn.Module, family: Family, row_length: float) -> float:
    """Return the length of rows without a window in which attention computes as much as in this layer.

    On average a token sees half of its row; with a sliding window it sees up to the whole window. Eager
    attention counts as 0: it is no operator whose result could be saved.
    """
    if family.attention == "eager":
        return 0
    window = getattr(layer.get_submodule(family.sublayers[0]), "sliding_window", None)
    return min(row_length, 2 * window) if window else row_length


def _attention_output(layer: nn.Module, family: Family) -> nn.Linear | Linear4bit:
    """Return the linear that reads the result of a layer's attention."""
    modules = layer.get_submodule(family.outputs[0]).modules()
    return next(m for m in modules if isinstance(m, (nn.Linear, Linear4bit)))


def _saved_elements(layer: nn.Module, family: Family, experts_per_token: int) -> int:
    """Return how many elements per token the results of a layer's linears and attention have."""
    linears = [m for m in layer.modules() if isinstance(m, (nn.Linear, Linear4bit))]
    stacks = [m for m in layer.modules() if isinstance(m, StackedModule)]
    of_experts = sum(m.parts * m.out_features for m in stacks)
    branches = [m for m in layer.modules() if isinstance(m, StackedLoRA)]  # two more grouped matmuls each
    of_experts += sum(m.lora_A.shape[1] + m.lora_B.shape[1] for m in branches)
    of_linears = sum(m.out_features for m in linears)
    return of_linears + experts_per_token * of_experts + _attention_output(layer, family).in_features
