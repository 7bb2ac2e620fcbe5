"""block_expansion.py: adds new layers to a model (Llama-Pro, arXiv 2401.02415), or inserts trained ones."""

from __future__ import annotations

import copy
import math
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

from transformers import PretrainedConfig

from checkpoints.model_writer import (
    TensorEntry,
    WeightFiles,
    apart_entries,
    check_entries_finite,
    constant_entry,
    file_entries,
    replace_entries,
    split_into_files,
    to_json_text,
    with_stored_names,
    write_model,
)
from checkpoints.trained_model import open_blocks
from files.base_model import check_base, tokenizer_remark
from files.config_parts import find_quantization, text_config
from files.model_folder import CheckpointFiles, fetch_weights, find_model, pin_model_name
from files.names import CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, TOKENIZER_TEXTS
from files.output_folder import check_output, clear_output
from files.quantized_releases import packed_expansion_error
from files.tensors import StoredTensor
from files.tokenizer import compare_with_files, read_tokenizer
from launch.program import print_error, quiet_libraries, shell_command
from models.family import Family
from models.llama_pro import NEW_LAYERS, is_expanded, new_layers, source_layers, spread_new_blocks
from models.redundant import UNTIED, corrected_config, sync_tied_embeddings
from models.registry import build_on_meta, check_weights, open_weights, read_config
from options.block_expansion import Options
from options.errors import DONE, UserError
from options.limits import MAX_CONFIG_BYTES, MAX_LAYERS, MAX_TOKENIZER_BYTES, read_json, read_text

# Lists in config.json that never have one entry per layer, even if their length is the number of layers.
OTHER_LISTS = ("architectures", "keys_to_ignore_at_inference", "mlp_only_layers")
# Lists per layer that may go on behind the last layer (SmolLM3's).
LONGER_LISTS = ("no_rope_layers",)


def insertion_points(options: Options, num_layers: int) -> list[int]:
    """Return the 0-based index of the layer before each new block, in ascending order.

    An index occurs once for each block after that layer. Raises UserError for an index in --after that the
    model of `num_layers` layers lacks, and for more than MAX_LAYERS layers with the new ones.
    """
    if options.after is not None:
        for layer in options.after:
            if not 0 <= layer < num_layers:
                raise UserError(f"--after {layer}: this model has the layers 0 to {num_layers - 1}")
        count = len(options.after)
    elif options.new_blocks is not None:
        count = options.new_blocks
    else:
        assert options.expansion_rate is not None
        count = max(1, math.floor(min(num_layers * options.expansion_rate, MAX_LAYERS) + 0.5))
    if num_layers + count > MAX_LAYERS:
        raise UserError(f"{num_layers} layers and {count:,} new ones: at most {MAX_LAYERS:,} are built")
    return spread_new_blocks(num_layers, count) if options.after is None else sorted(options.after)


def check_feature_layers(folder: Path, config: PretrainedConfig, family: Family, points: list[int]) -> None:
    """Raise UserError for a new block among the layers after which features of images are added.

    With a block before one of them, the features would be added a layer too early.

    Args:
        folder, config, family: of the base model.
        points: from `insertion_points`.
    """
    first = (family.vision.feature_layers(config) if family.vision else 0) - 1
    if points[0] < first:
        raise UserError(
            f"{folder}: features of images are added after each of the layers 0 to {first}, so no new block"
            f" may follow layer {points[0]}; place them by --after, from layer {first} on"
        )


def read_model(options: Options) -> tuple[PretrainedConfig, Family, CheckpointFiles, str | None]:
    """Fetch and open the model of --model_name, and read all its weights once to check them.

    Returns (config, family, files, name of the head's tensor if it differs from the embedding that
    config.json ties it to, else None). Prints a line about such a head.

    Raises UserError if the model is quantized, lies in --output_dir or holds NaN; with --blocks unless it is
    expanded; without --blocks if it is expanded, or cannot get the new blocks.
    """
    name = options.model_name
    folder = find_model(name)
    if Path(options.output_dir).resolve() == folder.resolve():
        raise UserError(f"--output_dir {folder}: is the folder of --model_name; choose another")
    config, family = read_config(folder)
    if find_quantization(config):
        raise packed_expansion_error(folder)
    if options.blocks:
        new_layers(config)
    elif is_expanded(config):
        raise UserError(
            f"--model_name {folder}: is expanded already ({NEW_LAYERS} in config.json);"
            " expand its base model, with all new blocks at once"
        )
    else:
        points = insertion_points(options, text_config(config).num_hidden_layers)
        check_feature_layers(folder, config, family, points)
    fetch_weights(pin_model_name(name, folder), folder)
    files, _, untied_head = open_weights(folder, config, family)
    if files.prequantized:  # whatever config.json says
        raise packed_expansion_error(folder)
    check_entries_finite(file_entries(files) | apart_entries(files))
    if untied_head:
        print(f"{folder}: {UNTIED}")
    return config, family, files, untied_head


def expanded_tensors(files: CheckpointFiles, family: Family, originals: list[int]) -> dict[str, TensorEntry]:
    """Return {tensor name: entry} of the expanded model, with each copy next to its original.

    originals: For each layer of the expanded model, the index of the base's layer that it is or copies
        (`source_layers` in models/llama_pro.py).
    """
    first = {layer: originals.index(layer) for layer in originals}
    entries: dict[str, TensorEntry] = {}
    # {new layer: its modules that add nothing}
    silenced: dict[int, set[str]] = {i: set() for i, layer in enumerate(originals) if i != first[layer]}
    for name, entry in file_entries(files).items():
        layer, rest = family.locate_layer(name)
        if layer is None:
            entries[name] = entry
            continue
        for i in range(first[layer], first[layer] + originals.count(layer)):
            value = family.identity_value(rest) if i in silenced else None
            entries[f"{family.layers}.{i}.{rest}"] = entry if value is None else constant_entry(entry, value)
            if value is not None:
                silenced[i].add(rest.partition(".")[0])
    assert all(len(modules) > 1 for modules in silenced.values()), (
        "a new block adds nothing: attention and MLP are silenced"
    )
    return entries


def name_like_base(
    entries: dict[str, TensorEntry], files: CheckpointFiles, family: Family, originals: list[int]
) -> dict[str, TensorEntry]:
    """Return the expanded model's entries by the names that its files have, spelled like the base's.

    Args:
        entries: from `expanded_tensors`, by the parameters' names.
        files: the base's files.
        family: the model's family.
        originals: as for `expanded_tensors`.
    """

    def locate(name: str) -> tuple[str, str]:
        """Return (the parameter of the base that it copies, its name in the files)."""
        layer, rest = family.locate_layer(name)
        if layer is None:
            return name, files.stored_name(name)
        source = f"{family.layers}.{originals[layer]}.{rest}"
        # The first number in a tensor's name is that of its layer.
        before, number, after = re.split(r"(?<=\.)(\d+)(?=\.)", files.stored_name(source), maxsplit=1)
        assert number == str(originals[layer])
        return source, f"{before}{layer}{after}"

    return with_stored_names(files, entries, locate)


def move_extra_layers(
    entries: dict[str, TensorEntry], family: Family, new_blocks: int
) -> dict[str, TensorEntry]:
    """Return entries of parts that are not built, with the extra layers behind the expanded model's last.

    Args:
        entries: {name in the files: entry}.
        family: the model's family.
        new_blocks: number of layers by which those behind the last one move (`Family.extra_layers`).
    """
    moved = {}
    for name, entry in entries.items():
        layer, rest = family.locate_layer(name)
        moved[name if layer is None else f"{family.layers}.{layer + new_blocks}.{rest}"] = entry
    return moved


def per_layer_lists(config: dict, num_layers: int) -> dict[str, list]:
    """Return {key: list} of the lists in a config that have `num_layers` entries, one per layer.

    LONGER_LISTS are cut. OTHER_LISTS and lists of token ids are left out, whatever their length.
    """
    lists = {
        key: value[:num_layers] if key in LONGER_LISTS else value
        for key, value in config.items()
        if isinstance(value, list)
    }
    lists = {key: value for key, value in lists.items() if len(value) == num_layers}
    other = {key for key in lists if key in OTHER_LISTS or key.endswith(("_id", "_ids", "_tokens"))}
    return {key: value for key, value in lists.items() if key not in other}


def expanded_config(raw: dict, config: PretrainedConfig, originals: list[int]) -> dict:
    """Return the contents of the expanded model's config.json.

    Args:
        raw: The contents of the base's config.json.
        config: The base's config as transformers reads it, with lists that follow from a pattern (such as a
            kind of attention per layer) written out.
        originals: As for `expanded_tensors`.
    """
    new = dict(sync_tied_embeddings(raw, config))
    text = text_config(config)
    is_flat = "num_hidden_layers" in raw and "text_config" not in raw  # so are old wrappers (Qwen2.5-VL)
    if text is not config and not is_flat:
        return new | {"text_config": _expanded_text_config(raw.get("text_config") or {}, text, originals)}
    return _expanded_text_config(new, text, originals)


def _expanded_text_config(raw: dict, config: PretrainedConfig, originals: list[int]) -> dict:
    """Do the same as `expanded_config` for the part of the config that describes the layers."""
    layers, resolved, new = config.num_hidden_layers, config.to_dict(), dict(raw)
    for key, value in per_layer_lists(raw | resolved, layers).items():
        new[key] = [value[layer] for layer in originals]
    if isinstance(raw.get("max_window_layers"), int):  # the number of first layers with full attention
        new["max_window_layers"] = sum(layer < raw["max_window_layers"] for layer in originals)
    if "mlp_only_layers" in resolved:  # of the other layers, every decoder_sparse_step-th has experts
        step, dense = resolved.get("decoder_sparse_step", 1), resolved["mlp_only_layers"] or []
        dense = [layer for layer in range(layers) if layer in dense or (layer + 1) % step]
        new["mlp_only_layers"] = [i for i, layer in enumerate(originals) if layer in dense]
        new["decoder_sparse_step"] = 1
    new["num_hidden_layers"] = len(originals)
    new[NEW_LAYERS] = [i for i, layer in enumerate(originals) if i != originals.index(layer)]
    return new


def expand(options: Options) -> str:
    """Write --model_name with new untrained blocks to --output_dir. Return the lines to print.

    Raises UserError and OSError.
    """
    config, family, files, _ = read_model(options)
    layers = text_config(config).num_hidden_layers
    originals = source_layers(layers, insertion_points(options, layers))
    raw = read_json(files.folder / CONFIG, MAX_CONFIG_BYTES)
    new_config = expanded_config(raw, config, originals)
    entries = expanded_tensors(files, family, originals)
    _check_plan(new_config, entries, config, files, family)
    stored = name_like_base(entries, files, family, originals)
    stored |= move_extra_layers(apart_entries(files), family, len(originals) - layers)
    _write(options, _split_like_base(stored, files), files, {CONFIG: to_json_text(new_config)})
    new = ", ".join(map(str, new_config.get("text_config", new_config)[NEW_LAYERS]))
    return (
        f"in {options.output_dir}: {len(originals)} layers, of which new: {new}\n"
        f"next: {shlex.join(shell_command('train.py'))} --train_type bnb_llama_pro"
        f" --model_name {options.output_dir} --dataset ..."
    )


def _check_plan(
    new_config: dict,
    entries: dict[str, TensorEntry],
    config: PretrainedConfig,
    files: CheckpointFiles,
    family: Family,
) -> None:
    """Raise unless `entries` are the tensors of the model that transformers builds from `new_config`.

    Raises UserError for the tensors, and AssertionError if transformers reads other lists from the config.
    """
    planned = copy.copy(files)
    planned.tensors = {name: StoredTensor("", entry.shape, entry.dtype) for name, entry in entries.items()}
    expanded = type(config).from_dict(new_config)
    check_weights(build_on_meta(expanded, family), planned, family)
    text, written = text_config(expanded), new_config.get("text_config", new_config)
    for key, value in per_layer_lists(text.to_dict(), text.num_hidden_layers).items():
        assert value == written[key], f"{key}: transformers reads {value}"


def _write(
    options: Options, weight_files: WeightFiles, files: CheckpointFiles, small_files: dict[str, str]
) -> None:
    """Clear --output_dir and write the model folder there. Print a line if the base has no tokenizer."""
    clear_output(Path(options.output_dir))
    write_model(Path(options.output_dir), weight_files, files.folder, small_files)
    if not any(files.folder.glob("tokenizer*")):
        print(f"no tokenizer in {files.folder}: training needs its files beside config.json")


def _split_like_base(entries: dict[str, TensorEntry], files: CheckpointFiles) -> WeightFiles:
    """Return `entries` split into files no larger than the base's largest file."""
    sizes: Counter[str] = Counter()
    for part in (files, *([files.apart] if files.apart else [])):
        for name, entry in file_entries(part).items():
            sizes[part.tensors[name].file] += entry.nbytes
    return split_into_files(entries, max(sizes.values()))


def insert_blocks(options: Options) -> str:
    """Write --model_name, an expanded model, with the trained blocks of --blocks. Return the line to print.

    Raises UserError, which names --blocks if they do not fit the model, and OSError.
    """
    config, family, files, untied_head = read_model(options)
    assert options.blocks is not None
    path = Path(options.blocks).expanduser()
    if not path.is_file():
        raise UserError(f"--blocks {path}: no such file")
    try:
        blocks, metadata = open_blocks(path, files, family, new_layers(config))
        check_entries_finite(file_entries(blocks))
        remark = check_base(metadata, config, files, str(path), "--model_name", untied_head)
    except UserError as e:
        raise UserError(f"--blocks {e}") from None
    if remark:
        print(f"--blocks {remark}", file=sys.stderr, flush=True)
    small_files = _changed_small_files(path, config, files)
    remark = tokenizer_remark(metadata, files.folder)
    if remark:
        print(remark, file=sys.stderr, flush=True)
    _write(options, replace_entries(files, file_entries(blocks)), files, small_files)
    layers, count = text_config(config).num_hidden_layers, len(blocks.tensors)
    return f"in {options.output_dir}: {layers} layers, {count} tensors from {options.blocks}"


def _changed_small_files(
    blocks_path: Path, config: PretrainedConfig, files: CheckpointFiles
) -> dict[str, str]:
    """Return {name: text} of the small files that must not be copied from the model's folder as they are.

    These are config.json if it ties a head that differs, generation_config.json if one is beside the blocks
    (with the stop tokens that the run learned), and tokenizer files: those that disagree with transformers,
    and all of them if they are beside the blocks (--chat_template).
    """
    small_files = corrected_config(files.folder, config)
    generation = blocks_path.with_name(GENERATION_CONFIG)
    if generation.is_file():
        small_files[GENERATION_CONFIG] = read_text(generation, MAX_CONFIG_BYTES)
    if any(files.folder.glob("tokenizer*")):
        tokenizer = read_tokenizer(files.folder, f"--model_name {files.folder}")
        small_files |= compare_with_files(files.folder, tokenizer).files
    if blocks_path.with_name(CHAT_TEMPLATE).is_file():
        beside = (blocks_path.with_name(name) for name in TOKENIZER_TEXTS)
        small_files |= {path.name: read_text(path, MAX_TOKENIZER_BYTES) for path in beside if path.is_file()}
    return small_files


def run(options: Options) -> int:
    """Expand --model_name, or insert --blocks into it. Return DONE, or REFUSED if the user can fix it."""
    quiet_libraries()
    try:
        check_output(Path(options.output_dir), options.overwrite)
        print(insert_blocks(options) if options.blocks else expand(options))
        return DONE
    except UserError as e:
        return print_error(e, verbose=False)
    except OSError as e:  # a full disk
        return print_error(UserError(f"{e.filename or options.output_dir}: {e.strerror or e}"), verbose=False)
