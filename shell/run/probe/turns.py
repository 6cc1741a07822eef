"""Turns: a program run so that only one compute action, or one joint action, runs at a time.

    rank 0   F0 |      | F1 |    |            The turns follow the order in which `replay` starts the actions of the
    rank 1      | F0   |    | B0 |            program. Messages are posted and waited for between the turns, where
                                              `replay` does it, so no rank waits for what comes in a later turn.

All other ranks sleep in a barrier. So the timed action has the machine to itself, even where ranks share cores.
"""

from collections import defaultdict
from collections.abc import Mapping

import attrs
import torch.distributed as dist

from mimogrid.core.program.lower import Program
from mimogrid.core.program.replay import meeting, replay
from mimogrid.core.schedule.actions import Action, Compute, Norm, Tie, Update
from mimogrid.shell.run.probe.clock import Clock, Measurement
from mimogrid.shell.runtime.execute import RankContext, Timed, execute


@attrs.frozen(eq=False)
class Turns:
    """Runs a rank's program in turns: as many actions as the next of `counts` says, then a barrier, and so on."""

    counts: tuple[int, ...]
    group: dist.ProcessGroup
    clock: Clock
    measurements: dict[Action, Measurement] = attrs.field(factory=dict[Action, Measurement])

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
                self.measurements[action] = self.clock.since(begin)
        return tuple(timeline)


def turns_of(program: Program) -> Mapping[int, tuple[int, ...]]:
    """Return how many actions each rank does in each turn; what is left follows after the last turn.

    Turn 0 has what comes before any compute action. Each further turn begins with one compute action or joint action,
    on all of its ranks, and continues with what `replay` starts before the next such action.
    """
    ranks = program.topology.ranks
    started = replay(program, {rank: program.of(rank) for rank in ranks}).started
    turns: dict[tuple[tuple[int, ...], Action], int] = {}
    counts: dict[int, defaultdict[int, int]] = {rank: defaultdict(int) for rank in ranks}
    for rank, action in started:
        if isinstance(action, Update):  # all ranks update at once, as in training
            continue
        turn = len(turns)
        if isinstance(action, Compute | Tie | Norm):
            key = program.joint(rank, action), meeting(action)
            turn = turns.setdefault(key, len(turns) + 1)
        counts[rank][turn] += 1
    return {rank: tuple(of[turn] for turn in range(len(turns) + 1)) for rank, of in counts.items()}
