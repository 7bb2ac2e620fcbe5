"""Measure the rounding errors of the 4-bit layer's matmuls, in 16 bits and in fp8, against float64.

    python -m benchmarks.fp8_errors                       the 8B shape's linears, 8,192 tokens, on a GPU
    python -m benchmarks.fp8_errors --shape tiny --tokens 64 --ways 16bit         a rehearsal on a CPU

Each linear has an NF4 weight and a LoRA branch of rank 64. Weights, activations and gradients are normal. The
second kind of activations has outliers: one channel in a thousand is 20 times as large. An error is the norm
of the difference over the norm of the reference, a float64 computation from the same bf16 operands:

- against the dequantized weight: what the matmuls and the results' bf16 round;
- against the weight before it was quantized: what NF4 rounds, too. "float64" has NF4's error alone.

W's error is that of the weight that a layer applies: its results for the rows of the identity matrix. The
gradients of A and B come from the same bf16 x and grad in all ways; in a model these have the errors of the
layers around it. The table of `mlp` shows that: 1, 2 and 3 are its gate, up and down.

Shapes: O output features, I input features, R rank, T tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files.atomic_writes import write_text
from launch.program import print_error
from models.shapes import SHAPES, Shape
from options.config import BASE_MATMULS
from options.errors import UserError
from quantization.layer import Linear4bit, round_matmuls
from quantization.nf4 import NF4
from quantization.operators import dequantize
from quantization.rounded import ROUNDINGS

RANK, STD = 64, 0.02
OUTLIER_EVERY, OUTLIER_FACTOR = 1000, 20.0
KINDS = ("normal", "outliers")  # of activations
EXACT = "float64"
DEQUANTIZED, UNQUANTIZED = "dequantized", "unquantized"

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, a, b) -> y
Block = Callable[..., Tensor]  # (*linears, x, *branches) -> y
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """The bf16 weights of one linear with its LoRA branch.

    Attributes:
        weight: [O, I], before it is quantized.
        a, b: [R, I] and [O, R].
    """

    weight: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Row:
    """Relative errors of one linear.

    Attributes:
        linear: its name and shape.
        kind: of the activations.
        way: how it was computed.
        reference: the weight of the reference.
        errors: {quantity: relative error}.
    """

    linear: str
    kind: str
    way: str
    reference: str
    errors: dict[str, float]


def check_way(way: str) -> None:
    """Raise UserError if a value of --ways is none of --base_matmul's."""
    if way not in BASE_MATMULS:
        raise UserError(f"--ways {way}: must be {' or '.join(BASE_MATMULS)}")


def make_linear(weight: Tensor, way: str) -> Linear4bit:
    """Return the layer of an NF4 weight [O, I] that computes in a way: a value of --base_matmul.

    The only function here that knows how a layer is told its way. Raises UserError for an unknown way,
    and for a shape that is not rounded.
    """
    check_way(way)
    layer = Linear4bit(
        nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"), weight.dtype, NF4()
    )
    layer.fill_buffers(weight.device)
    for name, content in layer.convert_tensor("weight", weight).items():
        setattr(layer, name, nn.Parameter(content, requires_grad=False))
    if way in ROUNDINGS and round_matmuls({"": layer}, way):
        sizes = " x ".join(map(str, weight.shape))
        raise UserError(f"--ways {way}: a linear of {sizes} multiplies in 16 bits")
    return layer


def exact_weight(layer: Linear4bit) -> Tensor:
    """Return the dequantized weight [O, I], without rounding to bf16, in float64."""
    packed = layer.codes, layer.scales, layer.table
    return dequantize(packed, layer.quantizer_name, layer.shape, torch.float32).double()


def draw(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Draw a normal tensor in bf16."""
    values = torch.empty(shape, device=generator.device).normal_(0, std, generator=generator)
    return values.to(torch.bfloat16)


def draw_linear(shape: tuple[int, int], generator: torch.Generator) -> Weights:
    """Draw a linear [O, I]. Its LoRA branch adds some 10% to the results."""
    o, i = shape
    return Weights(
        draw((o, i), STD, generator), draw((RANK, i), i**-0.5, generator), draw((o, RANK), STD, generator)
    )


def draw_x(tokens: int, features: int, kind: str, generator: torch.Generator) -> Tensor:
    """Draw activations [T, I], with outliers in some channels if the kind says so."""
    x = draw((tokens, features), 1.0, generator)
    if kind == "outliers":
        x[:, :: min(OUTLIER_EVERY, features)] *= OUTLIER_FACTOR
    return x


def mlp(gate: Linear, up: Linear, down: Linear, x: Tensor, *branches: Tensor) -> Tensor:
    """Return Llama's MLP of x [T, I]. branches: a and b of each linear."""
    return down(F.silu(gate(x, *branches[:2])) * up(x, *branches[2:4]), *branches[4:])


def alone(linear: Linear, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the result of a single linear."""
    return linear(x, a, b)


def exact_linear(weight: Tensor) -> Linear:
    """Return the linear of a float64 weight: x W^T + (x a^T) b^T."""
    return lambda x, a, b: F.linear(x, weight) + F.linear(F.linear(x, a), b)


def layer_linear(layer: Linear4bit) -> Linear:
    """Return the linear of a 4-bit layer."""
    return lambda x, a, b: layer(x, a=a, b=b)


def compute(block: Block, linears: list[Linear], operands: list[Tensor]) -> Results:
    """Return {name: y, the gradient of x, and those of each linear's a and b}.

    operands: x, a and b of each linear, and the gradient of y.
    """
    *leaves, grad = operands
    leaves = [each.detach().requires_grad_() for each in leaves]
    y = block(*linears, *leaves)
    grads = torch.autograd.grad(y, leaves, grad)
    numbers = [""] if len(linears) == 1 else range(1, 1 + len(linears))
    names = [f"grad {letter}{number}" for number in numbers for letter in "AB"]
    return {"y": y.detach(), "grad x": grads[0], **dict(zip(names, grads[1:], strict=True))}


@torch.no_grad()
def applied_weight(layer: Linear4bit) -> Tensor:
    """Return the weight [O, I] that a layer applies, from its results for the identity matrix."""
    identity = torch.eye(layer.in_features, dtype=layer.dtype, device=layer.codes.device)
    return layer(identity).t()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return ||value - reference|| / ||reference||, in float64."""
    return ((value.double() - reference).norm() / reference.norm()).item()


def compare(
    block: Block, layers: dict[str, list[Linear4bit]], unquantized: list[Tensor], operands: list[Tensor]
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield (way, the reference's weight, errors) of a block.

    Args:
        block: how the results of its linears are combined.
        layers: those of each way.
        unquantized: the weight [O, I] of each linear, in float64.
        operands: as for `compute`, in bf16.
    """
    weights = {DEQUANTIZED: [exact_weight(layer) for layer in next(iter(layers.values()))]}
    weights[UNQUANTIZED] = unquantized
    exact = [each.double() for each in operands]
    # The W of several linears is that of each one alone.
    expected = {
        reference: ({"W": each[0]} if len(each) == 1 else {})
        | compute(block, [*map(exact_linear, each)], exact)
        for reference, each in weights.items()
    }
    computed = {EXACT: expected[DEQUANTIZED]}
    for way, each in layers.items():
        computed[way] = {"W": applied_weight(each[0])} if len(each) == 1 else {}
        computed[way] |= compute(block, [*map(layer_linear, each)], operands)
    for reference, results in expected.items():
        for way, found in computed.items():
            if (way, reference) != (EXACT, DEQUANTIZED):
                yield way, reference, {name: relative_error(found[name], results[name]) for name in results}


def measure(
    name: str, block: Block, shapes: list[tuple[int, int]], tokens: int, ways: list[str], device: torch.device
) -> Iterator[Row]:
    """Yield the rows of a block.

    Args:
        name: for the rows.
        block: how the results of its linears are combined.
        shapes: (O, I) of each linear; the first reads x, the last makes y.
        tokens: T.
        ways: to compute in.
        device: for all tensors.
    """
    generator = torch.Generator(device).manual_seed(0)
    linears = [draw_linear(shape, generator) for shape in shapes]
    branches = [each for one in linears for each in (one.a, one.b)]
    layers = {way: [make_linear(one.weight, way) for one in linears] for way in ways}
    for kind in KINDS:
        x = draw_x(tokens, shapes[0][1], kind, generator)
        grad = draw((tokens, shapes[-1][0]), 1.0, generator)
        unquantized = [one.weight.double() for one in linears]
        for found in compare(block, layers, unquantized, [x, *branches, grad]):
            yield Row(name, kind, *found)


def list_blocks(shape: Shape) -> dict[str, tuple[Block, list[tuple[int, int]]]]:
    """Return {name: (block, shapes of its linears)}: the linears of a decoder layer, and its MLP."""
    width, wide = shape.hidden, shape.mlp
    linears = {
        "q, o": (width, width),
        "k, v": (width // shape.heads * shape.kv_heads, width),
        "gate, up": (wide, width),
        "down": (width, wide),
    }
    blocks: dict[str, tuple[Block, list[tuple[int, int]]]] = {
        f"{names}: {o} x {i}": (alone, [(o, i)]) for names, (o, i) in linears.items()
    }
    blocks["mlp"] = (mlp, [linears["gate, up"], linears["gate, up"], linears["down"]])
    return blocks


def format_tables(rows: list[Row]) -> str:
    """Return the rows as Markdown tables: one of single linears, one of the MLP."""
    tables = []
    for columns in dict.fromkeys(tuple(row.errors) for row in rows):
        lines = [["linear", "x", "way", "against the weight", *columns], ["---"] * (4 + len(columns))]
        for row in rows:
            if tuple(row.errors) == columns:
                errors = [f"{error:.2%}" for error in row.errors.values()]
                lines.append([row.linear, row.kind, row.way, row.reference, *errors])
        tables.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(tables)


def main(argv: list[str]) -> int:
    """Print the tables. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_errors")
    shapes = [name for name, shape in SHAPES.items() if isinstance(shape, Shape)]
    parser.add_argument("--shape", choices=shapes, default="8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ways", default="16bit,fp8", help="values of --base_matmul")
    parser.add_argument("--out", type=Path, help="file for the rows, as JSON")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    try:
        for name, (block, sizes) in list_blocks(SHAPES[options.shape]).items():
            rows += measure(name, block, sizes, options.tokens, options.ways.split(","), device)
    except UserError as e:
        return print_error(e, verbose=False)
    if options.out:
        write_text(options.out, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print(format_tables(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
