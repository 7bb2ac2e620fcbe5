"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from options.errors import UserError

# As in bitsandbytes: elements that share a scale, and the least elements of a shard with 8-bit moments.
BLOCK_SIZE, MIN_8BIT_ELEMENTS = 256, 4096


class ShardedAdamW(torch.optim.Optimizer):
    """bitsandbytes' AdamW on parameters that may be DTensors: each rank updates its own shards.

    param_groups and state are keyed by the model's parameters: schedules, gradient scalers and saved states
    expect that. bitsandbytes' kernels take plain tensors. So the inner optimizer, bitsandbytes' own, has one
    plain tensor per parameter that shares the shard's memory. Decay is decoupled; betas and eps are torch's.

    Args:
        params: parameters or parameter groups, as for any torch optimizer.
        lr: peak learning rate.
        bits: 32, or 8: both moments as 8-bit codes with one fp32 scale per 256 elements of the shard. As in
            bitsandbytes, a shard of fewer than 4,096 elements has 32-bit moments. Blocks and that limit
            depend on shards, so the number of ranks changes a result by the 8-bit rounding.
        paged: store moments of shards of 100,000 elements or more in CUDA managed memory, which moves to the
            host when the GPU is full. Moments of parameters on the CPU are in host memory anyway.
    """

    def __init__(self, params: Iterable, lr: float, bits: int, paged: bool):
        from bitsandbytes import optim

        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        self.bits, self.shards = bits, {p: _local_shard(p) for g in self.param_groups for p in g["params"]}
        groups = [{**g, "params": [self.shards[p] for p in g["params"]]} for g in self.param_groups]
        paged = paged and all(s.is_cuda for s in self.shards.values())
        self.inner = {8: optim.AdamW8bit, 32: optim.AdamW32bit}[bits](groups, is_paged=paged)
        for p, shard in self.shards.items():
            self.inner.state[shard] = self.state[p]  # one dict, which bitsandbytes fills at the first step

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # without a closure
        """Update this rank's shards, with bitsandbytes' step."""
        self._sync_inner()
        for p, shard in self.shards.items():
            # Kernels cannot run on no elements: a rank without rows of p has nothing to do.
            shard.grad = _local_shard(p.grad) if p.grad is not None and shard.numel() else None
        self.inner.step()
        for shard in self.shards.values():
            shard.grad = None  # or zero_grad would free nothing

    def _sync_inner(self) -> None:
        """Update the inner optimizer after changes outside: learning rates, and the memory of the shards.

        FSDP allocates a shard anew at the first forward if it pads or pins it.
        """
        for group, inner_group in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner_group.update({k: v for k, v in group.items() if k != "params"})
        for p, shard in self.shards.items():
            shard.data = _local_shard(p)
            assert shard.is_contiguous(), "bitsandbytes would update a copy"

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what state_dict() returned on this rank.

        Raises ValueError for the state of other shards (of another number of ranks) or of another optimizer.
        """
        # torch's own would turn 8-bit codes into numbers of the parameter's dtype, and bitsandbytes' would
        # move paged moments to the GPU.
        self._sync_inner()
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the saved optimizer state has other parameter groups")
        for g, (group, saved_group) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            for i, (p, key) in enumerate(zip(group["params"], saved_group["params"], strict=True)):
                self._load_param_state(p, g, i, state_dict["state"].get(key, {}))
            group.update({k: v for k, v in saved_group.items() if k != "params"})

    def _load_param_state(self, p: nn.Parameter, group: int, index: int, saved: dict) -> None:
        """Copy a parameter's saved state into its state. group, index: its position in param_groups."""
        state, shard = self.state[p], self.shards[p]
        if not saved:  # no step was taken, or the shard is empty
            state.clear()
            return
        if not state and shard.numel():
            self.inner.init_state(self.inner.param_groups[group], shard, group, index)
        if _state_layout(state) != _state_layout(saved):
            raise ValueError("the saved optimizer state is of other shards or of another optimizer")
        for key, value in saved.items():
            if torch.is_tensor(value):
                state[key].copy_(value)
            else:
                state[key] = value


def has_8bit_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer's state may have 8-bit blocks, which depend on the shards."""
    return isinstance(optimizer, ShardedAdamW) and optimizer.bits == 8


def merge_8bit_states(parts: list[tuple[dict[str, torch.Tensor], slice]]) -> dict[str, torch.Tensor]:
    """Return the 8-bit optimizer's state tensors for a shard that consists of rows of other shards.

    A single shard with all its rows is returned unchanged. Anything else is rounded to 8 bits once more, in
    new blocks.

    Args:
        parts: in order: the state tensors of a shard, on the CPU, and its rows.
    """
    from bitsandbytes import functional as bnb

    state, rows = parts[0]
    if len(parts) == 1 and rows == slice(0, len(state["state1"])):
        return state
    merged = {}
    for key in "12":
        moment = torch.cat([_dequantize_moment(state, key)[rows] for state, rows in parts])
        merged[f"state{key}"] = moment
        if moment.numel() >= MIN_8BIT_ELEMENTS:
            table = bnb.create_dynamic_map(signed=key == "1")
            merged[f"state{key}"], blocks = bnb.quantize_blockwise(moment, table, blocksize=BLOCK_SIZE)
            merged |= {f"absmax{key}": blocks.absmax, f"qmap{key}": table}
    return merged


def _dequantize_moment(state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """Return a shard's first (key "1") or second (key "2") moment in fp32."""
    from bitsandbytes import functional as bnb

    codes = state[f"state{key}"]
    if codes.dtype != torch.uint8:
        return codes
    scales, table = state[f"absmax{key}"], state[f"qmap{key}"]
    return bnb.dequantize_blockwise(codes, absmax=scales, code=table, blocksize=BLOCK_SIZE)


def _local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor, or a plain tensor, as a new object that shares the memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _state_layout(state: dict) -> dict:
    return {k: (v.shape, v.dtype) if torch.is_tensor(v) else type(v) for k, v in state.items()}


# Fused, on a CPU as well: one pass over the states instead of one for each operation.
_ADAMW, _ADAM = partial(torch.optim.AdamW, fused=True), partial(torch.optim.Adam, fused=True)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _ADAMW,
    "adam": _ADAM,
    "sgd": torch.optim.SGD,
    "adadelta": torch.optim.Adadelta,
    "fused_adamw": _ADAMW,
    "fused_adam": _ADAM,
    "adamw_8bit": partial(ShardedAdamW, bits=8, paged=False),
    "paged_adamw_32bit": partial(ShardedAdamW, bits=32, paged=True),
    "paged_adamw_8bit": partial(ShardedAdamW, bits=8, paged=True),
}
UNPAGED = {"paged_adamw_32bit": "adamw", "paged_adamw_8bit": "adamw_8bit"}


def check_optimizer(name: str, cpu_offload: bool) -> None:
    """Raise UserError for a paged optimizer (`name`) if `cpu_offload`, where paging has no effect.

    All optimizers run on CPU tensors and on CUDA tensors.
    """
    if cpu_offload and name in UNPAGED:
        raise UserError(
            f"--optimizer {name} has no effect with --use_cpu_offload true, which keeps all optimizer states"
            f" in host memory; use --optimizer {UNPAGED[name]}, or leave out --use_cpu_offload"
        )


def make_optimizer(
    params: Iterable[nn.Parameter],
    name: str,
    lr: float,
    weight_decay: float,
    lora_b: Iterable[nn.Parameter] = (),
    ratio: float = 1.0,
    stacked_vectors: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer of --optimizer `name` for the params that require gradients; only matrices decay.

    Other settings are torch's defaults. Vectors are norms, biases and DoRA magnitudes, which have nothing to
    gain from being small. The first group always has the rate `lr`: metrics.jsonl shows that group's.

    LoRA+ (Hayou et al., arXiv 2402.12354, section 4): B learns `ratio` times as fast as A. Vectors learn as
    fast as B, and an embedding and a head that are trained in full as fast as A, as in PEFT's
    create_loraplus_optimizer.

    Args:
        params: parameters of the model; those without requires_grad are left out.
        name: a key of OPTIMIZERS.
        lr: peak learning rate.
        weight_decay: of parameters with two or more dimensions, without `stacked_vectors`.
        lora_b: those that are a B of LoRA or DoRA.
        ratio: learning rate of lora_b and of vectors, relative to lr.
        stacked_vectors: those with two dimensions that are a vector for each expert.
    """
    params = [p for p in params if p.requires_grad]
    stacked, faster = set(stacked_vectors), set(lora_b) if ratio != 1 else set()
    vectors = [p for p in params if p.dim() < 2 or p in stacked]
    matrices = [p for p in params if p.dim() >= 2 and p not in stacked]
    groups = [
        {"params": [p for p in matrices if p not in faster], "weight_decay": weight_decay, "lr": lr},
        {"params": [p for p in matrices if p in faster], "weight_decay": weight_decay, "lr": ratio * lr},
        {"params": vectors, "weight_decay": 0.0, "lr": ratio * lr},
    ]
    return OPTIMIZERS[name]([g for g in groups if g["params"]], lr=lr)


def lr_factor(step: int, total_steps: int, warmup_fraction: float, schedule: str) -> float:
    """Return the learning rate at an optimizer step (from 0), relative to the peak.

    It rises linearly over the warm-up. Then, by `schedule`, it is constant, falls linearly to 0, or falls by
    a half cosine to a tenth.

    Args:
        step: number of optimizer steps before this one.
        total_steps: optimizer steps of the run.
        warmup_fraction: from 0 to 1; the warm-up has round(warmup_fraction * total_steps) steps.
        schedule: "constant", "linear" or "cosine".
    """
    warmup_steps = round(warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(
        total_steps - warmup_steps, 1
    )  # 0 at the peak, 1 after the last step
    return {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.55 + 0.45 * math.cos(math.pi * progress),
    }[schedule]


def make_schedule(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    warmup_fraction: float,
    schedule: str,
    steps_done: int = 0,
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return `lr_factor` as a torch scheduler.

    Args:
        optimizer: its groups' `initial_lr` is the peak, or their `lr` if they have none yet.
        total_steps, warmup_fraction, schedule: as for `lr_factor`.
        steps_done: optimizer steps that a resumed run has made.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: lr_factor(step, total_steps, warmup_fraction, schedule),
        last_epoch=steps_done - 1,
    )
