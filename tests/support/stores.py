"""Stores: small ones of conversations about images, a tiny LLaVA to read them, and indexes made in this process."""

import concurrent.futures
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mimogrid.shell.data.index import Index
from mimogrid.shell.data.indexing import Making, build


T = TypeVar("T")
LLAVA = Path(__file__).parents[2] / "examples" / "llava"


class Inline(concurrent.futures.Executor):
    """A pool that computes at once, in this process, and counts."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[T]":
        """Compute at once."""
        self.submitted += 1
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def example(name: str) -> ModuleType:
    """Return a file of the LLaVA example as a module."""
    spec = importlib.util.spec_from_file_location(f"llava_{name}", LLAVA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image(folder: Path, name: str, seed: int = 0, size: tuple[int, int] = (32, 8)) -> str:
    """Write an image of noise; return its name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return name


def record(
    number: int, *images: str, question: str = "Read the digits", answer: str = "3 1 4"
) -> dict[str, Any]:
    """Return a record in LLaVA's form."""
    turns = (("human", "<image>\n" * len(images) + question), ("gpt", answer))
    found: dict[str, Any] = {"id": f"r{number}"}
    if images:
        found["image"] = images[0] if len(images) == 1 else list(images)
    return found | {"conversations": [{"from": side, "value": value} for side, value in turns]}


def write_lines(store: Path, records: Sequence[Any]) -> Path:
    """Write a store of JSON lines; bytes are written as they are."""
    lines = (each if isinstance(each, bytes) else json.dumps(each).encode() for each in records)
    store.write_bytes(b"".join(line + b"\n" for line in lines))
    return store


def indexed(
    store: Path, checkpoint: Path, *, images: Path | None = None, out: Path | None = None, max_tokens: int = 0
) -> tuple[Index, int]:
    """Make an index beside a store; return it, and how many parts were made for it."""
    pool, out = Inline(), out or store.with_suffix(".index")
    making = Making(store=store, images=images or store.parent, processor=checkpoint, max_tokens=max_tokens)
    build(making, out, pool, ahead=4)
    return Index(out), pool.submitted
