"""Turns: a program run so that only one action that computes or joins ranks is under way at a time.

    rank 0   F0 |      | F1 |    |            The order of turns is one in which a walk over the program starts its
    rank 1      | F0   |    | B0 |            actions. Messages are posted and waited for between the turns, where
                                              that walk does it, so no rank waits for what comes in a later turn.

Everybody else sleeps in a barrier. So what is timed has the machine for itself, also where ranks share cores.
"""

from collections import defaultdict
from collections.abc import Mapping

import attrs
import torch.distributed as dist

from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import meeting, replay
from mimogrid.core.schedule.actions import Action, Compute, Norm, Tie, Update
from mimogrid.shell.run.probe.clock import Clock, Reading
from mimogrid.shell.runtime.execute import RankContext, Timed, execute


@attrs.frozen(eq=False)
class Turns:
    """Runs a rank's program in turns: as many actions as `counts` say, then wait for everybody, and so on."""

    counts: tuple[int, ...]
    group: dist.ProcessGroup
    clock: Clock
    readings: dict[Action, Reading] = attrs.field(factory=dict[Action, Reading])

    def __call__(self, actions: tuple[Action, ...], context: RankContext) -> tuple[Timed, ...]:
        """Run the program; return its timeline."""
        timeline: list[Timed] = []
        left = len(actions) - sum(self.counts)
        for turn, count in enumerate((*self.counts, left)):
            if turn:
                dist.barrier(self.group)
            for action in actions[len(timeline) : len(timeline) + count]:
                begin = self.clock.now()
                timeline += execute((action,), context, first=len(timeline))
                self.readings[action] = self.clock.since(begin)
        return tuple(timeline)


def turns_of(program: Program) -> Mapping[int, tuple[int, ...]]:
    """Return, for each rank, how many of its actions it does in each turn; what is left follows at once.

    Turn 0 has what comes before anybody computes. Each further one begins with one action that computes or joins
    ranks, on all of its ranks, and goes on with what a walk over the program starts before the next such action.
    """
    ranks = program.topology.ranks
    started = replay(program, {rank: program.of(rank) for rank in ranks}).started
    turns: dict[tuple[tuple[int, ...], Action], int] = {}
    counts: dict[int, defaultdict[int, int]] = {rank: defaultdict(int) for rank in ranks}
    for rank, action in started:
        if isinstance(action, Update):  # all ranks take the step at once, as they do in training
            continue
        turn = len(turns)
        if isinstance(action, Compute | Tie | Norm):
            key = program.joint(rank, action), meeting(action)
            turn = turns.setdefault(key, len(turns) + 1)
        counts[rank][turn] += 1
    return {rank: tuple(of[turn] for turn in range(len(turns) + 1)) for rank, of in counts.items()}
