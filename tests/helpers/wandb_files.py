"""What wandb wrote of a run."""

from __future__ import annotations

import struct
import time
from pathlib import Path


def wandb_records(path: Path) -> list:
    """All records of a finished run's .wandb file. wandb writes it in a process of its own, which may be behind."""
    deadline = time.time() + 30
    while time.time() < deadline:
        records = list(parse_wandb(path)) if path.stat().st_size else []
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} was not finished")


def parse_wandb(path: Path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, type, data) behind
    a 7-byte header, each record a protobuf. wandb 0.31 brings the messages but no reader of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, position, parts = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while position + 7 <= len(raw):
        if 32768 - position % 32768 < 7:  # too short for a header: padding
            position += 32768 - position % 32768
            continue
        _crc, length, kind = struct.unpack_from("<IHB", raw, position)
        if position + 7 + length > len(raw):  # being written
            return
        parts += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
