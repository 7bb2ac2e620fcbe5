"""export.py: a merged model folder of a finished run, or its adapter with a model card."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from checkpoints import model_writer
from checkpoints.model_writer import (
    TensorEntry,
    copy_small_files,
    list_small_files,
    to_json_text,
    write_model,
)
from data.sources import find_recipe
from data.stops import generation_config
from data.tokenizing import prepare
from files.atomic_writes import write_text
from files.disk_room import check_writable
from files.hub_errors import HUB_ERRORS
from files.model_folder import CheckpointFiles, pin_model_name
from files.names import ADAPTER, ADAPTER_CONFIG, CONFIG, TOKENIZER_FILES, split_revision
from files.tokenizer import compare_with_files
from finished.export_folder import check_space, check_unused, whole_or_nothing
from finished.finished_run import Run, load_tokenizer, open_run, read_adapter, stops_of
from finished.layerwise import compare, plain_logits, trained_logits
from finished.merge import merged_entries
from finished.model_card import card
from launch.program import print_error, quiet_libraries
from models.redundant import sync_tied_embeddings
from models.registry import read_config
from options.errors import UserError, describe
from options.export import Options
from options.limits import MAX_CONFIG_BYTES, read_json

PROMPTS = (
    "The capital of France is",
    "Below is an instruction that describes a task. Write a response that completes it.",
    "def fibonacci(n):",
    "In 1969, two people walked on the moon.",
)


def check(options: Options) -> Run:
    """All that can be wrong, found before anything is written. Raises UserError."""
    out = options.out
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; use cpu")
    check_writable(out, "--out")
    check_unused(out, options.overwrite)
    if options.push_to_hub:
        _check_hub(options.push_to_hub)
    run = open_run(options.run, options.base_model)
    if options.to == "adapter" and run.adapter:
        read_adapter(run)  # copied as it is, but not damaged
    for what, folder in (("RUN", run.folder.resolve()), ("the base model", run.base.resolve())):
        if folder in (out.resolve(), *out.resolve().parents):
            raise UserError(f"--out {out}: is in the folder of {what}; choose another")
    if not run.adapter:
        _check_whole(options, run)
        return run
    if run.files.packed and options.base == "original":
        raise UserError(
            f"--base original: {run.base} holds 4-bit weights only; leave the option out, or name the original"
            " model with --base_model"
        )
    return run


def _check_whole(options: Options, run: Run) -> None:
    """Of a run that saved a whole model, or its new blocks."""
    whole = run.base == run.folder
    is_what = "is a whole model" if whole else "holds new blocks"
    if options.to == "adapter":
        raise UserError(f"{run.folder}: {is_what}, trained without an adapter; use --to merged")
    if options.base_model and whole:
        raise UserError(f"--base_model has no effect: {run.folder} is a whole model; leave it out")
    if options.base == "dequantized" and not run.config.method.quantizer:
        raise UserError(
            f"--base dequantized has no effect: {run.folder} {is_what}, trained on a model that was never packed"
        )


def _check_hub(repo: str) -> None:
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


# What is written


def plan_dtypes(options: Options, run: Run) -> Callable[[torch.dtype], torch.dtype]:
    """Stored dtype -> dtype to write."""
    wanted = getattr(run.model_config, "dtype", None)
    unpacked = wanted if wanted in (torch.float32, torch.float16) else torch.bfloat16

    def dtype_of(stored: torch.dtype) -> torch.dtype:
        if options.dtype:
            return getattr(torch, options.dtype)
        stored = unpacked if stored == torch.uint8 else stored
        return stored if options.to == "merged" or stored.itemsize == 2 else torch.bfloat16

    return dtype_of


def model_config(run: Run, entries: dict[str, TensorEntry]) -> dict:
    """config.json of the merged model: the base's, but of weights that are not packed, in their dtype."""
    raw = read_json(run.base / CONFIG, MAX_CONFIG_BYTES)
    raw = sync_tied_embeddings(raw, run.model_config)
    raw.pop("quantization_config", None)
    raw.setdefault("architectures", [run.family.model_class.__name__])
    if any(entry.dtype != run.files.tensors[name].dtype for name, entry in entries.items()):
        largest = max(entries.values(), key=lambda entry: entry.nbytes).dtype
        raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(largest).removeprefix("torch.")
    return raw


def merged_base(run: Run, options: Options) -> str:
    return options.base or ("dequantized" if run.adapter else "original")


def write_merged(
    run: Run, options: Options, folder: Path, device: torch.device, small_files: dict[str, str]
) -> None:
    adapter = read_adapter(run) if run.adapter else {}
    base = merged_base(run, options)
    entries = merged_entries(run, adapter, base == "dequantized", plan_dtypes(options, run), device)
    size = sum(e.nbytes for e in entries.values()) + sum(p.stat().st_size for p in list_small_files(run.base))
    check_space(options.out, size)
    small_files = small_files | {CONFIG: to_json_text(model_config(run, entries))}
    write_model(
        folder, model_writer.split_into_files(entries, model_writer.SHARD_BYTES), run.base, small_files
    )
    what = "A complete model folder: `AutoModelForCausalLM.from_pretrained` loads it."
    if run.adapter:
        what += f" The adapter is merged into the {base} weights."
    write_card(run, options, folder, what, "transformers")


def write_card(run: Run, options: Options, folder: Path, what: str, library: str) -> None:
    base = pin_model_name(options.base_model, run.base) if options.base_model else run.config.model_name
    text = card(run.config, run.folder, base, options.out.resolve().name, what, library)
    write_text(folder / "README.md", text)


def write_adapter(run: Run, options: Options, folder: Path, small_files: dict[str, str]) -> None:
    assert run.adapter is not None
    path = run.folder / ADAPTER_CONFIG
    described = read_json(path, MAX_CONFIG_BYTES)
    try:
        named = described["base_model_name_or_path"], described.get("revision")
    except LookupError as e:
        raise UserError(f"{path}: not an adapter's description ({describe(e)})") from None
    if options.base_model:
        named = split_revision(pin_model_name(options.base_model, run.base))
    described["base_model_name_or_path"], described["revision"] = named
    check_space(
        options.out, run.adapter.stat().st_size + sum(p.stat().st_size for p in list_small_files(run.base))
    )
    shutil.copyfile(run.adapter, folder / ADAPTER)
    copy_small_files(run.base, folder, small_files, TOKENIZER_FILES)
    what = (
        "A LoRA or DoRA adapter in PEFT's format (adapter_config.json, adapter_model.safetensors):"
        " `PeftModel.from_pretrained(base, folder)` puts it over its base model."
    )
    write_card(run, options, folder, what, "peft")
    write_text(folder / ADAPTER_CONFIG, json.dumps(described, indent=2) + "\n")


# The check


def check_ids(run: Run) -> tuple[list[list[int]], str]:
    """(tokens of a few texts, what they are): rows of the run's data where that is a local file."""
    tokenizer, config = load_tokenizer(run), run.config
    with contextlib.suppress(UserError):  # moved or changed since the run
        recipe, file = find_recipe(config.dataset)
        if file or recipe.fill:
            length = min(config.context_length, 256)
            rows = prepare(config.dataset, config.dataset_format, 4, length, tokenizer, config.chat_date)
            return [part.tolist() for part in rows.tokens.split(rows.lengths().tolist())], "rows of the data"
    return [ids for ids in tokenizer(list(PROMPTS))["input_ids"] if ids], "fixed prompts"


def logit_difference(run: Run, out: Path, device: torch.device) -> str:
    """A line on how far the written model's logits are from those of the model that was trained, or, where
    the base may be another one, of the RUN over it."""
    rows, what = check_ids(run)
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)  # padded on the right, where nothing looks
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    trained = trained_logits(run, read_adapter(run) if run.adapter else {}, ids, device)
    model = "the trained model" if run.recognised else f"the run over {run.base}"
    written, family = read_config(out)  # not the run's: what is wrong in the file is to show
    difference, largest = compare(
        trained, plain_logits(written, family, CheckpointFiles(out), ids, device), lengths
    )
    return (
        f"largest logit difference from {model}: {difference:.4g}, of logits up to {largest:.4g}"
        f" ({len(rows)} {what}, {sum(lengths)} tokens, computed in fp32)"
    )


# The command


def push(repo: str, out: Path, names: list[str]) -> str:
    """Uploads those files. Returns where they are."""
    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=out, allow_patterns=names)
    except HUB_ERRORS as e:
        reason = str(e).strip().partition("\n")[0]
        raise UserError(f"--push_to_hub {repo}: failed ({reason}); the folder is whole in {out}") from None
    return f"at https://huggingface.co/{repo}"


def export(options: Options) -> None:
    run = check(options)
    tokenizer = load_tokenizer(run)
    use = compare_with_files(run.base, tokenizer)
    for remark in use.remarks:
        print(remark)
    learned = generation_config(run.base, run.model_config, stops_of(run, tokenizer))
    small_files = use.files | learned
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with whole_or_nothing(options.out, options.overwrite) as folder:
        if options.to == "adapter":
            write_adapter(run, options, folder, small_files)
        else:
            write_merged(run, options, folder, device, small_files)
        names = sorted(path.name for path in folder.iterdir())
    size = sum((options.out / name).stat().st_size for name in names)
    print(f"in {options.out}: {', '.join(names)} ({size / 1e9:.3g} GB)", flush=True)
    if options.to != "adapter" and options.check:
        print(logit_difference(run, options.out, device), flush=True)
    if options.push_to_hub:
        print(push(options.push_to_hub, options.out, names))


def run(options: Options) -> int:
    """Returns the exit status: 0, or 2 for something the user can put right."""
    quiet_libraries()
    try:
        export(options)
        return 0
    except UserError as e:
        return print_error(e, verbose=False)
    except OSError as e:  # a full disk
        return print_error(UserError(f"{e.filename or 'writing'}: {e.strerror or e}"), verbose=False)
