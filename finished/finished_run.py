"""A finished run, opened again: what was trained, on which base, and the model as training had it.

For the commands that come after training. A RUN is the --output_dir of train.py; its config.yaml says how it
was made, and the adapter's metadata which base it belongs to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from checkpoints.trained_model import open_blocks
from data.examples import toy_texts
from data.formats import RenderContext
from data.stops import stop_tokens
from files.base_model import (
    STRUCTURE_KEY,
    check_base,
    no_head_message,
    tokenizer_remark,
    trained_without_head,
)
from files.bnb_weights import detect_bnb_packing
from files.finite import is_finite
from files.model_folder import CheckpointFiles, digest_structure, fetch_weights, find_model, pin_model_name
from files.names import ADAPTER, ADAPTER_CONFIG, BLOCKS, CONFIG, OPTIONS
from files.tensors import read_header
from files.tokenizer import read_tokenizer
from launch.precision import Precision
from launch.ranks import RankInfo
from models.adapters import apply_method, check_quantization
from models.family import Family
from models.llama_pro import new_layers
from models.lora import LoRALinear
from models.registry import build_on_meta, open_weights, read_config
from models.toy import make_toy_model
from options.config import FIELDS, TOY_MODEL, Config
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json
from options.train import parse
from options.yaml_file import read_options_file
from quantize_layers import load_weights

PREFIX = "base_model.model."  # of PEFT's names
ADAPTER_DTYPES = ("F32", "BF16", "F16", "F64")  # safetensors' names
# What makes the model and its prompts. A run writes every option, so a config.yaml without one of these is damaged.
NEEDED = (
    "train_type", "lora_rank", "lora_alpha", "lora_target_modules", "n_bits", "group_size", "llama_pro_save",
    "model_name", "dataset", "dataset_format", "context_length", "precision",
)  # fmt: skip
assert set(NEEDED) <= FIELDS.keys()


@dataclass(frozen=True)
class Run:
    """folder: the RUN; base: the folder of the model it was trained from, or, where the run saved a whole
    model, the RUN itself; files: the weights in base, with a RUN's new blocks in the place of theirs;
    adapter: its safetensors file, or None; own_head: as `open_weights` returns it for the files; recognised:
    whether the weights of the base are known to be those that it was trained on."""

    folder: Path
    config: Config
    base: Path
    model_config: PretrainedConfig
    family: Family
    files: CheckpointFiles
    adapter: Path | None
    own_head: str | None = None
    recognised: bool = True


def open_run(folder: str | Path, base: str | None = None) -> Run:
    """Reads and checks a RUN. base: a folder or hub id to be used instead of the base that config.yaml names,
    for one that was moved. Raises UserError if it is no RUN, is half written, or belongs to another base."""
    folder = Path(folder).expanduser()
    if not (folder / OPTIONS).is_file():
        raise UserError(f"{folder}: is no run of train.py (no {OPTIONS})")
    config = _read_options(folder / OPTIONS)
    blocks = config.llama_pro_save == "blocks"
    whole = config.method.saves == "model" and not blocks
    saved = folder / (CONFIG if whole else BLOCKS if blocks else ADAPTER_CONFIG)
    if not saved.is_file():
        raise UserError(
            f"{folder}: holds no result ({saved.name}): the run was cut, or ran with --save_model false"
        )
    run = _open_model(folder, config, None if whole else base or config.model_name, base)
    if whole:
        return run
    if blocks:
        return _with_blocks(run)
    path = folder / ADAPTER
    metadata, tensors = _read_adapter_header(path)
    run = _recognised(dataclasses.replace(run, adapter=path), metadata, path)
    _check_adapter(run, tensors)
    _check_description(saved, config)
    _tell_of_tokenizer(run, metadata)
    return run


def open_base(run: Run, base: str | None = None) -> Run:
    """The model that a run which saved a whole model, or new blocks, was trained from, with nothing on it.
    base: as for `open_run`. Raises UserError, also for another model; tells if an earlier version trained the
    whole model without the base's head."""
    opened = _open_model(run.folder, run.config, base or run.config.model_name, base)
    if run.base != run.folder:  # new blocks, of which `open_run` has compared it
        return dataclasses.replace(opened, recognised=run.recognised)
    weights = run.files.folder / next(iter(run.files.tensors.values())).file
    metadata = read_header(weights)[0].get("__metadata__") or {}
    # An older RUN does not say what its base's config and shapes were: they are its own.
    metadata = {STRUCTURE_KEY: digest_structure(run.model_config, run.files)} | metadata
    head = opened.own_head
    if head and trained_without_head(metadata, opened.model_config, opened.files, head):
        print(f"{run.folder}: {no_head_message(head, opened.base)}; here the base has it", file=sys.stderr)
        return dataclasses.replace(opened, recognised=False)
    return _recognised(opened, metadata, run.folder)


def _recognised(run: Run, metadata: dict[str, str], result: Path) -> Run:
    """`run`, whose base is compared with what the header of its result says; tells what could not be
    compared. Raises UserError for another base."""
    remark = check_base(metadata, run.model_config, run.files, str(result), "--base_model", run.own_head)
    if remark:
        print(remark, file=sys.stderr, flush=True)
    return dataclasses.replace(run, recognised=not remark)


def _tell_of_tokenizer(run: Run, metadata: dict[str, str]) -> None:
    """Prints `tokenizer_remark`, unless the tokenizer cannot be read: what needs it says that."""
    if remark := tokenizer_remark(metadata, run.base):
        with contextlib.suppress(UserError):
            load_tokenizer(run)
            print(remark, file=sys.stderr, flush=True)


def _open_model(folder: Path, config: Config, name: str | None, given: str | None) -> Run:
    """The Run of the model `name` by itself: a hub id, a folder or the demo model; None: of what `folder`
    holds, which may be called like one of these. given: --base_model."""
    with _naming(name, given):
        base = (
            folder if name is None else make_toy_model(toy_texts()) if name == TOY_MODEL else find_model(name)
        )
        model_config, family = read_config(base)
        detect_bnb_packing(getattr(model_config, "quantization_config", None), base)
        if name is not None:
            fetch_weights(pin_model_name(name, base), base)
        files, _, own_head = open_weights(base, model_config, family)
    return Run(folder, config, base, model_config, family, files, None, own_head)


@contextlib.contextmanager
def _naming(name: str | None, given: str | None) -> Iterator[None]:
    """Puts --base_model into errors of finding a model in the place of --model_name, which no command on a
    RUN has. name, given: as for `_open_model`."""
    try:
        yield
    except UserError as e:
        text = str(e)
        if not text.startswith("--model_name"):
            raise
        rest = text.removeprefix("--model_name")
        if name is None or given:
            raise UserError(rest.lstrip() if name is None else f"--base_model{rest}") from None
        raise UserError(f"base model{rest}; if it was moved, name its folder: --base_model") from None


def _with_blocks(run: Run) -> Run:
    """`run` with the tensors of its new blocks in the place of the expanded model's. Raises UserError unless
    the blocks are this model's."""
    path = run.folder / BLOCKS
    blocks, metadata = open_blocks(path, run.files, run.family, new_layers(run.model_config))
    run = _recognised(run, metadata, path)
    _tell_of_tokenizer(run, metadata)
    return dataclasses.replace(run, files=run.files.overlaid_by(blocks))


def _read_options(path: Path) -> Config:
    """Raises UserError that names the file."""
    try:
        config, _ = parse(["--config", str(path)])
    except UserError as e:
        text = str(e).removeprefix("--config ")
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    _check_lost(path)
    return config


def _check_lost(path: Path) -> None:
    """Raises UserError where config.yaml, which is YAML, has lost an option: its default may be another."""
    given = read_options_file(str(path))
    lost = next((name for name in NEEDED if name not in given), None)
    if lost:
        raise UserError(f"{path}: has no {lost}, which a run writes: the file is damaged")


def _check_description(path: Path, config: Config) -> None:
    """Raises UserError where config.yaml says another thing of the adapter than its own description: one of
    them is damaged."""
    wanted = {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "use_dora": config.method.adapter == "dora",
    }
    described = read_json(path, MAX_CONFIG_BYTES)
    for name, value in wanted.items():
        if described.get(name) != value:
            found = f"{name} {described.get(name)}"
            raise UserError(f"{path}: {found}, but {OPTIONS} makes it {value}: one of them is damaged")


def _read_adapter_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[list[int], str]]]:
    """(metadata, {tensor: (shape, safetensors' name of its dtype)}) of an adapter's file. Raises UserError
    unless the file is whole and says which model it was trained on."""
    if not path.is_file():
        raise UserError(f"{path}: is missing: the run is half written")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            tensors = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or not a safetensors file ({e})") from None
    if STRUCTURE_KEY not in metadata:
        raise UserError(f"{path}: does not say which model it was trained on, as adapters of train.py do")
    return metadata, tensors


def _check_adapter(run: Run, found: dict[str, tuple[list[int], str]]) -> None:
    """Raises UserError unless the adapter holds exactly the tensors, by name and shape, of numbers with a
    fraction, that the run's options make of its base. found: as `_read_adapter_header` gives it."""
    path, model = run.adapter, build_on_meta(run.model_config, run.family)
    check_quantization(model, run.family, run.config, run.files)
    apply_method(model, run.family, run.config, Precision(torch.float32, torch.float32), run.files)
    wanted = {
        f"{PREFIX}{name}.{part}": list(tensor.shape)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for part, tensor in module.peft_tensors(lambda parameter: parameter.detach()).items()
    }
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted:
            raise UserError(f"{path}: {name} has no place in {run.base} with the options of {OPTIONS}")
        if name not in found:
            raise UserError(f"{path}: {name} is missing")
        shape, dtype = found[name]
        if shape != wanted[name]:
            raise UserError(
                f"{path}: {name} has shape {shape}, but {run.base} and {OPTIONS} ask for {wanted[name]}"
            )
        if dtype not in ADAPTER_DTYPES:  # whole numbers would be taken for weights
            raise UserError(
                f"{path}: {name} is stored as {dtype}; expected one of {', '.join(ADAPTER_DTYPES)}"
            )


def read_adapter(run: Run) -> dict[str, torch.Tensor]:
    """{PEFT's name: tensor} of the run's adapter. Raises UserError if it holds what no training leaves."""
    with safe_open(run.adapter, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{run.adapter}: is damaged ({name} holds NaN or infinity)")
    return tensors


def load_model(run: Run, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The trained model in evaluation mode, on one device, unsharded: the base packed as in training,
    computing in dtype, under the adapter; or the whole saved model in dtype."""
    precision, rank_info = Precision(dtype, dtype), RankInfo(0, 1, 0, 1, device)
    model = build_on_meta(run.model_config, run.family)
    if run.adapter:
        apply_method(
            model, run.family, run.config, dataclasses.replace(precision, trained=torch.float32), run.files
        )
    else:
        model.to(dtype).requires_grad_(False)  # type: ignore[arg-type]
    load_weights(model, run.family, run.files, rank_info, device, run.config.seed, workers=1)
    if run.adapter:
        set_adapter(model, run)
    return model.eval()


@torch.no_grad()
def set_adapter(model: nn.Module, run: Run) -> None:
    """Puts the run's adapter in the place of the one that `model`, of another run of the same base and the
    same options of the adapter, has."""
    tensors = read_adapter(run)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.set_peft_tensors(tensors_of(name, tensors))


def tensors_of(module: str, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{PEFT's name below the layer: tensor} of one linear, out of what `read_adapter` gave."""
    prefix = f"{PREFIX}{module}."
    return {name.removeprefix(prefix): t for name, t in adapter.items() if name.startswith(prefix)}


def stops_of(run: Run, tokenizer) -> list[int]:
    """Ids of the tokens that the run learned to end an answer with, and its base's own."""
    context = RenderContext(tokenizer, day=run.config.chat_date)
    return stop_tokens(run.base, run.model_config.eos_token_id, run.config.dataset_format, context)


def load_tokenizer(run: Run):
    """Raises UserError for one that is missing or damaged."""
    return read_tokenizer(run.base, str(run.base))
