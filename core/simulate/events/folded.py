"""Folded: a program in which one rank of each class stands for the others, as it is and as a peer.

The answers are the same for all microbatches that are alike. So they are kept: a walk asks millions of times.
"""

from collections.abc import Hashable

from mimogrid.core.job.costs import Costs, EdgeCosts
from mimogrid.core.program.lower import Program, link_of
from mimogrid.core.schedule.actions import Action, Transfer
from mimogrid.core.simulate.rank_classes import RankClasses
from mimogrid.core.step.traffic import message_bytes
from mimogrid.core.topology.topology import Link, Stage


class FoldedProgram:
    """The peers of a rank, and the ranks that it starts an action with, by the leaders of their classes."""

    def __init__(self, program: Program, costs: Costs, classes: RankClasses) -> None:
        self.program, self.costs, self.classes = program, costs, classes
        self._sizes: dict[tuple[int, Link, bool, int], tuple[tuple[int, int], ...]] = {}
        self._links: dict[tuple[Stage, Stage], tuple[Link, EdgeCosts]] = {}
        self._joint: dict[Hashable, tuple[int, ...]] = {}

    def peers(self, rank: int, transfer: Transfer) -> tuple[int, ...]:
        """Return the leaders of the ranks at the other ends of a transfer."""
        leader = self.classes.leader
        return tuple(dict.fromkeys([leader[peer] for peer, _ in self.sizes(rank, transfer)]))

    def sizes(self, rank: int, transfer: Transfer) -> tuple[tuple[int, int], ...]:
        """Return the ranks at the other ends of a transfer, each with the bytes of its message."""
        link, _ = self.link(transfer)
        key = rank, link, transfer.at_source, self.program.routes.first(link, transfer.microbatch)
        if key not in self._sizes:
            step, at_source = self.program.routes.step, transfer.at_source
            self._sizes[key] = tuple(
                (message.rank_target if at_source else message.rank_source, message_bytes(step, message))
                for message in self.program.messages_of(rank, transfer)
            )
        return self._sizes[key]

    def joint(self, rank: int, action: Action) -> tuple[int, ...]:
        """Return the leaders of the ranks that start an action together; the same in every microbatch."""
        key = rank, type(action), getattr(action, "stage", None), getattr(action, "bucket", None)
        if key not in self._joint:
            self._joint[key] = self.classes.leaders_of(self.program.joint(rank, action))
        return self._joint[key]

    def link(self, transfer: Transfer) -> tuple[Link, EdgeCosts]:
        """Return the link that a transfer is on, and its costs."""
        ends = transfer.stage, transfer.peer
        if ends not in self._links:
            link = link_of(self.program.topology, transfer)
            self._links[ends] = link, self.costs.on(link, link.edge)
        return self._links[ends]
