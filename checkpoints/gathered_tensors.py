"""Tensors to write that are gathered from the parameters of a sharded model (checkpoints/model_writer.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import nn

from checkpoints.model_writer import TensorEntry
from models.family import unwrapped_name
from parallel.shards import gather_to_cpu
from quantization.layer import Part, locate_tensor, parameters_from, part_of, stored_shape


def gathered_entries(
    model: nn.Module, names: Iterable[str], dtypes: Mapping[str, torch.dtype]
) -> dict[str, TensorEntry]:
    """Return {tensor's name: collective entry} of trained tensors, gathered from the model's parameters.

    A parameter that several tensors fill, a stack of experts, is gathered once for those that follow one
    another.

    Args:
        model: sharded or not.
        names: the tensors' names in the checkpoint.
        dtypes: {name: dtype to convert to}.
    """
    gathered = _LastGathered()
    params = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
    entries = {}
    for name in names:
        path, module, attribute = locate_tensor(model, name)
        (key,) = parameters_from(module, attribute)
        param, part = params[f"{path}.{key}"], part_of(module, attribute, key)
        shape = tuple(param.shape) if part is None else stored_shape(module, attribute)
        chunks = partial(_gather_chunks, gathered, param, part, dtypes[name])
        entries[name] = TensorEntry(dtypes[name], shape, chunks, collective=True)
    return entries


class _LastGathered:
    """The full contents, on the CPU, of the parameter that was gathered last."""

    def __init__(self):
        self.param: nn.Parameter | None = None
        self.full: torch.Tensor | None = None

    def gather(self, param: nn.Parameter) -> torch.Tensor:
        """Return the full contents of a parameter. Collective."""
        if param is not self.param:
            self.full = None  # before the next one is made
            self.param, self.full = param, gather_to_cpu(param)
        assert self.full is not None
        return self.full


def _gather_chunks(
    gathered: _LastGathered, param: nn.Parameter, part: Part | None, dtype: torch.dtype
) -> Iterator:
    """Yield the bytes of a parameter, or of a part of it, converted to `dtype`. Collective."""
    full = gathered.gather(param).view(-1)
    own = full if part is None else full[part.begin : part.begin + part.numel]
    yield own.to(dtype).contiguous().view(torch.uint8).numpy().data
