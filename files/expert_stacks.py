"""Experts that a checkpoint stacks: one tensor for the linear of all experts of a layer, as in GPT-OSS.

Here each expert has linears of its own (models/moe.py), so each of their tensors is read from its part of a
stack. In the files gate and up alternate, and weights are transposed:

    gate_up_proj       [E, I, 2 O]     of expert e: gate = stack[e, :, ::2]^T, up = stack[e, :, 1::2]^T
    gate_up_proj_bias  [E, 2 O]
    down_proj          [E, I, O]
    down_proj_bias     [E, O]

The hub's files of GPT-OSS hold the weights in MXFP4 (OCP Microscaling Formats 1.0), which is not transposed:

    X_blocks           [E, P O, I / 32, 16] uint8: two codes of 4 bits in a byte, the first in the low half
    X_scales           [E, P O, I / 32] uint8: the exponent of 32 weights, with a bias of 127

They are read as 16-bit weights, by the arithmetic of transformers (integrations/mxfp4.py), so that both give
the same numbers. What is written is stacked again, in 16 bits.

Shapes: E experts, I input features, O output features of a linear, P linears in a stack (2: gate and up).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from files.tensors import PinnedBuffers, StoredTensor, StreamedTensor, read_tensor
from options.errors import UserError
from options.limits import MAX_LAYERS

# Last name of a stack -> the parameters of one expert in it, which alternate.
STACKS = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"),
    "down_proj": ("down_proj.weight",),
    "down_proj_bias": ("down_proj.bias",),
}
_STACK_OF = {parameter: stack for stack, parameters in STACKS.items() for parameter in parameters}
BLOCKS, SCALES = "_blocks", "_scales"
PACKED_BYTES = 16  # of a block of 32 weights
BLOCK = 2 * PACKED_BYTES
BIAS = 127  # of the exponents
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))  # of the codes 0 to 15


def dequantize_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return weights [O, I] in bf16, as transformers computes them. Those beyond bf16 become infinite.

    Args:
        blocks: [O, I / 32, 16] uint8.
        scales: [O, I / 32] uint8.
    """
    codes = torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(2)  # [O, I / 32, 32]
    indices = codes.int() + len(MXFP4_VALUES) * scales.int()[..., None]
    return _mxfp4_table().to(blocks.device)[indices].flatten(1)


@cache
def _mxfp4_table() -> torch.Tensor:
    """Return the weights of all scales and codes in turn, in bf16. It is made on the CPU, for all devices."""
    values = torch.tensor(MXFP4_VALUES, dtype=torch.bfloat16).repeat(256, 1)
    exponents = torch.arange(256, dtype=torch.int32)[:, None] - BIAS
    return torch.ldexp(values, exponents, out=torch.empty_like(values)).flatten()


@dataclass(frozen=True)
class Mxfp4Stack(StoredTensor):
    """A stack of weights in MXFP4, described as the 16-bit tensor that it stands for.

    Attributes:
        scales: the tensor of scales; file and begin are those of the blocks.
    """

    scales: StoredTensor = dataclasses.field(kw_only=True)


@dataclass(frozen=True)
class ExpertTensor(StoredTensor):
    """A parameter of one expert in a stack. shape and dtype are the parameter's, begin is the expert's.

    Attributes:
        region: shape of the expert's part of the stack, or of its blocks.
        part: index of the parameter among those that alternate in the stack.
        parts: number of these.
        scales: the expert's scales, if the stack is in MXFP4.
    """

    region: tuple[int, ...] = ()
    part: int = 0
    parts: int = 1
    scales: StoredTensor | None = None

    def sources(self) -> tuple[StoredTensor, ...]:
        """Return the tensors in the files that hold the expert's part of the stack."""
        dtype = torch.uint8 if self.scales else self.dtype
        source = StoredTensor(self.file, self.region, dtype, self.begin)
        return (source, self.scales) if self.scales else (source,)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(source.nbytes for source in self.sources())

    @property
    def note(self) -> str:
        return " for each expert"

    def read(self, folder: Path, buffers: PinnedBuffers | None = None) -> torch.Tensor | StreamedExpert:
        """Read the parameter to the CPU, or start to stream it to a GPU. Raises OSError."""
        source, *scales = self.sources()
        streamed = StreamedExpert(
            self, read_tensor(folder, source, buffers), *(read_tensor(folder, tensor) for tensor in scales)
        )
        return streamed if buffers else streamed.to(torch.device("cpu"))

    def extract(self, source: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return the parameter. source, scales: contents of `sources`."""
        if scales is not None:
            rows = slice(self.part, None, self.parts)
            return dequantize_mxfp4(source[rows], scales[rows])
        own = source[..., self.part :: self.parts]
        return (own.T if own.dim() == 2 else own).contiguous()


@dataclass
class StreamedExpert:
    """The parameter of one expert, read as far as its tensors are; `to` brings it to a device."""

    stored: ExpertTensor
    source: torch.Tensor | StreamedTensor
    scales: torch.Tensor | None = None

    def to(self, device: torch.device) -> torch.Tensor:
        """Return the parameter on a device. Raises OSError."""
        scales = None if self.scales is None else self.scales.to(device)
        return self.stored.extract(self.source.to(device), scales)


def find_mxfp4_stacks(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Replace each pair of blocks and scales in `tensors` by one Mxfp4Stack. Reads headers alone.

    Raises UserError for one of them without the other, or if their shapes do not fit. folder: for messages.
    """
    for key in [name for name in tensors if name.endswith(BLOCKS)]:
        name, blocks = key.removesuffix(BLOCKS), tensors[key]
        scales = tensors.get(f"{name}{SCALES}")
        if blocks.dtype != torch.uint8 or name.rpartition(".")[2] not in STACKS:
            continue
        if scales is None:
            raise UserError(f"{folder / blocks.file}: {key} has no {name}{SCALES}")
        fits = len(blocks.shape) == 4 and blocks.shape[-1] == PACKED_BYTES and scales.dtype == torch.uint8
        if not fits or scales.shape != blocks.shape[:-1] or name in tensors:
            raise UserError(
                f"{folder / blocks.file}: {key} of shape {list(blocks.shape)} and {name}{SCALES} of shape"
                f" {list(scales.shape)} are no weights in MXFP4"
            )
        experts, outputs, groups, _ = blocks.shape
        shape = (experts, groups * BLOCK, outputs)
        tensors[name] = Mxfp4Stack(blocks.file, shape, torch.bfloat16, blocks.begin, scales=scales)
        del tensors[key], tensors[f"{name}{SCALES}"]


def split_stacks(folder: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return `tensors` with each stack replaced by the parameters of its experts, one expert after another.

    folder: for messages. Raises UserError for a stack of another number of dimensions or too many experts.
    """
    split: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        path, _, last = name.rpartition(".")
        if last not in STACKS:
            split[name] = stored
            continue
        if not path.endswith("experts") or len(stored.shape) != (2 if last.endswith("_bias") else 3):
            raise UserError(
                f"{folder / stored.file}: {name} has shape {list(stored.shape)}; expected the {last} of all"
                " experts of a layer"
            )
        if not 0 < stored.shape[0] <= MAX_LAYERS:
            raise UserError(f"{folder / stored.file}: {name} holds {stored.shape[0]:,} experts")
        parameters = STACKS[last]
        for i in range(stored.shape[0]):
            for part, parameter in enumerate(parameters):
                split[f"{path}.{i}.{parameter}"] = _expert_tensor(stored, i, part, len(parameters))
    return split


def _expert_tensor(stack: StoredTensor, index: int, part: int, parts: int) -> ExpertTensor:
    """Return the description of one parameter of expert `index`."""
    outputs = stack.shape[-1] // parts + (part < stack.shape[-1] % parts)  # as a slice [part::parts] has
    inputs = stack.shape[1:-1]
    whole = ExpertTensor(stack.file, (outputs, *inputs), stack.dtype, part=part, parts=parts)
    if isinstance(stack, Mxfp4Stack):
        region = (stack.shape[-1], stack.shape[1] // BLOCK, PACKED_BYTES)
        size = math.prod(region)
        scales = dataclasses.replace(
            stack.scales, shape=region[:-1], begin=stack.scales.begin + index * size // PACKED_BYTES
        )
        return dataclasses.replace(whole, begin=stack.begin + index * size, region=region, scales=scales)
    size = math.prod(stack.shape[1:]) * stack.itemsize
    return dataclasses.replace(whole, begin=stack.begin + index * size, region=stack.shape[1:])


def stack_name(parameter: str) -> str:
    """Return the name of the stack that holds a parameter of an expert."""
    path, linear, last = parameter.rsplit(".", 2)
    return f"{path.rpartition('.')[0]}.{_STACK_OF[f'{linear}.{last}']}"


def stacked_shape(shape: tuple[int, ...], count: int, parts: int) -> tuple[int, ...]:
    """Return the shape of a stack of `count` parameters of this shape, `parts` of them of each expert."""
    return (count // parts, *reversed(shape[1:]), shape[0] * parts)


def join_expert(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return an expert's part of a stack, made of its parameters: the inverse of `ExpertTensor.extract`."""
    rows = torch.stack(parameters, 1).flatten(0, 1)
    return (rows.T if rows.dim() == 2 else rows).contiguous()
