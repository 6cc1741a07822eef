"""Candidates: layouts of a whole job, in the order of their lower bounds.

The *main* module, the one with most work, lies at rank 0. Every other module has one of three places:

    beside     ranks of its own, behind those of the main module
    all        on the ranks of the main module, with a dp rank for each sample as far as there are samples
    first      on the ranks of the main module's first pipeline stage

The bound of a layout is that of its slowest module (`configs`): the first microbatch comes through the modules that
feed it, and the last gradient goes back through them. Ranks with two modules do the work of both.

The configurations of the main module are walked in order of their own bounds, which hold for all layouts with them.
Each is joined with configurations of the other modules. A module's configuration is left out where another one is as
good in ranks, bytes and seconds. The walk ends where no further layout can be among the best `KEPT`.
"""

import functools
import heapq
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.bounds import longest_before_s
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.plan.configs import ParallelConfig, PricedConfig
from mimogrid.core.plan.search_space import CHUNKS, SearchSpace


KEPT = 96
"""Layouts that are kept, those with the least bounds."""
EACH = 3
"""Layouts that are kept for one configuration of the main module."""
WORTH = 1.5
"""Configurations of the main module with bounds above this many times the least one are not looked at."""

BESIDE, ALL, FIRST = "beside", "all", "first"


@attrs.frozen(eq=False)
class Placed:
    """A configuration of a module, and where it lies."""

    priced: PricedConfig
    place: str = BESIDE

    @property
    def ranks(self) -> int:
        """How many ranks of its own it has."""
        return self.priced.ranks if self.place == BESIDE else 0


@attrs.frozen(eq=False)
class Candidate:
    """A layout with its lower bound in seconds."""

    bound: float
    main: PricedConfig
    others: Mapping[str, Placed]

    @property
    def ranks(self) -> int:
        """How many ranks host a module."""
        return self.main.ranks + sum(placed.ranks for placed in self.others.values())


@attrs.frozen(eq=False)
class OutOfMemory:
    """A layout that does not fit: the pipeline rank of a module that lacks most, and the bytes that it needs."""

    candidate: Candidate
    module: str
    pp: int
    needs: float


@attrs.frozen(eq=False)
class Candidates:
    """What a walk finds.

    Attributes:
        candidates: the best layouts, in order of their bounds.
        left_out_s: no layout that was left out has a lower bound below this.
        out_of_memory: layouts that do not fit: the one that lacks least, then the fastest.
        looked_at: how many configurations and layouts were priced.
    """

    candidates: tuple[Candidate, ...]
    left_out_s: float
    out_of_memory: tuple[OutOfMemory, ...]
    looked_at: int


@attrs.frozen(eq=False, kw_only=True)
class Scope:
    """What is laid out: the search spaces of the modules of a graph, on so many ranks of `memory_bytes` each.

    `samples` are those of a step. Only layouts with bounds below `below_s` are of interest.
    """

    spaces: Mapping[str, SearchSpace]
    graph: ModuleGraph
    main: str
    ranks: int
    memory_bytes: float
    samples: int
    below_s: float = math.inf

    @property
    def others(self) -> list[str]:
        """The modules but the main one, those that feed others first."""
        return [name for name in self.graph.order if name != self.main]

    def stages_below(self, name: str) -> int:
        """Return how many stages lie at least between a module and the loss."""
        return max((1 + self.stages_below(to) for to in self.graph.nodes[name].feeds), default=0)

    def downstream(self, name: str) -> set[str]:
        """Return the modules that a module feeds, directly or not."""
        feeds = self.graph.nodes[name].feeds
        return set(feeds).union(*(self.downstream(to) for to in feeds))


@attrs.define(eq=False)
class _Notes:
    """What a walk notes on its way; `worth_s` is the bound above which a configuration is not looked at."""

    worth_s: float = math.inf
    left_out_s: float = math.inf
    looked_at: int = 0
    out_of_memory: list[OutOfMemory] = attrs.field(factory=list[OutOfMemory])
    undominated: dict[tuple[str, int], tuple[PricedConfig, ...]] = attrs.field(
        factory=dict[tuple[str, int], tuple[PricedConfig, ...]]
    )

    def leave_out(self, bound: float) -> None:
        self.left_out_s = min(self.left_out_s, bound)

    def does_not_fit(self, candidate: Candidate, module: str, needs: Sequence[float]) -> None:
        """Note a layout; `needs` are the bytes of each pipeline rank of a module."""
        pp = max(range(len(needs)), key=needs.__getitem__)
        self.out_of_memory.append(OutOfMemory(candidate, module, pp, needs[pp]))
        if len(self.out_of_memory) > 8 * KEPT:
            self.out_of_memory = list(_worth_saying(self.out_of_memory))


def candidates_of(scope: Scope) -> Candidates:
    """Return the layouts of a job with the least lower bounds."""
    notes = _Notes()
    kept: list[tuple[float, int, int, Candidate]] = []  # the worst on top
    number = itertools.count()
    for bound, main in _main_configs(scope, notes):
        if len(kept) == KEPT and bound >= -kept[0][0]:
            notes.leave_out(bound)
            break
        for candidate in _joined(scope, notes, main, bound):
            heapq.heappush(kept, (-candidate.bound, -candidate.ranks, -next(number), candidate))
        while len(kept) > KEPT:
            notes.leave_out(-heapq.heappop(kept)[0])
    return Candidates(
        candidates=tuple(entry[-1] for entry in sorted(kept, reverse=True, key=lambda e: e[:3])),
        left_out_s=notes.left_out_s,
        out_of_memory=_worth_saying(notes.out_of_memory),
        looked_at=notes.looked_at,
    )


def _main_configs(scope: Scope, notes: _Notes) -> list[tuple[float, PricedConfig]]:
    """Return the configurations of the main module that fit, by their bounds, up to `WORTH` times the least one."""
    space, below = scope.spaces[scope.main], scope.stages_below(scope.main)
    configs = [
        config for count in _divisors(scope.samples) for config in space.configs(count, scope.ranks, CHUNKS)
    ]
    found: list[tuple[float, int, int, PricedConfig]] = []
    best = math.inf
    for least, i in sorted((space.least_s(config), i) for i, config in enumerate(configs)):
        if least > min(WORTH * best, scope.below_s):
            notes.leave_out(least)
            break
        if space.least_bytes(configs[i]) > scope.memory_bytes and notes.out_of_memory:
            continue
        notes.looked_at += 1
        priced = space.priced(configs[i])
        bound, needs = priced.bound_s(), priced.bytes_at_most(below)
        if max(needs) > scope.memory_bytes:
            notes.does_not_fit(Candidate(bound, priced, {}), scope.main, needs)
        elif bound <= min(WORTH * best, scope.below_s):
            found.append((bound, priced.ranks, i, priced))
            best = min(best, bound)
        else:
            notes.leave_out(bound)
    notes.worth_s = min(WORTH * best, scope.below_s)
    found.sort(key=lambda each: each[:3])
    return [(bound, priced) for bound, _, _, priced in found]


# -- the other modules -------------------------------------------------------------------------------------


def _joined(scope: Scope, notes: _Notes, main: PricedConfig, least: float) -> list[Candidate]:
    """Return the best layouts of the other modules around a configuration of the main one.

    The choices of each module are in order of the bound with it alone. So a choice that cannot be among the best ends
    the search through those behind it.
    """
    names = scope.others
    choices = [_sorted_choices(scope, notes, name, main) for name in names]
    best: list[Candidate] = []

    def join(chosen: dict[str, Placed], bound: float, room: int) -> None:
        if len(chosen) == len(names):
            notes.looked_at += 1
            candidate = Candidate(max(bound, _bound_s(scope, main, chosen)), main, dict(chosen))
            _keep(scope, notes, candidate, best)
            return
        for alone, placed in choices[len(chosen)]:
            if len(best) == EACH and max(bound, alone) >= best[-1].bound:
                notes.leave_out(max(bound, alone))
                break
            if placed.ranks <= room:
                join({**chosen, names[len(chosen)]: placed}, max(bound, alone), room - placed.ranks)

    join({}, least, scope.ranks - main.ranks)
    return best


def _keep(scope: Scope, notes: _Notes, candidate: Candidate, best: list[Candidate]) -> None:
    """Put a layout among the best, if it fits."""
    needs = _shared_bytes(scope, candidate)
    if max(needs, default=0) > scope.memory_bytes:
        notes.does_not_fit(candidate, scope.main, needs)
        return
    best.append(candidate)
    best.sort(key=lambda each: (each.bound, each.ranks))
    if len(best) > EACH:
        notes.leave_out(best.pop().bound)


def _sorted_choices(scope: Scope, notes: _Notes, name: str, main: PricedConfig) -> list[tuple[float, Placed]]:
    """Return what a module may have beside the main one, with the bounds of the two, in order of these."""
    choices = list(_choices(scope, notes, name, main))
    bounds = [(_bound_s(scope, main, {name: each}), each.ranks, i) for i, each in enumerate(choices)]
    return [(bound, choices[i]) for bound, _, i in sorted(bounds)]


def _choices(scope: Scope, notes: _Notes, name: str, main: PricedConfig) -> Iterator[Placed]:
    """Yield what a module may have: ranks that are left, or those of the main module."""
    room, config = scope.ranks - main.ranks, main.config
    below = main.depth if scope.main in scope.downstream(name) else scope.stages_below(name)
    for priced in _undominated(scope, notes, name, config.microbatches):
        if priced.ranks > room:
            continue
        needs = priced.bytes_at_most(below)
        if max(needs) > scope.memory_bytes:
            notes.does_not_fit(Candidate(main.bound_s(), main, {name: Placed(priced)}), name, needs)
        else:
            yield Placed(priced)
    for priced in _on(scope, name, main.ranks, config.microbatches):
        yield Placed(priced, ALL)
    if config.pp > 1:
        for priced in _on(scope, name, main.ranks // config.pp, config.microbatches):
            yield Placed(priced, FIRST)


def _undominated(scope: Scope, notes: _Notes, name: str, microbatches: int) -> tuple[PricedConfig, ...]:
    """Return the configurations of a module for which no other one is as good in every respect."""
    if (name, microbatches) not in notes.undominated:
        space = scope.spaces[name]
        configs = space.configs(microbatches, scope.ranks - 1)
        priced = [space.priced(config) for config in configs if space.least_s(config) <= notes.worth_s]
        notes.looked_at += len(priced)
        notes.undominated[name, microbatches] = _front(priced)
    return notes.undominated[name, microbatches]


def _front(configs: Iterable[PricedConfig]) -> tuple[PricedConfig, ...]:
    """Return the configurations for which no other one is as good in ranks, bytes, seconds through them and bound."""
    rated = sorted(
        (
            (
                priced.ranks,
                priced.bound_s(),
                priced.forward,
                priced.backward,
                max(priced.bytes_at_most(0)),
                max(rank.in_flight for rank in priced.bytes),
            ),
            i,
            priced,
        )
        for i, priced in enumerate(configs)
    )
    front: list[tuple[tuple[float, ...], PricedConfig]] = []
    for rates, _, priced in rated:
        if not any(all(map(operator.le, other, rates)) for other, _ in front):
            front.append((rates, priced))
    return tuple(priced for _, priced in front)


def _on(scope: Scope, name: str, ranks: int, microbatches: int) -> Iterator[PricedConfig]:
    """Yield configurations of one stage on so many ranks: with the microbatches of the job, or with larger ones."""
    space = scope.spaces[name]
    for shape in space.shapes:
        dp_ranks, left = divmod(ranks, shape.ranks)
        if left:
            continue
        larger = next(
            m for m in reversed(_divisors(microbatches)) if scope.samples // m >= dp_ranks or m == 1
        )
        for count in dict.fromkeys((microbatches, larger)):
            dp = min(dp_ranks, scope.samples // count)
            if dp % shape.dp_size == 0:
                yield space.priced(ParallelConfig(shape, 1, 1, dp, count))


# -- a layout ----------------------------------------------------------------------------------------------


def _bound_s(scope: Scope, main: PricedConfig, others: Mapping[str, Placed]) -> float:
    """Return seconds that no order of a layout beats."""
    priced = {name: placed.priced for name, placed in others.items()} | {scope.main: main}
    order = [name for name in scope.graph.order if name in priced]
    feeders = {name: [(f, 0.0) for f in scope.graph.nodes[name].feeders if f in priced] for name in order}
    heads = longest_before_s(order, feeders, {name: each.forward for name, each in priced.items()})
    tails = longest_before_s(order, feeders, {name: each.backward for name, each in priced.items()})
    alone = max(each.bound_s(heads[name], tails[name]) for name, each in priced.items())
    return max(alone, *_shared_s(main, others), 0.0)


def _shared_s(main: PricedConfig, others: Mapping[str, Placed]) -> Iterator[float]:
    """Yield the seconds that ranks with several modules work."""
    for pp, time in enumerate(main.times):
        guests = [guest.priced for guest in _guests(main, others, pp)]
        if guests:
            first = [(guest.config.microbatches, guest.times[0]) for guest in guests]
            yield (
                main.config.microbatches * time.work
                + sum(count * each.work for count, each in first)
                + time.update
                + sum(each.update for _, each in first)
            )


def _shared_bytes(scope: Scope, candidate: Candidate) -> tuple[float, ...]:
    """Return what the pipeline ranks of the main module hold with the modules that share them; nothing if none does."""
    main = candidate.main
    if all(placed.place == BESIDE for placed in candidate.others.values()):
        return ()
    needs = list(main.bytes_at_most(scope.stages_below(scope.main)))
    for pp in range(main.config.pp):
        for placed in _guests(main, candidate.others, pp):
            rank, count = placed.priced.bytes[0], placed.priced.config.microbatches
            # With fewer, larger microbatches: those in flight below are counted in microbatches of the main module.
            in_flight = min(1 + math.ceil(main.depth / (main.config.microbatches / count)), count)
            needs[pp] += rank.kept + rank.in_flight * in_flight
    return tuple(needs)


def _guests(main: PricedConfig, others: Mapping[str, Placed], pp: int) -> Iterator[Placed]:
    """Yield the modules that lie on ranks of the main module at a position along pp.

    They begin at rank 0. Those with few dp ranks do not reach the ranks of later stages.
    """
    first = pp * main.ranks // main.config.pp
    return (placed for placed in others.values() if placed.place != BESIDE and placed.priced.ranks > first)


def _worth_saying(out_of_memory: Iterable[OutOfMemory]) -> tuple[OutOfMemory, ...]:
    """Return the layout that lacks least, then the fastest ones, each once."""
    out_of_memory = list(out_of_memory)
    least = sorted(out_of_memory, key=lambda layout: layout.needs)[:1]
    fastest = sorted(out_of_memory, key=lambda layout: (layout.candidate.bound, layout.needs))[:KEPT]
    return tuple(dict.fromkeys([*least, *fastest]))


@functools.lru_cache(maxsize=1 << 10)
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)
