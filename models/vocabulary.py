"""The embedding and the head, trained in full beside an adapter (--train_embeddings; PEFT: modules_to_save).

In training they are ordinary trained parameters. A finished model holds both weights, the trained one and the
base's, so that `adapters_off` gives the base.
"""

from __future__ import annotations

import torch
from torch import nn

from models.family import Family

BASE_WEIGHT = "base_weight"  # the buffer with the weight that a module with two weights does not compute with


def vocabulary_modules(model: nn.Module, family: Family) -> dict[str, nn.Embedding | nn.Linear]:
    """Return {dotted name: module} of the embedding and the head. Tied ones share their weight."""
    embedding, head = model.get_submodule(family.embedding), model.get_submodule(family.head)
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    return {family.embedding: embedding, family.head: head}


def peft_modules_to_save(family: Family) -> list[str]:
    """Return PEFT's names of the embedding and the head, for modules_to_save."""
    return [name.rpartition(".")[2] for name in (family.embedding, family.head)]


def use_trained_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Let an embedding or a head of a loaded, unsharded model compute with this weight, and keep the base's.

    It gets the dtype and the device of the base's weight: training computes in this dtype as well.
    """
    if not has_two_weights(module):
        module.register_buffer(BASE_WEIGHT, module.get_parameter("weight").detach(), persistent=False)
    _set_weight(module, weight.to(module.get_buffer(BASE_WEIGHT)))


def use_base_weight(module: nn.Module) -> None:
    """Undo `use_trained_weight`, if it was called."""
    if has_two_weights(module):
        _set_weight(module, module.get_buffer(BASE_WEIGHT))
        delattr(module, BASE_WEIGHT)


def swap_weights(module: nn.Module) -> None:
    """Exchange the two weights of a module."""
    weight = module.get_parameter("weight").detach()
    _set_weight(module, module.get_buffer(BASE_WEIGHT))
    setattr(module, BASE_WEIGHT, weight)


def has_two_weights(module: nn.Module) -> bool:
    """Return whether the module has another weight beside the one that it computes with."""
    return hasattr(module, BASE_WEIGHT)


def _set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
