"""The embedding and the head, trained in full beside an adapter (--train_embeddings; PEFT: modules_to_save).

In training they are ordinary trained parameters. A finished model holds both weights, the trained one and the
base's, so that `adapters_off` gives the base.
"""

from __future__ import annotations

import torch
from torch import nn

from models.family import Family

# Prefix of the buffers with the weight and the bias that a module with two weights does not compute with.
BASE = "base_"


def vocabulary_modules(model: nn.Module, family: Family) -> dict[str, nn.Embedding | nn.Linear]:
    """Return {dotted name: module} of the embedding and the head. Tied ones share their weight."""
    embedding, head = model.get_submodule(family.embedding), model.get_submodule(family.head)
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    return {family.embedding: embedding, family.head: head}


def vocabulary_parameters(model: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """Return {dotted name: parameter} of the embedding and the head, which may have a bias.

    A tied weight has both names.
    """
    return {
        f"{path}.{name}": parameter
        for path, module in vocabulary_modules(model, family).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def peft_modules_to_save(family: Family) -> list[str]:
    """Return PEFT's names of the embedding and the head, for modules_to_save."""
    return [name.rpartition(".")[2] for name in (family.embedding, family.head)]


def use_trained_parameters(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Let an embedding or a head of a loaded, unsharded model compute with these, and keep the base's.

    They get the dtype and the device of the base's: training computes in this dtype as well.

    Args:
        module: the embedding or the head.
        tensors: {name below the module, weight or bias: the trained tensor}.
    """
    for name, tensor in tensors.items():
        if not hasattr(module, BASE + name):
            module.register_buffer(BASE + name, module.get_parameter(name).detach(), persistent=False)
        _set_parameter(module, name, tensor.to(module.get_buffer(BASE + name)))


def use_base_parameters(module: nn.Module) -> None:
    """Undo `use_trained_parameters`, if it was called."""
    for name in _doubled_parameters(module):
        _set_parameter(module, name, module.get_buffer(BASE + name))
        delattr(module, BASE + name)


def swap_parameters(module: nn.Module) -> None:
    """Exchange the two weights of a module, and its two biases if it has them."""
    for name in _doubled_parameters(module):
        tensor = module.get_parameter(name).detach()
        _set_parameter(module, name, module.get_buffer(BASE + name))
        setattr(module, BASE + name, tensor)


def has_two_weights(module: nn.Module) -> bool:
    """Return whether the module has another weight beside the one that it computes with."""
    return bool(_doubled_parameters(module))


def _doubled_parameters(module: nn.Module) -> list[str]:
    return [name for name in ("weight", "bias") if hasattr(module, BASE + name)]


def _set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
