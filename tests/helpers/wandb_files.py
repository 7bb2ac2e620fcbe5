"""Records in the files that wandb writes of a run."""

from __future__ import annotations

import struct
import time
from pathlib import Path


def wandb_records(path: Path) -> list:
    """Return the records of a finished run's .wandb file, once wandb's process has written all of them."""
    deadline = time.time() + 30
    while time.time() < deadline:
        records = list(parse_wandb(path)) if path.stat().st_size else []
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} was not finished")


def parse_wandb(path: Path):
    """Yield the records of a .wandb file.

    The format is LevelDB's log (blocks of 32 KiB; crc, length, type, data) after a 7-byte header; each record
    is a protobuf. wandb 0.31 has the messages but no reader.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    raw, position, record_bytes = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while position + 7 <= len(raw):
        if 32768 - position % 32768 < 7:  # too short for a header: padding
            position += 32768 - position % 32768
            continue
        _crc, length, kind = struct.unpack_from("<IHB", raw, position)
        if position + 7 + length > len(raw):  # still being written
            return
        record_bytes += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or the last fragment of one
            record = Record()
            record.ParseFromString(record_bytes)
            record_bytes = b""
            yield record
