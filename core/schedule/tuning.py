"""Tuning: the schedule `auto`, which tries orders on a clock and takes the best.

It tries issue policies: first those of the named schedules, then, from the best of these on, more microbatches in
flight for one pipeline rank after the other, those with most work first. That helps if stages are nearly balanced: an
encoder stage that takes 1.5 times as long as the stages of the language model needs four microbatches more than its
depth to keep them busy. The same addition for all stages gives nothing.

The clock runs an order once over the stages. All dp ranks of a stage compute at once, a message takes what its link
costs for the largest samples, and there is no limit on cores. A named order is tried as it would run, so on that
clock `auto` is never slower than a named schedule. The number of orders tried depends on the number of actions
only, so every rank finds the same order.

If there is a cap on memory, orders that exceed it on a rank do not count, and each named order is also tried with the
largest limit on microbatches in flight that fits.
"""

import collections
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping

import attrs

from mimogrid.core.job.costs import Costs
from mimogrid.core.pricing.assumed import assumed
from mimogrid.core.pricing.footprint import kept, most_bytes_in_flight, most_message_bytes
from mimogrid.core.schedule.actions import Kind
from mimogrid.core.schedule.issue_policy import ISSUE_POLICIES, IssuePolicy, IssueQueues, issue_queues_of
from mimogrid.core.schedule.scheduler import TimedWork, lower_bound_s, retimed, schedule
from mimogrid.core.schedule.work import Work, seconds_of, unit_seconds, work_of
from mimogrid.core.topology.topology import Stage, Topology


ACTIONS_TRIED = 200_000
FEWEST_TRIALS, MOST_TRIALS = 12, 200
"""Orders are tried until they have `ACTIONS_TRIED` actions together, a few seconds' worth."""

GB = 10**9
INCREMENTS = (1, 2, 4)
"""Numbers of microbatches by which the limit of a pipeline rank is raised at once."""


@attrs.frozen(eq=False)
class Trial:
    """An order that was tried.

    Attributes:
        policy: The policy that made it.
        timed: Its work, with the costs' seconds.
        queues: The issue queues of the policy.
        order: The numbers of its actions.
        end_s: The seconds that the step takes.
        bytes_over: How far it exceeds the cap on memory on the worst rank; 0 without a cap.
    """

    policy: IssuePolicy
    timed: TimedWork
    queues: IssueQueues
    order: tuple[int, ...]
    end_s: float
    bytes_over: float

    @functools.cached_property
    def in_flight(self) -> int:
        """The most microbatches in flight, summed over stages: of two equally fast trials fewer are better."""
        return sum(self.timed.work.in_flight(self.order).values())

    @property
    def merit(self) -> tuple[float, float]:
        """Lower is better: trials that fit come first, then the faster ones."""
        return max(0.0, self.bytes_over), self.end_s


def tuned(topology: Topology) -> Trial:
    """Return the best order for training that was found. It exceeds the cap if all orders do."""
    tuner = _Tuner(topology)
    trials = tuner.all_named()
    trials += [fitting for trial in trials for fitting in tuner.limited(trial)]
    trials.sort(key=lambda trial: trial.merit)
    starts = [trial for trial in trials if not trial.policy.all_forwards_first][:2]
    climbed = [tuner.climb(start, share) for start, share in zip(starts, (0.6, 1.0), strict=False)]
    tried = (*trials, *climbed)
    best = min(trial.merit for trial in tried)
    return min((trial for trial in tried if trial.merit == best), key=lambda trial: trial.in_flight)


def best_named(topology: Topology) -> Trial:
    """Return the best of the named orders."""
    return min(_Tuner(topology).all_named(), key=lambda trial: trial.merit)


def bytes_needed(
    topology: Topology, in_flight: Mapping[Stage, int], split: Collection[Stage]
) -> dict[int, float]:
    """Return the bytes that a rank needs at most, for the first rank of every set of stages that share ranks.

    The stages in `split` run their backward in two halves, and keep what the second half needs.
    """
    return {
        ranks[0]: kept(topology, ranks[0]).bytes
        + sum(
            in_flight.get(stage, 0) * most_bytes_in_flight(topology, stage, split=stage in split)
            for stage in stages
        )
        for stages, ranks in topology.ranks_by_stages.items()
    }


class _Tuner:
    """Tries orders of one job; `left` is how many it may still try."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.costs = topology.spec.schedule.costs or assumed(topology)
        self._works: dict[bool, TimedWork] = {}
        size = len(self._timed(True).work.actions)
        self.left = min(max(ACTIONS_TRIED // size, FEWEST_TRIALS), MOST_TRIALS)

    def all_named(self) -> list[Trial]:
        """Try the policy of every named schedule, each policy once."""
        policies = list(ISSUE_POLICIES.values())
        return [self.named(policy) for i, policy in enumerate(policies) if policy not in policies[:i]]

    def named(self, policy: IssuePolicy) -> Trial:
        """Try the order that a named schedule runs: it is made in unit time, then timed with the costs."""
        timed = self._timed(policy.splits)
        queues = issue_queues_of(timed.work, policy)
        unit = attrs.evolve(timed, seconds=unit_seconds(timed.work), delay={})
        return self._trial(policy, queues, schedule(unit, queues.by_pp_rank))

    def limited(self, trial: Trial) -> Iterator[Trial]:
        """Yield the trial of a policy that exceeds the cap, with the largest limit in flight that fits, if any does."""
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
        """Raise the limits of one pipeline rank after the other while that helps, with a share of the trials left."""
        until, bound_s = self.left * (1 - share), lower_bound_s(start.timed, start.order)
        if start.end_s <= bound_s:
            return start
        best = min(start, self._try(start.policy), key=lambda trial: trial.merit)
        stages = self._heaviest_first(best.timed)
        in_vain = 0
        for stage in itertools.cycle(stages):
            if in_vain == len(stages) or self.left <= until or best.end_s <= bound_s:
                break
            better = self._raised(best, stage)
            best, in_vain = (better, 0) if better else (best, in_vain + 1)
        return best

    def _raised(self, best: Trial, stage: Stage) -> Trial | None:
        """Return a better trial with more in flight on the pipeline rank of a stage, if there is one."""
        for more in INCREMENTS:
            extra = {**best.policy.extra_in_flight, stage: best.policy.extra_in_flight.get(stage, 0) + more}
            trial = self._try(attrs.evolve(best.policy, extra_in_flight=extra))
            if trial.merit < best.merit:
                return trial
        return None

    def _try(self, policy: IssuePolicy) -> Trial:
        """Try a policy, with the scheduler's clock running at the costs' seconds."""
        self.left -= 1
        timed = self._timed(policy.splits)
        queues = issue_queues_of(timed.work, policy)
        return self._trial(policy, queues, schedule(timed, queues.by_pp_rank))

    def _trial(self, policy: IssuePolicy, queues: IssueQueues, order: tuple[int, ...]) -> Trial:
        timed, cap = self._timed(policy.splits), self.topology.spec.schedule.memory_gb
        over = 0.0
        if cap is not None:
            needed = bytes_needed(self.topology, timed.work.in_flight(order), timed.work.split)
            over = max(needed.values()) - cap * GB
        return Trial(policy, timed, queues, order, retimed(timed, order, queues.by_pp_rank), over)

    def _timed(self, splits: bool) -> TimedWork:
        if splits not in self._works:
            work = work_of(self.topology, training=True, splits=splits)
            self._works[splits] = timed_by(work, self.costs)
        return self._works[splits]

    def _heaviest_first(self, timed: TimedWork) -> list[Stage]:
        """Return the first stages of the pipeline ranks whose limit can be raised: most work first, then deepest.

        With virtual stages only the last pipeline rank of a module has a limit of its own.
        """
        seconds: collections.defaultdict[Stage, float] = collections.defaultdict(float)
        for action, took in zip(timed.work.actions, timed.seconds, strict=True):
            seconds[action.stage] += took
        depth = {stage: info.depth for stage, info in self.topology.stages.items()}
        last = {name: module.grid.extent("pp") - 1 for name, module in self.topology.modules.items()}
        heads = [
            stages[0]
            for stages in timed.work.pp_ranks
            if len(stages) == 1 or stages[0].pp == last[stages[0].module]
        ]
        return sorted(heads, key=lambda stage: (-seconds[stage], -depth[stage], stage))


def timed_by(work: Work, costs: Costs) -> TimedWork:
    """Return work with the seconds of its costs. A send that does not overlap makes the action before it longer."""
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
