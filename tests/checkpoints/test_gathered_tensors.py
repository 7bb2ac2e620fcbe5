"""Tensors to write that are gathered from the parameters of a model."""

from __future__ import annotations

import torch
from torch import nn

from checkpoints import gathered_tensors
from checkpoints.gathered_tensors import gathered_entries
from tests.helpers.stacked_experts import make_list, stack_like


def test_a_stack_is_gathered_once_in_any_order_of_the_tensors(monkeypatch):
    """Files have the linears of one expert after those of another, so stacks alternate."""
    experts, model, gathered = make_list(), nn.Module(), []
    model.experts = stack_like(experts)[1]
    expected = dict(experts.named_parameters(prefix="experts"))
    names = sorted(expected)
    assert [name.split(".")[2] for name in names[:4]] == ["down_proj", "gate_proj", "up_proj", "down_proj"]

    def gather(parameter):
        gathered.append(parameter)
        return parameter.detach().clone()

    monkeypatch.setattr(gathered_tensors, "gather_to_cpu", gather)
    entries = gathered_entries(model, names, dict.fromkeys(names, torch.float32))
    for name in names:
        (chunk,) = entries[name].chunks()
        found = torch.frombuffer(bytearray(chunk), dtype=torch.float32).view(entries[name].shape)
        assert torch.equal(found, expected[name]), name
    assert len(gathered) == 2
