"""Tensors to write that are gathered from the parameters of a sharded model (checkpoints/model_writer.py)."""

from __future__ import annotations

from collections import Counter
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

    A parameter that several tensors fill, a stack of experts, is gathered once. It is kept until all of these
    were written: files may have the tensors of one expert after those of another.

    Args:
        model: sharded or not.
        names: the tensors' names in the checkpoint.
        dtypes: {name: dtype to convert to}.
    """
    gathered = _GatheredStacks()
    params = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
    entries = {}
    for name in names:
        path, module, attribute = locate_tensor(model, name)
        (key,) = parameters_from(module, attribute)
        param, part = params[f"{path}.{key}"], part_of(module, attribute, key)
        shape = tuple(param.shape) if part is None else stored_shape(module, attribute)
        gathered.left[param] += 1
        chunks = partial(_gather_chunks, gathered, param, part, dtypes[name])
        entries[name] = TensorEntry(dtypes[name], shape, chunks, collective=True)
    return entries


class _GatheredStacks:
    """The full contents, on the CPU, of the parameters of which some tensors were written, and not all.

    Attributes:
        left: number of tensors of each parameter that are not written yet.
    """

    def __init__(self):
        self.left: Counter[nn.Parameter] = Counter()
        self.full: dict[nn.Parameter, torch.Tensor] = {}

    def take(self, param: nn.Parameter) -> torch.Tensor:
        """Return the full contents of a parameter, for one of its tensors. Collective the first time."""
        full = self.full.pop(param) if param in self.full else gather_to_cpu(param)
        self.left[param] -= 1
        if self.left[param]:
            self.full[param] = full
        return full


def _gather_chunks(
    gathered: _GatheredStacks, param: nn.Parameter, part: Part | None, dtype: torch.dtype
) -> Iterator:
    """Yield the bytes of a parameter, or of a part of it, converted to `dtype`. Collective."""
    full = gathered.take(param).view(-1)
    own = full if part is None else full[part.begin : part.begin + part.numel]
    yield own.to(dtype).contiguous().view(torch.uint8).numpy().data
