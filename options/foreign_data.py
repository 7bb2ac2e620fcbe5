"""Data sets of other training programs' configurations, as --dataset, --dataset_format and --columns."""

from __future__ import annotations

from options.foreign_axolotl import translate_axolotl
from options.foreign_factory import translate_factory
from options.foreign_files import ForeignFile
from options.foreign_sets import Data, as_mapping, as_mappings, as_text
from options.yaml_file import Tree

# Keys of an entry of a mixture. `columns` there drops the other columns, which are not read here either.
MIXTURE_KEYS = ("id", "path", "config", "name", "split", "revision", "weight", "columns")


def translate_data(file: ForeignFile) -> Data:
    """Return the data sets of a configuration. Raises UserError if they are not written as that program's."""
    programs = {"axolotl": translate_axolotl, "TRL": _translate_trl, "LLaMA-Factory": translate_factory}
    translate = programs.get(file.program)
    data = Data()
    if translate:
        translate(file, data)
    if data.columns:
        data.options["columns"] = ",".join(f"{ours}={theirs}" for ours, theirs in data.columns.items())
    return data


def _translate_trl(file: ForeignFile, data: Data) -> None:
    """Read TRL's `dataset_name`, and the mixtures of TRL and of the alignment handbook."""
    tree = file.tree
    data.read |= {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"}
    data.read |= {"dataset_mixture", "dataset_mixer", "dataset_splits", "datasets", "dataset_configs"}
    mixture = as_mapping(tree.get("dataset_mixture"))
    entries = mixture.get("datasets") if mixture else tree.get("datasets")
    if size := as_text(mixture.get("test_split_size")):
        data.settings["test_split_size"] = size
    if entries:
        _mixture(as_mappings(file, "dataset_mixture" if mixture else "datasets", entries), data)
    elif mixer := as_mapping(tree.get("dataset_mixer")):
        splits = tree.get("dataset_splits")
        texts = [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []
        train = [split for split in texts if "train" in split] or [""]
        _mixture(
            [{"id": name, "split": split, "weight": mixer[name]} for name in mixer for split in train], data
        )
    elif source := as_text(tree.get("dataset_name")):
        config, split = as_text(tree.get("dataset_config")), as_text(tree.get("dataset_train_split"))
        data.options["dataset"] = data.name_set(source, config, split)
        test = as_text(tree.get("dataset_test_split")) or "test"
        if as_text(tree.get("eval_strategy")) not in ("", "no") and "test_split_size" not in data.settings:
            data.options["eval_dataset"] = data.name_set(source, config, test)
    if data.options and as_text(tree.get("assistant_only_loss")).lower() != "true":
        data.notes.append("of conversations only the assistant's turns are learned, as assistant_only_loss")


def _mixture(entries: list[dict[str, Tree]], data: Data) -> None:
    """Read a mixture, whose rows are put behind one another."""
    names = []
    for entry in entries:
        base = as_text(entry.get("id")) or as_text(entry.get("path"))
        config = as_text(entry.get("config")) or as_text(entry.get("name"))
        name = data.name_set(base, config, as_text(entry.get("split")), as_text(entry.get("revision")))
        data.report_unread(name, entry, MIXTURE_KEYS)
        weight = as_text(entry.get("weight"))
        if weight not in ("", "1", "1.0"):
            data.lost.append(f"{name}: weight {weight}, a share of its rows: all are used")
        names += [name] if base else []
    if names:
        data.options["dataset"] = ",".join(names)
