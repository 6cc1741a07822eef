"""How much memory an export takes: its peak, above that of exporting next to nothing.

    python benchmarks/export.py [--tensors 25] [--megabytes 16]

Writes a checkpoint of so many tensors of so many megabytes, each in two parts in two files and with two states of an
optimizer that are not exported, and exports it in a process of its own, once in each format.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.topology.parse import assemble
from mimogrid.core.update.contents import OPTIMIZER, written_as
from mimogrid.shell.checkpoint import manifest
from mimogrid.shell.checkpoint.files import entry_of, shard_name
from mimogrid.shell.checkpoint.index import INDEX, IndexedTensor, ShardPlace, index_text
from mimogrid.shell.job import jobfile, tensorfile


JOB = JobSpec(
    modules={"language": ModuleSpec(model="benchmark:network", options={})},  # whose parameters are not known
    data=DataSpec(source="synthetic"),
    batch=BatchSpec(global_size=1),
)
COLUMNS = 1024
PEAK = """
import sys, pathlib
from mimogrid.shell.cli import main as cli
assert cli.main(sys.argv[1:]) == 0
status = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def write(folder: Path, count: int, rows: int) -> int:
    """Write a checkpoint of `count` weights [rows, COLUMNS] with their states; return its bytes."""
    weights = [f"language.layers.{i}.weight" for i in range(count)]
    names = [
        *weights,
        *(f"{OPTIMIZER}{state}.{name}" for state in ("exp_avg", "exp_avg_sq") for name in weights),
    ]
    half = rows // 2
    checkpoint = manifest.folder_of(folder / manifest.CHECKPOINTS, 1)
    partial = checkpoint.with_name(checkpoint.name + manifest.PARTIAL)
    partial.mkdir(parents=True)
    index = {
        name: IndexedTensor(
            "F32",
            (rows, COLUMNS),
            tuple(ShardPlace(shard_name(rank), (rank * half, 0), (half, COLUMNS)) for rank in range(2)),
        )
        for name in names
    }
    counters = [f"{OPTIMIZER}step.{name}" for name in weights]
    index |= {name: IndexedTensor("F32", (1,), (ShardPlace(shard_name(0), (0,), (1,)),)) for name in counters}
    files = {INDEX: tensorfile.write_text(partial / INDEX, index_text(index))}
    for rank in range(2):
        block = torch.full((half, COLUMNS), float(rank))
        file = shard_name(rank)
        held = {n: part for n, of in index.items() for part in of.parts if part.file == file}
        entries = [entry_of(n, block if n in names else block[0, :1]) for n in held]
        places = {n: {"saved_offsets": part.offsets} for n, part in held.items()}
        metadata = {"format": "pt", tensorfile.SHARDING: json.dumps(places)}
        files[file] = tensorfile.write(partial / file, entries, metadata)
    facts = {
        "step": 1,
        "steps_taken": 1,
        "watch": {"scale": 1.0, "good": 0, "losses": [], "norms": []},
        "job": jobfile.dump(JOB),
        **written_as(assemble(JOB, SourceFacts()), 1),
        "versions": {},
    }
    manifest.publish(partial, checkpoint, facts, files)
    return sum(file["bytes"] for file in files.values())


def peak(run: Path, to: str) -> int:
    """Export in a process of its own; return its peak in bytes."""
    command = [sys.executable, "-c", PEAK, "export", str(run), "--to", to]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) << 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=25)
    parser.add_argument("--megabytes", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name, "small"), Path(name, "large")
        write(small, 1, 2)
        size = write(large, given.tensors, given.megabytes * 10**6 // (4 * COLUMNS) // 2 * 2)
        machine = f"{platform.platform()}, {os.cpu_count()} cores"
        print(f"{machine}, Python {platform.python_version()}, torch {torch.__version__}")
        each = size / 3e6 / given.tensors
        print(f"checkpoint of {size / 1e6:.0f} MB, weights {size / 3e6:.0f} MB, a tensor {each:.1f} MB")
        print(f"{'peak, MB':12}{'program':>10}{'export':>10}")
        for to in ("safetensors", "dcp"):
            idle, busy = peak(small, to), peak(large, to)
            print(f"{to:12}{idle / 1e6:10.0f}{(busy - idle) / 1e6:10.1f}")


if __name__ == "__main__":
    main()
