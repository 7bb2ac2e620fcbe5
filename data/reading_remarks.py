"""Remarks on how the rows of a data set were read."""

from __future__ import annotations

from collections.abc import Mapping

from data.schemas import Auto, Schema


def describe_unmarked(rows: list[dict], marker: str) -> list[str]:
    """Return a list with one remark on rows that are not learned for lack of a marker, or an empty list."""
    unmarked = sum(marker not in str(row.get("text")) for row in rows)
    if not unmarked:
        return []
    return [f"data: {unmarked:,} of {len(rows):,} rows have no marker {marker!r}; nothing of them is learned"]


def describe_two_systems(given: list[dict], read: list[dict]) -> list[str]:
    """Return a list with one remark on rows whose column `system` gives way to their own, or an empty list.

    given: the rows as they came; read: in the columns of the format.
    """
    count = 0
    for row, values in zip(given, read, strict=True):
        messages, system = values.get("messages"), row.get("system")
        if isinstance(system, str) and system.strip() and isinstance(messages, list) and messages:
            count += isinstance(messages[0], Mapping) and messages[0].get("content") != system
    if not count:
        return []
    return [
        f"data: {count:,} of {len(given):,} rows begin with a system message of their own; their column"
        " system is not read"
    ]


def describe_choice(name: str, schema: Schema, has_template: bool, has_images: bool) -> list[str]:
    """Return a list with one remark if the tokenizer decides on the format of a schema, or an empty list.

    Args:
        name: of the format.
        schema: as it was recognised.
        has_template: whether the tokenizer has a chat template.
        has_images: whether rows have images. Then it decides on all that are texts.
    """
    if schema.auto not in (Auto.WITH_TEMPLATE, Auto.WITHOUT_TEMPLATE) and not (
        has_images and schema.has_texts and name != "completion"
    ):
        return []
    columns, reason = " and ".join(schema.required), "a" if has_template else "no"
    return [
        f"data: columns {columns} are read as {name}, since the tokenizer has {reason} chat template;"
        " --dataset_format chooses another format (docs/data.md)"
    ]
