"""Read configurations of other training programs, recognise the program, and list their settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from options.errors import UserError
from options.exact_json import number_text, parse_json
from options.foreign_rules import FOREIGN
from options.limits import MAX_OPTIONS_BYTES, check_size, read_text
from options.yaml_file import MAX_DEPTH, Tree, read_tree

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # a pickle; the zip file of torch.save
LAUNCHERS = ("accelerate", "DeepSpeed")
NULL_IS_A_VALUE = ("max_length",)  # settings whose null is not their default: rows are not cut
PROGRAMS = ("axolotl", "TRL", "LLaMA-Factory", *LAUNCHERS)
# A file with one of these keys at its top is of that program; the first row counts.
SIGNS = (
    ("DeepSpeed", ("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size")),
    ("axolotl", ("base_model",)),
    ("LLaMA-Factory", ("finetuning_type", "stage", "cutoff_len", "template", "quantization_bit")),
    ("TRL", ("model_name_or_path", "dataset_name", "dataset_mixture", "dataset_mixer", "learning_rate",
             "per_device_train_batch_size")),
    ("accelerate", ("distributed_type", "compute_environment", "fsdp_config", "deepspeed_config",
                    "num_processes", "mixed_precision")),
)  # fmt: skip

# What a program does with a setting that the file leaves out, where train.py does something else.
_TRANSFORMERS = {
    "per_device_train_batch_size": "8",
    "num_train_epochs": "3",
    "lr_scheduler_type": "linear",
    "warmup_steps": "0",
    "save_steps": "500",
    "eval_strategy": "no",
}
DEFAULTS = {
    "TRL": _TRANSFORMERS
    | {"learning_rate": "2e-5", "max_length": "1024", "use_peft": "false", "bf16": "true"},
    "LLaMA-Factory": _TRANSFORMERS
    | {"learning_rate": "5e-5", "cutoff_len": "2048", "finetuning_type": "lora"},
    "axolotl": {
        "micro_batch_size": "1",
        "num_epochs": "1",
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch_fused",
        "warmup_ratio": "0.03",
        "sequence_len": "512",
        "adapter": "",
        "gradient_checkpointing": "false",
    },
}
ADAPTER_DEFAULTS = {  # used only if an adapter is trained
    "TRL": {"lora_r": "16", "lora_alpha": "32", "lora_dropout": "0.05", "lora_target_modules": "default"},
    "LLaMA-Factory": {"lora_rank": "8", "lora_target": "all"},
    "axolotl": {},
}


@dataclass(frozen=True)
class ForeignFile:
    """A configuration of another program.

    Attributes:
        path: where it is.
        program: one of PROGRAMS.
        tree: what it holds.
    """

    path: Path
    program: str
    tree: dict[str, Tree]

    @property
    def folder(self) -> Path:
        """The folder that it is in."""
        return self.path.parent


def read_foreign_file(name: str) -> ForeignFile:
    """Return a configuration. Raises UserError if it cannot be read or its program is not known."""
    path = Path(name).expanduser()
    tree = _read(path)
    if not isinstance(tree, dict):
        raise UserError(f"{name}: expected `key: value` lines")
    program = next((program for program, keys in SIGNS if any(key in tree for key in keys)), "")
    if "train_type" in tree and not program:
        raise UserError(f"{name}: has train.py's own options: python train.py --config {name}")
    if not program:
        raise UserError(f"{name}: not a configuration of {', '.join(PROGRAMS[:-1])} or {PROGRAMS[-1]}")
    return ForeignFile(path, program, tree)


def read_json_tree(path: Path) -> Tree:
    """Return a JSON file with all scalars as texts, or None. Raises UserError if it is not JSON."""
    try:
        return _as_texts(parse_json(read_text(path, MAX_OPTIONS_BYTES), exact=True), path, 0)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        line = f" line {e.lineno}:" if isinstance(e, json.JSONDecodeError) else ""
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e).splitlines()[0]
        raise UserError(f"{path}:{line} not a valid JSON file ({reason})") from None


def _read(path: Path) -> Tree:
    """Return what a file holds. Raises UserError for a pickle, and for what is not YAML or JSON."""
    start, is_pickle = b"", path.suffix.lower() in PICKLES
    if not is_pickle:
        check_size(path, MAX_OPTIONS_BYTES)
        try:
            with path.open("rb") as file:
                start = file.read(4)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None
    if is_pickle or start.startswith(PICKLE_STARTS):
        advice = "give the YAML or JSON file that the run was started with"
        raise UserError(f"{path}: a pickle can run any code, so none is read; {advice}")
    return read_json_tree(path) if path.suffix.lower() == ".json" else read_tree(str(path))


def _as_texts(value: Any, path: Path, depth: int) -> Tree:
    """Return a JSON value with its scalars as texts. Raises UserError if it is nested too deeply."""
    if depth > MAX_DEPTH:
        raise UserError(f"{path}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {key: _as_texts(each, path, depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_texts(each, path, depth + 1) for each in value]
    if isinstance(value, bool):
        return str(value).lower()
    return value if value is None or isinstance(value, str) else number_text(value)


def list_settings(file: ForeignFile) -> dict[str, str]:
    """Return {foreign name: value} of a file; names of nested settings have dots.

    Nulls are left out, but for those of NULL_IS_A_VALUE, which are the text "null".

    Fields of FSDP get their prefix, and those of accelerate's `deepspeed_config` have none. `auto` in a
    launcher's file means that the training program's own value holds, so it is left out.
    """
    settings: dict[str, str] = {}
    _flatten(file.tree, "", settings)
    if file.program in LAUNCHERS:
        settings = {name: value for name, value in settings.items() if value != "auto"}
    return settings


def _flatten(tree: dict[str, Tree], prefix: str, settings: dict[str, str]) -> None:
    """Add the settings of a mapping to `settings`."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if prefix == "fsdp_" and key.startswith("fsdp_"):
            name = key
        if isinstance(value, dict):
            _flatten(value, {"fsdp_config": "fsdp_", "deepspeed_config": ""}.get(name, f"{name}."), settings)
        elif isinstance(value, list):
            texts = [each for each in value if isinstance(each, str)]
            if texts or not value:
                settings[name] = ",".join(texts)
            elif any(each is not None for each in value):
                settings[name] = f"{len(value)} entries"
        elif value is not None or name in NULL_IS_A_VALUE:
            settings[name] = "null" if value is None else value


def add_defaults(settings: dict[str, str], program: str) -> set[str]:
    """Add the program's own defaults that train.py does not share; return their names.

    A default is added only if the setting has no other name in the file. Launchers' settings do not count.
    """
    added = set()
    for name, value in DEFAULTS.get(program, {}).items():
        own_names = {each for column in FOREIGN.by_name[name].names[:3] for each in column}
        if not own_names & set(settings):
            settings[name] = value
            added.add(name)
    return added


def add_adapter_defaults(settings: dict[str, str], program: str) -> set[str]:
    """Add the program's own defaults of adapters; return their names."""
    added = set()
    for name, value in ADAPTER_DEFAULTS.get(program, {}).items():
        rule = FOREIGN.by_name.get(name)
        if not any(each in settings for each in (rule.all_names if rule else (name,))):
            settings[name] = value
            added.add(name)
    if program == "LLaMA-Factory" and "lora_alpha" not in settings:
        rank = next(settings[name] for name in FOREIGN.by_name["lora_rank"].all_names if name in settings)
        settings["lora_alpha"] = str(2 * int(rank)) if rank.isdigit() else rank
        added.add("lora_alpha")
    return added
