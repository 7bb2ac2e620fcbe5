"""Read the rows of parquet files, and bring the values of tables into the form that JSON files give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from options.errors import UserError
from options.limits import MAX_IMAGE_BYTES, MAX_LINE_BYTES

PARQUET_BUFFER_BYTES = 2**20
PARQUET_BATCH_ROWS = 64  # rows read at once; few, as a file may store one large value for all of them

TakeRow = Callable[[dict], dict]  # returns a row without the bytes of its images


def read_parquet(path: Path, take_row: TakeRow) -> list[dict]:
    """Return the rows of a file. Raises UserError if it is malformed, or its rows are too large.

    take_row: what becomes of each row before the next ones are read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # Without a buffer of its own, pyarrow holds whole columns of images.
        file, rows = pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES), list[dict]()
        if file.metadata.num_rows > path.stat().st_size:  # forged: rows take a bit at least
            raise UserError(
                f"--dataset {path}: says {file.metadata.num_rows:,} rows in {path.stat().st_size:,} bytes"
            )
        for batch in _read_batches(file, path):
            rows += [take_row(drop_schema_nulls(row)) for row in batch.to_pylist()]
        restore_digits(rows, file.schema_arrow)
    # ValueError: not UTF-8, or a date that does not exist.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"--dataset {path}: not a parquet file ({reason})") from None
    return rows


def _read_batches(file: Any, path: Path) -> Iterator[Any]:
    """Yield the rows of a pyarrow.parquet.ParquetFile, a few at a time. Raises UserError for rows too large.

    Without care pyarrow holds all images that it has read: of all groups of rows of one iterator, those that
    its threads read ahead, and what it has freed itself.
    """
    import pyarrow

    holds_images = "binary" in str(file.schema_arrow)
    size, row_bytes = (4, MAX_IMAGE_BYTES) if holds_images else (PARQUET_BATCH_ROWS, MAX_LINE_BYTES // 4)
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(size, [group], use_threads=not holds_images):
            if batch.nbytes > row_bytes * size:
                raise UserError(
                    f"--dataset {path}: {size} rows of {batch.nbytes:,} bytes; at most {MAX_LINE_BYTES:,}"
                    f" each, or {MAX_IMAGE_BYTES:,} of images"
                )
            yield batch
            if holds_images:
                pyarrow.default_memory_pool().release_unused()


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
