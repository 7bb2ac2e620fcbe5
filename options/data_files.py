"""What the name of a data file says: which kinds are read, and what to do with the others."""

from __future__ import annotations

import os

# Those that are read.
KINDS = {".json": "JSON", ".jsonl": "JSON", ".ndjson": "JSON", ".csv": "CSV", ".parquet": "parquet"}
JSON_LINES = (".jsonl", ".ndjson")
READABLE = ", ".join(KINDS)
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
# fmt: off
TODO = {  # what to do: with files of which kinds
    "unpack it first": PACKED,
    "write it as .csv, with commas": (".tsv",),
    'make a .jsonl of it, with lines like {"text": "..."}': (".txt", ".md"),
    "write it as .parquet": (".arrow", ".feather", ".orc", ".avro"),
    "save the table as .csv": (".xlsx", ".xls", ".ods"),
    "write its rows as .jsonl": (
        ".xml", ".html", ".yaml", ".yml", ".h5", ".hdf5", ".npz", ".npy", ".sqlite", ".db"),
    "write its rows as .jsonl; nothing is unpickled here": (".pkl", ".pickle", ".pt", ".bin"),
    "only texts are read": (
        ".png", ".jpg", ".jpeg", ".webp", ".gif", ".wav", ".mp3", ".flac", ".mp4", ".pdf"),
}
# fmt: on
OTHERS = {suffix: todo for todo, suffixes in TODO.items() for suffix in suffixes}
# Names of texts that stand beside data and are none.
PROSE = ("readme", "license", "licence", "notice", "copying", "changelog", "citation", "requirements")


def suffix_of(name: str) -> str:
    """The suffix in small letters, of a packed file with the one before it: .jsonl.gz."""
    stem, last = os.path.splitext(os.path.basename(name).lower())
    return os.path.splitext(stem)[1] + last if last in PACKED else last


def advice(name: str) -> str | None:
    """What to do with a file of a kind that is known and not read; None for others."""
    return OTHERS.get(os.path.splitext(name.lower())[1])


def kind_in_folder(name: str) -> str | None:
    """Return the kind of a data file in a folder, to be told apart from other kinds; None for a file without
    rows, such as a README or a program."""
    stem, _ = os.path.splitext(os.path.basename(name).lower())
    suffix = suffix_of(name)
    if suffix in KINDS:
        return KINDS[suffix]
    if advice(name) is None or suffix in (".md", ".yaml", ".yml") or (suffix == ".txt" and stem in PROSE):
        return None
    return suffix
