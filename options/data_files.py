"""Kinds of data files by their names: those that can be read, and advice on the others."""

from __future__ import annotations

import os

# Kinds that can be read, by suffix.
TEXT_KINDS = {".json": "JSON", ".jsonl": "JSON", ".ndjson": "JSON", ".csv": "CSV"}
PACKINGS = {".gz": "gzip", ".zst": "zstd"}  # of text files; the names are pyarrow's
KINDS = TEXT_KINDS | {".parquet": "parquet"}
READABLE = ", ".join(KINDS)
KINDS |= {suffix + packing: kind for suffix, kind in TEXT_KINDS.items() for packing in PACKINGS}
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
# fmt: off
SUFFIXES_BY_ADVICE = {
    "unpack it first": COMPRESSED,
    "write it as .csv, with commas": (".tsv",),
    'make a .jsonl of it, with lines like {"text": "..."}': (".txt", ".md"),
    "write it as .parquet": (".arrow", ".feather", ".orc", ".avro"),
    "save the table as .csv": (".xlsx", ".xls", ".ods"),
    "write its rows as .jsonl": (
        ".xml", ".html", ".yaml", ".yml", ".h5", ".hdf5", ".npz", ".npy", ".sqlite", ".db"),
    "write its rows as .jsonl; nothing is unpickled here": (".pkl", ".pickle", ".pt", ".bin"),
    "only texts and images are read": (".wav", ".mp3", ".flac", ".mp4", ".pdf"),
    "give a .jsonl that names it in a column image": (
        ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"),
}
# fmt: on
IMAGE_SUFFIXES = SUFFIXES_BY_ADVICE["give a .jsonl that names it in a column image"]
ADVICE = {suffix: text for text, suffixes in SUFFIXES_BY_ADVICE.items() for suffix in suffixes}
# Names of text files that are not data but are often in a folder of data.
PROSE = ("readme", "license", "licence", "notice", "copying", "changelog", "citation", "requirements")


def file_suffix(name: str) -> str:
    """Return a file's suffix in lower case; of a compressed file the last two, such as .jsonl.gz."""
    stem, last = os.path.splitext(os.path.basename(name).lower())
    return os.path.splitext(stem)[1] + last if last in COMPRESSED else last


def unpacked_name(name: str) -> str:
    """Return a file's name without the suffix of its packing, if it has one of PACKINGS."""
    stem, last = os.path.splitext(name)
    return stem if last.lower() in PACKINGS else name


def conversion_advice(name: str) -> str | None:
    """Return what to do with a file of a known kind that cannot be read; None for other files."""
    if file_suffix(name) in KINDS:
        return None
    return ADVICE.get(os.path.splitext(name.lower())[1])


def kind_in_folder(name: str) -> str | None:
    """Return "JSON", "CSV" or "parquet"; the suffix if the file cannot be read; None if it has no rows.

    The name decides. A README, a program or an image has no rows.
    """
    stem, _ = os.path.splitext(os.path.basename(name).lower())
    suffix = file_suffix(name)
    if suffix in KINDS:
        return KINDS[suffix]
    is_prose = suffix in (".md", ".yaml", ".yml") or (suffix == ".txt" and stem in PROSE)
    return None if is_prose or suffix in IMAGE_SUFFIXES or conversion_advice(name) is None else suffix
