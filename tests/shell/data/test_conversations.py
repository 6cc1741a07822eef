"""Stores are read record by record, in either form; what is no conversation has its reason."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mimogrid.core.base.errors import PlanError
from mimogrid.shell.data.conversations import (
    REASONS,
    LeftOutError,
    Medium,
    conversation,
)
from mimogrid.shell.data.lines import raw_records
from mimogrid.shell.data.store import media_bytes, media_file


TRICKY = [
    {"id": "a", "text": 'brackets ]}[{ and "quotes" and \\'},
    {"id": "b", "list": [[1, {"x": "]"}], "é\u2028"]},
    "a string",
    {},
    *(None, 3, True, -2.5e3),
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf \n"])
def test_the_bytes_of_a_record_are_those_that_it_is_written_in(
    tmp_path: Path, indent: int | None, mark: bytes
) -> None:
    """Lists and lines give the same records, whatever is in their strings, and where they begin."""
    listed, lines = tmp_path / "list.json", tmp_path / "lines.jsonl"
    listed.write_bytes(mark + json.dumps(TRICKY, indent=indent, ensure_ascii=False).encode())
    lines.write_text("\n".join(json.dumps(each) for each in TRICKY))
    for store in (listed, lines):
        found = list(raw_records(store))
        assert [json.loads(raw) for _, raw in found] == TRICKY
        content = store.read_bytes()
        assert all(content[offset : offset + len(raw)] == raw for offset, raw in found)


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_list_that_is_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    """It must not pass for a shorter one."""
    store = tmp_path / "list.json"
    store.write_bytes(json.dumps(TRICKY).encode()[:cut])
    with pytest.raises(PlanError, match="brackets deep"):
        list(raw_records(store))


def test_both_forms_say_the_same() -> None:
    """Markers, parts and roles of both forms; images come in the order of their places."""
    llava = {
        "id": 7,
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat is it, and\n<image> this?"},
            {"from": "gpt", "value": " A cat, a dog."},
        ],
    }
    parts: list[dict[str, Any]] = [
        {"type": "image", "path": "a.png"},
        {"type": "text", "text": "What is it, and"},
        {"type": "image"},
        {"type": "text", "text": "this?"},
    ]
    messages = {
        "id": 7,
        "images": [{"path": "b.png"}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": " A cat, a dog."}]},
        ],
    }
    first, second = (conversation(json.dumps(each).encode(), "#0") for each in (llava, messages))
    assert first.id == second.id == "7"
    assert first.media == second.media == (Medium("image", "a.png"), Medium("image", "b.png"))
    assert [turn.role for turn in first.turns] == ["system", "user", "assistant"]
    assert first.turns[1].parts == (Medium("image"), "What is it, and", Medium("image"), "this?")
    assert first.turns[2] == second.turns[2]
    assert first.turns[2].parts == (" A cat, a dog.",)


def test_a_record_without_an_id_has_its_number() -> None:
    """Records are told apart."""
    assert conversation(b'{"messages": [{"role": "user", "content": "hi"}]}', "#12").id == "#12"


def turns(*said: Any, **more: Any) -> bytes:
    """Return a record in which the user and the assistant speak by turns."""
    sides = ("human", "gpt") * len(said)
    return json.dumps(
        {"conversations": [{"from": s, "value": v} for s, v in zip(sides, said, strict=False)], **more}
    ).encode()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (turns("caf\u00e9", "yes").replace(b"caf\\u00e9", b"caf\xe9"), "not UTF-8"),
        (b'{"conversations": [', "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no conversation"),
        (b"{}", "no conversation"),
        (b'{"conversations": []}', "no conversation"),
        (b'{"conversations": ["hi"]}', "no conversation"),
        (b'{"conversations": [{"from": "robot", "value": "hi"}]}', "no conversation"),
        (b'{"conversations": [{"from": "human", "value": 3}]}', "no conversation"),
        (b'{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "no conversation"),
        (turns("<image>", "x", image=3), "no conversation"),
        (turns("<image>", "x", image="a\0b"), "no conversation"),
        (turns("<image>", "x"), "media"),
        (turns("hi", "x", image="a.png"), "media"),
        (turns("<image>", "<image>", image="a.png"), "empty answer"),
        (turns("hi", "  "), "empty answer"),
    ],
)
def test_what_is_no_conversation_has_its_reason(raw: bytes, reason: str) -> None:
    """Each is one of the reasons that are explained."""
    with pytest.raises(LeftOutError) as caught:
        conversation(raw, "#0")
    assert caught.value.reason == reason
    assert reason in REASONS


def test_no_name_leads_out_of_the_folder_of_the_images(tmp_path: Path) -> None:
    """Neither by its parts, nor by a link."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "out").symlink_to(tmp_path)
    (images / "circle").symlink_to(images / "circle")
    for name in ("../a.png", "/etc/passwd", "x/../../a.png", "out/a.png", "circle"):
        with pytest.raises(LeftOutError) as caught:
            media_file(images, name).stat()
        assert caught.value.reason == "path"
    assert media_file(images, "x/../a.png") == images / "a.png"


def test_what_is_no_file_is_missing(tmp_path: Path) -> None:
    """A pipe would wait, and a name may be too long for the system."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "a" * 5000, "none.png", "."):
        with pytest.raises(LeftOutError) as caught:
            media_bytes(tmp_path, name)
        assert caught.value.reason == "missing file"
