"""Stages: the costs of a stage, from what all ranks that host it have measured.

A joint action takes as long as its slowest rank. The costs include what a program does besides computing: posting
messages counts for the stage that posts them; grad-norm sync, optimizer and the planning of a step are `update`, timed
as if all ranks did them at once, as they do at the end of every step.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence

import attrs

from mimogrid.core.job.costs import StageCosts
from mimogrid.core.program.lower import Program
from mimogrid.core.schedule.actions import Action, Compute, Direction, Kind, Recv, Send, Tie
from mimogrid.core.topology.topology import Module, Stage, StageInfo
from mimogrid.shell.run.probe.clock import rounded
from mimogrid.shell.run.probe.cores import allowed_cores
from mimogrid.shell.run.probe.record import RankProbe
from mimogrid.shell.run.probe.steps import Steps


@attrs.frozen(eq=False)
class StageProbe:
    """What all ranks measured of a stage, where `cores` compute at full speed (None: one for each rank)."""

    program: Program
    stage: Stage
    ranks: Sequence[RankProbe]
    cores: float | None

    @property
    def hosts(self) -> list[RankProbe]:
        """The ranks that host the stage."""
        return [of for of in self.ranks if any(info.stage == self.stage for info in self._infos(of.rank))]

    def costs(self) -> StageCosts:
        """Return the seconds of the stage."""
        return StageCosts(
            forward=rounded(self._compute(Kind.FORWARD) or 0.0),
            **self._backward(),
            reduce=rounded(max(of.sums[self.stage] for of in self.ranks) + self._longest(Tie(self.stage))),
            gather=rounded(max(of.gathers[self.stage] for of in self.ranks)),
            update=rounded(max(self._ending(of) for of in self.hosts)),
        )

    def _backward(self) -> dict[str, float]:
        """Return the seconds of a backward, by halves where they were measured.

        If the job's own schedule does not split it, the halves are scaled to add up to a whole backward.
        """
        whole, first, second = self._backwards
        if first is None or second is None:
            return {"backward": rounded(whole or 0.0)}
        scale = 1.0 if whole is None or self.stage in self.program.order.split else whole / (first + second)
        return {"input_gradient": rounded(first * scale), "weight_gradient": rounded(second * scale)}

    def split_over_whole(self) -> float | None:
        """Return the seconds of the two halves over those of a whole backward, if both were measured."""
        whole, first, second = self._backwards
        return None if not whole or first is None or second is None else (first + second) / whole

    @functools.cached_property
    def _backwards(self) -> tuple[float | None, float | None, float | None]:
        """The seconds of a whole backward and of its two halves, as far as they were measured."""
        return (
            self._compute(Kind.BACKWARD),
            self._compute(Kind.INPUT_GRADIENT),
            self._compute(Kind.WEIGHT_GRADIENT),
        )

    def spread(self) -> float:
        """Return how far the repetitions of an action of the stage are apart, relative to their median."""
        return statistics.median(
            (max(seconds) - min(seconds)) / max(statistics.median(seconds), 1e-9)
            for of in self.hosts
            for action, measurements in of.own.actions.items()
            if isinstance(action, Compute) and action.stage == self.stage
            for seconds in [[measurement.elapsed_s for measurement in measurements]]
        )

    def _compute(self, kind: Kind) -> float | None:
        """Return the mean over microbatches and dp ranks of an action, under the first schedule that has it."""
        found = (self._longest_of_each(kind, which) for which in range(1 + len(self.ranks[0].others)))
        return next((statistics.fmean(seconds) for seconds in found if seconds), None)

    def _longest_of_each(self, kind: Kind, which: int) -> list[float]:
        """Return the seconds of every action of a kind under a schedule: those of its slowest rank."""
        longest: dict[tuple[tuple[int, ...], int], float] = {}
        for of in self.hosts:
            steps = (of.own, *of.others)[which]
            posting = self._posting(steps, kind)
            for action in self._of_kind(steps, kind):
                joined = self.program.joint(of.rank, action)
                enough = 1.0 if self.cores is None else min(1.0, self.cores / len(joined))
                key = joined, action.microbatch
                longest[key] = max(longest.get(key, 0.0), enough * steps.elapsed_s(action) + posting)
        return list(longest.values())

    def _of_kind(self, steps: Steps, kind: Kind) -> list[Compute]:
        """Return the compute actions of the stage of one kind."""
        computes = (action for action in steps.actions if isinstance(action, Compute))
        return [action for action in computes if (action.stage, action.kind) == (self.stage, kind)]

    def _posting(self, steps: Steps, kind: Kind) -> float:
        """Return the seconds of posting messages per action of a kind on a rank."""
        if kind is Kind.WEIGHT_GRADIENT:
            return 0.0
        direction = Direction.FORWARD if kind is Kind.FORWARD else Direction.BACKWARD
        posts = sum(
            steps.busy_s(action)
            for action in steps.actions
            if isinstance(action, Send | Recv) and (action.stage, action.direction) == (self.stage, direction)
        )
        count = len(self._of_kind(steps, kind))
        return posts / count if count else 0.0

    def _longest(self, action: Action) -> float:
        """Return the seconds of the slowest rank for an action of its own steps; 0 where no rank has it."""
        return max((of.own.elapsed_s(action) for of in self.hosts if action in of.own.actions), default=0.0)

    def _ending(self, of: RankProbe) -> float:
        """Return a stage's share of what a rank does once per step, when all ranks do it.

        Ranks of the first stages must plan the next step before they begin it. The others plan while they wait.
        """
        parts = [self._at_once(of, one) for one in (RankProbe.agreeing, RankProbe.updating)]
        if any(info.first and not self._module(info.stage).inputs for info in self._infos(of.rank)):
            parts.append(self._at_once(of, RankProbe.planning))
        return sum(parts) / len(self._infos(of.rank))

    def _at_once(self, of: RankProbe, what: Callable[[RankProbe], float]) -> float:
        """Return the seconds of what all ranks of a host do at once, if they share the cores evenly."""
        mine = what(of)
        cores = min(allowed_cores(), self.cores or math.inf)
        shared = sum(min(mine, what(other)) for other in self.ranks if other.host == of.host)
        return max(mine, shared / cores)

    def _infos(self, rank: int) -> Sequence[StageInfo]:
        return self.program.topology.role(rank).stages

    def _module(self, stage: Stage) -> Module:
        return self.program.topology.modules[stage.module]
