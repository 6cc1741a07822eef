"""Rehearsals: what hosts lack together is found before a run starts on them, in one table."""

from pathlib import Path
from typing import Any

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.shell.job.jobs import open_job
from mimogrid.shell.world.hosts import HostRecord
from mimogrid.shell.world.preflight import problems, table
from mimogrid.shell.world.rehearsal import checks


TOPOLOGY = open_job(Path(__file__).resolve().parents[3] / "examples" / "first" / "job.toml").topology
VERSIONS = {"mimogrid": "0.1.0", "torch": "2.13.0", "python": "3.11"}
RECORDS = [HostRecord(host, VERSIONS) for host in "aabb"]
SAID: dict[str, Any] = {"digest": "abc", "device": "CPU", "problem": None, "available": 1 << 30}


def subjects(*given: Any, force: bool = False) -> list[str]:
    """What is wrong with a world, by subject."""
    return [problem.where for problem in problems(checks(TOPOLOGY, *given), force=force)]


def test_hosts_that_fit_together_lack_nothing() -> None:
    """The table has a line for each thing, and one for the memory of each host."""
    lines = [*table(checks(TOPOLOGY, RECORDS, [SAID] * 4, None))]
    assert ["ranks", "versions", "clocks", "plan", "devices", "memory", "memory"] == [
        line.split()[1] for line in lines
    ]
    assert all(line.startswith("ok ") for line in lines)
    assert "the launcher started 4: a (ranks 0-1), b (ranks 2-3)." in lines[0]


def test_whatever_hosts_lack_is_found() -> None:
    """Each by itself; clocks and memory may be passed over by force, the others would end the run."""
    other = attrs.evolve(RECORDS[3], versions=VERSIONS | {"torch": "2.12.0"})
    apart = Problem("clocks", "differ.", "Set them.")
    assert ["world_size"] == subjects(RECORDS[:3], [SAID] * 3, None, force=True)
    assert ["hosts"] == subjects([*RECORDS[:3], other], [SAID] * 4, None, force=True)
    assert ["plan"] == subjects(RECORDS, [SAID] * 3 + [SAID | {"digest": "abd"}], None, force=True)
    assert ["memory"] == subjects(RECORDS, [SAID | {"problem": "too small."}] * 4, None, force=True)
    assert ["clocks"] == subjects(RECORDS, [SAID] * 4, apart)
    assert ["memory"] == subjects(RECORDS, [SAID] * 2 + [SAID | {"available": 1 << 20}] * 2, None)
    assert [] == subjects(RECORDS, [SAID | {"available": 1 << 20}] * 4, apart, force=True)
