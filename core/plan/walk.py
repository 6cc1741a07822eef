"""Walk: the layouts of a whole job, by times that no order beats.

The *main* module, the one with most work, lies at rank 0. Every other one has one of three places:

    beside     ranks of its own, behind those of the main module
    all        on the ranks of the main module, with as many dp ranks as there are samples for
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

from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.plan.configs import ParallelConfig, PricedConfig
from mimogrid.core.plan.search_space import CHUNKS, SearchSpace


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

    priced: PricedConfig
    place: str = BESIDE

    @property
    def ranks(self) -> int:
        """How many ranks it takes away from others."""
        return self.priced.ranks if self.place == BESIDE else 0


@attrs.frozen(eq=False)
class Candidate:
    """A layout by its bound."""

    bound: float
    main: PricedConfig
    others: Mapping[str, Placed]

    @property
    def ranks(self) -> int:
        """How many ranks do anything."""
        return self.main.ranks + sum(placed.ranks for placed in self.others.values())


@attrs.frozen(eq=False)
class OutOfMemory:
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
    out_of_memory: tuple[OutOfMemory, ...]
    looked_at: int


def walk(
    spaces: Mapping[str, SearchSpace],
    graph: ModuleGraph,
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
    return _Walker(spaces, graph, main, ranks, cap, samples, below).walk()


@attrs.define(eq=False)
class _Walker:
    spaces: Mapping[str, SearchSpace]
    graph: ModuleGraph
    main: str
    ranks: int
    cap: float
    samples: int
    below: float
    worth: float = math.inf
    passed: float = math.inf
    looked_at: int = 0
    out_of_memory: list[OutOfMemory] = attrs.field(factory=list[OutOfMemory])
    fronts: dict[tuple[str, int], tuple[PricedConfig, ...]] = attrs.field(
        factory=dict[tuple[str, int], tuple[PricedConfig, ...]]
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
            out_of_memory=_chosen(self.out_of_memory),
            looked_at=self.looked_at,
        )

    def _mains(self) -> Iterator[tuple[float, PricedConfig]]:
        """Yield the options of the main module that fit, by their bounds, up to `WORTH` times the best."""
        space, below = self.spaces[self.main], self._stages_below(self.main)
        configs = [
            config for count in _divisors(self.samples) for config in space.configs(count, self.ranks, CHUNKS)
        ]
        ordered = sorted(((space.least_s(config), i) for i, config in enumerate(configs)))
        found: list[tuple[float, int, int, PricedConfig]] = []
        best = math.inf
        for least, i in ordered:
            if least > min(WORTH * best, self.below):
                self.passed = min(self.passed, least)
                break
            if space.least_bytes(configs[i]) > self.cap and self.out_of_memory:
                continue
            self.looked_at += 1
            priced = space.priced(configs[i])
            bound, most = priced.bound(), priced.bytes_at_most(below)
            if max(most) > self.cap:
                self._out_of_memory(Candidate(bound, priced, {}), self.main, most)
            elif bound <= min(WORTH * best, self.below):
                found.append((bound, priced.ranks, i, priced))
                best = min(best, bound)
            else:
                self.passed = min(self.passed, bound)
        self.worth = min(WORTH * best, self.below)
        found.sort(key=lambda each: each[:3])
        return ((bound, priced) for bound, _, _, priced in found)

    def _out_of_memory(self, candidate: Candidate, module: str, most: tuple[float, ...]) -> None:
        pp = max(range(len(most)), key=most.__getitem__)
        self.out_of_memory.append(OutOfMemory(candidate.bound, candidate, module, pp, most[pp]))
        if len(self.out_of_memory) > 8 * KEPT:
            self.out_of_memory = list(_chosen(self.out_of_memory))

    def _stages_below(self, name: str) -> int:
        """Return how many stages lie at least between a module and the loss."""
        return max((1 + self._stages_below(to) for to in self.graph.nodes[name].feeds), default=0)

    # -- the other modules ---------------------------------------------------------------------------------

    def _joined(self, main: PricedConfig, least: float) -> list[Candidate]:
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
                    self._out_of_memory(candidate, self.main, crowded)
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

    def _choices(self, name: str, main: PricedConfig) -> list[Placed]:
        """Return what a module may have: ranks that are left, or those of the main module."""
        room, count = self.ranks - main.ranks, main.config.microbatches
        below = main.depth if self.main in self._downstream(name) else self._stages_below(name)
        found: list[Placed] = []
        for priced in self._front(name, count):
            if priced.ranks > room:
                continue
            most = priced.bytes_at_most(below)
            if max(most) > self.cap:
                self._out_of_memory(Candidate(main.bound(), main, {name: Placed(priced)}), name, most)
            else:
                found.append(Placed(priced))
        places = (
            {ALL: main.ranks, FIRST: main.ranks // main.config.pp}
            if main.config.pp > 1
            else {ALL: main.ranks}
        )
        for place, ranks in places.items():
            found += [Placed(priced, place) for priced in self._on(name, ranks, count)]
        return found

    def _front(self, name: str, microbatches: int) -> tuple[PricedConfig, ...]:
        """Return the options of a module that no other one beats in every respect."""
        if (name, microbatches) not in self.fronts:
            space = self.spaces[name]
            configs = space.configs(microbatches, self.ranks - 1)
            options = [space.priced(config) for config in configs if space.least_s(config) <= self.worth]
            self.looked_at += len(options)
            self.fronts[name, microbatches] = _front(options)
        return self.fronts[name, microbatches]

    def _on(self, name: str, ranks: int, microbatches: int) -> Iterator[PricedConfig]:
        """Yield options of one stage on so many ranks: with the microbatches of the job, or larger ones."""
        space = self.spaces[name]
        for shape in space.shapes:
            dp_ranks, left = divmod(ranks, shape.ranks)
            if left:
                continue
            larger = next(m for m in _down_from(microbatches) if self.samples // m >= dp_ranks or m == 1)
            for count in dict.fromkeys((microbatches, larger)):
                dp = min(dp_ranks, self.samples // count)
                if dp % shape.dp_size == 0:
                    yield space.priced(ParallelConfig(shape, 1, 1, dp, count))

    def _bound(self, main: PricedConfig, others: Mapping[str, Placed]) -> float:
        """Return a time that no order of a layout beats."""
        options = {name: placed.priced for name, placed in others.items()} | {self.main: main}
        heads: dict[str, float] = {}
        tails: dict[str, float] = {}
        for name in self.graph.order:
            if name not in options:
                continue
            feeders = [feeder for feeder in self.graph.nodes[name].feeders if feeder in options]
            heads[name] = max((heads[f] + options[f].forward for f in feeders), default=0.0)
            tails[name] = max((tails[f] + options[f].backward for f in feeders), default=0.0)
        alone = max(priced.bound(heads[name], tails[name]) for name, priced in options.items())
        return max(alone, *self._shared(main, others), 0.0)

    def _shared(self, main: PricedConfig, others: Mapping[str, Placed]) -> Iterator[float]:
        """Yield the work of ranks that several modules share."""
        for pp, time in enumerate(main.times):
            guests = [p.priced for p in others.values() if p.place == ALL or (p.place == FIRST and pp == 0)]
            # Guests with few dp ranks leave the ranks behind them alone; ranks of stages are in order.
            first = pp * main.ranks // main.config.pp
            guests = [guest for guest in guests if guest.ranks > first]
            if guests:
                yield (
                    main.config.microbatches * time.work
                    + sum(guest.config.microbatches * guest.times[0].work for guest in guests)
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
            rank = placed.priced.bytes[0]
            # Fewer, larger microbatches: what flies below is counted in those of the main module.
            ratio = main.config.microbatches / placed.priced.config.microbatches
            flying = min(1 + math.ceil(main.depth / ratio), placed.priced.config.microbatches)
            for pp in range(main.config.pp):
                if placed.priced.ranks > pp * main.ranks // main.config.pp:
                    most[pp] += rank.kept + rank.flying * flying
        return tuple(most) if max(most) > self.cap else None

    def _downstream(self, name: str) -> set[str]:
        feeds = self.graph.nodes[name].feeds
        return set(feeds).union(*(self._downstream(to) for to in feeds))


def _front(options: Iterable[PricedConfig]) -> tuple[PricedConfig, ...]:
    """Return the options that no other one beats in ranks, bytes, the way through them and their own bound."""
    rated = sorted(
        (
            (
                priced.ranks,
                priced.bound(),
                priced.forward,
                priced.backward,
                max(priced.bytes_at_most(0)),
                max(rank.flying for rank in priced.bytes),
            ),
            i,
            priced,
        )
        for i, priced in enumerate(options)
    )
    front: list[tuple[tuple[float, ...], PricedConfig]] = []
    for rates, _, priced in rated:
        if not any(all(map(operator.le, other, rates)) for other, _ in front):
            front.append((rates, priced))
    return tuple(priced for _, priced in front)


def _chosen(out_of_memory: Iterable[OutOfMemory]) -> tuple[OutOfMemory, ...]:
    """Return the least short, then the fastest, each option once."""
    out_of_memory = list(out_of_memory)
    least = sorted(out_of_memory, key=lambda too_large: too_large.needs)[:1]
    fastest = sorted(out_of_memory, key=lambda too_large: (too_large.bound, too_large.needs))[:KEPT]
    return tuple(dict.fromkeys([*least, *fastest]))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _down_from(number: int) -> Iterator[int]:
    """Yield the divisors of a number, the largest first."""
    return (d for d in range(number, 0, -1) if number % d == 0)
