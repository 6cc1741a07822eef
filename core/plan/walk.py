"""Walk: the layouts of a whole job, by times that no order beats.

The *main* module, the one with most work, lies at rank 0. Every other one has one of three places:

    beside     ranks of its own, behind those of the main module
    all        on the ranks of the main module, with as many lanes as there are samples for
    first      on those of the main module's first pipeline stage

The bound of a layout is that of its slowest module (`options`): the first microbatch comes through the modules
that feed it, the last gradient goes back through them. Ranks with two modules do the work of both.

Options of the main module are walked in order of their bound alone, which bounds every layout with them; each is
joined with options of the others. A module's options are left out where another takes no more ranks, bytes and
seconds in every respect. The walk ends where no layout to come can be among the best `KEPT`.
"""

import heapq
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping

import attrs

from mimogrid.core.job.graph import Graph
from mimogrid.core.plan.menu import CHUNKS, Menu
from mimogrid.core.plan.options import Option, Way


KEPT = 96
"""Layouts that are kept, by their bounds."""
EACH = 3
"""Layouts that are kept for one option of the main module."""
WORTH = 1.5
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
    menus: Mapping[str, Menu],
    graph: Graph,
    main: str,
    *,
    ranks: int,
    cap: float,
    samples: int,
    below: float = math.inf,
) -> Walk:
    """Return the best layouts of a job on so many ranks of `cap` bytes, for so many samples in a step.

    Only those whose bounds are `below` some seconds are of interest.
    """
    return _Walker(menus, graph, main, ranks, cap, samples, below).walk()


@attrs.define(eq=False)
class _Walker:
    menus: Mapping[str, Menu]
    graph: Graph
    main: str
    ranks: int
    cap: float
    samples: int
    below: float
    worth: float = math.inf
    passed: float = math.inf
    looked_at: int = 0
    misses: list[Miss] = attrs.field(factory=list[Miss])
    fronts: dict[tuple[str, int], tuple[Option, ...]] = attrs.field(
        factory=dict[tuple[str, int], tuple[Option, ...]]
    )

    def walk(self) -> Walk:
        kept: list[tuple[float, int, int, Candidate]] = []  # the worst on top
        number = itertools.count()
        for bound, main in self._mains():
            if len(kept) == KEPT and bound >= -kept[0][0]:
                self.passed = min(self.passed, bound)
                break
            for candidate in self._joined(main, bound):
                heapq.heappush(kept, (-candidate.bound, -candidate.ranks, -next(number), candidate))
            while len(kept) > KEPT:
                self.passed = min(self.passed, -heapq.heappop(kept)[0])
        return Walk(
            candidates=tuple(entry[-1] for entry in sorted(kept, reverse=True, key=lambda e: e[:3])),
            passed=self.passed,
            misses=_chosen(self.misses),
            looked_at=self.looked_at,
        )

    def _mains(self) -> Iterator[tuple[float, Option]]:
        """Yield the options of the main module that fit, by their bounds, up to `WORTH` times the best."""
        menu, below = self.menus[self.main], self._stages_below(self.main)
        ways = [way for count in _divisors(self.samples) for way in menu.ways(count, self.ranks, CHUNKS)]
        ordered = sorted(((menu.least_s(way), i) for i, way in enumerate(ways)))
        found: list[tuple[float, int, int, Option]] = []
        best = math.inf
        for least, i in ordered:
            if least > min(WORTH * best, self.below):
                self.passed = min(self.passed, least)
                break
            if menu.least_bytes(ways[i]) > self.cap and self.misses:
                continue
            self.looked_at += 1
            option = menu.option(ways[i])
            bound, most = option.bound(), option.bytes_at_most(below)
            if max(most) > self.cap:
                self._missed(Candidate(bound, option, {}), self.main, most)
            elif bound <= min(WORTH * best, self.below):
                found.append((bound, option.ranks, i, option))
                best = min(best, bound)
            else:
                self.passed = min(self.passed, bound)
        self.worth = min(WORTH * best, self.below)
        found.sort(key=lambda each: each[:3])
        return ((bound, option) for bound, _, _, option in found)

    def _missed(self, candidate: Candidate, module: str, most: tuple[float, ...]) -> None:
        pp = max(range(len(most)), key=most.__getitem__)
        self.misses.append(Miss(candidate.bound, candidate, module, pp, most[pp]))
        if len(self.misses) > 8 * KEPT:
            self.misses = list(_chosen(self.misses))

    def _stages_below(self, name: str) -> int:
        """Return how many stages lie at least between a module and the loss."""
        return max((1 + self._stages_below(to) for to in self.graph.nodes[name].feeds), default=0)

    # -- the other modules ---------------------------------------------------------------------------------

    def _joined(self, main: Option, least: float) -> list[Candidate]:
        """Return the best layouts of the other modules around an option of the main one.

        Choices of each module are in order of the bound with it alone, so that a choice that cannot be among the
        best ends the search through those behind it.
        """
        names = [name for name in self.graph.order if name != self.main]
        choices: list[list[tuple[float, Placed]]] = []
        for name in names:
            placed = self._choices(name, main)
            bounds = [(self._bound(main, {name: each}), each.ranks, i) for i, each in enumerate(placed)]
            choices.append([(bound, placed[i]) for bound, _, i in sorted(bounds)])
        best: list[Candidate] = []

        def join(chosen: dict[str, Placed], bound: float, room: int) -> None:
            if len(chosen) == len(names):
                self.looked_at += 1
                candidate = Candidate(max(bound, self._bound(main, chosen)), main, dict(chosen))
                crowded = self._crowded(candidate)
                if crowded is not None:
                    self._missed(candidate, self.main, crowded)
                    return
                best.append(candidate)
                best.sort(key=lambda each: (each.bound, each.ranks))
                if len(best) > EACH:
                    self.passed = min(self.passed, best.pop().bound)
                return
            name = names[len(chosen)]
            for alone, placed in choices[len(chosen)]:
                if len(best) == EACH and max(bound, alone) >= best[-1].bound:
                    self.passed = min(self.passed, max(bound, alone))
                    break
                if placed.ranks <= room:
                    join({**chosen, name: placed}, max(bound, alone), room - placed.ranks)

        join({}, least, self.ranks - main.ranks)
        return best

    def _choices(self, name: str, main: Option) -> list[Placed]:
        """Return what a module may have: ranks that are left, or those of the main module."""
        room, count = self.ranks - main.ranks, main.way.microbatches
        below = main.depth if self.main in self._downstream(name) else self._stages_below(name)
        found: list[Placed] = []
        for option in self._front(name, count):
            if option.ranks > room:
                continue
            most = option.bytes_at_most(below)
            if max(most) > self.cap:
                self._missed(Candidate(main.bound(), main, {name: Placed(option)}), name, most)
            else:
                found.append(Placed(option))
        places = {ALL: main.ranks, FIRST: main.ranks // main.way.pp} if main.way.pp > 1 else {ALL: main.ranks}
        for place, ranks in places.items():
            found += [Placed(option, place) for option in self._on(name, ranks, count)]
        return found

    def _front(self, name: str, microbatches: int) -> tuple[Option, ...]:
        """Return the options of a module that no other one beats in every respect."""
        if (name, microbatches) not in self.fronts:
            menu = self.menus[name]
            ways = menu.ways(microbatches, self.ranks - 1)
            options = [menu.option(way) for way in ways if menu.least_s(way) <= self.worth]
            self.looked_at += len(options)
            self.fronts[name, microbatches] = _front(options)
        return self.fronts[name, microbatches]

    def _on(self, name: str, ranks: int, microbatches: int) -> Iterator[Option]:
        """Yield options of one stage on so many ranks: with the microbatches of the job, or larger ones."""
        menu = self.menus[name]
        for shape in menu.shapes:
            lanes, left = divmod(ranks, shape.ranks)
            if left:
                continue
            larger = next(m for m in _down_from(microbatches) if self.samples // m >= lanes or m == 1)
            for count in dict.fromkeys((microbatches, larger)):
                dp = min(lanes, self.samples // count)
                if dp % shape.lanes == 0:
                    yield menu.option(Way(shape, 1, 1, dp, count))

    def _bound(self, main: Option, others: Mapping[str, Placed]) -> float:
        """Return a time that no order of a layout beats."""
        options = {name: placed.option for name, placed in others.items()} | {self.main: main}
        heads: dict[str, float] = {}
        tails: dict[str, float] = {}
        for name in self.graph.order:
            if name not in options:
                continue
            feeders = [feeder for feeder in self.graph.nodes[name].feeders if feeder in options]
            heads[name] = max((heads[f] + options[f].forward for f in feeders), default=0.0)
            tails[name] = max((tails[f] + options[f].backward for f in feeders), default=0.0)
        alone = max(option.bound(heads[name], tails[name]) for name, option in options.items())
        return max(alone, *self._shared(main, others), 0.0)

    def _shared(self, main: Option, others: Mapping[str, Placed]) -> Iterator[float]:
        """Yield the work of ranks that several modules share."""
        for pp, time in enumerate(main.times):
            guests = [p.option for p in others.values() if p.place == ALL or (p.place == FIRST and pp == 0)]
            # Guests with few lanes leave the ranks behind them alone; ranks of stages are in order.
            first = pp * main.ranks // main.way.pp
            guests = [guest for guest in guests if guest.ranks > first]
            if guests:
                yield (
                    main.way.microbatches * time.work
                    + sum(guest.way.microbatches * guest.times[0].work for guest in guests)
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
            ratio = main.way.microbatches / placed.option.way.microbatches
            flying = min(1 + math.ceil(main.depth / ratio), placed.option.way.microbatches)
            for pp in range(main.way.pp):
                if placed.option.ranks > pp * main.ranks // main.way.pp:
                    most[pp] += rank.kept + rank.flying * flying
        return tuple(most) if max(most) > self.cap else None

    def _downstream(self, name: str) -> set[str]:
        feeds = self.graph.nodes[name].feeds
        return set(feeds).union(*(self._downstream(to) for to in feeds))


def _front(options: Iterable[Option]) -> tuple[Option, ...]:
    """Return the options that no other one beats in ranks, bytes, the way through them and their own bound."""
    rated = sorted(
        (
            (
                option.ranks,
                option.bound(),
                option.forward,
                option.backward,
                max(option.bytes_at_most(0)),
                max(rank.flying for rank in option.bytes),
            ),
            i,
            option,
        )
        for i, option in enumerate(options)
    )
    front: list[tuple[tuple[float, ...], Option]] = []
    for rates, _, option in rated:
        if not any(all(map(operator.le, other, rates)) for other, _ in front):
            front.append((rates, option))
    return tuple(option for _, option in front)


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
