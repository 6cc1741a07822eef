"""Hosts: what each says of itself when a world meets, and how they differ.

Ranks plan alike, and understand each other's messages, only with the same versions of mimogrid, torch and Python. A
host with others is refused, with a table of all hosts. Clocks may differ: no decision depends on them. But reports of
faults and logs compare times of hosts, so a difference is told.

A rank that passes a barrier knows that the last rank came to it between two times of its own clock. From these bounds
a difference of two clocks is proved, however loaded the hosts are, and is never guessed:

>>> before, after = ClockBounds(10.0, 10.1), ClockBounds(-0.2, 0.0)  # ahead of the last rank's clock, in seconds
>>> before.least_ahead_of(after), after.least_ahead_of(before)
(10.0, -10.0)
>>> ClockBounds(-3.0, 0.1).least_ahead_of(ClockBounds(-0.2, 0.2))
0.0
"""

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

import mimogrid
from mimogrid.core.base.errors import Problem
from mimogrid.core.draw.rank_map import runs


CLOCKS_S = 1.0
"""By how much clocks may differ before it is told."""


@attrs.frozen
class ClockBounds:
    """By how many seconds, at least and at most, a rank's clock is ahead of that of the last rank at a barrier."""

    least_s: float
    most_s: float

    def least_ahead_of(self, other: "ClockBounds") -> float:
        """Return by how much this clock is ahead of another for certain, in seconds; negative where it is behind."""
        least_s, most_s = self.least_s - other.most_s, self.most_s - other.least_s
        return least_s if least_s > 0 else min(most_s, 0.0)


@attrs.frozen
class HostRecord:
    """What a rank says of its host: the name, and by name the versions that must be the same everywhere."""

    host: str
    versions: Mapping[str, str]

    def as_text(self) -> str:
        """Return the record as it stands in a store."""
        return json.dumps([self.host, dict(self.versions)])

    @staticmethod
    def parse(text: str) -> "HostRecord":
        """Return the record that a text is of."""
        host, versions = json.loads(text)
        return HostRecord(host, versions)


def record_of(torch_version: str) -> HostRecord:
    """Return the record of this process. Builds of torch for several devices are one version, patches of Python too."""
    python = ".".join(platform.python_version_tuple()[:2])
    versions = {"mimogrid": mimogrid.__version__, "torch": torch_version.partition("+")[0], "python": python}
    return HostRecord(platform.node(), versions)


def first_other(records: Sequence[HostRecord]) -> int | None:
    """Return the first rank with other versions than rank 0, if there is one."""
    return next((rank for rank, of in enumerate(records) if of.versions != records[0].versions), None)


def version_problem(records: Sequence[HostRecord]) -> Problem | None:
    """Return how hosts differ from that of rank 0: a sentence, a table, and what to install."""
    other = first_other(records)
    if other is None:
        return None
    first, its = records[0].versions, records[other].versions
    differing = [name for name in first if any(of.versions.get(name) != first[name] for of in records)]
    shown = [name for name in differing if its.get(name) != first[name]]
    sentence = (
        f"rank {other} on host '{records[other].host}' has {_words(its, shown)}; "
        f"rank 0 on host '{records[0].host}' has {_words(first, shown)}."
    )
    packages = [f"{name}=={first[name]}" for name in differing if name != "python"]
    remedies = [f"pip install {' '.join(packages)}"] * bool(packages)
    remedies += [f"Python {first['python']}"] * ("python" in differing)
    remedy = f"Install the same on every host: {', '.join(remedies)}."
    return Problem("hosts", "\n".join((sentence, *_table(records))), remedy)


def clock_problem(hosts: Sequence[str], clocks: Mapping[int, ClockBounds]) -> Problem | None:
    """Return the hosts whose clocks certainly differ from that of rank 0's host, by rank; None if none does.

    `hosts` has the host of each rank, `clocks` the bounds of those that are known; rank 0 is.
    """
    apart: dict[str, tuple[int, float]] = {}
    for rank, bounds in clocks.items():
        ahead_s = bounds.least_ahead_of(clocks[0])
        if hosts[rank] != hosts[0] and abs(ahead_s) > max(CLOCKS_S, abs(apart.get(hosts[rank], (0, 0.0))[1])):
            apart[hosts[rank]] = rank, ahead_s
    if not apart:
        return None
    found = ", ".join(
        f"that of '{host}' (rank {rank}) is at least {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} it"
        for host, (rank, ahead_s) in apart.items()
    )
    message = (
        f"clocks differ from that of '{hosts[0]}' (rank 0): {found}. Times in reports are off by as much."
    )
    return Problem(
        "clocks", message, "Let NTP set the clocks of all hosts: `chronyc makestep`, `timedatectl`."
    )


def hosts_text(hosts: Iterable[str]) -> str:
    """Return the hosts of all ranks with their ranks.

    >>> hosts_text(["a", "a", "b", "b"])
    'a (ranks 0-1), b (ranks 2-3)'
    """
    return ", ".join(f"{host} (ranks {', '.join(runs(ranks))})" for host, ranks in _ranks_by(hosts).items())


def _ranks_by(keys: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, key in enumerate(keys):
        found.setdefault(key, []).append(rank)
    return found


def _words(versions: Mapping[str, str], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'none')}" for name in names)


def _table(records: Sequence[HostRecord]) -> Iterator[str]:
    """Yield a line for each kind of host that is there, widths as needed."""
    names = list(records[0].versions)
    rows = [["host", "ranks", *names]]
    for text, ranks in _ranks_by(record.as_text() for record in records).items():
        record = HostRecord.parse(text)
        rows.append(
            [record.host, ", ".join(runs(ranks)), *(record.versions.get(name, "none") for name in names)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
