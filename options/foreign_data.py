"""Data sets of other training programs' configurations, as --dataset and --dataset_format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from options.errors import UserError
from options.foreign_files import ForeignFile, read_json_tree
from options.yaml_file import Tree

# axolotl's types of rows, up to a colon or a dot, and the formats that write the same rows here.
AXOLOTL_TYPES = {"alpaca": "alpaca", "chat_template": "chat", "completion": "completion",
                 "pretrain": "completion"}  # fmt: skip
MAIN_SPLITS = ("", "train")
ROLES = {"role": "role", "content": "content"}
DATASET_INFO = "dataset_info.json"  # of LLaMA-Factory: {name: description of a data set}
INSTRUCTION_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
MESSAGE_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                "assistant_tag": "assistant"}  # fmt: skip


@dataclass
class Data:
    """What a configuration says about its rows.

    Attributes:
        options: options here, {name: value}.
        notes: what was decided.
        lost: what has no equal.
        read: keys at the top of the file that are accounted for.
        settings: settings that were found deeper in the file, {foreign name: value}.
    """

    options: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    settings: dict[str, str] = field(default_factory=dict)


def translate_data(file: ForeignFile) -> Data:
    """Return the data sets of a configuration. Raises UserError if they are not written as that program's."""
    translate = {"axolotl": _axolotl, "TRL": _trl, "LLaMA-Factory": _factory}.get(file.program)
    data = Data()
    if translate:
        translate(file, data)
    return data


def _text(value: Tree) -> str:
    """Return a scalar, or the first item of a list, as text; "" for anything else."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else ""


def _mappings(file: ForeignFile, key: str, value: Tree) -> list[dict[str, Tree]]:
    """Return a list of mappings. Raises UserError if it is something else."""
    entries = value if isinstance(value, list) else [value] if value is not None else []
    mappings = [each for each in entries if isinstance(each, dict)]
    if len(mappings) < len(entries):
        raise UserError(f"{file.path}: {key}: expected a list of `path: ...`")
    return mappings


def _note_parts(data: Data, source: str, config: str, split: str) -> None:
    """Note a configuration and a split of a hub data set, which --dataset does not name."""
    recipe = "a recipe, datasets/*.toml, names it"
    if config not in ("", "default"):
        data.lost.append(f"{source}: configuration {config}: {recipe}")
    if split not in MAIN_SPLITS:
        data.lost.append(f"{source}: split {split}: {recipe}")


def _note_others(data: Data, others: list[str]) -> None:
    """Note the data sets behind the first one."""
    if others:
        data.lost.append(f"also {', '.join(others)}: write all rows into one file")


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
        if not entries:
            continue
        entry = entries[0]
        source = _text(entry.get("path"))
        if source in ("json", "csv", "parquet", "text") or entry.get("data_files"):
            files = entry.get("data_files")
            source = _text(files) or source
            if isinstance(files, list) and len(files) > 1:
                data.lost.append(f"{key}: {len(files) - 1} more files: give their folder")
        if not source:
            raise UserError(f"{file.path}: {key}: an entry without `path`")
        data.options[option] = source
        _note_parts(data, source, _text(entry.get("name")), _text(entry.get("split")))
        _note_others(data, [_text(each.get("path")) for each in entries[1:]])
        if option == "dataset":
            kind: dict[str, Tree] = {"type": "completion"} if texts else {}
            _axolotl_type(kind | entry, data)


def _axolotl_type(entry: dict[str, Tree], data: Data) -> None:
    """Translate the type of a data set's rows."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        data.lost.append("datasets: type with its own prompt: write the rows as `prompt` and `answer` texts")
        return
    name = _text(kind)
    form = AXOLOTL_TYPES.get(name)
    if form == "chat":
        mapping = entry.get("message_property_mappings") or {}
        keys = mapping if isinstance(mapping, dict) else {}
        role = _text(entry.get("message_field_role")) or _text(keys.get("role")) or "role"
        content = _text(entry.get("message_field_content")) or _text(keys.get("content")) or "content"
        column = _text(entry.get("field_messages")) or "messages"
        if (column, role, content) != ("messages", "role", "content"):
            data.notes.append(f"rows of {column} with {role} and {content}: see docs/data.md for their form")
            return
    if form == "completion" and _text(entry.get("field")) not in ("", "text"):
        data.lost.append(f"datasets: field {_text(entry.get('field'))}: a column `text` is read")
    if form:
        data.options["dataset_format"] = form
    elif name:
        data.notes.append(f"type {name}: --dataset_format auto tells the form by the columns (docs/data.md)")


def _trl(file: ForeignFile, data: Data) -> None:
    """Read TRL's `dataset_name`, and the mixtures of TRL and of the alignment handbook."""
    tree = file.tree
    data.read |= {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"}
    data.read |= {"dataset_mixture", "dataset_mixer", "dataset_splits", "datasets", "dataset_configs"}
    mixture = tree.get("dataset_mixture")
    if isinstance(mixture, dict):
        _mixture(_mappings(file, "dataset_mixture", mixture.get("datasets")), data)
        if size := _text(mixture.get("test_split_size")):
            data.settings["test_split_size"] = size
    elif isinstance(tree.get("datasets"), list):
        _mixture(_mappings(file, "datasets", tree["datasets"]), data)
    elif isinstance(mixer := tree.get("dataset_mixer"), dict):
        splits = tree.get("dataset_splits")
        texts = [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []
        train = next((split for split in texts if "train" in split), "")
        _mixture([{"id": name, "split": train} for name in mixer], data)
    elif source := _text(tree.get("dataset_name")):
        data.options["dataset"] = source
        split = _text(tree.get("dataset_train_split"))
        _note_parts(data, source, _text(tree.get("dataset_config")), split)
    if data.options and _text(tree.get("assistant_only_loss")).lower() != "true":
        data.notes.append("of conversations only the assistant's turns are learned, as assistant_only_loss")


def _mixture(entries: list[dict[str, Tree]], data: Data) -> None:
    """Read a mixture, whose rows are put behind one another: the first data set."""
    names = [_text(each.get("id")) or _text(each.get("path")) for each in entries]
    splits = [_text(each.get("split")) for each in entries]
    if not names or not names[0]:
        return
    first = entries[0]
    data.options["dataset"] = names[0]
    _note_parts(data, names[0], _text(first.get("config")) or _text(first.get("name")), splits[0])
    others = zip(names[1:], splits[1:], strict=True)
    _note_others(data, [f"{name} ({split})" if split else name for name, split in others])


def _factory(file: ForeignFile, data: Data) -> None:
    """Read LLaMA-Factory's `dataset` and `eval_dataset`, which are names in dataset_info.json."""
    folder = _text(file.tree.get("dataset_dir")) or "data"
    data.read |= {"dataset", "eval_dataset", "dataset_dir"}
    infos = [file.folder / folder / DATASET_INFO, file.folder / DATASET_INFO, Path(folder) / DATASET_INFO]
    info = next((path for path in infos if path.is_file()), None)
    known = read_json_tree(info) if info else {}
    for key in ("dataset", "eval_dataset"):
        value = file.tree.get(key)
        texts = value if isinstance(value, list) else _text(value).split(",")
        names = [name.strip() for name in texts if isinstance(name, str) and name.strip()]
        if not names:
            continue
        _note_others(data, names[1:])
        entry = known.get(names[0]) if isinstance(known, dict) else None
        if info and isinstance(entry, dict):
            _factory_entry(info.parent, names[0], entry, key, data)
            continue
        data.options[key] = names[0]
        where = info or DATASET_INFO
        data.lost.append(f"{key} {names[0]}: not in {where}: put its file or hub id here")
    if _text(file.tree.get("stage")) == "pt":
        data.options["dataset_format"] = "completion"
        data.read.add("stage")


def _factory_entry(folder: Path, name: str, entry: dict[str, Tree], option: str, data: Data) -> None:
    """Translate an entry of dataset_info.json."""
    hub, local = _text(entry.get("hf_hub_url")), _text(entry.get("file_name"))
    source = hub or (str(folder / local) if local else "")
    data.options[option] = source or name
    if not source:
        data.lost.append(f"{option} {name}: neither a file nor a Hugging Face data set")
    _note_parts(data, source, _text(entry.get("subset")), _text(entry.get("split")))
    if option != "dataset":
        return
    columns, tags = entry.get("columns"), entry.get("tags")
    columns = columns if isinstance(columns, dict) else {}
    tags = tags if isinstance(tags, dict) else {}
    if _text(entry.get("ranking")) == "true":
        data.lost.append(f"dataset {name}: pairs of chosen and rejected answers")
    elif _text(entry.get("formatting")) == "sharegpt":
        names = {key: _text(tags.get(key)) for key in MESSAGE_TAGS}
        if _text(columns.get("messages")) == "messages" and names == MESSAGE_TAGS:
            data.options["dataset_format"] = "chat"
        else:
            data.notes.append("rows as ShareGPT's: see docs/data.md for their form")
    elif all(_text(columns.get(key)) in ("", column) for key, column in INSTRUCTION_COLUMNS.items()):
        data.options["dataset_format"] = "alpaca"
        data.notes.append("rows get Alpaca's prompt; LLaMA-Factory writes them with its template as a chat")
    else:
        given = ", ".join(_text(value) for value in columns.values())
        data.lost.append(f"dataset {name}: columns {given}: name them instruction, input and output")
