"""How large what a run reads may be. Far above anything in use, and below what would fill the memory of a
machine: a file that was made to do so, or that is not what its name says, ends the run in one line.
"""

from __future__ import annotations

from pathlib import Path

from options.errors import UserError
from options.exact_json import parse_json

OPTIONS_FILE = 2**20  # bytes of a --config file or a recipe
CONFIG_FILE = 2**22  # bytes of config.json or generation_config.json
INDEX_FILE = 2**26  # bytes of an index of shards, or of a cache's manifest
MANIFEST_FILE = 2**25  # bytes of a checkpoint's manifest; 8B, trained in full on 64 GPUs, take a tenth
METRICS_LINE = 2**14  # bytes of a line of metrics.jsonl; ours take some hundred
TOKENIZER_FILE = 2**28  # bytes of tokenizer.json; the largest vocabularies take 35 MB
LAYERS = 10_000  # of a model; and experts of a layer
LINE = 2**24  # bytes of a line of a .jsonl or .csv file
FOLDER_ENTRIES = 200_000  # files and folders below a data folder
LIST = 2**29  # bytes of a .json file that is one list: it can only be read as a whole
ROW = 2**22  # characters of a row's text: far more than any context, and tokens take a hundred bytes each


def check_size(path: Path, most: int) -> None:
    """Raises UserError if the file is larger, or no file, such as a device that never ends. One that is not
    there is for its reader to tell of."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file")
    if path.exists() and path.stat().st_size > most:
        raise UserError(f"{path}: has {path.stat().st_size:,} bytes; at most {most:,} are read")


def read_text(path: Path, most: int) -> str:
    """A UTF-8 text, also out of a pipe. Raises UserError if it is larger; OSError; ValueError if it is no
    UTF-8."""
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise UserError(f"{path}: has more than {most:,} bytes, which is the most that is read")
    return raw.decode("utf-8-sig")


def read_json(path: Path, most: int) -> dict:
    """The JSON object that a file holds. Raises UserError."""
    check_size(path, most)
    try:
        value = parse_json(read_text(path, most))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # ValueError: no JSON, no UTF-8, or NaN
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e).splitlines()[0]
        raise UserError(f"{path}: not a valid JSON file ({reason})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
