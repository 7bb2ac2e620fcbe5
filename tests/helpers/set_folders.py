"""Folders of data files, as data sets have them."""

from __future__ import annotations

import gzip
import json

import pyarrow

from tests.helpers.data_files import to_jsonl, write_csv, write_file, write_parquet

# Belongs to a set whose rows are in .csv files.
README = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: '*.csv'\n---\n# Rows\n"


def rows(*answers: str) -> list[dict]:
    return [{"question": "Q", "answer": answer} for answer in answers]


def written(folder, files: dict[str, list[dict] | str]):
    """Files of rows, in the kind that each name says, or of a text."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif name.endswith((".gz", ".zst")):
            pack = (
                gzip.compress if name.endswith(".gz") else lambda d: pyarrow.compress(d, "zstd", asbytes=True)
            )
            path.write_bytes(pack(to_jsonl(content).encode()))
        elif name.lower().endswith(".csv"):
            write_csv(path, content)
        elif name.endswith(".parquet"):
            write_parquet(path, content)
        else:
            write_file(path, json.dumps(content) if name.endswith(".json") else to_jsonl(content))
    return folder
