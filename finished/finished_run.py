"""Open a finished run: its options, its base model and its trained model.

The commands after training use it. A RUN is the --output_dir of train.py: config.yaml has its options, and
the adapter's metadata identifies its base model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from checkpoints.adapter import check_adapter_tensors, load_adapter
from checkpoints.trained_model import open_blocks
from data.formats import RenderContext
from data.image_format import ImageFormat
from data.stop_ids import collect_stop_ids
from data.template_choice import read_trained_tokenizer
from files.base_model import (
    STRUCTURE_KEY,
    check_base,
    no_head_message,
    tokenizer_remark,
    trained_without_head,
)
from files.config_parts import eos_token_id, text_config
from files.model_folder import CheckpointFiles, digest_structure, fetch_weights, find_model, pin_model_name
from files.names import ADAPTER, ADAPTER_CONFIG, BEST, BLOCKS, CONFIG, OPTIONS
from files.saved_adapter import (
    PEFT_PREFIX,
    UNSET,
    TensorHeaders,
    check_settings,
    read_adapter_header,
    read_adapter_tensors,
)
from files.tensors import read_header
from launch.precision import Precision
from launch.ranks import RankInfo
from models.adapters import apply_method, check_quantization
from models.experts import stack_experts
from models.family import Family
from models.llama_pro import new_layers
from models.peft_names import peft_exclusions, peft_full_modules, peft_rank_pattern, peft_target_parameters
from models.registry import build_on_meta, open_weights, read_config
from models.routers import find_routers
from models.vocabulary import (
    use_base_parameters,
    use_trained_parameters,
    vocabulary_modules,
)
from options.config import FIELDS, Config
from options.errors import UserError
from options.limits import MAX_CONFIG_BYTES, read_json
from options.train import parse
from options.yaml_file import read_options_file
from quantize_layers import load_weights
from training.run_images import read_image_format

# Options that determine the model and its prompts. A run writes every option, so a config.yaml without one of
# these is damaged.
REQUIRED_OPTIONS = (
    "train_type", "lora_rank", "lora_alpha", "lora_target_modules", "n_bits", "group_size", "llama_pro_save",
    "model_name", "dataset", "dataset_format", "context_length", "precision",
)  # fmt: skip
assert set(REQUIRED_OPTIONS) <= FIELDS.keys()


@dataclass(frozen=True)
class Run:
    """A RUN that was opened and checked.

    Attributes:
        folder: the RUN's folder.
        config: its options.
        base: folder of the model it was trained from; the RUN itself if it saved a whole model.
        model_config: config of the model in `base`.
        family: family of that model.
        files: weights in `base`, with the RUN's new blocks in place of the base's.
        adapter: the adapter's safetensors file, or None.
        untied_head: name of the head's tensor if config.json ties a head that the files hold
            (`open_weights`), or None.
        is_base_verified: whether the base is known to hold the weights that the RUN was trained on.
    """

    folder: Path
    config: Config
    base: Path
    model_config: PretrainedConfig
    family: Family
    files: CheckpointFiles
    adapter: Path | None
    untied_head: str | None = None
    is_base_verified: bool = True


def open_run(folder: str | Path, base_model: str | None = None) -> Run:
    """Open and check a RUN.

    base_model: folder or hub id to use in place of the base that config.yaml names, for one that was moved.
    Raises UserError if the folder is no RUN, is half written, or belongs to another base.
    """
    folder = Path(folder).expanduser()
    if not (folder / OPTIONS).is_file():
        raise UserError(f"{folder}: is no run of train.py (no {OPTIONS})")
    config = _read_options(folder / OPTIONS)
    blocks = config.llama_pro_save == "blocks"
    saves_model = config.method.saves == "model" and not blocks
    saved = folder / (CONFIG if saves_model else BLOCKS if blocks else ADAPTER_CONFIG)
    if not saved.is_file():
        has_best = (folder / BEST / OPTIONS).is_file()
        best = f"; {folder / BEST} holds the weights of the best evaluation so far" if has_best else ""
        raise UserError(
            f"{folder}: holds no result ({saved.name}): the run was interrupted, or ran with"
            f" --save_model false{best}"
        )
    run = _open_model(folder, config, None if saves_model else base_model or config.model_name, base_model)
    if saves_model:
        return run
    if blocks:
        return _overlay_new_blocks(run)
    path = folder / ADAPTER
    metadata, tensors = _read_run_header(path)
    run = _verify_base(dataclasses.replace(run, adapter=path), metadata, path)
    _check_adapter_tensors(run, tensors)
    _check_adapter_config(saved, run)
    _print_tokenizer_remark(run, metadata)
    return run


def open_base(run: Run, base_model: str | None = None) -> Run:
    """Open the base model of a RUN that saved a whole model or new blocks, without the trained weights.

    base_model: as for `open_run`. Raises UserError, also if it is another model. Prints a remark if an
    earlier version trained the whole model without the base's head.
    """
    opened = _open_model(run.folder, run.config, base_model or run.config.model_name, base_model)
    if run.base != run.folder:  # new blocks: `open_run` has verified their base
        return dataclasses.replace(opened, is_base_verified=run.is_base_verified)
    weights = run.files.folder / next(iter(run.files.tensors.values())).file
    metadata = read_header(weights)[0].get("__metadata__") or {}
    # An older RUN does not record its base's config and shapes: they equal its own.
    metadata = {STRUCTURE_KEY: digest_structure(run.model_config, run.files)} | metadata
    head = opened.untied_head
    if head and trained_without_head(metadata, opened.model_config, opened.files, head):
        print(f"{run.folder}: {no_head_message(head, opened.base)}; here the base has it", file=sys.stderr)
        return dataclasses.replace(opened, is_base_verified=False)
    return _verify_base(opened, metadata, run.folder)


def _verify_base(run: Run, metadata: dict[str, str], result: Path) -> Run:
    """Compare the run's base with the metadata of its result; return the run with `is_base_verified` set.

    Prints a remark on parts that could not be compared. Raises UserError for another base.
    """
    remark = check_base(metadata, run.model_config, run.files, str(result), "--base_model", run.untied_head)
    if remark:
        print(remark, file=sys.stderr, flush=True)
    return dataclasses.replace(run, is_base_verified=not remark)


def _print_tokenizer_remark(run: Run, metadata: dict[str, str]) -> None:
    """Print a remark if the base's tokenizer files changed since training.

    Not if they are unreadable: the code that needs them reports that.
    """
    if remark := tokenizer_remark(metadata, run.base):
        with contextlib.suppress(UserError):
            load_tokenizer(run)
            print(remark, file=sys.stderr, flush=True)


def _open_model(folder: Path, config: Config, name: str | None, base_model: str | None) -> Run:
    """Open the model `name`: a hub id, a folder or the demo model. None means the model saved in `folder`.

    `folder` itself cannot be the name: it may equal a hub id or the demo model's name. base_model:
    --base_model.
    """
    with _name_base_model_in_errors(name, base_model):
        base = folder if name is None else find_model(name)
        model_config, family = read_config(base, images=config.has_images)
        if name is not None:
            fetch_weights(pin_model_name(name, base), base)
        files, _, untied_head = open_weights(base, model_config, family)
    return Run(folder, config, base, model_config, family, files, None, untied_head)


@contextlib.contextmanager
def _name_base_model_in_errors(name: str | None, base_model: str | None) -> Iterator[None]:
    """Rewrite a UserError about --model_name to name --base_model.

    Commands on a RUN have no --model_name. Args: as for `_open_model`.
    """
    try:
        yield
    except UserError as e:
        text = str(e)
        if not text.startswith("--model_name"):
            raise
        detail = text.removeprefix("--model_name")
        if name is None or base_model:
            raise UserError(detail.lstrip() if name is None else f"--base_model{detail}") from None
        raise UserError(f"base model{detail}; if it was moved, name its folder: --base_model") from None


def _overlay_new_blocks(run: Run) -> Run:
    """Return the run with its trained blocks in place of the base's in `files`, and its base verified.

    Raises UserError if the blocks belong to another model.
    """
    path = run.folder / BLOCKS
    blocks, metadata = open_blocks(path, run.files, run.family, new_layers(run.model_config))
    run = _verify_base(run, metadata, path)
    _print_tokenizer_remark(run, metadata)
    return dataclasses.replace(run, files=run.files.overlaid_by(blocks))


def _read_options(path: Path) -> Config:
    """Read config.yaml. Raises UserError, which names the file, also without one of REQUIRED_OPTIONS."""
    try:
        config, _ = parse(["--config", str(path)])
    except UserError as e:
        text = str(e).removeprefix("--config ")
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    written = read_options_file(str(path))
    _check_required_options(path, written)
    if "empty_thinking" not in written:  # earlier versions learned it
        return dataclasses.replace(config, empty_thinking="learn")
    return config


def _check_required_options(path: Path, written: Mapping) -> None:
    """Raise UserError if config.yaml lacks one of REQUIRED_OPTIONS: the defaults may not be the run's.

    written: its options, {name: value}.
    """
    missing = next((name for name in REQUIRED_OPTIONS if name not in written), None)
    if missing:
        raise UserError(f"{path}: has no {missing}, which a run writes: the file is damaged")


def _check_adapter_config(path: Path, run: Run) -> None:
    """Raise UserError if adapter_config.json contradicts config.yaml, or has settings that no run writes.

    path: adapter_config.json.
    """
    config, model = run.config, build_on_meta(run.model_config, run.family)
    expected = {
        "modules_to_save": peft_full_modules(model, run.family, config),
        "exclude_modules": peft_exclusions(model, run.family, config),
        "target_parameters": peft_target_parameters(run.family, config),
        **({"rank_pattern": pattern} if (pattern := peft_rank_pattern(config)) else {}),
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "use_rslora": bool(config.use_rslora),
        "use_dora": config.method.adapter == "dora",
    }
    adapter_config = read_json(path, MAX_CONFIG_BYTES)
    for name, value in expected.items():
        if adapter_config.get(name) != value and (
            value not in UNSET or adapter_config.get(name) not in UNSET
        ):
            found = f"{name} {adapter_config.get(name)}"
            raise UserError(f"{path}: {found}, but {OPTIONS} makes it {value}: one of them is damaged")
    check_settings(adapter_config, path)


def _read_run_header(path: Path) -> tuple[dict[str, str], TensorHeaders]:
    """Return `read_adapter_header` of a RUN's file. Raises UserError if it is missing, or names no base."""
    if not path.is_file():
        raise UserError(f"{path}: is missing: the run is half written")
    metadata, tensors = read_adapter_header(path)
    if STRUCTURE_KEY not in metadata:
        raise UserError(f"{path}: does not say which model it was trained on, as adapters of train.py do")
    return metadata, tensors


def _check_adapter_tensors(run: Run, found: TensorHeaders) -> None:
    """Raise UserError unless the adapter holds exactly the tensors that the run's options create."""
    assert run.adapter is not None
    model = build_on_meta(run.model_config, run.family)
    check_quantization(model, run.family, run.config, run.files)
    apply_method(model, run.family, run.config, Precision(torch.float32, torch.float32), run.files)
    check_adapter_tensors(found, model, run.family, run.adapter, run.base, OPTIONS)


def read_adapter(run: Run) -> dict[str, torch.Tensor]:
    """Read the run's adapter as {PEFT's name: tensor}. Raises UserError if it holds NaN or infinity."""
    assert run.adapter is not None
    return dict(read_adapter_tensors(run.adapter))


def load_model(run: Run, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the trained model in evaluation mode, unsharded, on one device.

    With an adapter the base is packed as in training and computes in `dtype`; otherwise the saved model is in
    `dtype`.
    """
    precision, rank_info = Precision(dtype, dtype), RankInfo(0, 1, 0, 1, device)
    model = build_on_meta(run.model_config, run.family)
    if run.adapter:
        # The base's embedding, head and routers are loaded first; `set_adapter` adds those that were trained.
        config = dataclasses.replace(run.config, train_embeddings=False, train_router=False)
        precision = dataclasses.replace(precision, trained=torch.float32)
        apply_method(model, run.family, config, precision, run.files)
    else:
        model.to(dtype).requires_grad_(False)  # type: ignore[arg-type]
        run.family.set_fixed_parameters(model, torch.Tensor.float)
        stack_experts(model, {}, dtype)
    load_weights(model, run.family, run.files, rank_info, device, run.config.seed, workers=1)
    if run.adapter:
        set_adapter(model, run)
    return model.eval()


def set_adapter(model: PreTrainedModel, run: Run) -> None:
    """Load the run's adapter into `model`, which has an adapter of the same base and adapter options."""
    assert run.adapter is not None
    for module in (*vocabulary_modules(model, run.family).values(), *find_routers(model).values()):
        use_base_parameters(module)
    load_adapter(model, run.adapter, use_trained_parameters)


def select_module_tensors(module: str, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Select one linear's tensors from `read_adapter`'s: {PEFT's name below the module: tensor}."""
    prefix = f"{PEFT_PREFIX}{module}."
    found = {name.removeprefix(prefix): t for name, t in adapter.items() if name.startswith(prefix)}
    # PEFT puts a second adapter of a module, on another parameter, below the first.
    return {name: t for name, t in found.items() if not name.startswith("base_layer.")}


def find_stop_ids(run: Run, tokenizer) -> list[int]:
    """Return the ids of the tokens that end an answer: those the run learned, and the base's own."""
    context = RenderContext(tokenizer, day=run.config.chat_date)
    return collect_stop_ids(run.base, eos_token_id(run.model_config), run.config.dataset_format, context)


def read_run_image_format(run: Run) -> tuple[ImageFormat | None, str]:
    """Return (how the run takes images, ""); (None, why) if it takes none."""
    if not run.config.has_images:
        return None, f"{run.folder} was trained on texts, and takes no image"
    return read_image_format(run.config, run.model_config, run.family, run.base)


def load_tokenizer(run: Run):
    """Load the base's tokenizer, with the run's --chat_template. Raises UserError if it is unusable."""
    rows = text_config(run.model_config).vocab_size
    return read_trained_tokenizer(run.base, str(run.base), run.config.chat_template, rows)
