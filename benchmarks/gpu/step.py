"""A step of a CLIP encoder and a language model on one GPU: on one rank and on four, beside megatron-core's MimoModel.

    python benchmarks/gpu/step.py [--models 1b 7b] [--sequences 2048 4096] [--parts alone apart overhead]
    python benchmarks/gpu/step.py --tiny --device cpu

Every measurement has a world of processes of its own, which are gone before the next begins; one that fails is told
with its error. What each part measures is in the file of its name beside this one.

Results are printed. On a GPU they are also written to benchmarks/results/gpu.json, after every measurement; elsewhere
only where --out says.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, WorldError
from mimogrid.shell.world.launch import Pool
from workload import ALONE, APART, LANGUAGE, TINY, TINY_SEQUENCE, Options, job_of, opened


PARTS = {"alone": ALONE, "apart": APART, "overhead": APART}
"""What is measured, by the name of its file, and in which layout."""
RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu.json"
NEEDED = (0, 19)
"""The first megatron-core that has a schedule for several modules."""


def main() -> None:
    """Measure, print, and write."""
    given = _parser().parse_args()
    options = Options(**{field.name: getattr(given, field.name) for field in attrs.fields(Options)})
    out = given.out or (RESULTS if options.on_gpu else None)
    with Pool(1, may_use_cuda=options.on_gpu) as pool:
        (machine,) = pool.run("machine:facts", 1, options.on_gpu)
    if machine["device"] is None:
        sys.exit("there is no CUDA device; --tiny --device cpu shows that the rest works.")
    machine["commit"] = given.commit or machine["commit"]
    found: dict[str, Any] = {"machine": machine, "options": attrs.asdict(options), "measured": []}
    sizes = [(TINY, TINY_SEQUENCE)] if given.tiny else [(m, s) for m in given.models for s in given.sequences]
    for model, sequence in sizes:
        for part in given.parts:
            what = {"part": part, "model": model, "sequence": sequence}
            found["measured"].append(what | measured(part, model, sequence, options))
            print(json.dumps(found["measured"][-1], indent=2), flush=True)
            if out:
                out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measured(part: str, model: str, sequence: int, options: Options) -> dict[str, Any]:
    """Measure a part; `skipped` or `failed` says why there is nothing."""
    if part == "apart" and (reason := _lacking()):
        return {"skipped": reason}
    begin = time.monotonic()
    try:
        with opened(job_of(options, model, sequence, PARTS[part])) as job:
            size = job.topology.world_size
            with Pool(size, may_use_cuda=options.on_gpu) as pool:
                result: dict[str, Any] = pool.run(f"{part}:in_world", size, job, options)[0]
    except (PlanError, WorldError) as error:
        return {"failed": str(error)}
    return result | {"took_s": time.monotonic() - begin}


def _lacking() -> str | None:
    """Return why megatron-core's side on several ranks cannot run here, if it cannot."""
    there = importlib.metadata.version("megatron-core")
    if tuple(map(int, there.split(".")[:2])) >= NEEDED:
        return None
    return f"megatron-core {there} has no schedule for several modules; {'.'.join(map(str, NEEDED))} has one."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    parser.add_argument("--models", nargs="+", choices=sorted(LANGUAGE), default=["1b", "7b"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--samples", type=int, default=2, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--engine", choices=["auto", "local", "transformer_engine"], default="auto")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--commit", help="what is measured, where there is no repository to ask")
    return parser


if __name__ == "__main__":
    main()
