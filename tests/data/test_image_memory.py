"""The host's memory does not grow with the images of a data set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.images import encode_image
from tests.helpers.programs import ROOT

COUNT, MAX_MIB = 10_000, 200
PADDING = bytes(30_000)  # behind a PNG's end, where nobody reads it: 300 MB of images in all
# Prints the number of images, and how much more memory the process took at most, in MiB, than before reading.
READ = """
import re, sys
from data.tokenizing import tokenize_dataset
from tests.helpers.images import image_options
options = image_options(context_length=200)
def mib(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**10
before = mib("VmRSS")
rows = tokenize_dataset(sys.argv[1], options)
print(len(rows.images.refs), mib("VmHWM") - before)
"""


def write_rows(path: Path, kind: str, group_rows: int) -> Path:
    """Write COUNT rows of different images: paths of files, or bytes in groups of so many rows."""
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    image_type = struct if kind == "bytes" else pyarrow.string()
    texts = [("question", pyarrow.string()), ("answer", pyarrow.string())]
    schema, encoded = pyarrow.schema([*texts, ("image", image_type)]), encode_image(64, 64)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, COUNT, group_rows):
            rows = []
            for i in range(start, start + group_rows):
                data: object = encoded + i.to_bytes(8, "little") + PADDING
                if kind == "paths":
                    (path.parent / f"{i}.png").write_bytes(encoded + i.to_bytes(8, "little"))
                    data = f"{i}.png"
                rows.append(
                    {
                        "question": f"Q{i}?",
                        "answer": "A",
                        "image": {"bytes": data} if kind == "bytes" else data,
                    }
                )
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind, group_rows", [("paths", 1000), ("bytes", 100), ("bytes", COUNT)])
def test_ten_thousand_images_take_little_memory(tmp_path, kind, group_rows):
    """Whether rows name files or hold the images, in small or in large groups of a parquet file."""
    path = write_rows(tmp_path / "rows.parquet", kind, group_rows)
    done = subprocess.run(
        [sys.executable, "-c", READ, path],
        cwd=ROOT, env=os.environ | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    images, mib = done.stdout.split()
    assert int(images) == COUNT and float(mib) < MAX_MIB
    print(f"{kind}, groups of {group_rows}: {mib} MiB")
