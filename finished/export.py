"""export.py: write a finished run as a merged model folder, or its adapter with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from checkpoints import model_writer
from checkpoints.adapter import zero_rows_remark
from checkpoints.model_writer import (
    TensorEntry,
    copy_small_files,
    list_small_files,
    to_json_text,
    with_stored_names,
    write_model,
)
from data.stop_ids import make_generation_config
from data.template_choice import compare_with_base
from files.atomic_writes import write_text
from files.config_parts import weights_dtype, without_quantization
from files.disk_room import check_writable
from files.hub_errors import HUB_ERRORS
from files.model_folder import CheckpointFiles, pin_model_name
from files.names import ADAPTER, ADAPTER_CONFIG, CONFIG, TOKENIZER_FILES, split_revision
from finished.comparison_rows import read_comparison_rows
from finished.export_folder import check_output_folder, check_space, staging_folder
from finished.finished_run import (
    Run,
    find_stop_ids,
    load_tokenizer,
    open_run,
    read_adapter,
    read_run_image_format,
)
from finished.layerwise import LogitInputs, compare_logits, plain_logits, trained_logits
from finished.merge import make_apart_entries, make_merged_entries
from finished.model_card import render_card
from launch.devices import choose_device
from launch.program import print_error, quiet_libraries
from models.checkpoint_names import rename_tensors
from models.redundant import sync_tied_embeddings
from models.registry import build_on_meta, read_config
from monitoring.best_step import find_better_step
from options.errors import UserError, describe
from options.export import Options
from options.limits import MAX_CONFIG_BYTES, read_json


def check_options(options: Options) -> Run:
    """Return the opened RUN. Raises UserError for options that cannot be used with it; writes nothing."""
    out = options.out
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; use cpu")
    check_writable(out, "--out")
    check_output_folder(out, options.overwrite)
    if options.push_to_hub:
        _check_hub_access(options.push_to_hub)
    run = open_run(options.run, options.base_model)
    if options.to == "adapter" and run.adapter:
        read_adapter(run)  # the file is copied unchanged, so check here that it holds no NaN
    for name, folder in (("RUN", run.folder.resolve()), ("the base model", run.base.resolve())):
        if folder in (out.resolve(), *out.resolve().parents):
            raise UserError(f"--out {out}: is in the folder of {name}; choose another")
    if not run.adapter:
        _check_adapterless_options(options, run)
        return run
    if run.files.packed and options.base == "original":
        raise UserError(
            f"--base original: {run.base} holds 4-bit weights only; leave the option out, or name the"
            " original model with --base_model"
        )
    return run


def _check_adapterless_options(options: Options, run: Run) -> None:
    """Raise UserError for a --to, --base or --base_model that a RUN without an adapter cannot use."""
    is_full_model = run.base == run.folder
    content = "is a whole model" if is_full_model else "holds new blocks"
    if options.to == "adapter":
        raise UserError(f"{run.folder}: {content}, trained without an adapter; use --to merged")
    if options.base_model and is_full_model:
        raise UserError(f"--base_model has no effect: {run.folder} is a whole model; leave it out")
    if options.base == "dequantized" and not run.config.method.quantizer:
        raise UserError(
            f"--base dequantized has no effect: {run.folder} {content}, trained on a model that was never"
            " packed"
        )


def _check_hub_access(repo: str) -> None:
    """Raise UserError if `repo` is not owner/name, or if the hub does not accept the login."""
    try:
        validate_repo_id(repo)
        assert repo.count("/") == 1
    except (HFValidationError, AssertionError):
        raise UserError(f"--push_to_hub {repo}: is no repository (owner/name)") from None
    try:
        HfApi().whoami()
    except HUB_ERRORS as e:
        reason = str(e).strip().partition("\n")[0]
        raise UserError(f"--push_to_hub: not logged in, or the hub cannot be reached ({reason})") from None


# Writing


def make_dtype_rule(options: Options, run: Run) -> Callable[[torch.dtype], torch.dtype]:
    """Return the function that maps a stored dtype (uint8: packed in its file) to the dtype to write."""
    config_dtype = weights_dtype(run.model_config)
    unpacked = config_dtype if config_dtype in (torch.float32, torch.float16) else torch.bfloat16

    def dtype_of(stored: torch.dtype) -> torch.dtype:
        """Return the dtype to write for a stored dtype."""
        if options.dtype:
            return getattr(torch, options.dtype)
        stored = unpacked if stored == torch.uint8 else stored
        return stored if options.to == "merged" or stored.itemsize == 2 else torch.bfloat16

    return dtype_of


def make_merged_config(run: Run, entries: dict[str, TensorEntry]) -> dict:
    """Make config.json of the merged model: the base's, without packing, in the written dtype."""
    raw = read_json(run.base / CONFIG, MAX_CONFIG_BYTES)
    raw = sync_tied_embeddings(raw, run.model_config)
    raw = without_quantization(raw)
    raw.setdefault("architectures", [run.family.model_class.__name__])
    if any(entry.dtype != run.files.tensors[name].dtype for name, entry in entries.items()):
        largest = max(entries.values(), key=lambda entry: entry.nbytes).dtype
        for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
            key = "torch_dtype" if "torch_dtype" in part else "dtype"
            if part is raw or key in part:  # the parts of a wrapper
                part[key] = str(largest).removeprefix("torch.")
    return raw


def choose_merge_base(run: Run, options: Options) -> str:
    """Return --base, or its default: dequantized for an adapter, original for full weights."""
    return options.base or ("dequantized" if run.adapter else "original")


def write_merged(
    run: Run, options: Options, folder: Path, device: torch.device, small_files: dict[str, str]
) -> None:
    """Write the complete merged model into `folder`. Raises UserError if the disk has no room.

    Args:
        run: the opened RUN.
        options: options of the command.
        folder: staging folder to write into.
        device: device that merges the weights.
        small_files: {name: text} of tokenizer and generation files that replace the base's.
    """
    adapter = read_adapter(run) if run.adapter else {}
    base = choose_merge_base(run, options)
    entries = make_merged_entries(run, adapter, base == "dequantized", make_dtype_rule(options, run), device)
    config = make_merged_config(run, entries)
    entries = with_stored_names(run.files, entries)
    entries |= make_apart_entries(run.files, make_dtype_rule(options, run), device)
    size = sum(e.nbytes for e in entries.values()) + sum(p.stat().st_size for p in list_small_files(run.base))
    check_space(options.out, size)
    small_files = small_files | {CONFIG: to_json_text(config)}
    write_model(
        folder, model_writer.split_into_files(entries, model_writer.SHARD_BYTES), run.base, small_files
    )
    auto_class = _auto_class_name(run.model_config)
    description = f"A complete model folder: `{auto_class}.from_pretrained` loads it."
    if run.adapter:
        description += f" The adapter is merged into the {base} weights."
    write_card(run, options, folder, description, "transformers")


def _auto_class_name(config: PretrainedConfig) -> str:
    """Return the name of the auto class that loads a model: not all wrappers are causal LMs there."""
    is_causal_lm = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return "AutoModelForCausalLM" if is_causal_lm else "AutoModelForImageTextToText"


def write_card(run: Run, options: Options, folder: Path, description: str, library: str) -> None:
    """Write README.md, the model card, into `folder`.

    Args:
        run: the opened RUN.
        options: options of the command.
        folder: staging folder to write into.
        description: paragraph on the exported files.
        library: the hub's name of the library that loads them.
    """
    base = pin_model_name(options.base_model, run.base) if options.base_model else run.config.model_name
    text = render_card(run.config, run.folder, base, options.out.resolve().name, description, library)
    write_text(folder / "README.md", text)


def write_adapter(run: Run, options: Options, folder: Path, small_files: dict[str, str]) -> None:
    """Write the adapter, its config and the tokenizer into `folder`.

    adapter_config.json names the base of --base_model if that is given.

    Args:
        run: the opened RUN, which has an adapter.
        options: options of the command.
        folder: staging folder to write into.
        small_files: as for `write_merged`.

    Raises UserError if the adapter's config is damaged or the disk has no room.
    """
    assert run.adapter is not None
    path = run.folder / ADAPTER_CONFIG
    adapter_config = read_json(path, MAX_CONFIG_BYTES)
    try:
        name, revision = adapter_config["base_model_name_or_path"], adapter_config.get("revision")
    except LookupError as e:
        raise UserError(f"{path}: not an adapter's description ({describe(e)})") from None
    if options.base_model:
        name, revision = split_revision(pin_model_name(options.base_model, run.base))
    adapter_config["base_model_name_or_path"], adapter_config["revision"] = name, revision
    check_space(
        options.out, run.adapter.stat().st_size + sum(p.stat().st_size for p in list_small_files(run.base))
    )
    shutil.copyfile(run.adapter, folder / ADAPTER)
    copy_small_files(run.base, folder, small_files, TOKENIZER_FILES)
    if remark := zero_rows_remark(load_file(run.adapter)):
        print(remark, flush=True)
    description = (
        "A LoRA or DoRA adapter in PEFT's format (adapter_config.json, adapter_model.safetensors):"
        " `PeftModel.from_pretrained(base, folder)` puts it over its base model, which"
        f" `{_auto_class_name(run.model_config)}.from_pretrained` loads." + (f" {remark}." if remark else "")
    )
    write_card(run, options, folder, description, "peft")
    write_text(folder / ADAPTER_CONFIG, json.dumps(adapter_config, indent=2) + "\n")


# Comparing logits (--check)


def describe_logit_difference(run: Run, out: Path, device: torch.device) -> str:
    """Return a line with the largest difference between the written model's logits and the trained model's.

    If the base was not verified, the reference is the RUN over that base, and the line says so.
    """
    rows = read_comparison_rows(run.config, load_tokenizer(run), read_run_image_format(run)[0])
    inputs = LogitInputs(rows.ids, rows.images, rows.positions)
    trained = trained_logits(run, read_adapter(run) if run.adapter else {}, inputs, device)
    reference = "the trained model" if run.is_base_verified else f"the run over {run.base}"
    # Not the run's config, so that errors in the written file show.
    written, family = read_config(out, images=rows.images is not None)
    files = CheckpointFiles(out)
    rename_tensors(build_on_meta(written, family), family, files)
    plain = plain_logits(written, family, files, inputs, device)
    difference, largest = compare_logits(trained, plain, rows.positions, rows.lengths)
    return (
        f"largest logit difference from {reference}: {difference:.4g}, of logits up to {largest:.4g}"
        f" ({len(rows.lengths)} {rows.description}, {sum(rows.lengths)} tokens, computed in fp32)"
    )


# The command


def upload_to_hub(repo: str, out: Path, names: list[str]) -> str:
    """Upload the files `names` of `out` to a private repository; return "at <address>". Raises UserError."""
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=out, allow_patterns=names)
    except HUB_ERRORS as e:
        reason = str(e).strip().partition("\n")[0]
        raise UserError(f"--push_to_hub {repo}: failed ({reason}); the complete folder is in {out}") from None
    return f"at https://huggingface.co/{repo}"


def export(options: Options) -> None:
    """Check the options, write into a staging folder, compare logits, upload. Raises UserError."""
    run = check_options(options)
    if better := find_better_step(run.folder):
        print(better.describe(), flush=True)
    tokenizer = load_tokenizer(run)
    tokenizer_use = compare_with_base(run.base, str(run.base), tokenizer, run.config.chat_template)
    for remark in tokenizer_use.remarks:
        print(remark)
    generation_files = make_generation_config(run.base, run.model_config, find_stop_ids(run, tokenizer))
    small_files = tokenizer_use.files | generation_files
    device = choose_device(options.device)
    with staging_folder(options.out, options.overwrite) as folder:
        if options.to == "adapter":
            write_adapter(run, options, folder, small_files)
        else:
            write_merged(run, options, folder, device, small_files)
        names = sorted(path.name for path in folder.iterdir())
    size = sum((options.out / name).stat().st_size for name in names)
    print(f"in {options.out}: {', '.join(names)} ({size / 1e9:.3g} GB)", flush=True)
    if options.to != "adapter" and options.check:
        print(describe_logit_difference(run, options.out, device), flush=True)
    if options.push_to_hub:
        print(upload_to_hub(options.push_to_hub, options.out, names))


def run(options: Options) -> int:
    """Run the command. Return the exit status: 0, or 2 for an error that the user can fix."""
    quiet_libraries()
    try:
        export(options)
        return 0
    except UserError as e:
        return print_error(e, verbose=False)
    except OSError as e:  # a full disk
        return print_error(UserError(f"{e.filename or 'writing'}: {e.strerror or e}"), verbose=False)
