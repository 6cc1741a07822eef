"""Verify: whether a program does all of its work, in an order that cannot deadlock or mix up data.

A listing is judged against the step that it is for, not against how it was made. It must hold

- every forward of every active microbatch once, and its backward (or input and weight gradient) where one is due;
- every message posted once by each end, waited for once by each end after that, and on every pair of ranks
  received in the order in which it is sent;
- data before it is read: a receive is waited for before the compute action that needs it, a send is posted after
  the one that makes it;
- each reduction, agreement and update once, after the last gradient;
- an end: the walk of `replay`, in which nothing buffers and joint actions wait for all their ranks, gets there.

Ranks are *alike* if they owe the same and have equal lists. What is judged of one of them holds for all, for the
judgement reads nothing else. And they walk in step, which settles most programs at a fraction of the cost: who
walks in step needs more than who walks alone, so a walk that gets through is proof (see `replay`). One that gets
stuck is none; then every rank walks by itself, and that walk decides. So `verify` says of every listing what
`verify_each` says, which does without all this.

Why walking in step gets through for what `lower` makes: the order was made by doing all compute actions one after
the other, each on all the lanes that have it at once. That is a walk in step.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.schedule.actions import (
    Action,
    Compute,
    Direction,
    Kind,
    Recv,
    Send,
    Transfer,
    Wait,
    other_end,
)
from mimogrid.core.schedule.lower import Program
from mimogrid.core.schedule.program import Listing
from mimogrid.core.schedule.replay import Blocked, replay, replay_in_step
from mimogrid.core.topology import Link, Stage


def listing_of(program: Program) -> Listing:
    """Return the whole program, lowered for every rank that hosts a module."""
    return {rank: program.of(rank) for rank in program.topology.ranks}


def verify(program: Program, listing: Listing | None = None) -> tuple[str, ...]:
    """Return what is wrong with a listing of the program (default: its own), in words; nothing: it is sound."""
    whole = _complete(program, listing)
    duties = {rank: _duties(program, rank) for rank in program.topology.ranks}
    alike: dict[tuple[_Duties, tuple[Action, ...]], list[int]] = collections.defaultdict(list)
    for rank, duty in duties.items():
        alike[duty, whole[rank]].append(rank)
    return tuple(_faults(program, whole, [(duty, ranks) for (duty, _), ranks in alike.items()]))


def verify_each(program: Program, listing: Listing | None = None) -> tuple[str, ...]:
    """Return what `verify` returns, with every rank judged and walking by itself."""
    whole = _complete(program, listing)
    return tuple(_faults(program, whole, [(_duties(program, r), (r,)) for r in program.topology.ranks]))


def _complete(program: Program, listing: Listing | None) -> dict[int, tuple[Action, ...]]:
    given = listing_of(program) if listing is None else listing
    hosts = program.topology.ranks
    return {rank: tuple(given.get(rank, ())) for rank in dict.fromkeys((*hosts, *given))}


def _faults(
    program: Program, listing: Listing, alike: Sequence[tuple["_Duties", Sequence[int]]]
) -> Iterator[str]:
    found = [*_idle(program, listing)]
    judge = _Judge(program)
    for duty, ranks in alike:
        wrong = tuple(judge.faults(duty, listing[ranks[0]]))
        found += [f"rank {rank}: {fault}" for rank in ranks for fault in wrong]
    yield from sorted(found, key=_rank_first)
    if not found:
        yield from _channels(program, listing)
        yield from _deadlock(_blocked(program, listing, [ranks for _, ranks in alike]))


def _rank_first(fault: str) -> int:
    return int(fault.split()[1].rstrip(":"))


def _idle(program: Program, listing: Listing) -> Iterator[str]:
    for rank in sorted(set(listing) - set(program.topology.ranks)):
        if listing[rank]:
            yield f"rank {rank} hosts no module but has {len(listing[rank])} actions"


def _blocked(program: Program, listing: Listing, alike: Sequence[Sequence[int]]) -> tuple[Blocked, ...]:
    if len(alike) < len(listing) and not replay_in_step(program, listing, alike).blocked:
        return ()
    return replay(program, listing).blocked


# -- one rank ----------------------------------------------------------------------------------------------


@attrs.frozen
class _Seam:
    """What crosses a link for one microbatch of its target, as the ranks of one stage see it.

    `made_by` are the microbatches of the source that make what leaves here; None: it arrives here.
    """

    stage: Stage
    link: Link
    microbatch: int
    made_by: tuple[int, ...] | None


@attrs.frozen(cache_hash=True)
class _Duties:
    """All that a step asks of a rank: the stages with the microbatches that it computes, what it exchanges, and the
    actions that end the step."""

    stages: tuple[tuple[Stage, frozenset[int]], ...]
    seams: tuple[_Seam, ...]
    finish: tuple[Action, ...]


def _duties(program: Program, rank: int) -> _Duties:
    stages = program.topology.stages_of(rank)
    lanes = {info.stage: program.topology.modules[info.stage.module].lane_of(rank) for info in stages}
    step = program.routes.step
    return _Duties(
        tuple((stage, step.active(stage.module, lane)) for stage, lane in lanes.items()),
        tuple(seam for stage, lane in lanes.items() for seam in _seams(program, rank, stage, lane)),
        tuple(program.finish(rank)),
    )


def _seams(program: Program, rank: int, stage: Stage, lane: int) -> Iterator[_Seam]:
    topology, routes = program.topology, program.routes
    for link in topology.links_into(stage):
        for k in range(topology.modules[stage.module].microbatches):
            if rank in routes.reaching(link, k, lane):
                yield _Seam(stage, link, k, None)
    for link in topology.links_from(stage):
        for k in range(topology.modules[link.target.module].microbatches):
            messages = routes.leaving(link, k, lane).get(rank)
            if messages:
                yield _Seam(stage, link, k, tuple(sorted({j for m in messages for j in m.made_by})))


class _Judge:
    """Judges lists by themselves: is everything there, once, in an order that the data allows.

    An action is known by a number here, because attrs values are slow to compare; clauses are kept, because
    most ranks share most of them.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.actions: list[Action] = []
        self.numbers: dict[Action, int] = {}
        self.clauses: dict[tuple[_Seam, bool], _Clause] = {}

    def faults(self, duties: _Duties, actions: tuple[Action, ...]) -> Iterator[str]:
        """Yield what is wrong with a list of actions."""
        mine = list(map(self._number, actions))
        place = dict(zip(reversed(mine), range(len(mine) - 1, -1, -1), strict=True))
        due, sequence = self._due(duties, place)
        if len(place) < len(mine):
            for number, count in collections.Counter(mine).items():
                if number in due and count > 1:
                    yield f"'{self.actions[number]}' is there {count} times"
        if place.keys() != due:
            yield from (f"'{self.actions[n]}' has no place in this program" for n in place if n not in due)
            yield from (f"'{self.actions[n]}' is missing" for n in sorted(due) if n not in place)
        for first, then in sequence:
            if first in place and then in place and place[first] > place[then]:
                yield f"'{self.actions[then]}' comes before '{self.actions[first]}', which it needs"

    def _number(self, action: Action) -> int:
        number = self.numbers.setdefault(action, len(self.actions))
        if number == len(self.actions):
            self.actions.append(action)
        return number
