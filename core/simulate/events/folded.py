"""Folded: a program in which one rank of each class stands for the others, as it is and as a peer.

The answers are the same for all microbatches that are alike. So they are kept: a walk asks millions of times.
"""

from collections.abc import Hashable

import attrs

from mimogrid.core.job.costs import Costs, EdgeCosts
from mimogrid.core.program.lower import Program, link_of
from mimogrid.core.schedule.actions import Action, Compute, Transfer
from mimogrid.core.simulate.rank_classes import RankClasses
from mimogrid.core.step.traffic import message_bytes


@attrs.frozen(eq=False)
class End:
    """The ranks at the other ends of a transfer.

    Attributes:
        edge: what its messages cost.
        sizes: each rank with the bytes of its message.
        leaders: the leaders of these ranks, each once.
    """

    edge: EdgeCosts
    sizes: tuple[tuple[int, int], ...]
    leaders: tuple[int, ...]


class FoldedProgram:
    """The peers of a rank, and the ranks that it starts an action with, by the leaders of their classes."""

    def __init__(self, program: Program, costs: Costs, classes: RankClasses) -> None:
        self.program, self.costs, self.classes = program, costs, classes
        self._likes: dict[Hashable, int] = {}
        self._like: dict[Transfer, int] = {}
        self._ends: dict[tuple[int, int], End] = {}
        self._joint: dict[tuple[int, Hashable], tuple[int, ...]] = {}

    def peers(self, rank: int, transfer: Transfer) -> tuple[int, ...]:
        """Return the leaders of the ranks at the other ends of a transfer."""
        return self.end(rank, transfer).leaders

    def end(self, rank: int, transfer: Transfer) -> End:
        """Return the other end of a transfer of a rank: the same object for all transfers that are alike."""
        like = self._like.get(transfer)
        if like is None:
            link = link_of(self.program.topology, transfer)
            first = self.program.routes.first(link, transfer.microbatch)
            known = type(transfer), link, transfer.at_source, first
            like = self._like[transfer] = self._likes.setdefault(known, len(self._likes))
        found = self._ends.get((rank, like))
        if found is None:
            found = self._ends[rank, like] = self._end(rank, transfer)
        return found

    def _end(self, rank: int, transfer: Transfer) -> End:
        link, step = link_of(self.program.topology, transfer), self.program.routes.step
        sizes = tuple(
            (message.rank_target if transfer.at_source else message.rank_source, message_bytes(step, message))
            for message in self.program.messages_of(rank, transfer)
        )
        leaders = dict.fromkeys(self.classes.leader[peer] for peer, _ in sizes)
        return End(self.costs.on(link, link.edge), sizes, tuple(leaders))

    def joint(self, rank: int, action: Action) -> tuple[int, ...]:
        """Return the leaders of the ranks that start an action together; the same in every microbatch."""
        if isinstance(action, Compute):
            key: tuple[int, Hashable] = rank, action.stage
        else:
            key = rank, action
        found = self._joint.get(key)
        if found is None:
            found = self._joint[key] = self.classes.leaders_of(self.program.joint(rank, action))
        return found
