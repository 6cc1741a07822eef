"""Tuning: the order `auto`, found by trying orders on a clock.

What is tried are rules (`queues`): first those that have names, then, from the best of them on, further
microbatches in flight for one stage after the other, the stages with most to do first. Nearly balanced modules
gain by this what a fixed warm-up depth loses: an encoder stage that takes 1.5 times as long as the stages of
the language model needs four microbatches more than its depth to keep them fed. The same addition for all
stages gives nothing.

The clock is one walk of an order over the stages: all dp ranks of a stage at once, data on its way as long as its
link's costs say for the largest samples, no limit on cores. A named order is tried as it would be run, so on
that clock `auto` is no slower than any of them. How much is tried depends on the number of actions alone:
every rank finds the same.

Where there is a cap on memory, orders that exceed it on any rank do not count, and each named one is tried
also with the largest limit on microbatches in flight that keeps it below.
"""

import collections
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.pricing.footprint import kept, most_bytes_in_flight, most_message_bytes, ranks_by_stages
from mimogrid.core.schedule.actions import Kind
from mimogrid.core.schedule.issue_policy import ISSUE_POLICIES, IssuePolicy, IssueQueues, issue_queues_of
from mimogrid.core.schedule.scheduler import TimedWork, lower_bound_s, retimed, schedule
from mimogrid.core.schedule.work import Work, seconds_of, unit_seconds, work_of
from mimogrid.core.topology.topology import Stage, Topology


ACTIONS_TRIED = 200_000
FEWEST_TRIALS, MOST_TRIALS = 12, 200
"""Orders are tried until they have had so many actions together, a few seconds' worth."""

GB = 10**9
STEPS = (1, 2, 4)
"""By how many microbatches a stage's limit in flight is raised at once."""


@attrs.frozen(eq=False)
class Trial:
    """An order that was tried.

    Attributes:
        rule: what made it.
        timed: its work.
        lines: the lines of its pipeline ranks.
        order: the numbers of its actions.
        end_s: when it ends.
        bytes_over: by how much it exceeds the cap on memory, on the rank where it is worst; 0 without a cap.
    """

    policy: IssuePolicy
    timed: TimedWork
    queues: IssueQueues
    order: tuple[int, ...]
    end_s: float
    bytes_over: float

    @functools.cached_property
    def in_flight(self) -> int:
        """Microbatches in flight at most, summed over stages: the fewer, the better of two that are as fast."""
        return sum(self.timed.work.in_flight(self.order).values())

    @property
    def merit(self) -> tuple[float, float]:
        """The less, the better: what fits comes before what does not, then the faster."""
        return max(0.0, self.bytes_over), self.end_s


def tuned(topology: Topology) -> Trial:
    """Return the best order for training that was found; it may exceed the cap if all do."""
    bench = _Bench(topology)
    trials = bench.all_named()
    trials += [fit for trial in trials for fit in bench.limited(trial)]
    trials.sort(key=lambda trial: trial.merit)
    starts = [trial for trial in trials if not trial.policy.all_forwards_first][:2]
    climbed = [bench.climb(start, share) for start, share in zip(starts, (0.6, 1.0), strict=False)]
    tried = (*trials, *climbed)
    least = min(trial.merit for trial in tried)
    return min((trial for trial in tried if trial.merit == least), key=lambda trial: trial.in_flight)


def best_named(topology: Topology) -> Trial:
    """Return the best of the orders that have names."""
    return min(_Bench(topology).all_named(), key=lambda trial: trial.merit)


def bytes_needed(
    topology: Topology, in_flight: Mapping[Stage, int], split: Collection[Stage]
) -> dict[int, float]:
    """Return the bytes that the first rank of every set of stages that share ranks needs at most.

    The stages in `split` run their backward in two halves, and keep what the second one needs.
    """
    return {
        ranks[0]: kept(topology, ranks[0]).bytes
        + sum(
            in_flight.get(stage, 0) * most_bytes_in_flight(topology, stage, split=stage in split)
            for stage in stages
        )
        for stages, ranks in ranks_by_stages(topology).items()
    }


class _Bench:
    """Tries orders of one job, as many as it may."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.costs = topology.spec.schedule.costs or assumed(topology)
        self._works: dict[bool, TimedWork] = {}
        size = len(self._timed(True).work.actions)
        self.left = min(max(ACTIONS_TRIED // size, FEWEST_TRIALS), MOST_TRIALS)

    def all_named(self) -> list[Trial]:
        """Try every order that has a name."""
        policies = list(ISSUE_POLICIES.values())
        return [self.named(policy) for i, policy in enumerate(policies) if policy not in policies[:i]]

    def named(self, policy: IssuePolicy) -> Trial:
        """Try a rule as `orders` would run it: in unit time, then with these costs."""
        timed = self._timed(policy.splits)
        queues = issue_queues_of(timed.work, policy)
        unit = attrs.evolve(timed, seconds=unit_seconds(timed.work), delay={})
        return self._trial(policy, queues, schedule(unit, queues.pp_ranks))

    def limited(self, trial: Trial) -> Iterator[Trial]:
        """Yield the trial of the same rule with the largest limit that fits, if that is below what it has."""
        low, high = 0, max(trial.timed.work.in_flight(trial.order).values(), default=0)
        if trial.bytes_over <= 0 or trial.policy.all_forwards_first:
            return
        found = None
        while high - low > 1:
            limit = (low + high) // 2
            tried = self._try(attrs.evolve(trial.policy, limit=limit))
            low, high = (limit, high) if tried.bytes_over <= 0 else (low, limit)
            found = tried if found is None or tried.merit < found.merit else found
        if found:
            yield found

    def climb(self, start: Trial, share: float) -> Trial:
        """Raise the limit in flight of one stage after the other as long as that helps; use a share of what is left."""
        until, bound = self.left * (1 - share), lower_bound_s(start.timed, start.order)
        if start.end_s <= bound:
            return start
        best = min(start, self._try(start.policy), key=lambda trial: trial.merit)
        stages = self._heaviest_first(best.timed)
        in_vain = 0
        for stage in itertools.cycle(stages):
            if in_vain == len(stages) or self.left <= until or best.end_s <= bound:
                break
            better = self._raised(best, stage)
            best, in_vain = (better, 0) if better else (best, in_vain + 1)
        return best

    def _raised(self, best: Trial, stage: Stage) -> Trial | None:
        """Return a better trial with a higher limit in flight of a stage, if there is one."""
        for step in STEPS:
            extra_in_flight = {
                **best.policy.extra_in_flight,
                stage: best.policy.extra_in_flight.get(stage, 0) + step,
            }
            trial = self._try(attrs.evolve(best.policy, extra_in_flight=extra_in_flight))
            if trial.merit < best.merit:
                return trial
        return None

    def _try(self, policy: IssuePolicy) -> Trial:
        """Try a rule with these costs on the scheduler's own clock."""
        self.left -= 1
        timed = self._timed(policy.splits)
        queues = issue_queues_of(timed.work, policy)
        return self._trial(policy, queues, schedule(timed, queues.pp_ranks))

    def _trial(self, policy: IssuePolicy, queues: IssueQueues, order: tuple[int, ...]) -> Trial:
        timed, cap = self._timed(policy.splits), self.topology.spec.schedule.memory_gb
        over = 0.0
        if cap is not None:
            over = (
                max(bytes_needed(self.topology, timed.work.in_flight(order), timed.work.split).values())
                - cap * GB
            )
        return Trial(policy, timed, queues, order, retimed(timed, order, queues.pp_ranks), over)

    def _timed(self, splits: bool) -> TimedWork:
        if splits not in self._works:
            work = work_of(self.topology, training=True, splits=splits)
            self._works[splits] = timed_by(work, self.costs)
        return self._works[splits]

    def _heaviest_first(self, timed: TimedWork) -> list[Stage]:
        """The first stages of the pipeline ranks that have their own limit in flight: most work first, then deepest."""
        seconds: collections.defaultdict[Stage, float] = collections.defaultdict(float)
        for action, took in zip(timed.work.actions, timed.seconds, strict=True):
            seconds[action.stage] += took
        depth = {stage: info.depth for stage, info in self.topology.stages.items()}
        pipeline = {name: module.grid.extent("pp") for name, module in self.topology.modules.items()}
        pp_ranks = [t for t in timed.work.pp_ranks if len(t) == 1 or t[0].pp == pipeline[t[0].module] - 1]
        heads = [virtual_stages[0] for virtual_stages in pp_ranks]
        return sorted(heads, key=lambda stage: (-seconds[stage], -depth[stage], stage))


def timed_by(work: Work, costs: Costs) -> TimedWork:
    """Return work with the time that costs give it; on an edge that does not overlap, who sends is held up."""
    topology = work.topology
    seconds = [seconds_of(action, costs) for action in work.actions]
    delay: dict[tuple[Stage, Stage], float] = {}
    for link in topology.links:
        edge = costs.on(link, link.edge)
        took = edge.carry_s(most_message_bytes(topology, link)) + edge.latency
        ends = [(link.source, link.target, Kind.FORWARD)]
        ends += [(link.target, link.source, work.goes_back(link.target))] if link in work.gradients else []
        for here, there, kind in ends:
            delay[here, there] = took if edge.overlap else 0.0
            for k in range(0 if edge.overlap else work.count(here)):
                seconds[work.number(kind, here, k)] += took * _peers(topology, here, there)
    return TimedWork(work, tuple(seconds), delay)


def _peers(topology: Topology, here: Stage, there: Stage) -> int:
    """Return to how many ranks of another stage a rank sends, if all send to equally many."""
    modules = (topology.modules[stage.module] for stage in (here, there))
    ranks = [module.grid.size // module.grid.extent("pp") for module in modules]
    return -(-ranks[1] // ranks[0])
