"""Models that were quantized in formats that are not read here, and the models that they were made from.

The card of a release's repository (README.md) names its original as `base_model` if `base_model_relation`
is `quantized`. Otherwise that may be what the original was tuned from, and so may `_name_or_path` of
config.json. Then a name counts if it is the release's own without the usual endings, such as -AWQ.
"""

from __future__ import annotations

import re
from pathlib import Path

from files.config_parts import find_quantization
from files.names import CARD, CONFIG
from options.errors import UserError, join_names
from options.limits import MAX_CARD_BYTES, MAX_CONFIG_BYTES, read_json, read_text

ONLY = "only 16- and 32-bit weights, bitsandbytes' 4 bits (nf4) and GPT-OSS's MXFP4 can be read"
MXFP4 = "mxfp4"  # what `find_foreign_quantization` returns of the hub's GPT-OSS
# Files of older releases, whose config.json does not say that the weights are quantized.
SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_ENDING = re.compile(
    r"[-_.](gptq|awq|gguf|exl[23]|hqq|mlx|quantized|(fp|mxfp|nvfp|nf|int|q)[2468](_[01k](_[sml])?)?|w\d+a\d+\w*"
    r"|[2-8]-?bits?|dynamic|block|bnb|unsloth|qat)$",
    re.IGNORECASE,
)


def find_foreign_quantization(raw: dict, folder: Path) -> str | None:
    """Return the format of a folder's weights if they are quantized, and not to 4 bits by bitsandbytes.

    raw: the contents of the folder's config.json.
    """
    quantization_config = find_quantization(raw)
    if quantization_config is None:
        return next((kind for file, kind in SIDE_FILES.items() if (folder / file).is_file()), None)
    if not isinstance(quantization_config, dict):
        return join_names([str(quantization_config)])
    method = quantization_config.get("quant_method")
    if method is None and "load_in_4bit" in quantization_config:
        method = "bitsandbytes"
    if method == "bitsandbytes":
        return None if quantization_config.get("load_in_4bit") else "bitsandbytes 8 bit"
    if method == "fp8" and quantization_config.get("weight_block_size"):
        return "fp8 with scales of blocks"
    if method == "compressed-tensors":
        return f"compressed-tensors, {join_names([str(quantization_config.get('format'))])}"
    if method is None and {"group_size", "bits"} <= quantization_config.keys():
        return "mlx"
    return join_names([str(method or "unknown format")])


def explain_quantization(folder: Path, kind: str) -> str:
    """Return what is said of a folder whose weights are in a format that is not read. kind: the format."""
    return f"the weights are quantized already ({kind}); {ONLY}: {suggest_original(folder)}"


def packed_expansion_error(folder: Path) -> UserError:
    """Return the error for new blocks (Llama-Pro) in a model that bitsandbytes packed."""
    return UserError(
        f"--model_name {folder}: is quantized; new blocks need the original weights:"
        f" {suggest_original(folder)}"
    )


def is_gguf_release(folder: Path) -> bool:
    """Return whether a folder without other weights holds GGUF files, or is a snapshot of such."""
    is_named_so = re.search(r"[-_.]gguf$", _own_name(folder), re.IGNORECASE) is not None
    return is_named_so or any(folder.glob("*.gguf"))


def gguf_error(folder: Path) -> UserError:
    """Return the error for a folder of GGUF files."""
    return UserError(f"--model_name {folder}: {explain_quantization(folder, 'GGUF')}")


def suggest_original(folder: Path) -> str:
    """Return the advice to take the model that a quantized one was made from, and where its name is from.

    Only a name that is known to be the original's is given, without which the advice names none.
    """
    own = _own_name(folder)
    bases, is_quantized = _bases_of_card(folder)
    certain = bases if is_quantized and len(bases) == 1 else []
    for names, source in ((bases, CARD), (_bases_of_config(folder), CONFIG)):
        for name in names:
            if _plain(name) == name and (name in certain or _is_same_model(name, own)):
                return f"take {name}, which {source} names as the original"
    if _plain(own) != own:
        return f"take the original, by the name {_last(_plain(own))}"
    return "take the model that it was made from"


def _plain(name: str) -> str:
    """Return a release's name without its endings that say how it was quantized."""
    while (shorter := _ENDING.sub("", name)) != name:
        name = shorter
    return name


def _last(name: str) -> str:
    """Return a hub id's name without its owner."""
    return name.rpartition("/")[2]


def _is_same_model(name: str, own: str) -> bool:
    """Return whether a hub id has the name of the release `own` without its endings, by any owner."""
    return own != _plain(own) and _last(name).casefold() == _last(_plain(own)).casefold()


def _own_name(folder: Path) -> str:
    """Return the hub id of a snapshot in the hub's cache; the folder's name if it is none."""
    repository = folder.absolute().parent.parent.name
    is_snapshot = folder.absolute().parent.name == "snapshots" and repository.startswith("models--")
    return "/".join(repository.split("--")[1:]) if is_snapshot else folder.absolute().name


def _bases_of_card(folder: Path) -> tuple[list[str], bool]:
    """Return (the hub ids of `base_model`, whether its relation is "quantized") of the card's YAML.

    Without a relation a base may also be the model that the release's original was tuned from.
    """
    try:
        card = read_text(folder / CARD, MAX_CARD_BYTES).replace("\r\n", "\n")
    except (OSError, ValueError, UserError):
        return [], False
    front = card.partition("---\n")[2].partition("\n---")[0] if card.startswith("---\n") else ""
    found = re.search(r"^base_model:(.*(?:\n[ \t]+\S.*|\n-.*)*)", front, re.MULTILINE)
    words = re.split(r"[\s'\",\[\]]+", re.sub(r"(^|\s)#.*", "", found[1])) if found else []
    relation = re.search(r"^base_model_relation:\s*['\"]?quantized\b", front, re.MULTILINE)
    return [word for word in words if _HUB_ID.fullmatch(word)], relation is not None


def _bases_of_config(folder: Path) -> list[str]:
    """Return the hub id in _name_or_path of config.json, in a list; [] if it holds none."""
    try:
        name = read_json(folder / CONFIG, MAX_CONFIG_BYTES).get("_name_or_path")
    except UserError:
        return []
    return [name] if isinstance(name, str) and _HUB_ID.fullmatch(name) else []
