"""Data sets of axolotl's configurations: their names, formats and columns here."""

from __future__ import annotations

from options.errors import UserError
from options.foreign_files import ForeignFile
from options.foreign_sets import (
    MESSAGE_KEYS,
    Data,
    as_mapping,
    as_mappings,
    as_text,
    as_texts,
    describe_value,
)
from options.yaml_file import Tree

# Types of rows, and the formats that write the same rows here. A style may follow alpaca's, behind a colon.
TYPES = {"alpaca": "alpaca", "alpaca:instruct": "alpaca", "gpteacher": "alpaca",
         "gpteacher:instruct": "alpaca", "chat_template": "chat", "completion": "completion",
         "pretrain": "completion"}  # fmt: skip
# Types whose rows a format here reads, but with another prompt.
OTHER_PROMPTS = {"alpaca:chat": "alpaca", "alpaca:chatml": "alpaca", "alpaca:phi": "alpaca",
                 "gpteacher:chat": "alpaca", "alpaca_chat.load": "alpaca", "sharegpt": "chat",
                 "sharegpt.load_role": "chat", "sharegpt.load_ultrachat": "chat"}  # fmt: skip
RENAMED = {"gpteacher": {"output": "response"}}  # {type without its style: columns}
OWN_PROMPT_COLUMNS = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
BUILDERS = (
    "json",
    "csv",
    "parquet",
    "text",
    "arrow",
)  # values of `path` beside `data_files`, for local files
# Keys of an entry that are read for every type, for chat_template and sharegpt, and for completion.
COMMON = ("path", "name", "split", "train_on_split", "revision", "data_files", "ds_type", "type",
          "trust_remote_code")  # fmt: skip
OF_CHATS = ("field_messages", "message_field_role", "message_field_content", "message_property_mappings",
            "chat_template", "chat_template_jinja", "conversation", "field_tools")  # fmt: skip
OF_TEXTS = ("field", "text_column")


def translate_axolotl(file: ForeignFile, data: Data) -> None:
    """Read axolotl's `datasets` or `pretraining_dataset`, and `test_datasets`."""
    texts = "datasets" not in file.tree and "pretraining_dataset" in file.tree
    data.read |= {"datasets", "pretraining_dataset", "test_datasets"}
    for key, option in (
        ("pretraining_dataset" if texts else "datasets", "dataset"),
        ("test_datasets", "eval_dataset"),
    ):
        value = file.tree.get(key)
        entries = as_mappings(file, key, {"path": value} if isinstance(value, str) and texts else value)
        default: dict[str, Tree] = {"type": "completion"} if texts and option == "dataset" else {}
        names = [name for entry in entries for name in _read_entry(file, key, default | entry, data)]
        if names:
            data.options[option] = ",".join(names)
    if data.form:
        data.options["dataset_format"] = data.form


def _read_entry(file: ForeignFile, key: str, entry: dict[str, Tree], data: Data) -> list[str]:
    """Return the data sets of an entry, as --dataset names them; record how their rows are read."""
    names = _names(file, key, entry, data)
    name = f"{key} {names[0]}"
    kind = entry.get("type")
    read: tuple[str, ...] = COMMON
    if isinstance(kind, dict):
        columns = {ours: as_text(kind.get(theirs)) for theirs, ours in OWN_PROMPT_COLUMNS.items()}
        data.lost.append(f"{name}: a type with a prompt of its own: rows get Alpaca's prompt")
        data.report_unread(name, kind, (*OWN_PROMPT_COLUMNS, "format", "no_input_format"))
        form = "alpaca"
    else:
        form = _form(name, as_text(kind), entry, data)
        columns = dict(RENAMED.get(as_text(kind).partition(":")[0], {}))
    if form == "completion":
        columns["text"] = as_text(entry.get("field")) or as_text(entry.get("text_column"))
        read += OF_TEXTS
    elif form == "chat":
        columns |= _chat_columns(name, entry, data)
        _chat_template(name, entry, data)
        read += OF_CHATS
    data.add_form(name, form, columns)
    data.report_unread(name, entry, read)
    return names


def _names(file: ForeignFile, key: str, entry: dict[str, Tree], data: Data) -> list[str]:
    """Return the data sets of an entry, as --dataset names them."""
    path, given = as_text(entry.get("path")), entry.get("data_files")
    files = as_texts(given.get("train") if isinstance(given, dict) else given)
    if files and path in ("", *BUILDERS):
        return files
    if not path:
        raise UserError(f"{file.path}: {key}: an entry without `path`")
    parts = {
        "config": as_text(entry.get("name")),
        "split": as_text(entry.get("split")) or as_text(entry.get("train_on_split")),
        "revision": as_text(entry.get("revision")),
    }
    if given and (files or not entry.get("ds_type")):
        lines = {"source": path, "data_files": files[0] if files else "..."} | parts
        recipe = "; ".join(f'{name} = "{text}"' for name, text in lines.items() if text)
        more = f"; a recipe for each of the {len(files)} patterns" if len(files) > 1 else ""
        data.lost.append(
            f"{key} {path}: data_files: {describe_value('', given)}: write a recipe, rows.toml, with the"
            f" lines {recipe}, for --dataset rows.toml (docs/data.md){more}"
        )
    elif entry.get("ds_type"):
        return [path]
    return [data.name_set(path, **parts)]


def _form(name: str, kind: str, entry: dict[str, Tree], data: Data) -> str:
    """Return the format of a data set's type, or "" if the columns tell it; record types without an equal.

    Args:
        name: the set, as comments call it.
        kind: its type.
        entry: its description.
        data: what is found out.
    """
    if kind in TYPES:
        return TYPES[kind]
    form = OTHER_PROMPTS.get(kind, "")
    if not kind:
        data.lost.append(f"{name}: no type: axolotl then takes rows of tokens, which are not read here")
    elif form == "chat":
        if not as_text(entry.get("conversation")):
            data.lost.append(f"{name}: type: {kind}: its prompt is Vicuna's: the chat template is used")
    elif form:
        data.lost.append(f"{name}: type: {kind}: its prompt is another: rows get Alpaca's prompt")
    else:
        data.lost.append(
            f"{name}: type: {kind}: no format here writes its prompt; the columns tell the format"
        )
    return form


def _chat_columns(name: str, entry: dict[str, Tree], data: Data) -> dict[str, str]:
    """Return the columns of conversations; record names of a message's parts that are not read."""
    keys = as_mapping(entry.get("message_property_mappings"))
    role = as_text(entry.get("message_field_role")) or as_text(keys.get("role")) or "role"
    content = as_text(entry.get("message_field_content")) or as_text(keys.get("content")) or "content"
    if (role, content) not in MESSAGE_KEYS:
        data.lost.append(f"{name}: messages with {role} and {content}: name them role and content")
    data.report_unread(f"{name}: message_property_mappings", keys, ("role", "content"))
    messages = as_text(entry.get("field_messages"))
    return {
        "messages": messages if messages != "conversations" else "",
        "tools": as_text(entry.get("field_tools")),
    }


def _chat_template(name: str, entry: dict[str, Tree], data: Data) -> None:
    """Take the template of a set as that of the run, if it is the first one that is named."""
    template = as_text(entry.get("chat_template")) or as_text(entry.get("conversation"))
    if template and data.settings.setdefault("chat_template", template) != template:
        data.lost.append(f"{name}: chat_template: {template}: a run has one, that of the first set")
    if text := as_text(entry.get("chat_template_jinja")):
        data.settings["chat_template_jinja"] = text
