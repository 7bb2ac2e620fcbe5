"""Runs of the real program inside the test's own process group: the same check, set-up and loop as
train.py's, with adapters made random (a B of zeros would prove nothing)."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import train
from data.packing import make_sampler
from models.family import clean
from models.lora import LoRALinear
from monitoring.tracking import NoTracker
from options.train import parse
from parallel.shards import fill, gather
from training import preflight as checks


def make_job(rank_info, argv: list[str]) -> train.Job:
    # Not compiled unless asked for, on GPUs either: there it would be most of the tests' time.
    quiet = ["--world_size", str(rank_info.world), "--output_dir", "/nonexistent/out", "--compile", "false"]
    config, _ = parse([*quiet, *map(str, argv)])
    original, checks.check_output = checks.check_output, lambda *_: None  # nothing is written here
    try:
        return train.check(config)
    finally:
        checks.check_output = original


def randomize(model, seed: int = 7) -> None:
    """Fills B and the change of the magnitude with the same random values on any number of ranks."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            generator = torch.Generator().manual_seed(seed + sum(map(ord, clean(path))))
            for parameter, std in ((module.lora_B, 0.05), (getattr(module, "magnitude_change", None), 0.2)):
                if parameter is not None:
                    fill(parameter, torch.randn(parameter.shape, generator=generator) * std)


def set_up(rank_info, argv: list[str], random_adapters: bool = True):
    """(job, sharded model with random adapters) of a run."""
    job = make_job(rank_info, argv)
    model, _ = train.set_up(job, rank_info)
    if random_adapters:
        randomize(model)
    return job, model


def trained_tensors(model) -> dict[str, torch.Tensor]:
    return {clean(n): gather(p).clone() for n, p in model.named_parameters() if p.requires_grad}


def train_run(rank_info, argv: list[str]) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """(loss of each step, every trained tensor afterwards, gradient norm of each step)."""
    job, model = set_up(rank_info, argv)
    sampler = make_sampler(job.config, job.rows, rank_info.rank, rank_info.world)
    history = train.train(job, model, rank_info, sampler, NoTracker())
    return [m.loss for m in history], trained_tensors(model), [m.grad_norm for m in history]


def whole_run(rank_info, job: train.Job) -> str:
    """What a rank does from loading to the saved result; returns all that it printed."""
    shown, root = io.StringIO(), Path(train.__file__).parent
    with contextlib.chdir(root), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        train.run_rank(rank_info, job)
    return shown.getvalue()


def outputs(rank_info, argv: list[str], ids: torch.Tensor, random_adapters: bool = True):
    """(the model's logits in evaluation mode, its `dense_tensors`, its `trained_tensors`)."""
    _, model = set_up(rank_info, argv, random_adapters)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits.clone()
    return logits, dense_tensors(model), trained_tensors(model)


def dense_state(rank_info, argv: list[str]) -> dict[str, torch.Tensor]:
    """The weights that training computes with, by the checkpoint's names: 4-bit ones dequantized."""
    return dense_tensors(set_up(rank_info, argv)[1])


def dense_tensors(model) -> dict[str, torch.Tensor]:
    state = {}
    for path, module in model.named_modules():
        own = {n: gather(p) for n, p in module.named_parameters(recurse=False)}
        if "codes" in own:
            device = "cpu" if module.table is None else module.table.device
            packed = (own.pop(name).to(device) for name in ("codes", "scales"))
            own["weight"] = module.unpack(*packed).cpu()
        for name, value in own.items():
            if not name.startswith(("lora_", "magnitude", "squared")):
                state[clean(f"{path}.{name}").replace(".base.", ".")] = value.clone()
    return state


def transformers_model(folder: Path, state: dict[str, torch.Tensor]):
    """transformers' own model of a checkpoint's folder, with the weights `state` in place of the folder's. They
    go by the files' names and through transformers' own loader, which stacks experts. Attention is eager: the
    plain arithmetic, of which everything else is an optimization."""
    with tempfile.TemporaryDirectory() as other:
        shutil.copy(folder / "config.json", other)
        save_file({k: v.contiguous() for k, v in state.items()}, Path(other, "model.safetensors"))
        model, report = AutoModelForCausalLM.from_pretrained(
            other, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    return model.eval()
