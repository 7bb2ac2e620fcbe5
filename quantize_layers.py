"""4-bit linear layers whose storage FSDP can shard, and the streaming load that fills a sharded model.

Shapes: O output features, I input features, T tokens (all leading dimensions of x).

A 4-bit weight is two frozen parameters, `codes` and `scales`, in a float storage dtype, their bytes never read
as numbers, so that `fully_shard` shards, gathers and offloads both with the layer's other weights. What the
bytes mean is the quantizer's business (quantizers.py).

The storage dtype is fp32, whatever the compute dtype. In 16 bits the bytes would not survive: FSDP copies
shards with torch._foreach_copy_, whose CUDA kernel converts bf16 and fp16 to float and back, which turns
every NaN pattern - one element in 256 of random bytes - into the same NaN. For the same reason these
parameters must never be cast: FSDP's param_dtype stays None where there are packed weights (wrapping.py).
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from model_files import CheckpointFiles
from models.family import Family, clean
from quantizers import Quantizer, flat_bytes

STORAGE = torch.float32


def as_storage(data: torch.Tensor) -> torch.Tensor:
    """data's bytes as a 1-D tensor of STORAGE, zero-padded to a whole element."""
    raw = flat_bytes(data)
    return F.pad(raw, (0, -raw.numel() % STORAGE.itemsize)).view(STORAGE)


def dequantize(quantizer: Quantizer, codes, scales, table, shape, dtype, row_scale=None) -> torch.Tensor:
    """`Quantizer.dequantize` of codes and scales in float storage."""
    raw = codes.view(torch.uint8), scales.view(torch.uint8)
    return quantizer.dequantize(*raw, table, shape, dtype, row_scale)


class _MatMul4bit(torch.autograd.Function):
    """y = x W^T + b, or x (diag(g) W)^T with a row scale g, for a frozen 4-bit W. Saves the packed weight, not
    the dequantized one: FSDP frees the gathered storage after forward and fills it again before backward."""

    @staticmethod
    def forward(ctx, x, codes, scales, table, quantizer, shape, bias, row_scale):
        weight = dequantize(quantizer, codes, scales, table, shape, x.dtype, row_scale)
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(codes, scales, table, row_scale, None if row_scale is None else y)
        ctx.quantizer, ctx.shape = quantizer, shape
        return y

    @staticmethod
    def backward(ctx, grad):
        codes, scales, table, row_scale, y = ctx.saved_tensors
        weight = dequantize(ctx.quantizer, codes, scales, table, ctx.shape, grad.dtype, row_scale)
        grad_x = grad @ weight
        grad_scale = None
        if row_scale is not None:  # the derivative of g (W x) by g is W x = y / g
            grad_scale = (grad * y).flatten(0, -2).sum(0, dtype=torch.float32) / row_scale
        return grad_x, None, None, None, None, None, None, grad_scale


def scaled_linear(base: nn.Module, x: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """row_scale * (W x) for a frozen linear without a bias: [T, I] -> [T, O]; row_scale [O] fp32."""
    if isinstance(base, Linear4bit) and base.in_features % base.quantizer.block == 0:
        return base(x, row_scale)
    y = base(x)
    # y * g, written as y + y * (g - 1): g is near 1, where bf16 is coarse.
    return torch.addcmul(y, y, (row_scale - 1).to(y.dtype))


class Packed(nn.Module):
    """A module whose parameters are made from the checkpoint's tensors, or from nothing, rather than being
    them. The streaming load asks each module through these methods; the defaults change nothing."""

    def packs(self, name: str) -> tuple[str, ...]:
        """The parameters, by name below this module, that the checkpoint's tensor `name` makes."""
        return (name,)

    def pack(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their full contents, from the full tensor. Keys as in `packs`."""
        return {name: tensor}

    def initial_values(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Full contents of the parameters that no checkpoint holds, on the CPU, the same on every rank."""
        return {}

    def fill_buffers(self, device: torch.device) -> None:
        """Puts in place what is neither in a checkpoint nor trained."""


def packs(module: nn.Module, name: str) -> tuple[str, ...]:
    """`Packed.packs`, also for a plain module: its parameters are the checkpoint's tensors."""
    return module.packs(name) if isinstance(module, Packed) else (name,)


def pack(module: nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """`Packed.pack`, also for a plain module."""
    return module.pack(name, tensor) if isinstance(module, Packed) else {name: tensor}


class Linear4bit(Packed):
    """A frozen linear layer with a packed weight in float storage: [T, I] -> [T, O] in x's dtype.

    dtype: of the dequantized weight. Takes the place of `linear`, keeps its bias, and is made on its device
    (meta).
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, quantizer: Quantizer):
        super().__init__()
        self.out_features, self.in_features = self.shape = tuple(linear.weight.shape)
        self.dtype, self.quantizer, device = dtype, quantizer, linear.weight.device
        for name, n_bytes in zip(("codes", "scales"), quantizer.sizes(self.shape), strict=True):
            data = torch.empty(-(-n_bytes // STORAGE.itemsize), dtype=STORAGE, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)  # _MatMul4bit has no gradient for it
        self.register_buffer("table", None, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized [O, I] weight, made anew at each access. Only inside a gathered FSDP unit."""
        return self.unpack(self.codes, self.scales)

    def forward(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b; with row_scale [O] fp32 (`scaled_linear`), each output times its row's scale."""
        assert row_scale is None or self.bias is None, "a bias is not rescaled"
        if torch.is_autocast_enabled(x.device.type):  # which does not look inside _MatMul4bit's backward
            x = x.to(self.dtype)
        packed = self.codes, self.scales, self.table
        return _MatMul4bit.apply(x, *packed, self.quantizer, self.shape, self.bias, row_scale)

    def packs(self, name: str) -> tuple[str, ...]:
        return ("codes", "scales") if name == "weight" else (name,)

    def pack(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A weight [O, I] is quantized from the dtype in which it is stored, on the device where it is."""
        if name != "weight":
            return {name: tensor}
        codes, scales = self.quantizer.quantize(tensor)
        return {"codes": as_storage(codes), "scales": as_storage(scales)}

    def unpack(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The [O, I] weight of what `pack` returned, in the layer's dtype."""
        return dequantize(self.quantizer, codes, scales, self.table, self.shape, self.dtype)

    def fill_buffers(self, device: torch.device) -> None:
        self.table = self.quantizer.table(device)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.quantizer}"


def quantize_linears(model: nn.Module, names: list[str], dtype: torch.dtype, quantizer: Quantizer) -> None:
    """Puts a Linear4bit that computes in `dtype` in the place of each named linear of a meta model."""
    for name in names:
        model.set_submodule(name, Linear4bit(model.get_submodule(name), dtype, quantizer))


def load_weights(
    model: nn.Module,
    family: Family,
    files: CheckpointFiles,
    device: torch.device,
    home: torch.device,
    seed: int,
) -> None:
    """Gives a meta model, sharded by FSDP or not, memory and fills all of it: parameters from the checkpoint
    or by their module (`Packed.initial_values`), buffers from constants and the config.

    device: where the rank computes, packs weights and holds buffers; home: where its shards of the parameters
    are kept, the CPU with --use_cpu_offload.

    Raises AssertionError if anything was left unfilled: it would train on garbage.
    """
    _materialize(model, family, device, home)
    params = {clean(name): p for name, p in model.named_parameters()}
    filled = _stream(model, params, files, device)
    for path, module in model.named_modules():
        if isinstance(module, Packed):
            # Seeded by name: the values depend neither on the order of modules nor on the number of ranks.
            generator = torch.Generator().manual_seed((seed << 32) % 2**63 + zlib.crc32(clean(path).encode()))
            for name, full in module.initial_values(generator).items():
                fill(params[f"{clean(path)}.{name}"], full)
                filled.add(f"{clean(path)}.{name}")
    assert filled == set(params), f"not filled: {sorted(set(params) - filled)[:3]}"


def _materialize(model: nn.Module, family: Family, device: torch.device, home: torch.device) -> None:
    model.to_empty(device=home)
    if model.config.tie_word_embeddings:  # to_empty makes new parameters, one for each of the two names
        model.get_submodule(family.head).weight = model.get_submodule(family.embedding).weight
    with device:  # no checkpoint holds its tables; only the config argument is stable between versions
        rotary = family.rotary_class(config=model.config)
    model.set_submodule(family.rotary, rotary)
    for module in model.modules():
        if isinstance(module, Packed):
            module.fill_buffers(device)
    filled = {
        id(b) for m in model.modules() if isinstance(m, Packed) or m is rotary for b in m.buffers(False)
    }
    for name, content in family.constants(model.config).items():
        buffer = model.get_buffer(name)
        assert buffer.shape == content.shape, f"{name}: {content.shape} for {buffer.shape}"
        filled.add(id(buffer.copy_(content)))
    unknown = [name for name, buffer in model.named_buffers() if id(buffer) not in filled]
    assert not unknown, f"buffers that nothing fills: {unknown}"


def _stream(model: nn.Module, params: dict, files: CheckpointFiles, device: torch.device) -> set[str]:
    """Reads every tensor of the checkpoint once, packs it as its module says, keeps each rank's shard.

    Tensors go round the ranks: in a round each rank reads and packs one, then all receive all. So each is
    read and quantized by one rank only, a rank holds one full tensor and a packed one at a time, and the
    contents are the same for any number of ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    names = sorted(files.tensors, key=lambda n: files.tensors[n].file)  # file by file, each in its own order
    filled = set()
    for start in range(0, len(names), world):
        for owner, packed in enumerate(_pack_round(model, files, names[start : start + world], rank, device)):
            for target, content in packed.items():
                param = params[target]
                if content is None:
                    content = torch.empty(param.shape, dtype=param.dtype, device=device)
                content = content.to(param.dtype).contiguous()
                assert content.shape == param.shape, f"{target}: {content.shape} for {param.shape}"
                if world > 1:  # as bytes: codes are not numbers
                    dist.broadcast(content.view(-1).view(torch.uint8), src=owner)
                fill(param, content)
                filled.add(target)
    return filled


def _pack_round(model: nn.Module, files: CheckpointFiles, names: list[str], rank: int, device) -> list[dict]:
    """Per tensor of the round {parameter: content}; the content is None where another rank brings it."""
    result = []
    for owner, name in enumerate(names):
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        content = dict.fromkeys(packs(module, last))
        if owner == rank:
            content = pack(module, last, files.read(name).to(device))
        result.append({f"{path}.{key}": value for key, value in content.items()})
    return result


@torch.no_grad()
def fill(param: nn.Parameter, full: torch.Tensor) -> None:
    """Copies this rank's part of `full` into a parameter, sharded by FSDP along dimension 0 or whole."""
    if not isinstance(param, DTensor):
        param.copy_(full)
        return
    local = param.to_local()
    for mesh_dim, placement in enumerate(param.placements):
        if placement.is_shard():
            # torch.chunk's split is FSDP2's: the last ranks may get less, or nothing.
            parts = full.chunk(param.device_mesh.size(mesh_dim), dim=placement.dim)
            place = param.device_mesh.get_local_rank(mesh_dim)
            full = parts[place] if place < len(parts) else full[:0]
    local.copy_(full)
