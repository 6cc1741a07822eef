"""Edits of a checkpoint: what may happen to its files, by accident or on purpose, drawn at random.

An edit may also renew checksums: those of the files in the manifest, or these and that of the manifest. With all of
them renewed nobody can tell other values of a tensor, so such an edit leaves the values as they are.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.index import INDEX
from mimogrid.shell.checkpoint.jsonfile import canonical
from mimogrid.shell.job import tensorfile


KEPT, FILES, ALL = "checksums kept", "checksums of files renewed", "all checksums renewed"

Edit = Callable[[Path, random.Random, bool], Path]
"""Changes a checkpoint, its values too if it may; returns its folder."""


def edited(folder: Path, draw: random.Random) -> tuple[Path, str]:
    """Apply a drawn edit; return the folder, which may have another name, and what was done."""
    name, renewal = draw.choice(list(EDITS)), draw.choice([KEPT, FILES, ALL])
    folder = EDITS[name](folder, draw, renewal != ALL)
    renew(folder, renewal)
    return folder, f"{name}, {renewal}"


def renew(folder: Path, renewal: str) -> None:
    """Renew checksums, if there is a manifest that can be read."""
    path = folder / manifest.MANIFEST
    try:
        facts = json.loads(path.read_text())
        names = [name for name in facts["files"] if (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if renewal != KEPT:
        for name in names:
            facts["files"][name] = {
                "bytes": (folder / name).stat().st_size,
                "sha256": tensorfile.checksum(folder / name),
            }
        if renewal == ALL:
            facts[manifest.DIGEST] = manifest.manifest_digest(facts)
        path.write_text(canonical(facts))


def flip(folder: Path, draw: random.Random, values: bool) -> Path:
    """Change a bit."""
    path = draw.choice(_files(folder))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content) if values else _header_end(path))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return folder


def cut(folder: Path, draw: random.Random, values: bool) -> Path:
    """Lose the end of a file."""
    path = draw.choice(_files(folder))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    return folder


def extend(folder: Path, draw: random.Random, values: bool) -> Path:
    """Write something behind a file."""
    path = draw.choice(_files(folder))
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 8, 300])))
    return folder


def swap_files(folder: Path, draw: random.Random, values: bool) -> Path:
    """Give two files each other's names."""
    one, other = draw.sample(_files(folder), 2)
    spare = folder / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    return folder


def swap_parts(folder: Path, draw: random.Random, values: bool) -> Path:
    """Let the index give two parts each other's file, offsets or shape."""

    def change(index: dict[str, Any]) -> None:
        parts = [part for of in index.values() for part in of["parts"]]
        cuts = [part for of in index.values() if len(of["parts"]) > 1 for part in of["parts"]]
        one, other = draw.sample(draw.choice([parts, cuts or parts]), 2)
        for key in draw.choice([("file",), ("offsets",), ("shape",), ("file", "offsets")]):
            one[key], other[key] = other[key], one[key]

    return _index(folder, change)


def swap_places(folder: Path, draw: random.Random, values: bool) -> Path:
    """Let the headers of two files give two tensors each other's place in the full ones, or in the file."""
    path = draw.choice(_shards(folder))

    def change(header: dict[str, Any]) -> None:
        if values and draw.random() < 0.5:
            one, other = draw.sample(sorted(header.keys() - {"__metadata__"}), 2)
            for key in ("data_offsets", "shape"):
                header[one][key], header[other][key] = header[other][key], header[one][key]
            return
        places = json.loads(header["__metadata__"][tensorfile.SHARDING])
        name = draw.choice(sorted(places))
        offsets = places[name]["saved_offsets"]
        places[name]["saved_offsets"] = [o + draw.choice([-1, 1, 2]) for o in offsets]
        header["__metadata__"][tensorfile.SHARDING] = json.dumps(places)

    return _header(path, change)


def rename_folder(folder: Path, draw: random.Random, values: bool) -> Path:
    """Give the checkpoint the name of another step, or any name."""
    return folder.rename(folder.with_name(draw.choice(["step-00000009", "step-00000001", "step-2", "best"])))


def rename_file(folder: Path, draw: random.Random, values: bool) -> Path:
    """Give a file another name; the manifest may follow, and the index."""
    path = draw.choice(_files(folder))
    new = draw.choice(
        ["other", "shard-00009-model-00001-of-00001.safetensors", "Index.json", path.name + "~"]
    )
    path.rename(folder / new)
    follows = draw.choice(["", "manifest", "index", "both"])
    if follows in {"manifest", "both"}:
        _manifest(folder, lambda facts: facts["files"].update({new: facts["files"].pop(path.name, {})}))
    if follows in {"index", "both"} and (folder / INDEX).exists():
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text.replace(json.dumps(path.name), json.dumps(new)))
    return folder


def rename_tensor(folder: Path, draw: random.Random, values: bool) -> Path:
    """Give a tensor another name in the index, in the headers or in both; two names may be exchanged."""
    names = sorted(json.loads((folder / INDEX).read_text()))
    old, new = draw.sample(names, 2)
    new = (
        draw.choice([new, old + "s", "other." + old, old.replace("optimizer.", "")]) if values else old + "s"
    )
    _each_mention(folder, draw, lambda table: table.update({new: table.pop(old)}) if old in table else None)
    return folder


def delete_tensor(folder: Path, draw: random.Random, values: bool) -> Path:
    """Let the index, the headers or both forget a tensor."""
    name = draw.choice(sorted(json.loads((folder / INDEX).read_text())))
    _each_mention(folder, draw, lambda table: table.pop(name, None))
    return folder


def delete_entry(folder: Path, draw: random.Random, values: bool) -> Path:
    """Delete a field of the manifest, a file of its list, a field of the index, or a file."""

    def field(of: dict[str, Any]) -> None:
        del of[draw.choice(sorted(of))]

    match draw.randrange(4):
        case 0:
            return _manifest(folder, field)
        case 1:
            return _manifest(folder, lambda facts: field(facts["files"]))
        case 2:
            return _index(folder, lambda index: field(draw.choice(list(index.values()))))
        case _:
            draw.choice(_files(folder)).unlink()
            return folder


def change_number(folder: Path, draw: random.Random, values: bool) -> Path:
    """Change a number of the manifest or of the index, or put something else in its place."""

    def change(table: dict[str, Any]) -> None:
        holder, key = draw.choice(list(_numbers(table)))
        old = holder[key]
        others = [
            old + 1,
            old - 1,
            old * 2,
            -old - 1,
            10**9,
            10**40,
            1e308,
            float("nan"),
            str(old),
            None,
            [old],
            True,
        ]
        holder[key] = draw.choice(others)

    return draw.choice([_manifest, _index])(folder, change)


EDITS: dict[str, Edit] = {
    "a bit is flipped": flip,
    "a file is cut": cut,
    "a file is extended": extend,
    "two files are swapped": swap_files,
    "two parts are swapped": swap_parts,
    "places are others": swap_places,
    "the folder is renamed": rename_folder,
    "a file is renamed": rename_file,
    "a tensor is renamed": rename_tensor,
    "a tensor is deleted": delete_tensor,
    "an entry is deleted": delete_entry,
    "a number is another": change_number,
}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


def _header_end(path: Path) -> int:
    content = path.read_bytes()
    return 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)


def _json(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(canonical(table))
    return path.parent


def _manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    return _json(folder / manifest.MANIFEST, change) if (folder / manifest.MANIFEST).exists() else folder


def _index(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    return _json(folder / INDEX, change)


def _header(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a header, and lay the values of the tensors that it still has behind each other as it now says."""
    content, end = path.read_bytes(), _header_end(path)
    header = json.loads(content[8:end])
    change(header)
    tensors = sorted(
        (name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )
    values = bytearray()
    for name in tensors:
        begin, stop = header[name]["data_offsets"]
        header[name]["data_offsets"] = [len(values), len(values) + stop - begin]
        values += content[end + begin : end + stop]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path.parent


def _each_mention(folder: Path, draw: random.Random, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a table of tensors in the index, in the headers, or in both."""
    where = draw.choice(["index", "headers", "both"])
    if where != "headers":
        _index(folder, change)
    if where != "index":

        def in_header(header: dict[str, Any]) -> None:
            places = json.loads(header["__metadata__"][tensorfile.SHARDING])
            change(header)
            change(places)
            header["__metadata__"][tensorfile.SHARDING] = json.dumps(places)

        for path in _shards(folder):
            _header(path, in_header)


def _numbers(table: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every number in a JSON value, by what holds it and the key there."""
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        if isinstance(value, dict | list):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield table, key
