"""Demos: what programs of benchmarks/ run in a world, for ranks of the pool, which do not import them by name."""

import runpy
from pathlib import Path

import attrs

from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job


PARITY = Path(__file__).parents[2] / "benchmarks" / "demo_parity.py"


def parity(place: RankPlace, job: Job) -> dict[str, dict[str, tuple[float, float]]] | None:
    """Return what the demonstration of exactness finds, by rule and module."""
    found = runpy.run_path(str(PARITY))["in_world"](place, job)
    return found and {
        rule: {name: attrs.astuple(each) for name, each in of.items()} for rule, of in found.items()
    }
