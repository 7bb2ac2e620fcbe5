"""Runs of the program in the test's process group, with the check, set-up and loop of train.py.

The adapters are random, since a B of zeros would prove nothing.
"""

from __future__ import annotations

import contextlib
import gc
import io
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import train
from data.packing import make_sampler
from models.checkpoint_names import ParameterNames
from models.family import unwrapped_name
from models.lora import LowRankModule
from models.moe import member_names
from monitoring.tracking import NoTracker
from options.train import parse
from parallel.shards import fill_shard, gather_to_cpu
from quantization.stacked import StackedModule
from tests.helpers.auto_classes import auto_class, load_transformers_model
from tests.helpers.spellings import is_of_a_tower
from tests.helpers.stacks import stack_experts
from training import preflight as checks


def make_job(rank_info, argv: list[str]) -> train.Job:
    """Check the options of a run that writes nothing."""
    # Not compiled by default, on GPUs too, where it would take most of the tests' time.
    defaults = [
        "--world_size",
        str(rank_info.world),
        "--output_dir",
        "/dev/null/out",  # cannot be made, by root neither
        "--compile",
        "false",
    ]
    config, _ = parse([*defaults, *map(str, argv)])
    original, checks.check_output = checks.check_output, lambda *_: None  # nothing is written here
    try:
        return train.check_run(config)
    finally:
        checks.check_output = original


def randomize(model, seed: int = 7) -> None:
    """Fill B and magnitude_change with random values, the same on any number of ranks."""
    for path, module in model.named_modules():
        if isinstance(module, LowRankModule):
            generator = torch.Generator().manual_seed(seed + sum(map(ord, unwrapped_name(path))))
            for parameter, std in ((module.lora_B, 0.05), (getattr(module, "magnitude_change", None), 0.2)):
                if parameter is not None:
                    fill_shard(parameter, torch.randn(parameter.shape, generator=generator) * std)


def set_up(rank_info, argv: list[str], random_adapters: bool = True):
    """Return (job, sharded model with random adapters, or with that of --adapter) of a run."""
    job = make_job(rank_info, argv)
    if rank_info.device.type == "cuda":
        gc.collect()  # cycles of an earlier run; train.py compares the GPU's memory before and after loading
    model, _ = train.set_up(job, rank_info)
    if random_adapters and not job.adapter:
        randomize(model)
    return job, model


def trained_tensors(model) -> dict[str, torch.Tensor]:
    """Gather copies of the trained tensors. Collective."""
    return {
        unwrapped_name(n): gather_to_cpu(p).clone() for n, p in model.named_parameters() if p.requires_grad
    }


def train_run(rank_info, argv: list[str]) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """Train; return (loss of each step, trained tensors afterwards, gradient norm of each step)."""
    job, model = set_up(rank_info, argv)
    sampler = make_sampler(job.config, job.rows, rank_info.rank, rank_info.world)
    history = train.train(job, model, rank_info, sampler, NoTracker())
    return [m.loss for m in history], trained_tensors(model), [m.grad_norm for m in history]


def full_run(rank_info, job: train.Job) -> str:
    """Run a rank from loading to the saved result; return all that it printed."""
    output, root = io.StringIO(), Path(train.__file__).parent
    with contextlib.chdir(root), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        train.run_rank(rank_info, job)
    return output.getvalue()


def outputs(rank_info, argv: list[str], ids: torch.Tensor, random_adapters: bool = True):
    """Return (the model's logits in evaluation mode, its `dense_tensors`, its `trained_tensors`)."""
    _, model = set_up(rank_info, argv, random_adapters)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits.clone()
    return logits, dense_tensors(model), trained_tensors(model)


def dense_state(rank_info, argv: list[str]) -> dict[str, torch.Tensor]:
    """Set up a run and return its `dense_tensors`."""
    return dense_tensors(set_up(rank_info, argv)[1])


def dense_tensors(model) -> dict[str, torch.Tensor]:
    """Gather the weights of the base by the checkpoint's names, 4-bit ones dequantized. Collective."""
    state = {}
    for path, module in model.named_modules():
        tensors = {n: gather_to_cpu(p) for n, p in module.named_parameters(recurse=False)}
        if isinstance(module, StackedModule):
            state |= member_tensors(unwrapped_name(path), module, tensors)
            continue
        if "codes" in tensors:
            device = "cpu" if module.table is None else module.table.device
            packed = (tensors.pop(name).to(device) for name in ("codes", "scales"))
            tensors["weight"] = module.dequantize(*packed).cpu()
        for name, value in tensors.items():
            if not name.startswith(("lora_", "magnitude", "squared")):
                state[unwrapped_name(f"{path}.{name}").replace(".base.", ".")] = value.clone()
    return state


def member_tensors(path: str, stack, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a stack's members by the checkpoint's names.

    Args:
        path: the stack's path in the model.
        stack: the StackedModule.
        tensors: {parameter: full tensor}, or gradients.
    """
    if "codes" in tensors:
        device = "cpu" if stack.table is None else stack.table.device
        packed = (tensors.pop(name).to(device) for name in ("codes", "scales"))
        tensors["weight"] = stack.dequantize(*packed).cpu()
    experts, _, last = path.rpartition(".")
    state = {}
    for i, name in enumerate(member_names(last, stack.experts)):
        for key, tensor in tensors.items():
            shape = stack.stored_shape(f"{i}.{key}")
            state[f"{experts}.{name}.{key}"] = tensor.reshape(-1, *shape)[i].clone()
    return state


def split_members(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return {checkpoint's name: tensor} of dense parameters, or of gradients, by the parameters' names."""
    split = dict(tensors)
    for path, module in model.named_modules():
        if isinstance(module, StackedModule):
            path = unwrapped_name(path)
            own = {key: split.pop(f"{path}.{key}") for key in ("weight", "bias") if f"{path}.{key}" in split}
            split |= member_tensors(path, module, own)
    return split


def transformers_model(folder: Path, state: dict[str, torch.Tensor]):
    """Return transformers' model of a checkpoint's folder with the weights `state` instead of the folder's.

    `state` has the parameters' names. It goes through transformers' loader by the files' names, with the
    folder's tensors for towers, which are not built here. The loader stacks experts, except those of GPT-OSS.
    Attention is eager, the plain arithmetic that everything else optimizes.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "gpt_oss":
        state = stack_experts(state)
    with torch.device("meta"):
        names = ParameterNames(auto_class(config).from_config(config))
    for path in folder.glob("*.safetensors"):
        for stored, tensor in load_file(path).items():
            name = names.parameter_name(stored)
            if name in state:
                state = {key: value for key, value in state.items() if key != name} | {stored: state[name]}
            elif is_of_a_tower(stored):
                state = state | {stored: tensor}
    with tempfile.TemporaryDirectory() as copied:
        shutil.copy(folder / "config.json", copied)
        save_file({k: v.contiguous() for k, v in state.items()}, Path(copied, "model.safetensors"))
        model, report = load_transformers_model(
            copied, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    return model.eval()
