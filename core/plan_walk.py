"""Walk: the layouts of a whole job, by times that no order beats.

The *main* module, the one with most work, lies at rank 0. Every other one has one of three places:

    beside     ranks of its own, behind those of the main module
    all        on the ranks of the main module, with as many lanes as there are samples for
    first      on those of the main module's first pipeline stage

The bound of a layout is that of its slowest module (`plan_options`): the first microbatch comes through the modules that
feed it, the last gradient goes back through them. Ranks with two modules do the work of both.

Options of the main module are walked in order of their bound alone, which bounds every layout with them; each is joined
with options of the others. A module's options are left out where another takes no more ranks, bytes and seconds in
every respect. The walk ends where no layout to come can be among the best `KEPT`.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.graph import Graph
from mimogrid.core.plan_options import CHUNKS, Limit, Menu, Option


KEPT = 96
"""Layouts that are kept, by their bounds."""
EACH = 3
"""Layouts that are kept for one option of the main module."""
WORTH = 2.0
"""Options of the main module with bounds above this many times the best one are not looked at."""

BESIDE, ALL, FIRST = "beside", "all", "first"


@attrs.frozen(eq=False)
class Placed:
    """An option of a module, and where it lies."""

    option: Option
    place: str = BESIDE

    @property
    def ranks(self) -> int:
        """How many ranks it takes away from others."""
        return self.option.ranks if self.place == BESIDE else 0


@attrs.frozen(eq=False)
class Candidate:
    """A layout by its bound."""

    bound: float
    main: Option
    others: Mapping[str, Placed]

    @property
    def ranks(self) -> int:
        """How many ranks do anything."""
        return self.main.ranks + sum(placed.ranks for placed in self.others.values())


@attrs.frozen(eq=False)
class Miss:
    """A layout that does not fit: the pipeline rank of a module that lacks most, and what it needs at least."""

    bound: float
    candidate: Candidate
    module: str
    pp: int
    needs: float


@attrs.frozen(eq=False)
class Walk:
    """What a walk found.

    Attributes:
        candidates: the best layouts in order of their bounds.
        passed: no layout that was left out has a bound below this.
        misses: what does not fit, the least short first, and the fastest of them.
        looked_at: how many options and layouts were priced.
    """

    candidates: tuple[Candidate, ...]
    passed: float
    misses: tuple[Miss, ...]
    looked_at: int


def walk(
    menus: Mapping[str, Menu], graph: Graph, main: str, *, ranks: int, cap: float, samples: int
) -> Walk:
    """Return the best layouts of a job on so many ranks of `cap` bytes, for so many samples in a step."""
    return _Walker(menus, graph, main, ranks, cap, samples).walk()


@attrs.define(eq=False)
class _Walker:
    menus: Mapping[str, Menu]
    graph: Graph
    main: str
    ranks: int
    cap: float
    samples: int
    limit: Limit = attrs.field(factory=Limit)
    looked_at: int = 0
    misses: list[Miss] = attrs.field(factory=list[Miss])
    fronts: dict[tuple[str, int], tuple[Option, ...]] = attrs.field(
        factory=dict[tuple[str, int], tuple[Option, ...]]
    )

    def walk(self) -> Walk:
        kept: list[tuple[float, int, int, Candidate]] = []  # the worst on top
        passed = math.inf
        number = itertools.count()
        for bound, main in self._mains():
            threshold = -kept[0][0] if len(kept) == KEPT else math.inf
            if bound >= threshold:
                passed = min(passed, bound)
                break
            found = sorted(self._joined(main, bound), key=lambda c: (c.bound, c.ranks))
            for candidate in found[EACH:]:
                passed = min(passed, candidate.bound)
            for candidate in found[:EACH]:
                heapq.heappush(kept, (-candidate.bound, -candidate.ranks, -next(number), candidate))
            while len(kept) > KEPT:
                passed = min(passed, -heapq.heappop(kept)[0])
        return Walk(
            candidates=tuple(entry[-1] for entry in sorted(kept, reverse=True, key=lambda e: e[:3])),
            passed=min(passed, self.limit.passed),
            misses=_chosen(self.misses),
            looked_at=self.looked_at,
        )

    def _mains(self) -> list[tuple[float, Option]]:
        """Return the options of the main module that fit, by their bounds."""
        menu, found = self.menus[self.main], list[tuple[float, Option]]()
        below = self._stages_below(self.main)
        best = math.inf
        # Many small microbatches are nearly always best: what comes first sets the limit for the rest.
        for count in sorted(_divisors(self.samples), reverse=True):
            for option in menu.options(count, self.ranks, CHUNKS, limit=self.limit):
                self.looked_at += 1
                bound = option.bound()
                most = option.bytes_at_most(below)
                if max(most) > self.cap:
                    self._missed(Candidate(bound, option, {}), self.main, most, 0.0)
                    continue
                found.append((bound, option))
                best = min(best, bound)
                self.limit.seconds = WORTH * best
        found.sort(key=lambda each: (each[0], each[1].ranks, str(each[1])))
        return found

    def _missed(self, candidate: Candidate, module: str, most: tuple[float, ...], more: float) -> None:
        pp = max(range(len(most)), key=most.__getitem__)
        self.misses.append(Miss(candidate.bound, candidate, module, pp, most[pp] + more))
        if len(self.misses) > 4 * KEPT:
            self.misses = list(_chosen(self.misses))

    def _stages_below(self, name: str) -> int:
        """Return how many stages lie at least between a module and the loss."""
        return max((1 + self._stages_below(to) for to in self.graph.nodes[name].feeds), default=0)

    # -- the other modules ---------------------------------------------------------------------------------

    def _joined(self, main: Option, least: float) -> Iterator[Candidate]:
        """Yield the layouts of the other modules around an option of the main one."""
        names = [name for name in self.graph.order if name != self.main]
        choices = [self._choices(name, main) for name in names]
        for chosen in itertools.product(*choices):
            others = dict(zip(names, chosen, strict=True))
            if main.ranks + sum(placed.ranks for placed in chosen) > self.ranks:
                continue
            self.looked_at += 1
            candidate = Candidate(max(least, self._bound(main, others)), main, others)
            crowded = self._crowded(candidate)
            if crowded is None:
                yield candidate
            else:
                self._missed(candidate, self.main, crowded, 0.0)

    def _choices(self, name: str, main: Option) -> list[Placed]:
        """Return what a module may have: ranks that are left, or those of the main module."""
        room, count = self.ranks - main.ranks, main.microbatches
        below = main.depth if self.main in self._downstream(name) else self._stages_below(name)
        found: list[Placed] = []
        for option in self._front(name, count):
            if option.ranks > room:
                continue
            most = option.bytes_at_most(below)
            if max(most) > self.cap:
                self._missed(Candidate(main.bound(), main, {name: Placed(option)}), name, most, 0.0)
            else:
                found.append(Placed(option))
        places = {ALL: main.ranks, FIRST: main.ranks // main.pp} if main.pp > 1 else {ALL: main.ranks}
        for place, ranks in places.items():
            found += [Placed(option, place) for option in self._on(name, ranks, count)]
        return found

    def _front(self, name: str, microbatches: int) -> tuple[Option, ...]:
        """Return the options of a module that no other one beats in every respect."""
        if (name, microbatches) not in self.fronts:
            room = self.ranks - 1
            options = sorted(
                self.menus[name].options(microbatches, room, limit=self.limit),
                key=lambda o: (o.ranks, o.bound(), o.forward, str(o)),
            )
            self.looked_at += len(options)
            front: list[Option] = []
            for option in options:
                if not any(_beats(other, option) for other in front):
                    front.append(option)
            self.fronts[name, microbatches] = tuple(front)
        return self.fronts[name, microbatches]

    def _on(self, name: str, ranks: int, microbatches: int) -> Iterator[Option]:
        """Yield options of one stage on so many ranks: with the microbatches of the job, or larger ones."""
        menu = self.menus[name]
        for shape in menu.shapes:
            lanes, left = divmod(ranks, shape.tp * shape.cp)
            if left:
                continue
            larger = next(m for m in _down_from(microbatches) if self.samples // m >= lanes or m == 1)
            for count in dict.fromkeys((microbatches, larger)):
                dp = min(lanes, self.samples // count)
                if (shape.tp * shape.cp * dp) % shape.ep == 0:
                    yield menu.option(shape, pp=1, chunks=1, dp=dp, microbatches=count)

    def _bound(self, main: Option, others: Mapping[str, Placed]) -> float:
        """Return a time that no order of a layout beats."""
        options = {name: placed.option for name, placed in others.items()} | {self.main: main}
        heads: dict[str, float] = {}
        tails: dict[str, float] = {}
        for name in self.graph.order:
            feeders = self.graph.nodes[name].feeders
            heads[name] = max((heads[f] + options[f].forward for f in feeders), default=0.0)
            tails[name] = max((tails[f] + options[f].backward for f in feeders), default=0.0)
        alone = max(option.bound(heads[name], tails[name]) for name, option in options.items())
        return max(alone, *self._shared(main, others), 0.0)

    def _shared(self, main: Option, others: Mapping[str, Placed]) -> Iterator[float]:
        """Yield the work of ranks that several modules share."""
        for pp, time in enumerate(main.times):
            guests = [p.option for p in others.values() if p.place == ALL or (p.place == FIRST and pp == 0)]
            # Guests with few lanes leave the ranks behind them alone; ranks of stages are in order.
            first = pp * main.ranks // main.pp
            guests = [guest for guest in guests if guest.ranks > first]
            if guests:
                yield (
                    main.microbatches * time.work
                    + sum(guest.microbatches * guest.times[0].work for guest in guests)
                    + time.update
                    + sum(guest.times[0].update for guest in guests)
                )

    def _crowded(self, candidate: Candidate) -> tuple[float, ...] | None:
        """Return what the ranks of the main module need with its guests, if that is too much."""
        guests = [p for p in candidate.others.values() if p.place != BESIDE]
        if not guests:
            return None
        main = candidate.main
        most = list(main.bytes_at_most(self._stages_below(self.main)))
        for placed in guests:
            rank = placed.option.bytes[0]
            # Fewer, larger microbatches: what flies below is counted in those of the main module.
            ratio = main.microbatches / placed.option.microbatches
            flying = min(1 + math.ceil(main.depth / ratio), placed.option.microbatches)
            for pp in range(main.pp):
                if placed.option.ranks > pp * main.ranks // main.pp:
                    most[pp] += rank.kept + rank.flying * flying
        return tuple(most) if max(most) > self.cap else None

    def _downstream(self, name: str) -> set[str]:
        feeds = self.graph.nodes[name].feeds
        return set(feeds).union(*(self._downstream(to) for to in feeds))


def _beats(one: Option, other: Option) -> bool:
    """Whether an option is no worse in anything: ranks, bytes, the way through it, its own bound."""
    return (
        one.ranks <= other.ranks
        and one.bound() <= other.bound()
        and one.forward <= other.forward
        and one.backward <= other.backward
        and max(one.bytes_at_most(0)) <= max(other.bytes_at_most(0))
        and max(rank.flying for rank in one.bytes) <= max(rank.flying for rank in other.bytes)
    )


def _chosen(misses: Iterable[Miss]) -> tuple[Miss, ...]:
    """Return the least short, then the fastest, each option once."""
    misses = list(misses)
    least = sorted(misses, key=lambda miss: miss.needs)[:1]
    fastest = sorted(misses, key=lambda miss: (miss.bound, miss.needs))[:KEPT]
    return tuple(dict.fromkeys([*least, *fastest]))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _down_from(number: int) -> Iterator[int]:
    """Yield the divisors of a number, the largest first."""
    return (d for d in range(number, 0, -1) if number % d == 0)
