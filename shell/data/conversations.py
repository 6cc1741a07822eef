r"""Conversations: what people and assistants say in a record of a store, with images and sounds among it.

A record has one of three forms, and may have neither images nor sounds:

    {"id": "7", "image": "7.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                    {"from": "gpt", "value": "A cat."}]}
    {"id": "8", "images": ["8.png"], "messages": [{"role": "user", "content": [{"type": "image"},
                                                   {"type": "text", "text": "And that?"}]},
                                                  {"role": "assistant", "content": "A dog."}]}
    {"id": "9", "audio": "9.wav", "question": "Who is it?", "answer": "A bird."}

``<image>`` and ``<audio>`` stand for the next image or sound, or a part of the content may name its own. A question has
the images and sounds that have no place in it before it, and may be missing. What makes a record unusable is a
`LeftOutError` with its reason.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs


Kind = Literal["image", "audio"]
LISTS: Mapping[Kind, tuple[str, ...]] = {"image": ("image", "images"), "audio": ("audio", "audios")}
"""Where a record lists the files of each kind."""
_MARKERS = re.compile(r"(<image>|<audio>)")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


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
    "media": "it has more or fewer images or sounds than places for them",
    "path": "an image or a sound is not in the folder of the media",
    "missing file": "there is no such image or sound",
    "broken image": "an image cannot be decoded",
    "huge image": "an image has more pixels than Pillow decodes (a decompression bomb)",
    "broken sound": "a sound cannot be decoded, is cut off, or is no finite numbers",
    "empty sound": "a sound has no samples",
    "long sound": "a sound is longer than the processor reads",
    "control token": "its text holds a special token of the tokenizer, such as one that stands for an image",
    "template": "the chat template refuses it, or writes a turn otherwise when another follows",
    "processor": "the processor refuses it",
    "empty answer": "an assistant says nothing",
    "no counted token": "no token of an assistant is left to learn",
    "too many tokens": "it is longer than the index may take",
}
"""Why records are left out."""


@attrs.frozen
class Medium:
    """An image or a sound of a turn; its name in the store where it is known."""

    kind: Kind
    name: str | None = None


@attrs.frozen
class Turn:
    """What one side says: texts, images and sounds."""

    role: str
    parts: tuple[str | Medium, ...]


@attrs.frozen
class Conversation:
    """A record: its id, its turns, and its images and sounds with their names, in the order of their places."""

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Medium, ...]


def conversation(raw: bytes, name: str, offered: Sequence[Medium] = ()) -> Conversation:
    """Return what a record says. Raises LeftOutError.

    Args:
        raw: the record as JSON.
        name: its id where it has none.
        offered: the images and sounds that the store has with a record, for one that lists none of their kind.
    """
    record = _record(raw)
    listed = {kind: tuple(_listed(record, kind)) for kind in LISTS}
    turns = record.get("conversations", record.get("messages"))
    if turns is None and "answer" in record:
        places = {kind: len(listed[kind]) or sum(m.kind == kind for m in offered) for kind in LISTS}
        turns = _asked(record, places)
    if not isinstance(turns, list) or not turns:
        raise LeftOutError("no conversation", "has neither conversations nor messages nor an answer")
    read = tuple(map(_turn, turns))
    if any(turn.role == "assistant" and not _says(turn) for turn in read):
        raise LeftOutError("empty answer", "an assistant says nothing")
    media = [part for turn in read for part in turn.parts if isinstance(part, Medium)]
    names = {kind: iter(_names(kind, media, listed[kind], offered)) for kind in LISTS}
    placed = tuple(
        medium if medium.name else Medium(medium.kind, next(names[medium.kind])) for medium in media
    )
    found = record.get("id")
    return Conversation(name if found is None else str(found), read, placed)


def _record(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
        if _SURROGATE.search(raw):
            json.dumps(record, ensure_ascii=False).encode()  # Half a character is JSON, and no text.
    except UnicodeDecodeError as error:
        raise LeftOutError("not UTF-8", f"at byte {error.start} of the record") from None
    except UnicodeEncodeError:
        raise LeftOutError("not UTF-8", "has half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise LeftOutError("no JSON", str(error)) from None
    if not isinstance(record, dict):
        raise LeftOutError("no conversation", "is no table")
    return record


def _asked(record: Mapping[str, Any], places: Mapping[Kind, int]) -> list[Any]:
    """Return a question and its answer as turns; what has no place in the question is before it."""
    question, answer = record.get("question") or "", record["answer"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise LeftOutError("no conversation", "its question or its answer is no text")
    missing = ((kind, count - question.count(f"<{kind}>")) for kind, count in places.items())
    before = "".join(f"<{kind}>" * count for kind, count in missing)
    if not before and not question.strip():
        raise LeftOutError("no conversation", "has an answer to nothing")
    return [{"role": "user", "content": before + question}, {"role": "assistant", "content": answer}]


def _names(
    kind: Kind, media: Sequence[Medium], listed: Sequence[str], offered: Sequence[Medium]
) -> Sequence[str]:
    """Return the names for the places of a kind that have none. Raises LeftOutError unless each has one."""
    own = [medium for medium in media if medium.kind == kind]
    places = sum(medium.name is None for medium in own)
    if not listed and len(own) == places:
        listed = [medium.name or "" for medium in offered if medium.kind == kind]
    if len(listed) != places:
        thing = {"image": "images", "audio": "sounds"}[kind]
        raise LeftOutError("media", f"names {len(listed)} {thing} and has {places} places for them")
    return listed


def _listed(record: Mapping[str, Any], kind: Kind) -> Iterator[str]:
    for key in LISTS[kind]:
        named = record.get(key)
        for name in named if isinstance(named, list) else [] if named is None else [named]:
            yield _name(name, kind)


def _name(name: Any, kind: Kind) -> str:
    if isinstance(name, Mapping):
        name = name.get("path", name.get("url", name.get(kind)))
    if not isinstance(name, str) or not name or "\0" in name:
        raise LeftOutError("no conversation", f"a file of the kind '{kind}' is named {name!r}"[:200])
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


def _parts(piece: Any) -> Iterator[str | Medium]:
    """Yield the texts, images and sounds of a part. Blanks beside a marker are the template's to write."""
    named = piece.get("type") if isinstance(piece, Mapping) else None
    kind = next((each for each in LISTS if each == named), None)
    if named == "text" and isinstance(piece.get("text"), str):
        pieces = _MARKERS.split(piece["text"])
        for number, words in enumerate(pieces):
            if number % 2:
                yield Medium("image" if words == "<image>" else "audio")
            elif kept := words.strip() if len(pieces) > 1 else words:
                yield kept
    elif kind is not None:
        names = [piece[key] for key in ("path", "url", kind) if piece.get(key) is not None]
        yield Medium(kind, _name(names[0], kind) if names else None)
    else:
        raise LeftOutError("no conversation", f"a part of a turn is {json.dumps(piece)[:100]}")


def _says(turn: Turn) -> bool:
    return any(isinstance(part, str) and part.strip() for part in turn.parts)
