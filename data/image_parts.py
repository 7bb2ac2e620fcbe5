"""Images within conversations: content that is a list of parts, and LLaVA's `<image>` in texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.image_files import ImageSource
from data.image_store import StoredImage
from data.parted_text import PartedText
from options.errors import UserError
from options.exact_json import describe_json_type, try_parse_json

MARK = "<image>"  # LLaVA's, in a question
PART_TYPES = ("text", "image", "image_url")
SOURCE_KEYS = ("image", "path", "url", "image_url", "bytes")  # of a part or an object, for its image
EXPECTED = 'expected parts like {"type": "image"} and {"type": "text", "text": "..."} (docs/data.md)'


def list_sources(value: Any, error_prefix: str) -> list[ImageSource]:
    """Return the images that a column of a row names: none, one or several.

    value: a path, an object with `bytes` or `path`, or a list of these, which may be JSON text. Raises
    UserError for another one.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = try_parse_json(value)
    if isinstance(value, Mapping) and all(part is None for part in value.values()):
        return []  # an image that a table lacks
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [_read_source(each, error_prefix) for each in value]
    return [_read_source(value, error_prefix)]


def _read_source(value: Any, error_prefix: str) -> ImageSource:
    """Return an image that a row names. Raises UserError if it is neither a path nor holds an image."""
    if isinstance(value, Mapping):
        found = [value[key] for key in SOURCE_KEYS if value.get(key) is not None]
        if len(found) == 1:
            return _read_source(found[0], error_prefix)
    if isinstance(value, StoredImage) or (isinstance(value, str) and value):
        return value
    what = "an empty text" if value == "" else describe_json_type(value)
    raise UserError(
        f"{error_prefix}: an image is {what}; expected a path, or an object with bytes or a path"
        " (docs/data.md)"
    )


def has_image_parts(messages: Any) -> bool:
    """Return whether any content of a value that may be a list of messages has a part of an image."""
    if not isinstance(messages, list):  # the quick answer: data may have millions of rows of texts
        return False
    contents = (m.get("content") for m in _mappings(messages))
    return any(_is_image(part) for content in contents for part in _mappings(content))


def _mappings(value: Any) -> Iterator[Mapping]:
    """Yield the objects of a value if it is a list."""
    return (each for each in value if isinstance(each, Mapping)) if isinstance(value, list) else iter(())


def _is_image(part: Mapping) -> bool:
    kind = part.get("type")
    return kind in PART_TYPES[1:] or (kind is None and bool(_list_own(part)))


def _list_own(part: Mapping) -> dict[str, Any]:
    """Return the fields of a part that name its image. A table has empty objects in parts without one."""
    return {key: part[key] for key in SOURCE_KEYS if part.get(key) is not None and part[key] != {}}


def place_images(
    messages: Any, given: Sequence[ImageSource], has_marks: bool, error_prefix: str
) -> tuple[Any, list[ImageSource]]:
    """Return (messages in which each content with images is a PartedText, the images in their order).

    A part of an image has its own source, or the next one of `given`. If nothing says where the given images
    are, they are before the first text of a user. Values that are no messages stay, since `check_messages`
    reports them.

    Args:
        messages: of a row, with `role` and `content`.
        given: the images of the row's columns.
        has_marks: whether MARK in texts, except in answers, stands for an image.
        error_prefix: begins each error.

    Raises UserError for malformed parts, and unless there are as many images as places for them.
    """
    if not isinstance(messages, list):
        return messages, []
    left, placed, sources = list(given), list[Any](), list[ImageSource]()
    for i, message in enumerate(messages, 1):
        content, found = _read_content(message, has_marks, f"{error_prefix}: message {i}")
        for source in found:
            if source is None and not left:
                raise UserError(
                    f"{error_prefix}: has more images in the text than in the column: message {i} has a place"
                    f" for one more than the {len(given)} in its column images or image; add it, or leave the"
                    " place out"
                )
            sources.append(left.pop(0) if source is None else source)
        placed.append(message if content is None else {**message, "content": content})
    if left and not sources and all(_has_text(message) for message in messages):
        return _put_first(placed, left, error_prefix), left
    if left:
        raise UserError(
            f"{error_prefix}: has {len(given)} images in its column images or image, but its messages have"
            f" places for {len(given) - len(left)}"
        )
    return placed, sources


def _has_text(message: Any) -> bool:
    return not isinstance(message, Mapping) or not isinstance(message.get("content"), list)


def _put_first(messages: list, given: Sequence[ImageSource], error_prefix: str) -> list:
    """Return the messages with all images before the first text of a user. Raises UserError without one."""
    for i, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = PartedText([*[None] * len(given), str(message.get("content") or "")])
            return [*messages[:i], {**message, "content": content}, *messages[i + 1 :]]
    raise UserError(f"{error_prefix}: has images, but no message of the role user to show them in")


def _read_content(
    message: Any, has_marks: bool, error_prefix: str
) -> tuple[PartedText | None, list[ImageSource | None]]:
    """Return (the content of a message if it has parts, else None; the source of each image, None = given).

    has_marks, error_prefix: as for `place_images`.
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    has_marks = has_marks and isinstance(message, Mapping) and message.get("role") != "assistant"
    if isinstance(content, list) and content:
        return _read_parts(content, has_marks, error_prefix)
    if not has_marks or not isinstance(content, str) or MARK not in content:
        return None, []
    return split_marks(content), [None] * content.count(MARK)


def split_marks(text: str) -> PartedText:
    """Return a text with an image in the place of each MARK."""
    first, *others = text.split(MARK)
    return PartedText(
        [first] * bool(first) + [part for other in others for part in (None, other) if part != ""]
    )


def _read_parts(
    content: list, has_marks: bool, error_prefix: str
) -> tuple[PartedText, list[ImageSource | None]]:
    """Return what `_read_content` does for a list of parts.

    Raises UserError for a malformed part, and for a mark beside parts of images.
    """
    parts, sources = list[str | None](), list[ImageSource | None]()
    for i, part in enumerate(content, 1):
        where = f"{error_prefix}: part {i} of its content"
        if not isinstance(part, Mapping):
            raise UserError(f"{where} is {describe_json_type(part)}; {EXPECTED}")
        if _is_image(part):
            own = _list_own(part)
            parts.append(None)
            sources.append(_read_source(own, where) if own else None)
        elif part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            marked = split_marks(part["text"]).parts if has_marks else (part["text"],)
            if None in marked and any(isinstance(one, Mapping) and _is_image(one) for one in content):
                raise UserError(
                    f"{where} holds {MARK} beside parts of images; leave out the one or the other"
                )
            parts += marked
            sources += [None] * marked.count(None)
        else:
            kind = part.get("type", "text")
            what = "has no text" if kind == "text" else f"is of the type {kind!r}"
            raise UserError(f"{where} {what}; {EXPECTED}")
    return PartedText(parts), sources
