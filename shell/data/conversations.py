r"""Conversations: a store of what people and assistants say, with images in a folder.

A store is a JSON list, or a file of JSON lines. A record has one of two forms, and may have no image at all:

    {"id": "7", "image": "7.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}
    {"id": "8", "images": ["8.png"], "messages": [{"role": "user", "content": [{"type": "image"},
                                                   {"type": "text", "text": "And that?"}]},
                                                  {"role": "assistant", "content": "A dog."}]}

``<image>`` stands for the next image, or a part of the content may name its image itself. A record is addressed by its
bytes in the file, so one is read without the others. What makes a record unusable is a `LeftOutError` with its reason.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem


MARKER = "<image>"
ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)
"""Strings, whose brackets do not count, and brackets."""


class LeftOutError(Exception):
    """A record that cannot be a sample: one of `REASONS`, and the fact."""

    def __init__(self, reason: str, fact: str) -> None:
        super().__init__(reason, fact)
        self.reason = reason
        self.fact = fact


REASONS: Mapping[str, str] = {
    "not UTF-8": "its bytes are no text",
    "no JSON": "its text is no JSON",
    "no conversation": "it is no record of turns as this page has them",
    "duplicate id": "an earlier record has its id",
    "images": "it has more or fewer images than places for them",
    "path": "an image is not in the folder of the images",
    "missing image": "there is no such file",
    "broken image": "an image cannot be decoded",
    "huge image": "an image has more pixels than Pillow decodes (a decompression bomb)",
    "control token": "its text holds a special token of the tokenizer, such as one that stands for an image",
    "template": "the chat template refuses it, or writes a turn otherwise when another follows",
    "processor": "the processor refuses it",
    "empty answer": "an assistant says nothing",
    "no counted token": "no token of an assistant is left to learn",
    "too many tokens": "it is longer than the index may take",
}
"""Why records are left out."""


@attrs.frozen
class Picture:
    """Where an image goes; the name of its file where it is known."""

    name: str | None = None


@attrs.frozen
class Turn:
    """What one side says: texts and pictures."""

    role: str
    parts: tuple[str | Picture, ...]


@attrs.frozen
class Conversation:
    """A record: its id, its turns, and the files of its pictures in their order."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


# -- the file ----------------------------------------------------------------------------------------------


def raw_records(store: Path) -> Iterator[tuple[int, bytes]]:
    """Yield where each record of a store begins, and its bytes. Raises PlanError if the file is no store.

    A list is read whole; of lines, one after the other.
    """
    try:
        with store.open("rb") as file:
            first = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            file.seek(0)
            if first != b"[":
                yield from _lines(file)
                return
            yield from _list(store, file.read())
    except OSError as error:
        remedy = "Name a JSON file of conversations; see docs/data.md."
        raise PlanError([Problem(str(store), f"cannot be read: {error.strerror}.", remedy)]) from None


def _lines(file: Any) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in file:
        if line.strip():
            yield offset, line
        offset += len(line)


def _list(store: Path, content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the values of a JSON list: strings are skipped, and brackets are counted."""
    depth = start = 0
    for found in _STRUCTURE.finditer(content):
        match found.group():
            case b"{" | b"[":
                start = found.start() if depth == 1 else start
                depth += 1
            case b"}" | b"]":
                depth -= 1
                if depth == 1:
                    yield start, content[start : found.end()]
            case text:
                if depth == 1:
                    yield found.start(), text
        if not depth:
            return
    remedy = "Copy it again: it is cut off, or is no JSON."
    raise PlanError([Problem(str(store), f"ends {depth} brackets deep.", remedy)])


# -- a record ----------------------------------------------------------------------------------------------


def conversation(raw: bytes, name: str) -> Conversation:
    """Return what a record says; `name` is its id where it has none. Raises LeftOutError."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LeftOutError("not UTF-8", f"at byte {error.start} of the record") from None
    except (ValueError, RecursionError) as error:
        raise LeftOutError("no JSON", str(error)) from None
    if not isinstance(record, dict):
        raise LeftOutError("no conversation", "is no table")
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise LeftOutError("no conversation", "has neither conversations nor messages")
    read = tuple(map(_turn, turns))
    if any(turn.role == "assistant" and not _says(turn) for turn in read):
        raise LeftOutError("empty answer", "an assistant says nothing")
    pictures = [part for turn in read for part in turn.parts if isinstance(part, Picture)]
    listed = list(_listed(record))
    if len(listed) != (places := sum(picture.name is None for picture in pictures)):
        raise LeftOutError("images", f"names {len(listed)} images and has {places} places for them")
    unnamed = iter(listed)
    images = tuple(picture.name or next(unnamed) for picture in pictures)
    return Conversation(str(record.get("id", name)), read, images)


def _listed(record: Mapping[str, Any]) -> Iterator[str]:
    for key in ("image", "images"):
        named = record.get(key)
        for name in named if isinstance(named, list) else [] if named is None else [named]:
            yield _name(name)


def _name(name: Any) -> str:
    if isinstance(name, Mapping):
        name = name.get("path", name.get("url", name.get("image")))
    if not isinstance(name, str) or not name or "\0" in name:
        raise LeftOutError("no conversation", f"an image is named {name!r}"[:200])
    return name


def _turn(turn: Any) -> Turn:
    role = content = None
    if isinstance(turn, Mapping):
        role = ROLES.get(str(turn.get("from", turn.get("role"))))
        content = turn.get("value", turn.get("content"))
    if role is None or not isinstance(content, str | list):
        raise LeftOutError("no conversation", f"a turn is {json.dumps(turn)[:100]}")
    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return Turn(role, tuple(part for piece in pieces for part in _parts(piece)))


def _parts(piece: Any) -> Iterator[str | Picture]:
    """Yield the texts and pictures of a part. Blanks beside a marker are the template's to write."""
    kind = piece.get("type") if isinstance(piece, Mapping) else None
    if kind == "text" and isinstance(piece.get("text"), str):
        text = piece["text"]
        for number, words in enumerate(text.split(MARKER)):
            if number:
                yield Picture()
            if kept := words.strip() if MARKER in text else words:
                yield kept
    elif kind == "image":
        names = [piece[key] for key in ("path", "url", "image") if key in piece]
        yield Picture(_name(names[0]) if names else None)
    else:
        raise LeftOutError("no conversation", f"a part of a turn is {json.dumps(piece)[:100]}")


def _says(turn: Turn) -> bool:
    return any(isinstance(part, str) and part.strip() for part in turn.parts)


# -- its images --------------------------------------------------------------------------------------------


def image_file(folder: Path, name: str) -> Path:
    """Return where an image is. Raises LeftOutError if that is not within the folder of the images."""
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name that is too long
        raise LeftOutError("path", f"{name!r}: {error}"[:200]) from None
    if not inside:
        raise LeftOutError("path", f"{name!r} is not in the folder of the images")
    return path


def image_bytes(folder: Path, name: str) -> bytes:
    """Return the bytes of an image. Raises LeftOutError."""
    path = image_file(folder, name)
    try:
        if not path.is_file():  # A pipe would wait, a device have no end.
            raise LeftOutError("missing image", f"{name!r}: there is no such file")
        return path.read_bytes()
    except OSError as error:
        raise LeftOutError("missing image", f"{name!r}: {error.strerror}") from None
