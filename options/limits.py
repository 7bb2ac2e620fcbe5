"""Upper limits on the size of files that a run reads.

They are far above anything in use, but too low to fill a machine's memory. A file that was made to do that,
or whose name is misleading, ends the run with a one-line error.
"""

from __future__ import annotations

from pathlib import Path

from options.errors import UserError
from options.exact_json import parse_json

MAX_OPTIONS_BYTES = 2**20  # a --config file or a recipe
MAX_TEMPLATE_BYTES = 2**17  # the template of --chat_template, whose text config.yaml records
MAX_TEMPLATE_FILE_BYTES = 2**24  # that file, which may be a tokenizer_config.json with its tokens
MAX_CONFIG_BYTES = 2**22  # config.json or generation_config.json
MAX_CARD_BYTES = 2**20  # README.md of a model
MAX_INDEX_BYTES = 2**26  # an index of shards, or a cache's manifest
MAX_MANIFEST_BYTES = 2**25  # a checkpoint's manifest; 8B trained in full on 64 GPUs takes a tenth
MAX_METRICS_LINE_BYTES = 2**14  # a line of metrics.jsonl; ours take some hundred bytes
MAX_TOKENIZER_BYTES = 2**28  # tokenizer.json; the largest vocabularies take 35 MB
MAX_LAYERS = 10_000  # layers of a model; also experts of a layer
MAX_LINE_BYTES = 2**24  # a line of a .jsonl or .csv file
# Bytes that a packed data file may unpack to, per byte of it; 16 MiB are allowed in any case. Texts shrink to
# a fifth, and lines of one template to a twentieth. Files that are made to fill a memory shrink much more.
MAX_UNPACKED_RATIO = 50
MIN_UNPACKED_BYTES = 2**24
MAX_MIXED_SETS = 50  # sets of a mixture
MAX_WEIGHT = 10**9  # of a set in a mixture; the smallest is its inverse
MAX_MIXED_ROWS = 10**8  # rows of an epoch of a mixture
MAX_FOLDER_ENTRIES = 200_000  # files and folders below a data folder
MAX_LIST_BYTES = 2**29  # a .json file that is one list, which can only be read as a whole
MAX_IMAGE_BYTES = 2**26  # an encoded image
# Of an image, which takes 3 bytes a pixel when it is decoded. A file of 109 kB can have 179 million.
MAX_IMAGE_PIXELS = 2**26
MAX_ROW_CHARS = 2**22  # a row's text; longer than any context, and each token takes a hundred bytes


def check_size(path: Path, max_bytes: int) -> None:
    """Raise UserError if the file is too large, or not a regular file (a device may never end).

    A missing file is not an error here: its reader reports it.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file")
    if path.exists() and path.stat().st_size > max_bytes:
        raise UserError(f"{path}: has {path.stat().st_size:,} bytes; at most {max_bytes:,} are read")


def read_text(path: Path, max_bytes: int) -> str:
    """Return the text of a UTF-8 file, which may be a pipe.

    Raises UserError if it is too large, OSError if it cannot be read, ValueError if it is not UTF-8.
    """
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise UserError(f"{path}: has more than {max_bytes:,} bytes, which is the most that is read")
    return raw.decode("utf-8-sig")


def read_json(path: Path, max_bytes: int) -> dict:
    """Return the JSON object in a file. Raises UserError if there is none, or the file is too large."""
    check_size(path, max_bytes)
    try:
        value = parse_json(read_text(path, max_bytes))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # ValueError: not JSON, not UTF-8, or NaN
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e).splitlines()[0]
        raise UserError(f"{path}: not a valid JSON file ({reason})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
