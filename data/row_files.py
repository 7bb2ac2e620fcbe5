"""Read the rows of a file: JSON lines, a JSON list, CSV or parquet. The first three may be packed.

Each row has an origin, which messages name. Texts and numbers stay as the file writes them. Files that are
malformed, or made to fill the memory, are refused.
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

from data.packed_files import open_data_file
from options.data_files import KINDS, READABLE, conversion_advice, file_suffix, unpacked_name
from options.errors import UserError
from options.exact_json import parse_json
from options.limits import MAX_LINE_BYTES, MAX_LIST_BYTES, check_size

PARQUET_BATCH_ROWS = 64  # rows read at once; few, as a file may store one large value for all of them
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
    """

    rows: list[dict]
    origins: list[str]
    remarks: tuple[str, ...] = ()
    commit: str = ""


def read_file(path: Path) -> Rows:
    """Read the rows of a file. Raises UserError if it is missing, malformed or of a kind not in KINDS."""
    if not os.path.isfile(path):
        raise UserError(f"--dataset {path}: no such file")
    check_file_type(path)
    suffix = file_suffix(unpacked_name(path.name))
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        if suffix == ".csv":
            return _read_csv(path)
        if suffix == ".json" and _starts_with_list(path):
            return _read_json_list(path)
        return _read_json_lines(path)
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


def _read_json_lines(path: Path) -> Rows:
    """Read a file with one JSON object per line. Raises UserError with the line if it is malformed."""
    rows, origins = [], []
    for number, line in enumerate(_read_lines(path), 1):
        if line.strip():
            rows.append(_parse_json(line, path, number))
            origins.append(f"{path}:{number}")
            if not isinstance(rows[-1], dict):
                raise UserError(f"--dataset {path}:{number}: not a JSON object")
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


def _read_json_list(path: Path) -> Rows:
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
    return Rows(rows, [f"{path} entry {i}" for i in range(1, len(rows) + 1)])


def _read_csv(path: Path) -> Rows:
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
            rows.append(row)
            origins.append(f"{path}:{reader.line_num}")
    except csv.Error as e:
        line = reader.reader.line_num  # DictReader counts a line only after it was parsed
        raise UserError(f"--dataset {path}:{line}: not CSV ({e})") from None
    for name in header:
        _convert_nan_cells(rows, name)
    return Rows(rows, origins)


def _convert_nan_cells(rows: list[dict], column: str) -> None:
    """Replace, in place, the cells `nan` and `inf` of a column of numbers by floats.

    `check_row` refuses such floats if a format reads the column. Columns that also hold words stay unchanged.
    """
    matches = [row for row in rows if NAN_OR_INF.fullmatch(row[column])]
    if matches and all(_is_number(row[column]) for row in rows if not NAN_OR_INF.fullmatch(row[column])):
        for row in matches:
            row[column] = float(row[column])


def _is_number(cell: str) -> bool:
    """Return whether a cell is empty, or a number as people write it: 1,000 or $5 or 12 kg."""
    return not cell.strip() or (bool(re.search(r"\d", cell)) and not LONG_WORD.search(cell))


def _read_parquet(path: Path) -> Rows:
    """Read a parquet file. Raises UserError if it is malformed, or has rows larger than a line may be."""
    import pyarrow
    import pyarrow.parquet

    try:
        file, rows = pyarrow.parquet.ParquetFile(path), []
        if file.metadata.num_rows > path.stat().st_size:  # forged: rows take a bit at least
            raise UserError(
                f"--dataset {path}: says {file.metadata.num_rows:,} rows in {path.stat().st_size:,} bytes"
            )
        for batch in file.iter_batches(PARQUET_BATCH_ROWS):
            if batch.nbytes > MAX_LINE_BYTES * PARQUET_BATCH_ROWS // 4:
                raise UserError(
                    f"--dataset {path}: {PARQUET_BATCH_ROWS} rows of {batch.nbytes:,} bytes; at"
                    f" most {MAX_LINE_BYTES:,} each"
                )
            rows += [drop_schema_nulls(row) for row in batch.to_pylist()]
        restore_digits(rows, file.schema_arrow)
    # ValueError: not UTF-8, or a date that does not exist.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"--dataset {path}: not a parquet file ({reason})") from None
    return Rows(rows, [f"{path} row {i}" for i in range(1, len(rows) + 1)])


def drop_schema_nulls(row: dict) -> dict:
    """Return a row without the nulls that a table's schema adds to the objects in its columns.

    In a table, every object of a column has the keys of all of them. Nulls in lists, and columns that are
    null, belong to the data and stay.
    """
    return {column: _drop_nulls(value) for column, value in row.items()}


def _drop_nulls(value: Any) -> Any:
    """Return a value without null fields in its objects, at every depth. Maps of pyarrow become objects."""
    if isinstance(value, dict):
        return {key: _drop_nulls(part) for key, part in value.items() if part is not None}
    if not isinstance(value, list):
        return value
    if value and all(isinstance(part, tuple) for part in value):  # pyarrow reads a map as tuples
        return {key: _drop_nulls(part) for key, part in value}
    return [_drop_nulls(part) for part in value]


def restore_digits(rows: list[dict], schema) -> None:
    """Replace 16 and 32-bit floats in the rows by those with the fewest digits: 0.1 for 0.10000000149011612.

    These are the 64-bit floats of the shortest texts that mean the same 16 or 32-bit number. Floats within
    lists and structs are replaced, too. schema: pyarrow's, of the rows' table.
    """
    for name, arrow_type in zip(schema.names, schema.types, strict=True):
        # The type's text names float16 and float32 so, also within lists and structs, but float64 `double`.
        for row in rows if "float" in str(arrow_type) else ():
            row[name] = _restore_digits(row[name], arrow_type)


def _restore_digits(value: Any, arrow_type) -> Any:
    """Return a value with the digits restored, as in `restore_digits`."""
    import numpy
    import pyarrow

    types, narrow = pyarrow.types, {pyarrow.float16(): numpy.float16, pyarrow.float32(): numpy.float32}
    if arrow_type in narrow and isinstance(value, numpy.floating):  # 16 bits, of a pyarrow before 21
        value = float(value)
    if arrow_type in narrow and isinstance(value, float) and math.isfinite(value):
        whole = value.is_integer() and abs(value) < 1e16  # beyond, Python writes an exponent as well
        return value if whole else float(str(narrow[arrow_type](value)))
    if types.is_struct(arrow_type) and isinstance(value, dict):
        return {key: _restore_digits(part, arrow_type.field(key).type) for key, part in value.items()}
    if types.is_map(arrow_type) and isinstance(value, dict):
        return {key: _restore_digits(part, arrow_type.item_type) for key, part in value.items()}
    if types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        return value and [_restore_digits(part, arrow_type.value_type) for part in value]
    return value
