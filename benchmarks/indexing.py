"""How fast a store is indexed, and how fast its samples are described and loaded.

    python benchmarks/indexing.py [--records 2000] [--side 336] [--workers 1,2]

Makes the tiny LLaVA of examples/llava, with images of so many pixels a side that its processor makes small, and a
store of conversations about noise. Prints records per second for each number of processes, and times per sample.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
from PIL import Image

from mimogrid.shell.data.index import Index
from mimogrid.shell.data.indexing import Making, build, processes
from mimogrid.shell.job.jobs import open_job


MAKE = Path(__file__).parents[1] / "examples/llava/make.py"
JOB = """
[modules.vision]
model = "vit"
weights = "checkpoint"
feeds = ["language"]
projector = { language = { kind = "mlp", ffn = 64 } }
[modules.language]
model = "gpt"
weights = "checkpoint"
[data]
source = "conversations"
options = { index = "index" }
[batch]
global_size = 1
"""
LIBRARIES = ("transformers", "tokenizers", "torch", "pillow", "pyarrow")
DRAWN = 500
"""Samples that are described and loaded."""


def main() -> None:
    """Print a line for each number of processes, and one for each way to read a sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--side", type=int, default=336)
    parser.add_argument("--workers", default="1,2")
    args = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES))
    print(f"load average {os.getloadavg()[0]:.1f} before")
    print(f"{args.records} records, images of {args.side} x {args.side} in JPEG")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runpy.run_path(str(MAKE))["checkpoint"](folder / "checkpoint")
        write(folder, args.records, args.side)
        for workers in map(int, args.workers.split(",")):
            making = Making(store=folder / "store.jsonl", media=folder, processor=folder / "checkpoint")
            with processes(workers) as pool:
                # The first record is waited for, because a process takes seconds to import transformers.
                build(
                    attrs.evolve(making, store=folder / "warm.jsonl"),
                    folder / f"warm-{workers}",
                    pool,
                    ahead=1,
                )
                begin = time.perf_counter()
                build(making, folder / f"index-{workers}", pool, ahead=4 * workers)
            speed = args.records / (time.perf_counter() - begin)
            print(f"{workers} processes   {speed:6.0f} records/s")
        (folder / f"index-{workers}").rename(folder / "index")
        (folder / "job.toml").write_text(JOB)
        read(folder / "job.toml", min(DRAWN, len(Index(folder / "index"))))
    print(f"load average {os.getloadavg()[0]:.1f} after")


def write(folder: Path, count: int, side: int) -> None:
    """Write a store of conversations, each about one of a hundred images of noise."""
    draws = np.random.default_rng(0)
    for number in range(100):
        small = draws.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        Image.fromarray(small).resize((side, side)).save(folder / f"{number}.jpg")
    turns = ({"from": "human", "value": "<image>\nRead the digits"}, {"from": "gpt", "value": "3 1 4"})
    records = [
        json.dumps({"id": str(n), "image": f"{n % 100}.jpg", "conversations": turns}) for n in range(count)
    ]
    (folder / "store.jsonl").write_text("\n".join(records))
    (folder / "warm.jsonl").write_text(records[0])


def read(path: Path, count: int) -> None:
    """Print how long it takes to describe a sample, and to load it for each module."""
    source = open_job(path).source
    assert source is not None
    ways: dict[str, Callable[[int], object]] = {
        "describe": source.describe,
        "language": lambda n: source.load(n, "language"),
        "vision": lambda n: source.load(n, "vision"),
    }
    for name, once in ways.items():
        once(0)
        begin = time.perf_counter()
        for number in range(count):
            once(number)
        print(f"{name:<12}  {1e6 * (time.perf_counter() - begin) / count:6.0f} us a sample")


if __name__ == "__main__":
    main()
