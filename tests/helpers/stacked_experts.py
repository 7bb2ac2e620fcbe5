"""Routed experts as a list and as stacks with the same weights, and the tokens that they get."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.models.mistral.modeling_mistral import MistralMLP

from models.expert_adapters import EXPERT_ADAPTERS
from models.experts import StackedExperts, stack_experts
from models.gpt_oss import GptOssExpert
from models.moe import Experts
from parallel.shards import fill_part
from quantization.layer import convert_tensor, locate_tensor, part_of, quantize_linears
from quantization.quantizers import Quantizer
from tests.helpers import tiny

E, H, K = 6, 64, 2  # experts, hidden features, experts of a token
SCALING = 0.7  # of adapters


def make_list(mlp: int = 48, biased: bool = False, experts: int = E) -> Experts:
    """Return a list of experts with random weights; biased: those of GPT-OSS."""
    torch.manual_seed(0)
    if biased:
        return Experts(lambda: GptOssExpert(H, mlp, 1.702, 7.0), experts, K)
    config = tiny.CONFIGS["mixtral"]()
    config.intermediate_size = mlp
    return Experts(lambda: MistralMLP(config), experts, K)


def stack_like(experts: Experts, quantizer: Quantizer | None = None, dtype=None, device="cpu"):
    """Return (the list of experts, packed if there is a quantizer, stacks with the same contents)."""
    holder, original = nn.Module(), nn.Module()
    holder.experts, original.experts = copy.deepcopy(experts), copy.deepcopy(experts)
    dtype = dtype or next(experts.parameters()).dtype
    linears = [name for name, module in original.named_modules() if isinstance(module, nn.Linear)]
    quantizers = dict.fromkeys(linears, quantizer) if quantizer else {}
    assert not stack_experts(holder, quantizers, dtype)
    quantize_linears(original, quantizers, dtype)
    for model in (holder, original):
        model.to(device)
        for module in model.modules():
            if hasattr(module, "fill_buffers"):
                module.fill_buffers(torch.device(device))
        params = dict(model.named_parameters())
        for name, tensor in experts.named_parameters(prefix="experts"):
            path, module, attribute = locate_tensor(model, name)
            for key, content in convert_tensor(module, attribute, tensor.detach().to(device)).items():
                fill_part(params[f"{path}.{key}"], part_of(module, attribute, key), content)
    assert isinstance(holder.experts, StackedExperts)
    return original.experts, holder.experts


# Names of `make_routing`'s cases.
ROUTINGS = ("random", "idle", "one_expert", "one_token")


def make_routing(case: str, experts: int = E, tokens: int = 40) -> tuple[torch.Tensor, ...]:
    """Return (x [T, H], index [T, K], weights [T, K]).

    Cases: random; idle: one expert gets no token; one_expert: each token's two experts are the same two;
    one_token: a single token.
    """
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1 if case == "one_token" else tokens, experts, generator=generator)
    if case == "idle":
        scores[:, experts - 1] = 0
    if case == "one_expert":
        scores[:, 2:4] += 1
    weights, index = scores.topk(K)
    return torch.randn(len(scores), H, generator=generator), index, weights


def run_experts(module: nn.Module, x, index, weights) -> list[torch.Tensor]:
    """Return (result, gradient of x, gradient of the routing weights)."""
    inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(inputs[0], index, inputs[1])
    y.float().square().sum().backward()
    return [y.detach(), inputs[0].grad, inputs[1].grad]


def add_adapters(
    kind: str, experts: Experts, quantizer: Quantizer | None = None, device: str = "cpu", rank: int = 3
) -> StackedExperts:
    """Return stacks like a list of experts with random adapters, and magnitudes that differ from the norms.

    Args:
        kind: lora or dora.
        experts: the list.
        quantizer: packs the stacks, or None.
        device: the device of the result.
        rank: R.
    """
    dtype = next(experts.parameters()).dtype
    _, stacked = stack_like(experts.requires_grad_(False), quantizer, dtype, device)
    generator = torch.Generator().manual_seed(2)

    def randomize(parameter: nn.Parameter) -> None:
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(device)

    for name in ("gate_up", "down"):
        base = getattr(stacked, name)
        module = EXPERT_ADAPTERS[kind](base, rank, SCALING, torch.float32)
        randomize(module.lora_A)
        randomize(module.lora_B)
        if kind == "dora":
            norms = module.compute_squared_norm(base.members())
            module.squared_norm.data = norms.view_as(module.squared_norm)
            randomize(module.magnitude_change)
        setattr(stacked, name, module)
    return stacked
