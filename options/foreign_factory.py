"""Data sets of LLaMA-Factory's configurations, which are entries of dataset_info.json."""

from __future__ import annotations

from pathlib import Path

from options.foreign_files import ForeignFile, read_json_tree
from options.foreign_sets import MESSAGE_KEYS, Data, as_mapping, as_text, as_texts
from options.yaml_file import Tree

DATASET_INFO = "dataset_info.json"  # {name: description of a data set}
INSTRUCTION_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system",
                       "images": "images"}  # fmt: skip
CHAT_COLUMNS = {"messages": "messages", "system": "system", "tools": "tools", "images": "images"}
# {tag: the value that means it by default, with `from`; the values that are read here with `role`}.
TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "system_tag": ("system", "system"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", ""),
}
NAMED = ("hf_hub_url", "file_name", "subset", "split", "revision")  # keys of an entry that name its rows
UNUSED = ("ms_hub_url", "om_hub_url")  # other hubs, beside hf_hub_url


def translate_factory(file: ForeignFile, data: Data) -> None:
    """Read LLaMA-Factory's `dataset` and `eval_dataset`, which are names in dataset_info.json."""
    folder = as_text(file.tree.get("dataset_dir")) or "data"
    data.read |= {"dataset", "eval_dataset", "dataset_dir", "interleave_probs", "mix_strategy"}
    infos = [file.folder / folder / DATASET_INFO, file.folder / DATASET_INFO, Path(folder) / DATASET_INFO]
    info = next((path for path in infos if path.is_file()), None)
    known = as_mapping(read_json_tree(info)) if info else {}
    for key in ("dataset", "eval_dataset"):
        sets = []
        for name in as_texts(file.tree.get(key)):
            entry = known.get(name)
            if info and isinstance(entry, dict):
                sets.append(_read_entry(info.parent, f"{key} {name}", entry, file.tree, data))
            else:
                sets.append(name)
                data.lost.append(f"{key} {name}: not in {info or DATASET_INFO}: put its file or hub id here")
        weights = as_texts(file.tree.get("interleave_probs")) if key == "dataset" else []
        if weights and len(weights) == len(sets):
            sets = [f"{name}*{weight}" for name, weight in zip(sets, weights, strict=True)]
            data.notes.append("weights: an epoch uses the largest set once (docs/data.md)")
        if sets:
            data.options[key] = ",".join(sets)
    if data.form:
        data.options["dataset_format"] = data.form
    if as_text(file.tree.get("stage")) == "pt":
        data.options["dataset_format"] = "completion"
        data.read.add("stage")
    elif not as_text(file.tree.get("template")) and data.form == "chat":
        data.notes.append(
            "no template: the tokenizer's own is used, as there; a tokenizer without one gets the template"
            " `empty` there, which has no equal here, as every tokenizer did in older versions"
        )


def _read_entry(folder: Path, name: str, entry: dict[str, Tree], tree: dict[str, Tree], data: Data) -> str:
    """Return the data set of an entry, as --dataset names it; record how its rows are read.

    Args:
        folder: that of dataset_info.json.
        name: the set, as comments call it.
        entry: its description.
        tree: the configuration.
        data: what is found out.
    """
    read = [*NAMED, "formatting", "columns", "ranking"]
    if as_text(entry.get("ranking")) == "true":
        data.lost.append(f"{name}: pairs of chosen and rejected answers")
    columns = as_mapping(entry.get("columns"))
    if as_text(tree.get("stage")) == "pt":
        form, theirs = "completion", {"prompt": "text"}
    elif as_text(entry.get("formatting")) == "sharegpt":
        form, theirs = "chat", CHAT_COLUMNS
        _read_tags(name, as_mapping(entry.get("tags")), data)
        read.append("tags")
    else:  # with a template instructions are written as a chat
        form, theirs = (
            ("alpaca" if as_text(tree.get("template")) == "alpaca" else "chat"),
            INSTRUCTION_COLUMNS,
        )
    named = {ours: as_text(columns.get(their)) for their, ours in theirs.items()}
    if named.get("messages") == "conversations":
        named["messages"] = ""
    data.add_form(name, form, named)
    data.report_unread(f"{name}: columns", columns, theirs)
    if hub := as_text(entry.get("hf_hub_url")):
        data.report_unread(name, entry, [*read, *UNUSED])
        return data.name_set(hub, *(as_text(entry.get(key)) for key in ("subset", "split", "revision")))
    data.report_unread(name, entry, read)
    if local := as_text(entry.get("file_name")):
        return str(folder / local)
    data.lost.append(f"{name}: neither a file nor a Hugging Face data set")
    return name


def _read_tags(name: str, tags: dict[str, Tree], data: Data) -> None:
    """Record the tags of conversations whose values are not read here."""
    keys = as_text(tags.get("role_tag")) or "from", as_text(tags.get("content_tag")) or "value"
    if keys not in MESSAGE_KEYS:
        data.lost.append(f"{name}: messages with {keys[0]} and {keys[1]}: name them from and value")
    for tag, (default, role) in TAGS.items():
        value = as_text(tags.get(tag))
        if keys[0] == "role" and role and (value or role not in ("system", "tool")):
            wanted, value = role, value or default
        else:
            wanted, value = default, value or default
        if value != wanted:
            data.lost.append(f"{name}: tags: {tag}: {value}: write {wanted} in the rows")
    data.report_unread(f"{name}: tags", tags, ("role_tag", "content_tag", *TAGS))
