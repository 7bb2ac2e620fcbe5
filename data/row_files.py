"""Read the rows of a file: JSON lines, a JSON list, CSV or parquet. The first three may be packed.

Each row has an origin, which messages name. Texts and numbers stay as the file writes them. Images that rows
hold as bytes go to a file of the cache (data/image_store.py). Files that are malformed, or made to fill the
memory, are refused.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from data.image_store import IMAGE_COLUMNS, ImageStore
from data.packed_files import open_data_file
from data.parquet_rows import TakeRow, read_parquet
from options.data_files import KINDS, READABLE, conversion_advice, file_suffix, unpacked_name
from options.errors import UserError
from options.exact_json import parse_json
from options.limits import MAX_LINE_BYTES, MAX_LIST_BYTES, check_size

NAN_OR_INF = re.compile(r"\s*[+-]?(nan|inf|infinity)\s*", re.IGNORECASE)
# Longer than units, currencies and exponents: 5 mmol, EUR 1,000, 1e5.
LONG_WORD = re.compile(r"[^\W\d_]{5}")


@dataclass(frozen=True)
class Rows:
    """Rows as they were read.

    Attributes:
        rows: {column: value} of each row.
        origins: the file and line, or the like, of each row, for messages.
        remarks: lines to print at start.
        commit: of the hub set that they are from; "" = from elsewhere, or not known.
        folders: of each row, the folder that paths of images are relative to; "" = a hub set's row, whose
            paths are in the caches.
    """

    rows: list[dict]
    origins: list[str]
    remarks: tuple[str, ...] = ()
    commit: str = ""
    folders: Sequence[str] = ()

    def first(self, count: int) -> Rows:
        """Return the first `count` rows."""
        kept = self.rows[:count], self.origins[:count], self.folders[:count]
        return replace(self, rows=kept[0], origins=kept[1], folders=kept[2])


def read_file(path: Path, image_columns: Collection[str] = IMAGE_COLUMNS) -> Rows:
    """Read the rows of a file.

    Raises UserError if it is missing, malformed or of a kind not in KINDS. image_columns: the columns that
    hold images.
    """
    with ImageStore(str(path)) as store:
        rows = _read_rows(path, lambda row: store.take_row(row, image_columns))
    return replace(rows, folders=[str(path.parent)] * len(rows.rows))


def _read_rows(path: Path, take_row: TakeRow) -> Rows:
    """Read the rows of a file, as `read_file` does."""
    if not os.path.isfile(path):
        raise UserError(f"--dataset {path}: no such file")
    check_file_type(path)
    suffix = file_suffix(unpacked_name(path.name))
    if suffix == ".parquet":
        rows = read_parquet(path, take_row)
        return Rows(rows, [f"{path} row {i}" for i in range(1, len(rows) + 1)])
    try:
        if suffix == ".csv":
            return _read_csv(path, take_row)
        if suffix == ".json" and _starts_with_list(path):
            return _read_json_list(path, take_row)
        return _read_json_lines(path, take_row)
    except OSError as e:
        raise UserError(f"--dataset {path}: {e.strerror}") from None


def check_file_type(path: Path) -> None:
    """Raise UserError, with a remedy, for a file of a kind that is not read."""
    suffix = file_suffix(path.name)
    if suffix not in KINDS:
        problem = f"{suffix} files are not read" if suffix else "it has no suffix"
        remedy = conversion_advice(path.name) or "rename or convert it"
        raise UserError(f"--dataset {path}: {problem} ({READABLE} are); {remedy}")


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, with their line breaks.

    Only \\n ends a line: splitlines would also break a row at U+2028 and other rare characters. Raises
    UserError for a line that is not UTF-8, or too long.
    """
    with open_data_file(path) as file:
        for number in count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"--dataset {path}:{number}: a line of more than {MAX_LINE_BYTES:,} bytes")
            if b"\0" in line:
                raise UserError(f"--dataset {path}:{number}: holds NULs: not a text, or in UTF-16")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"--dataset {path}:{number}: not UTF-8") from None


def _read_json_lines(path: Path, take_row: TakeRow) -> Rows:
    """Read a file with one JSON object per line. Raises UserError with the line if it is malformed."""
    rows, origins = [], []
    for number, line in enumerate(_read_lines(path), 1):
        if line.strip():
            row = _parse_json(line, path, number)
            if not isinstance(row, dict):
                raise UserError(f"--dataset {path}:{number}: not a JSON object")
            rows.append(take_row(row))
            origins.append(f"{path}:{number}")
    return Rows(rows, origins)


def _parse_json(text: str, path: Path, line: int | None):
    """Return the value of a JSON text: one line of the file or, with None, all of it. Raises UserError."""
    suffix = file_suffix(path.name)
    is_json = file_suffix(unpacked_name(path.name)) == ".json"
    remedy = f"; a {suffix} file has one object per line" + ", or is one list" * is_json
    try:
        return parse_json(text, exact=True)
    except json.JSONDecodeError as e:
        raise UserError(
            f"--dataset {path}:{line or e.lineno}: not JSON ({e.msg}){remedy if line else ''}"
        ) from None
    except ValueError as e:  # a number that is out of range, or has thousands of digits
        raise UserError(f"--dataset {path}:{line or _find_bad_line(text)}: not usable JSON ({e})") from None
    except RecursionError:
        raise UserError(f"--dataset {path}:{line or _find_bad_line(text)}: JSON nested too deeply") from None


def _find_bad_line(rows: str) -> int:
    """Return the line, from 1, on which the first unusable entry of a JSON list begins; 1 if none is."""
    decoder, start = json.JSONDecoder(), 0
    while start < len(rows):
        if rows[start] in " \t\r\n,[]":
            start += 1
            continue
        try:
            _, end = decoder.raw_decode(rows, start)
            parse_json(rows[start:end], exact=True)
        except (ValueError, RecursionError):
            return rows.count("\n", 0, start) + 1
        start = end
    return 1


def _starts_with_list(path: Path) -> bool:
    """Return whether the file begins with a JSON list. Other .json files hold one object per line."""
    with open_data_file(path) as file:
        return file.read(MAX_LINE_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _read_json_list(path: Path, take_row: TakeRow) -> Rows:
    """Read a file that is one JSON list of objects. Raises UserError if it is malformed or too large."""
    check_size(path, MAX_LIST_BYTES)
    with open_data_file(path) as file:
        raw = file.read(MAX_LIST_BYTES + 1)
    if len(raw) > MAX_LIST_BYTES:
        raise UserError(
            f"--dataset {path}: a list of more than {MAX_LIST_BYTES:,} bytes; make a .jsonl of it"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(f"--dataset {path}:{line}: not UTF-8") from None
    rows = _parse_json(text, path, None)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"--dataset {path}: entry {i} is not a JSON object")
    return Rows([*map(take_row, rows)], [f"{path} entry {i}" for i in range(1, len(rows) + 1)])


def _read_csv(path: Path, take_row: TakeRow) -> Rows:
    """Read a CSV file with a header. Raises UserError, which names the line, if it is malformed."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(_read_lines(path), strict=True)
    rows, origins = [], []
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise UserError(f"--dataset {path}:1: the header names a column twice")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"--dataset {path}:{reader.line_num}: another number of columns than the header"
                )
            rows.append(take_row(row))
            origins.append(f"{path}:{reader.line_num}")
    except csv.Error as e:
        line = reader.reader.line_num  # DictReader counts a line only after it was parsed
        raise UserError(f"--dataset {path}:{line}: not CSV ({e})") from None
    for name in header:
        _convert_nan_cells(rows, name)
    return Rows(rows, origins)


def _convert_nan_cells(rows: list[dict], column: str) -> None:
    """Replace, in place, the cells `nan` and `inf` of a column of numbers by floats.

    `check_row` refuses such floats if a format reads the column. Columns that also hold words stay unchanged,
    and so do images.
    """
    rows = [row for row in rows if isinstance(row[column], str)]
    matches = [row for row in rows if NAN_OR_INF.fullmatch(row[column])]
    if matches and all(_is_number(row[column]) for row in rows if not NAN_OR_INF.fullmatch(row[column])):
        for row in matches:
            row[column] = float(row[column])


def _is_number(cell: str) -> bool:
    """Return whether a cell is empty, or a number as people write it: 1,000 or $5 or 12 kg."""
    return not cell.strip() or (bool(re.search(r"\d", cell)) and not LONG_WORD.search(cell))
