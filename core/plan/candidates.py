"""Candidates: layouts of a whole job, with their lower bounds, in the order of what they take by estimate.

The *main* module, the one with most work, lies at rank 0. Every other module has one of three places:

    beside     ranks of its own, behind those of the main module
    all        on the ranks of the main module, with a dp rank for each sample as far as there are samples
    first      on the ranks of the main module's first pipeline stage

The bound of a layout is that of its slowest module (`configs`): the first microbatch comes through the modules that
feed it, and the last gradient goes back through them. Ranks with two modules do the work of both.

The bound leaves out that modules that share ranks run one after the other. So layouts are ranked by an estimate, in
which the first microbatches of all modules on the main one's ranks come before its first, and the last after its last.

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
from typing import TypeVar

import attrs

from mimogrid.core.base.bounds import longest_before_s
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.schedules import GPIPE
from mimogrid.core.plan.configs import ParallelConfig, PricedConfig, Rates
from mimogrid.core.plan.pins import FREE, JOB, Pins
from mimogrid.core.plan.progress import Progress, Watch, always
from mimogrid.core.plan.search_space import CHUNKS, SearchSpace, divisors


KEPT = 48
"""Layouts that are kept, those with the least estimates."""
EACH = 4
"""Layouts that are kept for one configuration of the main module."""
NEAR = 1.01
"""A configuration is left out where another one is no worse than so many times as bad in any respect."""
FAST, SHORT = 0.5, 0.01
"""Parts of the least time of the main module: of modules beside it that are faster, and of microbatches that go through
these sooner, more ranks are no better."""
BEAM = 12
"""Layouts of some modules that are kept while others are placed around a configuration of the main one."""
FEW = 64
"""A module beside the main one may have so many ranks in any case."""
AMPLE = 4
"""A module beside the main one gets at most so many times its share of the ranks, by its share of the work."""
CLOSEST = 8
"""Configurations that are priced though they cannot fit, to say which lacks least."""
WORTH = 1.5
"""The walk ends at bounds above this many times the estimate of the best layout."""

EFFORT = 500_000
"""Pipeline ranks of configurations, and layouts, that are priced before the walk ends, once there is a layout."""

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
    """A layout with its lower bound in seconds, and with an estimate: one that knows that ranks are shared."""

    bound: float
    main: PricedConfig
    others: Mapping[str, Placed]
    estimate: float = 0.0

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
        candidates: the best layouts, in order of their estimates.
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

    `samples` are those of a step, `work` the operations of each module in it.
    """

    spaces: Mapping[str, SearchSpace]
    graph: ModuleGraph
    main: str
    ranks: int
    memory_bytes: float
    samples: int
    work: Mapping[str, float]
    pins: Pins = FREE

    def can_cut(self, dp_sizes: Mapping[str, int], counts: Iterable[int]) -> bool:
        """Whether a step can be cut for modules of these dp sizes, with so many microbatches each.

        Where a limit of tokens cuts it, the longest sample must fit into every part of the limit. Where samples are
        assigned by cost there must be one for every cell.
        """
        space = self.spaces[self.main]
        if space.limit is not None:
            texts = [dp for name, dp in dp_sizes.items() if name in self.graph.texts]
            return space.limit.allows(texts, dp_sizes.values())
        cells = math.lcm(*counts) * math.lcm(*dp_sizes.values())
        return not space.balances or cells <= self.samples

    def most_ranks(self, name: str) -> int:
        """Return how many ranks of its own a module may get; small ones always a few, and what is pinned."""
        share = self.work[name] / (sum(self.work.values()) or 1.0)
        pinned: int = math.prod(self.pins.value(name, axis) or 1 for axis in ("tp", "cp", "pp", "dp"))
        return min(self.ranks - 1, max(FEW, math.ceil(AMPLE * share * self.ranks), pinned))

    @property
    def counts(self) -> Sequence[int]:
        """The numbers of microbatches that the main module may have."""
        of_job = self.pins.among(JOB, "microbatches", self.spaces[self.main].counts)
        return self.pins.among(self.main, "microbatches", of_job)

    def count_beside(self, name: str, count: int) -> int:
        """Return the number of microbatches of a module beside a main one that has `count`."""
        if self.spaces[name].limit is not None:
            return count
        return self.pins.module_microbatches(name, self.pins.job_microbatches(count), self.samples)

    @property
    def others(self) -> list[str]:
        """The modules but the main one, those that feed others first."""
        return [name for name in self.graph.order if name != self.main]

    def stages_below(self, name: str) -> int:
        """Return how many stages lie at least between a module and the loss, or microbatches that are held there."""
        return max((self.held, *(1 + self.stages_below(to) for to in self.graph.nodes[name].feeds)))

    @property
    def held(self) -> int:
        """How many microbatches every module holds at least, if it has so many: with GPipe all of them."""
        return self.samples if self.pins.order == GPIPE else 0

    def downstream(self, name: str) -> set[str]:
        """Return the modules that a module feeds, directly or not."""
        feeds = self.graph.nodes[name].feeds
        return set(feeds).union(*(self.downstream(to) for to in feeds))


@attrs.frozen
class _Beside:
    """The dp size and the microbatches of the main module, where what lies beside it depends on them; else 0."""

    dp: int = 0
    microbatches: int = 0

    @classmethod
    def of(cls, scope: Scope, main: PricedConfig) -> "_Beside":
        """Return those of a main module: they count where steps are cut into cells."""
        cuts = scope.spaces[scope.main].cuts_cells
        return cls(main.config.dp, main.config.microbatches) if cuts else cls()

    @property
    def dp_sizes(self) -> tuple[int, ...]:
        """The dp size, if it counts."""
        return (self.dp,) if self.dp else ()

    def can_cut(self, scope: Scope, name: str, config: ParallelConfig) -> bool:
        """Whether a step can be cut for the main module and this one."""
        both = {scope.main: self.dp, name: config.dp}
        return not self.dp or scope.can_cut(both, (self.microbatches, config.microbatches))


@attrs.define(eq=False)
class _Notes:
    """What a walk notes on its way. `least_s` is what the main module takes at least."""

    least_s: float = 0.0
    left_out_s: float = math.inf
    looked_at: int = 0
    effort: int = 0
    out_of_memory: list[OutOfMemory] = attrs.field(factory=list[OutOfMemory])
    undominated: dict[tuple[str, int, "_Beside"], tuple[PricedConfig, ...]] = attrs.field(
        factory=dict[tuple[str, int, "_Beside"], tuple[PricedConfig, ...]]
    )
    shared: dict[tuple[str, int, int, "_Beside"], tuple[PricedConfig, ...]] = attrs.field(
        factory=dict[tuple[str, int, int, "_Beside"], tuple[PricedConfig, ...]]
    )

    def prices(self, config: ParallelConfig) -> None:
        """Note that a configuration is priced."""
        self.looked_at += 1
        self.effort += config.pp

    def leave_out(self, bound: float) -> None:
        self.left_out_s = min(self.left_out_s, bound)

    def does_not_fit(self, candidate: Candidate, module: str, needs: Sequence[float]) -> None:
        """Note a layout; `needs` are the bytes of each pipeline rank of a module."""
        pp = max(range(len(needs)), key=needs.__getitem__)
        self.out_of_memory.append(OutOfMemory(candidate, module, pp, needs[pp]))
        if len(self.out_of_memory) > 8 * KEPT:
            self.out_of_memory = list(_worth_saying(self.out_of_memory))


def candidates_of(scope: Scope, watch: Watch = always) -> Candidates:
    """Return the layouts of a job with the least lower bounds. `watch` is asked whether to go on once there is one."""
    notes = _Notes()
    kept: list[tuple[float, int, int, Candidate]] = []  # the worst on top
    number = itertools.count()
    worth = math.inf
    for bound, main in _main_configs(scope, notes):
        full = len(kept) == KEPT and bound >= -kept[0][0]
        goes_on = watch(Progress(bound_s=bound, looked_at=notes.looked_at)) and notes.effort < EFFORT
        goes_on = goes_on or not kept
        if full or bound > worth or not goes_on:
            notes.leave_out(bound)
            break
        for candidate in _joined(scope, notes, main, bound):
            heapq.heappush(kept, (-candidate.estimate, -candidate.ranks, -next(number), candidate))
            worth = min(worth, WORTH * candidate.estimate)
        while len(kept) > KEPT:
            notes.leave_out(heapq.heappop(kept)[-1].bound)
    return Candidates(
        candidates=tuple(entry[-1] for entry in sorted(kept, reverse=True, key=lambda e: e[:3])),
        left_out_s=notes.left_out_s,
        out_of_memory=_worth_saying(notes.out_of_memory),
        looked_at=notes.looked_at,
    )


def _main_configs(scope: Scope, notes: _Notes) -> Iterator[tuple[float, PricedConfig]]:
    """Yield the configurations of the main module that fit, in order of their bounds; none is priced too early."""
    space, below = scope.spaces[scope.main], scope.stages_below(scope.main)
    rated = itertools.chain.from_iterable(space.rated(count, scope.ranks, CHUNKS) for count in scope.counts)
    configs: list[ParallelConfig] = []
    leasts: list[float] = []
    helds: list[float] = []
    for (_, least, _, held), config in rated:
        leasts.append(least)
        helds.append(held)
        configs.append(config)
    notes.least_s = min(leasts, default=0.0)
    priced: list[tuple[float, int, int, PricedConfig]] = []
    left_out: list[tuple[float, int]] = []
    for i in sorted(range(len(configs)), key=leasts.__getitem__):
        least = leasts[i]
        while priced and priced[0][0] <= least:
            bound, _, _, main = heapq.heappop(priced)
            yield bound, main
        if space.least_bytes(configs[i]) > scope.memory_bytes and notes.out_of_memory:
            left_out.append((helds[i], i))
            continue
        notes.prices(configs[i])
        main = space.priced(configs[i])
        bound, needs = main.bound_s(), main.bytes_at_most(below)
        if max(needs) > scope.memory_bytes:
            notes.does_not_fit(Candidate(bound, main, {}), scope.main, needs)
        else:
            heapq.heappush(priced, (bound, main.ranks, i, main))
    for _, i in heapq.nsmallest(CLOSEST, left_out):
        main = space.priced(configs[i])
        notes.does_not_fit(Candidate(main.bound_s(), main, {}), scope.main, main.bytes_at_most(below))
    yield from ((bound, main) for bound, _, _, main in sorted(priced, key=lambda each: each[:3]))


# -- the other modules -------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Choice:
    """A configuration and place of a module beside the main one.

    `bound` is that of the two alone. `work` and `bytes` are what it adds to each pipeline rank of the main module, and
    `head` and `tail` what its microbatches take there before the first and after the last of the main module.
    """

    placed: Placed
    bound: float
    head: float = 0.0
    tail: float = 0.0
    work: tuple[float, ...] = ()
    bytes: tuple[float, ...] = ()

    @functools.cached_property
    def rates(self) -> Rates:
        """What is better if it is less."""
        return self.bound, self.placed.ranks, max(self.work, default=0.0), max(self.bytes, default=0.0)


@attrs.frozen(eq=False)
class _Part:
    """A layout of the main module and some others.

    `work` and `bytes` are those of the pipeline ranks of the main module, `head` and `tail` the seconds of the others
    there, one after the other, before its first microbatch and after its last.
    """

    main: PricedConfig
    bound: float
    estimate: float
    head: float
    tail: float
    ranks: int
    others: Mapping[str, Placed]
    work: tuple[float, ...]
    bytes: tuple[float, ...]

    def is_cut(self, scope: Scope) -> bool:
        """Whether a step can be cut for these modules."""
        if not scope.spaces[scope.main].cuts_cells:
            return True
        configs = {name: priced.config for name, priced in _all_priced(self.main, self.others).items()}
        counts = [config.microbatches for config in configs.values()]
        return scope.can_cut({name: config.dp for name, config in configs.items()}, counts)

    def with_(self, name: str, choice: _Choice) -> "_Part":
        work = tuple(map(operator.add, self.work, choice.work)) if choice.work else self.work
        held = tuple(map(operator.add, self.bytes, choice.bytes)) if choice.bytes else self.bytes
        head, tail = self.head + choice.head, self.tail + choice.tail
        bound = max(self.bound, choice.bound, *work)
        return _Part(
            main=self.main,
            bound=bound,
            estimate=max(self.estimate, bound, self.main.bound_s(head, tail)),
            head=head,
            tail=tail,
            ranks=self.ranks + choice.placed.ranks,
            others={**self.others, name: choice.placed},
            work=work,
            bytes=held,
        )


def _joined(scope: Scope, notes: _Notes, main: PricedConfig, least: float) -> list[Candidate]:
    """Return the best layouts of the other modules around a configuration of the main one.

    Modules are placed one by one, and of the layouts so far the best `BEAM` are kept: all of them would be too many
    where there are several modules.
    """
    count, most = main.config.microbatches, main.bytes_at_most(scope.stages_below(scope.main))
    work = tuple(count * time.work + time.update for time in main.times)
    parts = [_Part(main, least, least, 0.0, 0.0, main.ranks, {}, work, most)]
    choices = {name: _sorted_choices(scope, notes, name, main) for name in scope.others}
    to_come = sum(_fewest_ranks(each) for each in choices.values())
    for name, found in choices.items():
        to_come -= _fewest_ranks(found)
        grown = [part.with_(name, each) for part in parts for each in found]
        notes.looked_at += len(grown)
        notes.effort += len(grown)
        within = [part for part in grown if part.ranks + to_come <= scope.ranks]
        parts = _best(scope, notes, main, [part for part in within if part.is_cut(scope)])
    bounds = [max(part.bound, chain_bound_s(scope.graph, _all_priced(main, part.others))) for part in parts]
    # Of equal estimates the least work is best: what is recomputed may lie on no path that counts.
    estimates = [max(bound, part.estimate) for bound, part in zip(bounds, parts, strict=True)]
    ranked = sorted(range(len(parts)), key=lambda i: (estimates[i], parts[i].ranks, max(parts[i].work)))
    whole = [Candidate(bounds[i], main, parts[i].others, estimates[i]) for i in ranked]
    for candidate in whole[EACH:]:
        notes.leave_out(candidate.bound)
    return whole[:EACH]


def _fewest_ranks(choices: Sequence[_Choice]) -> int:
    return min((choice.placed.ranks for choice in choices), default=0)


def _best(scope: Scope, notes: _Notes, main: PricedConfig, parts: list[_Part]) -> list[_Part]:
    """Return the parts that fit and are best, and the one with the fewest ranks."""
    fitting: list[_Part] = []
    for part in parts:
        if max(part.bytes) <= scope.memory_bytes:
            fitting.append(part)
        else:
            notes.does_not_fit(Candidate(part.bound, main, part.others), scope.main, part.bytes)
    fitting.sort(key=lambda part: (part.estimate, part.ranks, max(part.work), max(part.bytes)))
    kept = fitting[:BEAM]
    if len(fitting) > BEAM:
        kept.append(min(fitting[BEAM:], key=lambda part: (part.ranks, part.estimate)))
    return kept


def _sorted_choices(scope: Scope, notes: _Notes, name: str, main: PricedConfig) -> list[_Choice]:
    """Return what a module may have beside the main one, best first, none of which another one is as good as."""
    feeds, depth = scope.main in scope.downstream(name), max(main.depth, scope.held)
    choices = _choices(scope, notes, name, main)
    return _front(_choice(main, placed, feeds=feeds, depth=depth) for placed in choices)


def _choice(main: PricedConfig, placed: Placed, *, feeds: bool, depth: int) -> _Choice:
    """Return a placed configuration with the bound that it and the main module have alone.

    `depth` is how many microbatches the main module needs in flight before it.
    """
    priced = placed.priced
    if feeds:
        bound = max(main.bound_s(priced.forward, priced.backward), priced.bound_s())
    else:
        bound = max(main.bound_s(), priced.bound_s(main.forward, main.backward))
    if placed.place == BESIDE:
        return _Choice(placed, bound)
    count = priced.config.microbatches
    # With fewer, larger microbatches: those in flight below are counted in microbatches of the main module.
    in_flight = min(1 + math.ceil(depth / (main.config.microbatches / count)), count)
    each = [
        (count * time.work + time.update, rank.kept + rank.in_flight * in_flight)
        for time, rank in zip(priced.times, priced.bytes, strict=True)
    ]
    shared = [[each[stage] for stage in stages] for stages in _stages_shared(priced, main)]
    work = tuple(max((seconds for seconds, _ in stages), default=0.0) for stages in shared)
    held = tuple(max((kept for _, kept in stages), default=0.0) for stages in shared)
    head, tail = (priced.forward, priced.backward) if feeds else (0.0, 0.0)
    return _Choice(placed, bound, head, tail, work, held)


def _stages_shared(priced: PricedConfig, main: PricedConfig) -> Iterator[range]:
    """Yield, for each pipeline rank of the main module, the stages of another one at rank 0 that share its ranks."""
    stages, pp = priced.config.pp, main.config.pp
    each, mine = priced.ranks // stages, main.ranks // pp
    for rank in range(pp):
        yield range(min(rank * mine // each, stages), min(-(-(rank + 1) * mine // each), stages))


def _choices(scope: Scope, notes: _Notes, name: str, main: PricedConfig) -> Iterator[Placed]:
    """Yield what a module may have: ranks that are left, or those of the main module."""
    room, config = scope.ranks - main.ranks, main.config
    count, below = scope.count_beside(name, config.microbatches), scope.stages_below(name)
    below = max(main.depth, scope.held) if scope.main in scope.downstream(name) else below
    beside = _Beside.of(scope, main)
    for priced in _undominated(scope, notes, name, count, beside):
        if priced.ranks > room:
            continue
        needs = priced.bytes_at_most(below)
        if max(needs) > scope.memory_bytes:
            notes.does_not_fit(Candidate(main.bound_s(), main, {name: Placed(priced)}), name, needs)
        else:
            yield Placed(priced)
    for priced in _on(scope, notes, name, main.ranks, count, beside=beside):
        yield Placed(priced, ALL)
    if config.pp > 1:
        for priced in _on(scope, notes, name, main.ranks // config.pp, count, beside=beside):
            yield Placed(priced, FIRST)


def _undominated(
    scope: Scope, notes: _Notes, name: str, microbatches: int, beside: "_Beside"
) -> tuple[PricedConfig, ...]:
    """Return the configurations of a module for which no other one is nearly as good in every respect.

    A configuration is priced only if none that was priced is nearly as good as it may be at best.
    """
    key = name, microbatches, beside
    if key not in notes.undominated:
        found = scope.spaces[name].rated(microbatches, scope.most_ranks(name), beside=beside.dp_sizes)
        cut = (each for each in found if beside.can_cut(scope, name, each[1]))
        rated = sorted(cut, key=operator.itemgetter(0))
        front: list[tuple[Rates, PricedConfig]] = []
        for least, config in rated:
            if not _is_matched(_where_it_counts(least, notes), front):
                notes.prices(config)
                priced = scope.spaces[name].priced(config)
                rates = _where_it_counts(priced.rates, notes)
                if max(priced.bytes_at_most(microbatches)) <= scope.memory_bytes:
                    rates = (*rates[:-1], 0.0)
                if not _is_matched(rates, front):
                    front.append((rates, priced))
        notes.undominated[key] = tuple(priced for _, priced in front)
    return notes.undominated[key]


def _where_it_counts(rates: Rates, notes: _Notes) -> Rates:
    """Return the rates of a configuration that lies beside the main module, where less would not make a step shorter.

    No step is shorter than the main module takes at least (`notes.least_s`), alone and on all ranks.
    """
    ranks, bound, through, held = rates
    return ranks, max(bound, FAST * notes.least_s), max(through, SHORT * notes.least_s), held


_Rated = TypeVar("_Rated", PricedConfig, _Choice)


def _is_matched(rates: Rates, front: list[tuple[Rates, _Rated]]) -> bool:
    """Whether one of a front is no worse in any rate, or by less than `NEAR`; that one is moved to the front of it.

    The next ones are mostly like this one: so the first that is asked is mostly the last.
    """
    a, b, c, d = rates
    a, b, c, d = NEAR * a, NEAR * b, NEAR * c, NEAR * d
    for i, ((e, f, g, h), _) in enumerate(front):
        if e <= a and f <= b and g <= c and h <= d:
            if i:
                front.insert(0, front.pop(i))
            return True
    return False


def _on(
    scope: Scope, notes: _Notes, name: str, ranks: int, microbatches: int, *, beside: "_Beside"
) -> Sequence[PricedConfig]:
    """Return configurations on so many ranks, of one stage: with the microbatches of the job, or with larger ones."""
    key = name, ranks, microbatches, beside
    if key not in notes.shared:
        space = scope.spaces[name]
        configs = [*_configs_on(scope, name, ranks, microbatches, beside=beside, exactly=True)]
        if not configs and scope.pins.of(name):
            configs = [*_configs_on(scope, name, ranks, microbatches, beside=beside, exactly=False)]
        cut = (config for config in configs if beside.can_cut(scope, name, config))
        notes.shared[key] = tuple(_front(map(space.priced, cut)))
    return notes.shared[key]


def _configs_on(
    scope: Scope, name: str, ranks: int, microbatches: int, *, beside: "_Beside", exactly: bool
) -> Iterator[ParallelConfig]:
    """Yield configurations on so many ranks, or, if not `exactly`, on fewer or more: pins may need that."""
    among, space = functools.partial(scope.pins.among, name), scope.spaces[name]
    for shape, pp, chunks in itertools.product(space.shapes, among("pp", (1,)), among("chunks", (1,))):
        dp_ranks, left = divmod(ranks, shape.ranks * pp)
        if left and exactly:
            continue
        for count in dict.fromkeys(among("microbatches", _counts_on(scope, name, dp_ranks, microbatches))):
            sizes = space.sizes(count, ranks if exactly else scope.ranks, beside=beside.dp_sizes)
            dp = sizes.largest_dp(shape, pp, chunks, dp_ranks)
            if not exactly:
                dp = max(dp - dp % shape.dp_size, shape.dp_size)
            yield from (
                ParallelConfig(shape, pp, chunks, each, count)
                for each in among("dp", (dp,))
                if each and sizes.holds(shape, pp, chunks, each)
            )


def _counts_on(scope: Scope, name: str, dp_ranks: int, microbatches: int) -> Iterator[int]:
    """Yield the microbatches of the job, and fewer, larger ones that have samples for all dp ranks."""
    yield microbatches
    if scope.spaces[name].limit is None:
        fewer = reversed(divisors(microbatches))
        yield next(count for count in fewer if scope.samples // count >= dp_ranks or count == 1)


def _front(found: Iterable[_Rated]) -> list[_Rated]:
    """Return those for which no other one is nearly as good in every respect."""
    front: list[tuple[Rates, _Rated]] = []
    for each in sorted(found, key=lambda each: each.rates):
        if not _is_matched(each.rates, front):
            front.append((each.rates, each))
    return [each for _, each in front]


# -- a layout ----------------------------------------------------------------------------------------------


def _all_priced(main: PricedConfig, others: Mapping[str, Placed]) -> dict[str, PricedConfig]:
    return {name: placed.priced for name, placed in others.items()} | {main.module: main}


def chain_bound_s(graph: ModuleGraph, priced: Mapping[str, PricedConfig]) -> float:
    """Return seconds that no order of a layout beats, as if no modules shared ranks."""
    order = [name for name in graph.order if name in priced]
    feeders = {name: [(f, 0.0) for f in graph.nodes[name].feeders if f in priced] for name in order}
    heads = longest_before_s(order, feeders, {name: each.forward for name, each in priced.items()})
    tails = longest_before_s(order, feeders, {name: each.backward for name, each in priced.items()})
    return max(each.bound_s(heads[name], tails[name]) for name, each in priced.items())


def _worth_saying(out_of_memory: Iterable[OutOfMemory]) -> tuple[OutOfMemory, ...]:
    """Return the layout that lacks least, then the fastest ones, each once."""
    out_of_memory = list(out_of_memory)
    least = sorted(out_of_memory, key=lambda layout: layout.needs)[:1]
    fastest = sorted(out_of_memory, key=lambda layout: (layout.candidate.bound, layout.needs))[:KEPT]
    return tuple(dict.fromkeys([*least, *fastest]))
