"""A finished run, opened again: what was trained, on which base, and the model on one device, as training had it.

For the commands that come after training. A RUN is the --output_dir of train.py; its config.yaml says how it was
made, and the adapter's metadata which base it belongs to.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig

from bnb_files import check_stored_quantization
from checkpoint import ADAPTER, BLOCKS, base_digest
from command_line import describe, parse
from config import TOY_MODEL, Config, UserError
from data import toy_texts
from launch import Place
from model_files import CheckpointFiles, fetch_weights, find_model
from models import build_on_meta, check_weights, read_config
from models.adapters import apply_method, check_packing
from models.family import Family
from models.lora import LoRALinear
from models.toy import toy_model
from precision import Precision
from quantize_layers import load_weights


@dataclass(frozen=True)
class Run:
    """folder: the RUN; base: the folder of the model it was trained from; files: the weights of that model, or,
    where the run saved a whole model, of the RUN itself; adapter: its safetensors file, or None."""

    folder: Path
    config: Config
    base: Path
    model_config: PretrainedConfig
    family: Family
    files: CheckpointFiles
    adapter: Path | None


def open_run(folder: str | Path, base: str | None = None) -> Run:
    """Reads and checks a RUN. base: a folder or hub id to be used instead of the base that config.yaml names,
    for a base that was moved. Raises UserError if it is no RUN, is half written, or belongs to another base."""
    folder = Path(folder).expanduser()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is no run of train.py (no config.yaml)")
    config, _ = parse(["--config", str(folder / "config.yaml")])
    if config.llama_pro_save == "blocks":
        raise UserError(
            f"{folder}: holds new blocks only; put them into their model first: python block_expansion.py"
            f" --model_name {config.model_name} --blocks {folder / BLOCKS} --output_dir ..."
        )
    whole = config.method.saves == "model"
    name = str(folder) if whole else base or config.model_name
    saved = folder / ("config.json" if whole else "adapter_config.json")
    if not saved.is_file():
        raise UserError(
            f"{folder}: holds no result ({saved.name}): the run was cut, or ran with --save_model false"
        )
    run = _open_model(folder, config, name)
    if not whole:
        run = dataclasses.replace(run, adapter=folder / ADAPTER)
        check_packing(build_on_meta(run.model_config, run.family), run.family, config, run.files)
        _check_base(run.adapter, run.model_config, run.files)
    return run


def open_base(run: Run, base: str | None = None) -> Run:
    """The model that a run which saved a whole model was trained from, with nothing on it. Raises UserError."""
    return _open_model(run.folder, run.config, base or run.config.model_name)


def _open_model(folder: Path, config: Config, name: str) -> Run:
    """The Run of the model `name` by itself: a folder, a hub id or the demo model."""
    base = toy_model(toy_texts()) if name == TOY_MODEL else find_model(name)
    model_config, family = read_config(base)
    check_stored_quantization(getattr(model_config, "quantization_config", None), base)
    fetch_weights(name, base)
    files = CheckpointFiles(base)
    check_weights(build_on_meta(model_config, family), files, family)
    return Run(folder, config, base, model_config, family, files, None)


def _check_base(adapter: Path, model_config: PretrainedConfig, files: CheckpointFiles) -> None:
    if not adapter.is_file():
        raise UserError(f"{adapter}: is missing: the run is half written")
    try:
        with safe_open(adapter, framework="pt") as f:
            digest = (f.metadata() or {}).get("base_digest")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{adapter}: truncated or not a safetensors file ({e})") from None
    if digest != base_digest(model_config, files):
        raise UserError(f"{adapter}: was trained on another model than {files.folder}")


def read_adapter(run: Run) -> dict[str, torch.Tensor]:
    """{PEFT's name: tensor} of the run's adapter."""
    with safe_open(run.adapter, framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def load_model(run: Run, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The trained model in evaluation mode, on one device, unsharded: the base packed as in training, computing
    in dtype, under the adapter; or the whole saved model in dtype. Raises UserError if the adapter does not
    fit the model."""
    precision, place = Precision(dtype, dtype), Place(0, 1, 0, 1, device)
    model = build_on_meta(run.model_config, run.family)
    if run.adapter:
        apply_method(
            model, run.family, run.config, dataclasses.replace(precision, trained=torch.float32), run.files
        )
    else:
        model.to(dtype).requires_grad_(False)
    load_weights(model, run.family, run.files, place, device, run.config.seed, workers=1)
    if run.adapter:
        set_adapter(model, run)
    return model.eval()


@torch.no_grad()
def set_adapter(model: nn.Module, run: Run) -> None:
    """Puts the run's adapter in the place of the one that `model`, of another run of the same base and the same
    options of the adapter, has. Raises UserError if it does not fit."""
    tensors = read_adapter(run)
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            prefix = f"base_model.model.{path}."
            own = {
                n.removeprefix(prefix): tensors.pop(n) for n in [n for n in tensors if n.startswith(prefix)]
            }
            try:
                module.set_peft_tensors(own)
            except (KeyError, RuntimeError) as e:
                raise UserError(f"{run.adapter}: does not fit {path} of {run.base} ({e})") from None
    if tensors:
        raise UserError(f"{run.adapter}: {next(iter(tensors))} has no place in {run.base}")


def check_adapter(run: Run) -> None:
    """Raises UserError if the adapter's names and shapes are not those of this model with the run's options. Reads
    headers only."""
    model = build_on_meta(run.model_config, run.family)
    apply_method(model, run.family, run.config, Precision(torch.float32, torch.float32), run.files)
    wanted = {
        f"base_model.model.{path}.{name}": list(tensor.shape)
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for name, tensor in module.peft_tensors(lambda parameter: parameter.detach()).items()
    }
    with safe_open(run.adapter, framework="pt") as f:
        found = {name: list(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{run.adapter}: {name} has shape {found.get(name, 'none: it is missing')}; config.yaml and"
                f" {run.base} say {wanted.get(name, 'that there is none')}"
            )


def load_tokenizer(run: Run):
    """Raises UserError for one that is missing or damaged."""
    try:
        return AutoTokenizer.from_pretrained(run.base, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # the tokenizers library has no narrower one for a damaged tokenizer.json
        raise UserError(f"{run.base}: no usable tokenizer ({describe(e)})") from None
