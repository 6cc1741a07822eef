"""Verify: whether a program does all of its work, in an order that cannot deadlock or mix up data.

A listing is judged against the step that it is for, not against how it was made. It must hold

- every forward of every active microbatch once, and its backward (or input and weight gradient) where one is due;
- every message posted once by each end, waited for once by each end after that, and on every pair of ranks
  received in the order in which it is sent;
- data before it is read: a receive is waited for before the compute action that needs it, a send is posted after
  the one that makes it;
- each reduction, agreement and update once, after the last gradient;
- an end: the walk of `replay`, in which nothing buffers and joint actions wait for all their ranks, gets there.
"""

import collections
from collections.abc import Iterator

import attrs

from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Kind,
    Norm,
    Recv,
    Reduce,
    Send,
    Tie,
    Transfer,
    Update,
    Wait,
)
from mimogrid.core.schedule.lower import Program, link_of
from mimogrid.core.schedule.program import Listing
from mimogrid.core.schedule.replay import Blocked, postings, replay


def listing_of(program: Program) -> Listing:
    """Return the whole program, lowered for every rank that hosts a module."""
    return {rank: program.of(rank) for rank in program.topology.ranks}


def verify(program: Program, listing: Listing | None = None) -> tuple[str, ...]:
    """Return what is wrong with a listing of the program (default: its own), in words; nothing: it is sound."""
    listing = listing_of(program) if listing is None else listing
    faults = [*_ranks(program, listing)]
    for rank in program.topology.ranks:
        faults += _Judge(program, rank, tuple(listing.get(rank, ()))).faults()
    if not faults:
        faults += _channels(program, listing)
        faults += _deadlock(replay(program, listing).blocked)
    return tuple(faults)


def _ranks(program: Program, listing: Listing) -> Iterator[str]:
    for rank in sorted(set(listing) - set(program.topology.ranks)):
        if listing[rank]:
            yield f"rank {rank} hosts no module but has {len(listing[rank])} actions"


@attrs.frozen(eq=False)
class _Judge:
    """Judges one rank's list by itself: is everything there, once, in an order that the data allows."""

    program: Program
    rank: int
    actions: tuple[Action, ...]

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with this rank's list."""
        place = self._places()
        due = self._due()
        for action, count in place.items():
            if action not in due:
                yield f"rank {self.rank}: '{action}' has no place in this program"
            elif len(count) > 1:
                yield f"rank {self.rank}: '{action}' is there {len(count)} times"
        missing = [action for action in due if action not in place]
        yield from (f"rank {self.rank}: '{action}' is missing" for action in missing)
        for first, then in self._sequence(due):
            if first in place and then in place and place[first][0] > place[then][0]:
                yield f"rank {self.rank}: '{then}' comes before '{first}', which it needs"

    def _places(self) -> dict[Action, list[int]]:
        places: dict[Action, list[int]] = collections.defaultdict(list)
        for i, action in enumerate(self.actions):
            places[action].append(i)
        return places

    def _due(self) -> dict[Action, None]:
        """Every action that this rank owes, from the step alone."""
        due: dict[Action, None] = dict.fromkeys(self._computes())
        for transfer in self._transfers():
            due |= {transfer: None, Wait(transfer): None}
        return due | dict.fromkeys(self.program.finish(self.rank))

    def _computes(self) -> Iterator[Compute]:
        step, topology = self.program.routes.step, self.program.topology
        split = {(a.stage, a.microbatch) for a in self.actions if _is(a, Kind.INPUT_GRADIENT)}
        for info in topology.stages_of(self.rank):
            module = topology.modules[info.stage.module]
            lane = module.grid.position(self.rank)["dp"]
            for microbatch in range(module.microbatches):
                if step.is_active(info.stage, lane, microbatch):
                    yield Compute(Kind.FORWARD, info.stage, microbatch)
                    if info.stage in self.program.order.backward:
                        whole = (info.stage, microbatch) not in split
                        for kind in (
                            (Kind.BACKWARD,) if whole else (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
                        ):
                            yield Compute(kind, info.stage, microbatch)

    def _transfers(self) -> Iterator[Transfer]:
        topology, routes = self.program.topology, self.program.routes
        for info in topology.stages_of(self.rank):
            stage = info.stage
            for link in (*topology.links_into(stage), *topology.links_from(stage)):
                gradient = link in self.program.order.gradients
                for k in range(topology.modules[link.target.module].microbatches):
                    if stage == link.target and routes.sent_to(self.rank, link, k):
                        yield Recv(stage, Direction.FORWARD, k, link.source)
                        if gradient:
                            yield Send(stage, Direction.BACKWARD, k, link.source)
                    if stage == link.source and routes.sent_by(self.rank, link, k):
                        yield Send(stage, Direction.FORWARD, k, link.target)
                        if gradient:
                            yield Recv(stage, Direction.BACKWARD, k, link.target)

    def _sequence(self, due: dict[Action, None]) -> Iterator[tuple[Action, Action]]:
        """Yield pairs of actions of which the first must come before the second."""
        finish = tuple(self.program.finish(self.rank))
        for action in due:
            match action:
                case Wait(transfer=transfer):
                    yield transfer, action
                case Send() | Recv():
                    yield from self._around(action, due)
                case Compute(kind=Kind.FORWARD):
                    pass
                case Compute(kind=kind, stage=stage, microbatch=microbatch):
                    needs = Kind.INPUT_GRADIENT if kind is Kind.WEIGHT_GRADIENT else Kind.FORWARD
                    yield Compute(needs, stage, microbatch), action
                    yield from ((action, last) for last in finish)
                case Reduce() | Tie() | Norm() | Update():
                    yield from ((action, later) for later in finish[finish.index(action) + 1 :])

    def _around(self, transfer: Transfer, due: dict[Action, None]) -> Iterator[tuple[Action, Action]]:
        """A send follows the compute actions that make its data; a receive is complete before its readers."""
        own = {transfer.microbatch}
        if transfer.stage == link_of(self.program.topology, transfer).source:
            messages = self.program.messages_of(self.rank, transfer)
            own = {k for message in messages for k in message.made_by}
        forward = transfer.direction is Direction.FORWARD
        kinds = (Kind.FORWARD,) if forward else (Kind.BACKWARD, Kind.INPUT_GRADIENT)
        for compute in (Compute(kind, transfer.stage, k) for kind in kinds for k in sorted(own)):
            if compute in due:
                sends = isinstance(transfer, Send)
                yield (compute, transfer) if sends else (Wait(transfer), compute)


def _is(action: Action, kind: Kind) -> bool:
    return isinstance(action, Compute) and action.kind is kind


def _channels(program: Program, listing: Listing) -> Iterator[str]:
    """Each rank must receive from a peer in the order in which that peer sends: some transports have no tags."""
    sent: dict[tuple[int, int], list[object]] = collections.defaultdict(list)
    received: dict[tuple[int, int], list[object]] = collections.defaultdict(list)
    for rank, actions in listing.items():
        for action in actions:
            if isinstance(action, Transfer):
                for mine, _ in postings(program, rank, action):
                    if isinstance(action, Send):
                        sent[rank, mine.other].append(mine.transfer)
                    else:
                        received[mine.other, rank].append(mine.transfer)
    for (source, target), order in sent.items():
        if order != received[source, target]:
            yield (
                f"rank {target} posts its receives from rank {source} in another order than rank {source} "
                "sends: a transport without tags would mix them up"
            )


def _deadlock(blocked: tuple[Blocked, ...]) -> Iterator[str]:
    """Name one cycle of waits in words; ranks outside it only wait for those in it."""
    stuck = {block.rank: block for block in blocked}
    if not stuck:
        return
    path: list[int] = []
    rank = next(iter(stuck))
    while rank in stuck and rank not in path:
        path.append(rank)
        rank = next((r for r in stuck[rank].waits_for if r in stuck), stuck[rank].waits_for[0])
    cycle = path[path.index(rank) :] if rank in path else path
    waits = "; ".join(
        f"rank {r} stands before '{stuck[r].action}' and waits for rank "
        f"{', '.join(map(str, stuck[r].waits_for))}"
        for r in cycle
    )
    yield f"deadlock: {waits}"
