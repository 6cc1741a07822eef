"""Stragglers: ranks that take longer than expected, and whether they compute or load for longer.

With the costs of a job, a simulated step predicts how long each rank computes. Those seconds need not be the seconds
of this machine, so the median rank sets the scale: a straggler takes longer in proportion to its prediction than the
median rank. Without costs, each rank is compared with the median of the ranks that host the same stages. A rank that
has its stages alone is then not compared.

>>> step_times = [StepTimes(0, "lm.0", 1.0), StepTimes(1, "lm.0", 1.1), StepTimes(2, "lm.0", 2.5, load_s=0.2)]
>>> (found,) = stragglers(step_times, above=1.5)
>>> print(found)
rank 2 (module lm, stage lm.0) computes for 2.5 s a step, 2.3 times the median of its peers, 1.1 s: it computes slowly
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence

import attrs


@attrs.frozen
class StepTimes:
    """How long a rank is busy in a step with its stages, and how much of that is loading data."""

    rank: int
    stages: str
    busy_s: float
    load_s: float = 0.0


@attrs.frozen
class Straggler:
    """A rank that is slower than expected; `standard` says what the expectation is."""

    step_times: StepTimes
    expected_s: float
    standard: str
    cause: str

    @property
    def times(self) -> float:
        """How many times as long as expected it is busy."""
        return self.step_times.busy_s / self.expected_s

    @property
    def modules(self) -> list[str]:
        """The modules of its stages."""
        return list(dict.fromkeys(stage.partition(".")[0] for stage in self.step_times.stages.split()))

    def __str__(self) -> str:
        modules, stages = self.modules, self.step_times.stages.split()
        return (
            f"rank {self.step_times.rank} (module{'s' * (len(modules) > 1)} {', '.join(modules)}, "
            f"stage{'s' * (len(stages) > 1)} {', '.join(stages)}) computes for {self.step_times.busy_s:.3g} s a step, "
            f"{self.times:.1f} times {self.standard}, {self.expected_s:.3g} s: {self.cause}"
        )


def stragglers(
    step_times: Sequence[StepTimes], *, above: float, predicted: Mapping[int, float] | None = None
) -> Iterator[Straggler]:
    """Yield the ranks that are busy for more than `above` times what is expected, the slowest first.

    `predicted` are the seconds that a simulated step lets each rank compute, of which the scale is unknown. A rank
    without a prediction is expected to take as long as the median of its peers.
    """
    plan = predicted or {}
    ratios = [one.busy_s / plan[one.rank] for one in step_times if plan.get(one.rank)]
    scale = statistics.median_low(ratios) if ratios else 0.0
    alike: dict[str, list[StepTimes]] = {}
    for one in step_times:
        alike.setdefault(one.stages, []).append(one)
    found: list[Straggler] = []
    for peers in alike.values():
        for one in peers:
            expected, standard = plan.get(one.rank, 0.0) * scale, "what its costs predict"
            if not expected and len(peers) > 1:
                expected, standard = statistics.median_low(p.busy_s for p in peers), "the median of its peers"
            if expected and one.busy_s > above * expected:
                found.append(Straggler(one, expected, standard, _cause(one, peers, expected)))
    yield from sorted(found, key=lambda straggler: -straggler.times)


def _cause(step_times: StepTimes, peers: list[StepTimes], expected_s: float) -> str:
    """Return whether loading or computing explains the greater part of what a rank takes longer."""
    usual = statistics.median_low(p.load_s for p in peers) if len(peers) > 1 else 0.0
    loads = step_times.load_s - usual > 0.5 * (step_times.busy_s - expected_s)
    return "it waits for its data" if loads else "it computes slowly"


def mean(steps: Sequence[Sequence[StepTimes]]) -> Iterator[StepTimes]:
    """Yield the mean times of each rank over steps; each step has the ranks in the same order."""
    for step_times in zip(*steps, strict=True):
        busy_s = statistics.fmean(step_times.busy_s for step_times in step_times)
        yield attrs.evolve(
            step_times[0],
            busy_s=busy_s,
            load_s=statistics.fmean(step_times.load_s for step_times in step_times),
        )
