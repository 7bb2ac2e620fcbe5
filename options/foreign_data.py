"""Data sets of other training programs' configurations, as --dataset, --dataset_format and --columns."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from options.errors import UserError
from options.foreign_files import ForeignFile, read_json_tree
from options.yaml_file import Tree

# axolotl's types of rows, up to a colon or a dot, and the formats that write the same rows here.
AXOLOTL_TYPES = {"alpaca": "alpaca", "chat_template": "chat", "completion": "completion",
                 "pretrain": "completion"}  # fmt: skip
AXOLOTL_COLUMNS = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
SPLIT = re.compile(r"\w+(\.\w+)*")  # a whole split; slices such as train[:20%] are not read
MESSAGE_KEYS = (("role", "content"), ("from", "value"))  # both are read
DATASET_INFO = "dataset_info.json"  # of LLaMA-Factory: {name: description of a data set}
FACTORY_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}


@dataclass
class Data:
    """What a configuration says about its rows.

    Attributes:
        options: options here, {name: value}.
        notes: what was decided.
        lost: what has no equal.
        read: keys at the top of the file that are accounted for.
        settings: settings that were found deeper in the file, {foreign name: value}.
        columns: {column of the format: the data's name for it}.
    """

    options: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    settings: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)

    def name_column(self, ours: str, theirs: str) -> None:
        """Record the data's name for a column of the format, unless it is the same or not given."""
        if theirs not in ("", ours):
            self.columns[ours] = theirs

    def name_set(self, base: str, config: str = "", split: str = "", revision: str = "") -> str:
        """Return a data set as --dataset names it: base:config:split@revision."""
        if split and not SPLIT.fullmatch(split):
            self.lost.append(
                f"{base}: split {split}: whole splits are read; --dataset_samples reads fewer rows"
            )
            split = split.partition("[")[0].partition("+")[0]
        parts = f":{'' if config == 'default' else config}:{'' if split == 'train' else split}".rstrip(":")
        return base + parts + (f"@{revision}" if revision not in ("", "main") else "")


def translate_data(file: ForeignFile) -> Data:
    """Return the data sets of a configuration. Raises UserError if they are not written as that program's."""
    translate = {"axolotl": _axolotl, "TRL": _trl, "LLaMA-Factory": _factory}.get(file.program)
    data = Data()
    if translate:
        translate(file, data)
    if data.columns:
        data.options["columns"] = ",".join(f"{ours}={theirs}" for ours, theirs in data.columns.items())
    return data


def _text(value: Tree) -> str:
    """Return a scalar, or the first item of a list, as text; "" for anything else."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else ""


def _mapping(value: Tree) -> dict[str, Tree]:
    """Return a mapping, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _mappings(file: ForeignFile, key: str, value: Tree) -> list[dict[str, Tree]]:
    """Return a list of mappings. Raises UserError if it is something else."""
    entries = value if isinstance(value, list) else [value] if value is not None else []
    mappings = [each for each in entries if isinstance(each, dict)]
    if len(mappings) < len(entries):
        raise UserError(f"{file.path}: {key}: expected a list of `path: ...`")
    return mappings


def _axolotl(file: ForeignFile, data: Data) -> None:
    """Read axolotl's `datasets` or `pretraining_dataset`, and `test_datasets`."""
    texts = "datasets" not in file.tree and "pretraining_dataset" in file.tree
    data.read |= {"datasets", "pretraining_dataset", "test_datasets"}
    for key, option in (
        ("pretraining_dataset" if texts else "datasets", "dataset"),
        ("test_datasets", "eval_dataset"),
    ):
        value = file.tree.get(key)
        entries = _mappings(file, key, {"path": value} if isinstance(value, str) and texts else value)
        names = [name for entry in entries for name in _axolotl_sets(file, key, entry, data)]
        if names:
            data.options[option] = ",".join(names)
        if option == "dataset":
            default: dict[str, Tree] = {"type": "completion"} if texts else {}
            forms = {_axolotl_form(default | entry, data) for entry in entries}
            if len(forms) == 1 and (form := forms.pop()):
                data.options["dataset_format"] = form


def _axolotl_sets(file: ForeignFile, key: str, entry: dict[str, Tree], data: Data) -> list[str]:
    """Return the data sets of an entry, as --dataset names them."""
    files = entry.get("data_files")
    if isinstance(files, list):
        return [each for each in files if isinstance(each, str)]
    source = _text(files) or _text(entry.get("path"))
    if not source:
        raise UserError(f"{file.path}: {key}: an entry without `path`")
    if entry.get("ds_type") or files:
        return [source]
    parts = (_text(entry.get(name)) for name in ("name", "split", "revision"))
    return [data.name_set(source, *parts)]


def _axolotl_form(entry: dict[str, Tree], data: Data) -> str:
    """Return the format of a data set's type, or "" if the columns tell it."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        for theirs, ours in AXOLOTL_COLUMNS.items():
            data.name_column(ours, _text(kind.get(theirs)))
        data.lost.append("datasets: a type with a prompt of its own: rows get Alpaca's prompt")
        return "alpaca"
    form = AXOLOTL_TYPES.get(_text(kind), "")
    if form == "completion":
        data.name_column("text", _text(entry.get("field")))
    if form == "chat":
        keys = _mapping(entry.get("message_property_mappings"))
        role = _text(entry.get("message_field_role")) or _text(keys.get("role")) or "role"
        content = _text(entry.get("message_field_content")) or _text(keys.get("content")) or "content"
        if (role, content) not in MESSAGE_KEYS:
            data.lost.append(f"datasets: messages with {role} and {content}: name them role and content")
        column = _text(entry.get("field_messages"))
        data.name_column("messages", column if column != "conversations" else "")
    return form


def _trl(file: ForeignFile, data: Data) -> None:
    """Read TRL's `dataset_name`, and the mixtures of TRL and of the alignment handbook."""
    tree = file.tree
    data.read |= {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"}
    data.read |= {"dataset_mixture", "dataset_mixer", "dataset_splits", "datasets", "dataset_configs"}
    mixture = _mapping(tree.get("dataset_mixture"))
    entries = mixture.get("datasets") if mixture else tree.get("datasets")
    if size := _text(mixture.get("test_split_size")):
        data.settings["test_split_size"] = size
    if entries:
        _mixture(_mappings(file, "dataset_mixture" if mixture else "datasets", entries), data)
    elif mixer := _mapping(tree.get("dataset_mixer")):
        splits = tree.get("dataset_splits")
        texts = [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []
        train = [split for split in texts if "train" in split] or [""]
        _mixture(
            [{"id": name, "split": split, "weight": mixer[name]} for name in mixer for split in train], data
        )
    elif source := _text(tree.get("dataset_name")):
        config, split = _text(tree.get("dataset_config")), _text(tree.get("dataset_train_split"))
        data.options["dataset"] = data.name_set(source, config, split)
        test = _text(tree.get("dataset_test_split")) or "test"
        if _text(tree.get("eval_strategy")) not in ("", "no") and "test_split_size" not in data.settings:
            data.options["eval_dataset"] = data.name_set(source, config, test)
    if data.options and _text(tree.get("assistant_only_loss")).lower() != "true":
        data.notes.append("of conversations only the assistant's turns are learned, as assistant_only_loss")


def _mixture(entries: list[dict[str, Tree]], data: Data) -> None:
    """Read a mixture, whose rows are put behind one another."""
    names = []
    for entry in entries:
        base = _text(entry.get("id")) or _text(entry.get("path"))
        config = _text(entry.get("config")) or _text(entry.get("name"))
        name = data.name_set(base, config, _text(entry.get("split")))
        weight = _text(entry.get("weight"))
        if weight not in ("", "1", "1.0"):
            data.lost.append(f"{name}: weight {weight}, a share of its rows: all are used")
        names += [name] if base else []
    if names:
        data.options["dataset"] = ",".join(names)


def _factory(file: ForeignFile, data: Data) -> None:
    """Read LLaMA-Factory's `dataset` and `eval_dataset`, which are names in dataset_info.json."""
    folder = _text(file.tree.get("dataset_dir")) or "data"
    data.read |= {"dataset", "eval_dataset", "dataset_dir", "interleave_probs", "mix_strategy"}
    infos = [file.folder / folder / DATASET_INFO, file.folder / DATASET_INFO, Path(folder) / DATASET_INFO]
    info = next((path for path in infos if path.is_file()), None)
    known = _mapping(read_json_tree(info)) if info else {}
    for key in ("dataset", "eval_dataset"):
        sets, forms = [], set()
        for name in _list(file.tree.get(key)):
            entry = known.get(name)
            if info and isinstance(entry, dict):
                sets.append(_factory_set(info.parent, name, entry, data))
                forms.add(_factory_form(name, entry, file.tree, data) if key == "dataset" else "")
            else:
                sets.append(name)
                data.lost.append(f"{key} {name}: not in {info or DATASET_INFO}: put its file or hub id here")
        weights = _list(file.tree.get("interleave_probs")) if key == "dataset" else []
        if weights and len(weights) == len(sets):
            sets = [f"{name}*{weight}" for name, weight in zip(sets, weights, strict=True)]
            data.notes.append("weights: an epoch uses the largest set once (docs/data.md)")
        if sets:
            data.options[key] = ",".join(sets)
        if len(forms) == 1 and (form := forms.pop()):
            data.options["dataset_format"] = form
    if _text(file.tree.get("stage")) == "pt":
        data.options["dataset_format"] = "completion"
        data.read.add("stage")


def _list(value: Tree) -> list[str]:
    """Return the texts of a list, or of a text with commas."""
    parts = value if isinstance(value, list) else _text(value).split(",")
    return [part.strip() for part in parts if isinstance(part, str) and part.strip()]


def _factory_set(folder: Path, name: str, entry: dict[str, Tree], data: Data) -> str:
    """Return the data set of an entry of dataset_info.json, as --dataset names it."""
    if hub := _text(entry.get("hf_hub_url")):
        return data.name_set(hub, _text(entry.get("subset")), _text(entry.get("split")))
    if local := _text(entry.get("file_name")):
        return str(folder / local)
    data.lost.append(f"dataset {name}: neither a file nor a Hugging Face data set")
    return name


def _factory_form(name: str, entry: dict[str, Tree], tree: dict[str, Tree], data: Data) -> str:
    """Return the format of an entry's rows. With a template LLaMA-Factory writes instructions as a chat."""
    columns, tags = _mapping(entry.get("columns")), _mapping(entry.get("tags"))
    if _text(entry.get("ranking")) == "true":
        data.lost.append(f"dataset {name}: pairs of chosen and rejected answers")
    if _text(tree.get("stage")) == "pt":
        data.name_column("text", _text(columns.get("prompt")))
        return "completion"
    if _text(entry.get("formatting")) == "sharegpt":
        keys = _text(tags.get("role_tag")) or "from", _text(tags.get("content_tag")) or "value"
        if keys not in MESSAGE_KEYS:
            data.lost.append(
                f"dataset {name}: messages with {keys[0]} and {keys[1]}: name them from and value"
            )
        column = _text(columns.get("messages"))
        data.name_column("messages", column if column != "conversations" else "")
        data.name_column("tools", _text(columns.get("tools")))
        return "chat"
    for theirs, ours in FACTORY_COLUMNS.items():
        data.name_column(ours, _text(columns.get(theirs)))
    if _text(columns.get("history")):
        data.lost.append(f"dataset {name}: history: earlier turns are read from `messages` only")
    return "alpaca" if _text(tree.get("template")) in ("", "alpaca") else "chat"
