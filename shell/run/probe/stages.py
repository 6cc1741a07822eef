"""Stages: the costs of a stage, from what all ranks that host it have measured.

An action takes as long as the slowest of the ranks that join in it. What a program does beside computing has its place
in the costs, too: posting messages belongs to the stage that posts them, and agreement, optimizer and the planning of a
step are `update`, timed when all ranks do them at once, as at the end of every step.
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
from mimogrid.shell.run.probe.record import OfRank
from mimogrid.shell.run.probe.steps import Steps


@attrs.frozen(eq=False)
class OfStage:
    """What all ranks found of a stage, where so many `cores` compute at full speed (None: one for each rank)."""

    program: Program
    stage: Stage
    ranks: Sequence[OfRank]
    cores: float | None

    @property
    def holders(self) -> list[OfRank]:
        """The ranks that host the stage."""
        return [of for of in self.ranks if any(info.stage == self.stage for info in self._infos(of.rank))]

    def costs(self) -> StageCosts:
        """Return the seconds of the stage."""
        return StageCosts(
            forward=rounded(self._compute(Kind.FORWARD) or 0.0),
            **self._backward(),
            reduce=rounded(max(of.sums[self.stage] for of in self.ranks) + self._longest(Tie(self.stage))),
            update=rounded(max(self._ending(of) for of in self.holders)),
        )

    def _backward(self) -> dict[str, float]:
        """Return the seconds of a backward, by halves where they were measured.

        Halves add up to a whole backward where the job's own schedule does not split it.
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
        """Seconds of a whole backward and of its two halves, whatever was measured of these."""
        return (
            self._compute(Kind.BACKWARD),
            self._compute(Kind.INPUT_GRADIENT),
            self._compute(Kind.WEIGHT_GRADIENT),
        )

    def spread(self) -> float:
        """Return how far the repetitions of an action of the stage are apart, relative to their median."""
        return statistics.median(
            (max(seconds) - min(seconds)) / max(statistics.median(seconds), 1e-9)
            for of in self.holders
            for action, readings in of.own.actions.items()
            if isinstance(action, Compute) and action.stage == self.stage
            for seconds in [[reading.lasted for reading in readings]]
        )

    def _compute(self, kind: Kind) -> float | None:
        """Return the mean over microbatches and dp ranks of an action, under the first schedule that has it."""
        found = (self._longest_of_each(kind, which) for which in range(1 + len(self.ranks[0].others)))
        return next((statistics.fmean(seconds) for seconds in found if seconds), None)

    def _longest_of_each(self, kind: Kind, which: int) -> list[float]:
        """Return the seconds of every action of a kind in the steps of a schedule: the longest of ranks that join."""
        longest: dict[tuple[tuple[int, ...], int], float] = {}
        for of in self.holders:
            steps = (of.own, *of.others)[which]
            posting = self._posting(steps, kind)
            for action in self._of_kind(steps, kind):
                joined = self.program.joint(of.rank, action)
                enough = 1.0 if self.cores is None else min(1.0, self.cores / len(joined))
                key = joined, action.microbatch
                longest[key] = max(longest.get(key, 0.0), enough * steps.lasted(action) + posting)
        return list(longest.values())

    def _of_kind(self, steps: Steps, kind: Kind) -> list[Compute]:
        """Return the compute actions of the stage of one kind."""
        computes = (action for action in steps.actions if isinstance(action, Compute))
        return [action for action in computes if (action.stage, action.kind) == (self.stage, kind)]

    def _posting(self, steps: Steps, kind: Kind) -> float:
        """Return what posting messages adds to each action of a kind on a rank."""
        if kind is Kind.WEIGHT_GRADIENT:
            return 0.0
        direction = Direction.FORWARD if kind is Kind.FORWARD else Direction.BACKWARD
        posts = sum(
            steps.worked(action)
            for action in steps.actions
            if isinstance(action, Send | Recv) and (action.stage, action.direction) == (self.stage, direction)
        )
        count = len(self._of_kind(steps, kind))
        return posts / count if count else 0.0

    def _longest(self, action: Action) -> float:
        """Return how long the slowest rank is at an action of its own steps; nothing where none has it."""
        return max((of.own.lasted(action) for of in self.holders if action in of.own.actions), default=0.0)

    def _ending(self, of: OfRank) -> float:
        """A stage's part of what a rank does once per step, when all do.

        Who begins the next step must have planned it; the others have time for that until they hear from him.
        """
        parts = [self._at_once(of, one) for one in (OfRank.agreeing, OfRank.updating)]
        if any(info.first and not self._module(info.stage).inputs for info in self._infos(of.rank)):
            parts.append(self._at_once(of, OfRank.planning))
        return sum(parts) / len(self._infos(of.rank))

    def _at_once(self, of: OfRank, what: Callable[[OfRank], float]) -> float:
        """Return how long a rank is at something that all ranks of its host do at once, sharing the cores evenly."""
        mine = what(of)
        cores = min(allowed_cores(), self.cores or math.inf)
        shared = sum(min(mine, what(other)) for other in self.ranks if other.host == of.host)
        return max(mine, shared / cores)

    def _infos(self, rank: int) -> Sequence[StageInfo]:
        return self.program.topology.role(rank).stages

    def _module(self, stage: Stage) -> Module:
        return self.program.topology.modules[stage.module]
