"""Rows of a file: JSON lines, a JSON list, CSV or parquet, each row with the place that messages name.

Texts and numbers stay as the file has them. What is malformed, or made to fill the memory, is refused with
its place.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from options.data_files import KINDS, READABLE, conversion_advice, file_suffix
from options.errors import UserError
from options.exact_json import parse_json
from options.limits import MAX_LINE_BYTES, MAX_LIST_BYTES, check_size

PARQUET_ROWS = 64  # read at once: one value may stand for all of them in the file
NO_NUMBER = re.compile(r"\s*[+-]?(nan|inf|infinity)\s*", re.IGNORECASE)
WORD = re.compile(r"[^\W\d_]{5}")  # longer than units, currencies and exponents: 5 mmol, EUR 1,000, 1e5


@dataclass(frozen=True)
class Rows:
    """Raw rows and where each came from, for messages. remarks: lines to print at start."""

    rows: list[dict]
    origins: list[str]
    remarks: tuple[str, ...] = ()


def read_file(path: Path) -> Rows:
    """Read the rows of a file whose suffix is one of KINDS. Raises UserError if it is missing or
    malformed."""
    if not os.path.isfile(path):
        raise UserError(f"--dataset {path}: no such file")
    check_kind(path)
    suffix = file_suffix(path.name)
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        if suffix == ".csv":
            return _read_csv(path)
        if suffix == ".json" and _is_list(path):
            return _read_json_list(path)
        return _read_json_lines(path)
    except OSError as e:
        raise UserError(f"--dataset {path}: {e.strerror}") from None


def check_kind(path: Path) -> None:
    """Raise UserError for a file of a kind that is not read, with what to do."""
    suffix = file_suffix(path.name)
    if suffix not in KINDS:
        what = f"{suffix} files are not read" if suffix else "no suffix tells what it is"
        todo = conversion_advice(path.name) or "rename or convert it"
        raise UserError(f"--dataset {path}: {what} ({READABLE} are); {todo}")


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text with their ends. These are \\n only: splitlines would also break a row at
    U+2028 and other rare characters. Raises UserError for a line that is no UTF-8, or too long."""
    with path.open("rb") as file:
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


def _read_json_lines(path: Path) -> Rows:
    rows, origins = [], []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            rows.append(_json(line, path, number))
            origins.append(f"{path}:{number}")
            if not isinstance(rows[-1], dict):
                raise UserError(f"--dataset {path}:{number}: not a JSON object")
    return Rows(rows, origins)


def _json(text: str, path: Path, line: int | None):
    try:
        return parse_json(text, exact=True)
    except json.JSONDecodeError as e:
        raise UserError(f"--dataset {path}:{line or e.lineno}: not JSON ({e.msg})") from None
    except ValueError as e:  # a number that none can mean, or of thousands of digits
        raise UserError(f"--dataset {path}:{line or _line_of_fault(text)}: not usable JSON ({e})") from None
    except RecursionError:
        raise UserError(f"--dataset {path}:{line or 1}: JSON nested too deeply") from None


def _line_of_fault(rows: str) -> int:
    """Return the line on which the first unusable entry of a JSON list begins."""
    decoder, start = json.JSONDecoder(), 0
    while start < len(rows):
        if rows[start] in " \t\r\n,[]":
            start += 1
            continue
        try:
            _, end = decoder.raw_decode(rows, start)
            parse_json(rows[start:end], exact=True)
        except ValueError:
            return rows.count("\n", 0, start) + 1
        start = end
    return 1


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(MAX_LINE_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _read_json_list(path: Path) -> Rows:
    check_size(path, MAX_LIST_BYTES)
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(f"--dataset {path}:{line}: not UTF-8") from None
    rows = _json(text, path, None)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"--dataset {path}: entry {i} is not a JSON object")
    return Rows(rows, [f"{path} entry {i}" for i in range(1, len(rows) + 1)])


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(_lines(path), strict=True)
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
            rows.append(row)
            origins.append(f"{path}:{reader.line_num}")
    except csv.Error as e:
        line = reader.reader.line_num  # DictReader counts a line only once it was right
        raise UserError(f"--dataset {path}:{line}: not CSV ({e})") from None
    for name in header:
        _mark_no_numbers(rows, name)
    return Rows(rows, origins)


def _mark_no_numbers(rows: list[dict], column: str) -> None:
    """Make floats of the cells `nan` and `inf` of a column of numbers: `checked` refuses them where a format
    reads the column. Columns that also hold words are left alone."""
    marked = [row for row in rows if NO_NUMBER.fullmatch(row[column])]
    if marked and all(_is_number(row[column]) for row in rows if not NO_NUMBER.fullmatch(row[column])):
        for row in marked:
            row[column] = float(row[column])


def _is_number(cell: str) -> bool:
    """Whether a cell is a number as people write them, such as 1,000 or $5 or 12 kg, or is empty."""
    return not cell.strip() or (bool(re.search(r"\d", cell)) and not WORD.search(cell))


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file, rows = pyarrow.parquet.ParquetFile(path), []
        if file.metadata.num_rows > path.stat().st_size:  # a bit per row is more than a page's header takes
            raise UserError(
                f"--dataset {path}: says {file.metadata.num_rows:,} rows in {path.stat().st_size:,} bytes"
            )
        for batch in file.iter_batches(PARQUET_ROWS):
            if batch.nbytes > MAX_LINE_BYTES * PARQUET_ROWS // 4:
                raise UserError(
                    f"--dataset {path}: {PARQUET_ROWS} rows of {batch.nbytes:,} bytes; at most {MAX_LINE_BYTES:,} each"
                )
            rows += [without_fillers(row) for row in batch.to_pylist()]
        restore_digits(rows, file.schema_arrow)
    # ValueError: no UTF-8, or no such date.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"--dataset {path}: not a parquet file ({reason})") from None
    return Rows(rows, [f"{path} row {i}" for i in range(1, len(rows) + 1)])


def without_fillers(row: dict) -> dict:
    """Remove the nulls within a row's columns, which a table's schema puts there: all objects of a column
    have the keys of all rows. Nulls in lists, and whole columns, are the data's own."""
    return {column: _without_fillers(value) for column, value in row.items()}


def _without_fillers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_fillers(part) for key, part in value.items() if part is not None}
    if not isinstance(value, list):
        return value
    if value and all(isinstance(part, tuple) for part in value):  # what pyarrow makes of a map
        return {key: _without_fillers(part) for key, part in value}
    return [_without_fillers(part) for part in value]


def restore_digits(rows: list[dict], schema) -> None:
    """Replace fractions of 16 and 32 bits, at every depth, by the float of 64 bits with the fewest digits
    that tell them apart: 0.1 instead of 0.10000000149011612. schema: pyarrow's, of the rows' table."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        # Which spells float32 and float16, also within lists and structs, but not float64.
        for row in rows if "float" in str(kind) else ():
            row[name] = _with_digits(row[name], kind)


def _with_digits(value: Any, kind) -> Any:
    """kind: the value's type in pyarrow."""
    import numpy
    import pyarrow

    types, narrow = pyarrow.types, {pyarrow.float16(): numpy.float16, pyarrow.float32(): numpy.float32}
    if kind in narrow and isinstance(value, float) and math.isfinite(value):
        whole = value.is_integer() and abs(value) < 1e16  # beyond, Python writes an exponent as well
        return value if whole else float(str(narrow[kind](value)))
    if types.is_struct(kind) and isinstance(value, dict):
        return {key: _with_digits(part, kind.field(key).type) for key, part in value.items()}
    if types.is_map(kind) and isinstance(value, dict):
        return {key: _with_digits(part, kind.item_type) for key, part in value.items()}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return value and [_with_digits(part, kind.value_type) for part in value]
    return value
