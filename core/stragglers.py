"""Stragglers: ranks that take longer than they should, and where their time goes.

Ranks of one stage do alike work, so each is compared with the median of them; a rank that is alone at its stage
has nobody to be compared with but a prediction, where costs are known.

>>> paces = [Pace(0, "lm.0", 1.0), Pace(1, "lm.0", 1.1), Pace(2, "lm.0", 2.5, load_s=0.2)]
>>> [str(s) for s in stragglers(paces, above=1.5)]
['rank 2 takes 2.50 s a step for lm.0, 2.3 times the median of its peers, 1.10 s: it computes more slowly']
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs


@attrs.frozen
class Pace:
    """How long a rank is busy in a step with its stages, and how much of that is loading data."""

    rank: int
    stages: str
    busy_s: float
    load_s: float = 0.0


@attrs.frozen
class Straggler:
    """A rank that is slower than what it is compared with, `standard`."""

    pace: Pace
    expected_s: float
    standard: str
    cause: str

    def __str__(self) -> str:
        times = self.pace.busy_s / self.expected_s
        return (
            f"rank {self.pace.rank} takes {self.pace.busy_s:.2f} s a step for {self.pace.stages}, {times:.1f} times "
            f"{self.standard}, {self.expected_s:.2f} s: {self.cause}"
        )


def stragglers(
    paces: Iterable[Pace], *, above: float, predicted: Mapping[int, float] | None = None
) -> Iterator[Straggler]:
    """Yield the ranks that are busy for more than `above` times what was predicted, or their peers' median."""
    alike: dict[str, list[Pace]] = {}
    for pace in paces:
        alike.setdefault(pace.stages, []).append(pace)
    for peers in alike.values():
        for pace in peers:
            expected = (predicted or {}).get(pace.rank, 0.0)
            standard = "its prediction"
            if not expected:
                if len(peers) == 1:
                    continue
                expected, standard = statistics.median_low(p.busy_s for p in peers), "the median of its peers"
            if expected and pace.busy_s > above * expected:
                yield Straggler(pace, expected, standard, _cause(pace, peers, expected))


def _cause(pace: Pace, peers: list[Pace], expected_s: float) -> str:
    """Say whether loading explains the greater part of what a rank takes longer."""
    usual = statistics.median_low(p.load_s for p in peers) if len(peers) > 1 else 0.0
    loads = pace.load_s - usual > 0.5 * (pace.busy_s - expected_s)
    return "it waits for its data" if loads else "it computes more slowly"


def mean(steps: Sequence[Sequence[Pace]]) -> Iterator[Pace]:
    """Yield the mean pace of each rank over steps; in each step the ranks come in the same order."""
    for paces in zip(*steps, strict=True):
        busy_s = statistics.fmean(pace.busy_s for pace in paces)
        yield attrs.evolve(paces[0], busy_s=busy_s, load_s=statistics.fmean(pace.load_s for pace in paces))
