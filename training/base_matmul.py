"""Checks of --base_matmul: whether the GPU multiplies in the format, and which weights fit it."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from files.weight_headers import WeightHeaders
from launch.gpus import Gpu, detect_gpu
from launch.precision import Precision, detect_precision
from models.adapters import choose_quantizers, packed_linears
from models.experts import expert_prefixes
from models.family import Family
from models.registry import build_on_meta
from options.config import Config
from options.errors import UserError
from quantization.rounded import ROUNDINGS, Rounding, fits, multiply


def check_base_matmul(base_matmul: str | None, gpu: Gpu | None, precision: Precision) -> None:
    """Raise UserError if --base_matmul does not run there.

    Args:
        base_matmul: the option's value.
        gpu: the kind of the GPUs, or None for CPU processes.
        precision: the dtypes of the model.
    """
    rounding = ROUNDINGS.get(base_matmul or "")
    if not rounding:
        return
    option = f"--base_matmul {base_matmul}"
    if not _runs_on(rounding, gpu):
        needed, own = (".".join(map(str, c)) for c in (rounding.capability, gpu.capability if gpu else ()))
        here = f"a {gpu.name} has {own}" if gpu else "there is no GPU here"
        others = [n for n, form in ROUNDINGS.items() if _runs_on(form, gpu)]
        raise UserError(
            f"{option}: needs GPUs of compute capability {needed} or more, and {here}; choose"
            f" {' or '.join([*others, '16bit'])}"
        )
    if rounding.dtype.is_floating_point and precision.matmul_dtype != torch.bfloat16:
        raise UserError(
            f"{option}: its results are bf16, and the precision here is {precision}; choose --precision auto"
        )


def _runs_on(rounding: Rounding, gpu: Gpu | None) -> bool:
    """Return whether a kind of GPU multiplies in a format; None: whether CPU processes do."""
    return gpu.capability >= rounding.capability if gpu else not rounding.dtype.is_floating_point


def try_base_matmul(base_matmul: str | None, device: torch.device) -> None:
    """Multiply two small matrices as --base_matmul says, on a rank's GPU.

    Raises UserError if torch cannot: it multiplies fp8 with a scale for each row on fewer kinds of GPUs than
    have fp8 (pytorch#192707).
    """
    if base_matmul not in ROUNDINGS or device.type == "cpu":
        return
    ones, scale = torch.ones(32, 32, device=device), torch.ones(32, device=device)
    operand = ROUNDINGS[base_matmul].round(ones)
    try:
        multiply(operand, scale, operand, scale, torch.bfloat16)
        torch.cuda.synchronize(device)
    except RuntimeError as e:
        raise UserError(
            f"--base_matmul {base_matmul}: torch {torch.__version__} does not multiply so on this GPU"
            f" ({str(e).splitlines()[0]}); choose 16bit"
        ) from None


def check_base_matmul_here(base_matmul: str | None, precision: str) -> None:
    """Raise UserError if --base_matmul does not run on this machine. Looks at its GPUs only for a format.

    precision: as --precision has it.
    """
    if base_matmul in ROUNDINGS:
        gpu = detect_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        check_base_matmul(base_matmul, gpu, detect_precision(precision))


def remark_on_matmuls(
    model_config: PretrainedConfig, family: Family, config: Config, files: WeightHeaders
) -> tuple[str, ...]:
    """Return lines that say which linears stay in 16 bits with --base_matmul; empty if none does."""
    if config.base_matmul in (None, "16bit"):
        return ()
    model = build_on_meta(model_config, family)  # takes seconds with many experts
    names = [n for n in packed_linears(model, family, config, files) if family.locate_layer(n)[0] is not None]
    in_experts, option = expert_prefixes(model), f"--base_matmul {config.base_matmul}"
    plain = [name for name in names if not name.startswith(in_experts)]
    remarks = [f"{option}: routed experts multiply in 16 bits"] if len(plain) < len(names) else []
    quantizers = choose_quantizers(plain, config, files)
    others = [n for n, q in quantizers.items() if not fits(model.get_parameter(f"{n}.weight").shape, q.block)]
    if others:
        shape = " x ".join(str(n) for n in model.get_parameter(f"{others[0]}.weight").shape)
        remarks.append(
            f"{option}: {len(others)} of {len(plain)} linears multiply in 16 bits: sizes that are not"
            f" multiples of 16, or not of a block; the first is {others[0]}, {shape}"
        )
    return tuple(remarks)
