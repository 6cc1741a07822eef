"""Stragglers: ranks that take longer than they should, and where their time goes.

Where the costs of a job are known, a plan foretells how long each rank computes. Its seconds need not be those of this
machine, so the median rank sets the scale: a straggler takes longer than *that* in proportion to its plan. Without
costs, ranks of one stage do alike work, and each is compared with the median of them; then a rank that is alone at
its stage has nobody to be compared with.

>>> paces = [Pace(0, "lm.0", 1.0), Pace(1, "lm.0", 1.1), Pace(2, "lm.0", 2.5, load_s=0.2)]
>>> (found,) = stragglers(paces, above=1.5)
>>> print(found)
rank 2 (module lm, stage lm.0) computes for 2.5 s a step, 2.3 times the median of its peers, 1.1 s: it computes slowly
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence

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

    @property
    def times(self) -> float:
        """How many times as long as expected it is busy."""
        return self.pace.busy_s / self.expected_s

    @property
    def modules(self) -> list[str]:
        """Those of its stages."""
        return list(dict.fromkeys(stage.partition(".")[0] for stage in self.pace.stages.split()))

    def __str__(self) -> str:
        modules, stages = self.modules, self.pace.stages.split()
        return (
            f"rank {self.pace.rank} (module{'s' * (len(modules) > 1)} {', '.join(modules)}, "
            f"stage{'s' * (len(stages) > 1)} {', '.join(stages)}) computes for {self.pace.busy_s:.3g} s a step, "
            f"{self.times:.1f} times {self.standard}, {self.expected_s:.3g} s: {self.cause}"
        )


def stragglers(
    paces: Sequence[Pace], *, above: float, predicted: Mapping[int, float] | None = None
) -> Iterator[Straggler]:
    """Yield the ranks that are busy for more than `above` times what is expected of them, the slowest first.

    `predicted` says how long a plan lets each rank compute; what is expected is that, at the scale of the median rank.
    Of ranks that it does not name the median of their peers is expected.
    """
    plan = predicted or {}
    ratios = [pace.busy_s / plan[pace.rank] for pace in paces if plan.get(pace.rank)]
    scale = statistics.median_low(ratios) if ratios else 0.0
    alike: dict[str, list[Pace]] = {}
    for pace in paces:
        alike.setdefault(pace.stages, []).append(pace)
    found: list[Straggler] = []
    for peers in alike.values():
        for pace in peers:
            expected, standard = plan.get(pace.rank, 0.0) * scale, "what its costs foretell"
            if not expected and len(peers) > 1:
                expected, standard = statistics.median_low(p.busy_s for p in peers), "the median of its peers"
            if expected and pace.busy_s > above * expected:
                found.append(Straggler(pace, expected, standard, _cause(pace, peers, expected)))
    yield from sorted(found, key=lambda one: -one.times)


def _cause(pace: Pace, peers: list[Pace], expected_s: float) -> str:
    """Say whether loading explains the greater part of what a rank takes longer."""
    usual = statistics.median_low(p.load_s for p in peers) if len(peers) > 1 else 0.0
    loads = pace.load_s - usual > 0.5 * (pace.busy_s - expected_s)
    return "it waits for its data" if loads else "it computes slowly"


def mean(steps: Sequence[Sequence[Pace]]) -> Iterator[Pace]:
    """Yield the mean pace of each rank over steps; in each step the ranks come in the same order."""
    for paces in zip(*steps, strict=True):
        busy_s = statistics.fmean(pace.busy_s for pace in paces)
        yield attrs.evolve(paces[0], busy_s=busy_s, load_s=statistics.fmean(pace.load_s for pace in paces))
