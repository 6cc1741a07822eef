"""Layouts: what a search is asked, a candidate as a job, and what the search says of it."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.samples import Sample
from mimogrid.core.base.units import in_bytes
from mimogrid.core.job.placement import graph_of, place
from mimogrid.core.job.schedules import INTERLEAVED, ONE_F_ONE_B
from mimogrid.core.job.spec import BatchSpec, GridSpec, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.plan.candidates import BESIDE, Candidate, Candidates, OutOfMemory
from mimogrid.core.plan.configs import PricedConfig
from mimogrid.core.plan.pins import FREE, Pins
from mimogrid.core.plan.search_space import Illegal, SearchSpace
from mimogrid.core.plan.token_limit import TokenLimit, token_limit_of
from mimogrid.core.pricing.even import largest_samples
from mimogrid.core.pricing.machine import Machine, machine_for
from mimogrid.core.step.step import step_of
from mimogrid.core.topology.parse import assemble
from mimogrid.core.topology.topology import Topology


BEST, SLOWER, TOO_LARGE, ILLEGAL = "best", "slower", "too large", "illegal"


@attrs.frozen(kw_only=True)
class Layout:
    """A layout of a job, and how it does; all numbers are 0 where it cannot run.

    Attributes:
        spec: the job with this layout.
        kind: the best, slower than that, too large for the memory, or illegal.
        reason: why it is not the best, or that it is, in words.
        step_s: seconds of a step.
        tokens_per_s_per_gpu: over all GPUs that are allocated.
        active: GPUs in a grid; the other ones idle.
        bubble: part of the time of the active GPUs in which they compute nothing.
        mfu: part of their peak that all allocated GPUs reach, by the operations of the model alone.
        exchange_s: seconds of a GPU on average that compute actions take beyond these operations: messages within
            layers, recomputation, reading of weights, and efficiency of small products.
        padding: part of all positions in layers that rounds rows up, so that ranks along tp and cp have equal parts.
        encoder_share: part of all computing that is not the main module's.
        peak_bytes: per module, what the rank with that module that needs most needs in all.
        lower_bound_s: seconds that no order of these grids beats.
        lockstep_s: seconds of a step as it was timed first, in lockstep.
    """

    spec: JobSpec
    kind: str
    reason: str
    step_s: float = 0.0
    tokens_per_s_per_gpu: float = 0.0
    active: int = 0
    bubble: float = 0.0
    mfu: float = 0.0
    exchange_s: float = 0.0
    padding: float = 0.0
    encoder_share: float = 0.0
    peak_bytes: Mapping[str, float] = attrs.field(factory=dict[str, float])
    lower_bound_s: float = 0.0
    lockstep_s: float = 0.0


@attrs.frozen(kw_only=True, eq=False)
class Question:
    """What is asked: a legal job with the samples of one step, on so many of its GPUs (`gpu.name` is set), with pins.

    All that is assumed stands in the job, and so in every layout of it: precision, kind of GPU, memory, efficiency.
    """

    spec: JobSpec
    facts: SourceFacts
    samples: tuple[Sample, ...]
    gpus: int
    pins: Pins = FREE

    @functools.cached_property
    def machine(self) -> Machine:
        """The GPUs that the job assumes."""
        machine = machine_for(self.spec)
        assert machine is not None
        return machine

    @functools.cached_property
    def limit(self) -> TokenLimit | None:
        """The limit of tokens of the job."""
        return token_limit_of(step_of(self.topology(self.spec), self.samples))

    @property
    def memory_bytes(self) -> float:
        """The memory of each GPU."""
        return self.machine.memory_bytes

    def batch(self, microbatches: int) -> BatchSpec:
        """Return the batch of a layout with so many microbatches, which a limit of tokens leaves out."""
        batch = attrs.evolve(self.spec.batch, global_size=len(self.samples))
        return batch if batch.tokens_per_microbatch else attrs.evolve(batch, microbatches=microbatches)

    def topology(self, spec: JobSpec) -> Topology:
        """Return the topology of a layout of the job."""
        return assemble(spec, self.facts)

    @functools.cached_property
    def largest(self) -> tuple[Sample, ...]:
        """As many samples, each as large as the largest: memory must hold these."""
        return largest_samples(self.samples, graph_of(self.spec), self.facts.sequence)


# -- as jobs -----------------------------------------------------------------------------------------------


def layout_of(question: Question, main: str, candidate: Candidate) -> JobSpec:
    """Return the job with the layout of a candidate; modules that it does not name lie at rank 0, on one rank."""
    configs = {main: candidate.main} | {name: placed.priced for name, placed in candidate.others.items()}
    offsets = _offsets(question, candidate)
    count = question.pins.job_microbatches(candidate.main.config.microbatches)
    modules = {
        name: _laid_out(module, configs[name], offsets[name], count) if name in configs else _alone(module)
        for name, module in question.spec.modules.items()
    }
    order = INTERLEAVED if any(each.config.chunks > 1 for each in configs.values()) else ONE_F_ONE_B
    return attrs.evolve(
        question.spec,
        modules=modules,
        batch=question.batch(count),
        schedule=attrs.evolve(question.spec.schedule, name=question.pins.order or order, costs=None),
        optimizer=attrs.evolve(question.spec.optimizer, sharded=True),
        world_size=question.gpus,
    )


def _laid_out(module: ModuleSpec, priced: PricedConfig, offset: int, count: int) -> ModuleSpec:
    """Return a module in a configuration, in a job of `count` microbatches; defaults are not written."""
    return attrs.evolve(
        module,
        grid=attrs.evolve(priced.config.grid, offset=offset),
        chunks=priced.config.chunks,
        recompute=priced.config.shape.recompute,
        split=None if len(set(priced.split)) == 1 else priced.split,
        microbatches=None if priced.config.microbatches == count else priced.config.microbatches,
    )


def _alone(module: ModuleSpec) -> ModuleSpec:
    return attrs.evolve(module, grid=GridSpec(offset=0), chunks=1, split=None, microbatches=None)


def _offsets(question: Question, candidate: Candidate) -> Mapping[str, int]:
    """Lay modules behind each other, those with most tp first, each at a multiple of it if there is room."""
    beside = [(name, p.priced) for name, p in candidate.others.items() if p.place == BESIDE]
    beside.sort(key=lambda each: -each[1].config.shape.ranks)
    room = question.gpus - candidate.ranks
    offsets = {candidate.main.module: 0} | {n: 0 for n, p in candidate.others.items() if p.place != BESIDE}
    end = candidate.main.ranks
    for name, priced in beside:
        gap = -end % priced.config.shape.ranks
        gap = gap if gap <= room else 0
        offsets[name], room, end = end + gap, room - gap, end + gap + priced.ranks
    return offsets


def kind_of(spec: JobSpec, main: str) -> tuple[object, ...]:
    """Return what tells two layouts apart for people: the grid of the main module, and which modules share its ranks.

    So of layouts that differ in details of small modules one is shown.
    """
    grids = place(spec)
    mine = range(grids[main].offset, grids[main].offset + grids[main].size)
    shared = (grid.offset < mine.stop and mine.start < grid.offset + grid.size for grid in grids.values())
    return grids[main], *shared


def shown(spec: JobSpec) -> str:
    """Return a layout in a line: modules in file order with their first rank, microbatches, order.

    For example ``vision dp=8 @16, language tp=2 pp=4 dp=2 @0; 16 microbatches, 1f1b``.
    """
    grids = place(spec)
    parts = ", ".join(_grid_shown(spec, name, grids[name].offset) for name in spec.modules)
    limit = spec.batch.tokens_per_microbatch
    cut = f"microbatches of {limit:,} tokens" if limit else f"{spec.batch.microbatches} microbatches"
    return f"{parts}; {cut}, {spec.schedule.name}"


def _grid_shown(spec: JobSpec, name: str, offset: int) -> str:
    module, grid = spec.modules[name], spec.modules[name].grid
    sizes = [f"{axis}={size}" for axis in ("tp", "cp", "ep", "pp", "dp") if (size := getattr(grid, axis)) > 1]
    more = [f"chunks={module.chunks}"] * (module.chunks > 1) + ["uneven"] * (module.split is not None)
    more += [f"recompute={module.recompute}"] * (module.recompute != "none")
    own = [f"m={module.microbatches}"] * (module.microbatches is not None)
    return " ".join([name, *(sizes or ["tp=1"]), *more, *own, f"@{offset}"])


# -- why a layout is not the best --------------------------------------------------------------------------


def compared(layout: Layout, best: Layout, own: Layout, named: Mapping[str, JobSpec]) -> Layout:
    """Return a layout that fits with how many times slower it is than the best one, and what it loses by."""
    reason = "the fastest" if layout is best else _slower(layout, best)
    found = attrs.evolve(layout, kind=BEST if layout is best else SLOWER, reason=reason)
    for name, spec in named.items():
        found = attrs.evolve(found, reason=f"{name}: {found.reason}") if layout.spec == spec else found
    return marked_own(found) if layout.spec == own.spec else found


def _slower(layout: Layout, best: Layout) -> str:
    idle, least = (each.step_s * each.bubble * each.active for each in (layout, best))
    parts = {
        "exchange, recomputation and small products": layout.exchange_s - best.exchange_s,
        "bubble": (idle - least) / max(layout.active, 1),
        "idle GPUs": layout.step_s * (best.active - layout.active) / max(best.active, 1),
    }
    most = [f"{s:.3g} s {what}" for what, s in parts.items() if s > 0.01 * best.step_s]
    if layout.step_s < best.step_s:
        return f"{best.step_s / layout.step_s:.2f} x faster"
    return f"{layout.step_s / best.step_s:.2f} x slower" + (f": {', '.join(most)} more" if most else "")


def marked_own(layout: Layout) -> Layout:
    """Return a layout with a reason that says that it is the job's own."""
    return attrs.evolve(layout, reason=f"the job's own layout: {layout.reason}")


def marked_unpinned(layout: Layout, pins: Pins) -> Layout:
    """Return a layout with a reason that says which pins it does not have, if it lacks any."""
    broken = ", ".join(map(str, pins.broken_by(layout.spec)))
    return attrs.evolve(layout, reason=f"not as pinned ({broken}); {layout.reason}") if broken else layout


def too_large(candidates: Candidates, question: Question, best: Layout | None) -> Iterator[Layout]:
    """Yield layouts that do not fit and might beat the best time, one for each shape and pp of the main module."""
    known: set[str] = set()
    for layout in _lacking_any(candidates, question):
        if best is not None and layout.candidate.bound >= best.step_s:
            continue
        priced = layout.candidate.main
        if (kind := f"{priced.config.shape} {priced.config.pp}") not in known:
            known.add(kind)
            yield Layout(
                spec=layout_of(question, priced.module, layout.candidate),
                kind=TOO_LARGE,
                reason=f"does not fit: {_lacking(layout, question.memory_bytes)}",
            )


def _lacking(layout: OutOfMemory, memory_bytes: float) -> str:
    priced = layout.candidate.main
    if layout.module != priced.module and layout.module in layout.candidate.others:
        priced = layout.candidate.others[layout.module].priced
    return f"{needs(f'{layout.module}.{layout.pp}', layout.needs, memory_bytes)} with {priced}"


def _lacking_any(candidates: Candidates, question: Question) -> Iterator[OutOfMemory]:
    """Yield what is estimated not to fit; a walk that fills only a part of the memory leaves out more."""
    return (each for each in candidates.out_of_memory if each.needs > question.memory_bytes)


def least_lack(
    candidates: Candidates, evaluated: Sequence[Layout], spaces: Mapping[str, SearchSpace], question: Question
) -> tuple[str, float]:
    """Return what lacks least where nothing fits, and what rules tp out there, in words, with the bytes that it needs.

    No bytes are needed where no grid is legal.
    """
    least = min(_lacking_any(candidates, question), key=lambda layout: layout.needs, default=None)
    tried = [each for each in evaluated if each.kind == TOO_LARGE and each.peak_bytes]
    closest = min(tried, key=lambda layout: max(layout.peak_bytes.values()), default=None)
    needed = max(closest.peak_bytes.values()) if closest else math.inf
    if closest is not None and (least is None or needed < least.needs):
        return f"{closest.reason.removeprefix('does not fit: ')} with {shown(closest.spec)}", needed
    if least is None:
        return evaluated[0].reason if evaluated else "no grid is legal on so few GPUs", 0.0
    ruled_out = next((each for each in _plain(spaces[least.module].illegal)), None)
    why = f". {ruled_out.problem.message} {ruled_out.problem.remedy}" if ruled_out else ""
    return _lacking(least, question.memory_bytes) + why.removesuffix("."), least.needs


def _plain(shapes: Iterable[Illegal]) -> Iterator[Illegal]:
    """Yield the illegal shapes that one would try first: powers of two of tp alone."""
    for each in shapes:
        if each.shape.cp == each.shape.ep == 1 and each.shape.tp & (each.shape.tp - 1) == 0:
            yield each


def illegal(spaces: Mapping[str, SearchSpace], question: Question) -> Iterator[Layout]:
    """Yield the illegal shapes that one would try first, with the reasons."""
    for space in spaces.values():
        for each in _plain(space.illegal):
            yield Layout(
                spec=_with_shape(question.spec, each),
                kind=ILLEGAL,
                reason=f"illegal: {each.problem.message} {each.problem.remedy}",
            )


def _with_shape(spec: JobSpec, each: Illegal) -> JobSpec:
    module = spec.modules[each.module]
    grid = attrs.evolve(module.grid, tp=each.shape.tp)
    return attrs.evolve(spec, modules={**spec.modules, each.module: attrs.evolve(module, grid=grid)})


def needs(what: str, size_bytes: float, memory_bytes: float) -> str:
    """Return by how much something is too large, in words.

    >>> needs("language.0", 93.1e9, 80e9)
    'language.0 needs 93.1 GB of 80 GB per GPU, short by 13.1 GB'
    """
    has, cap, short = map(in_bytes, (size_bytes, memory_bytes, size_bytes - memory_bytes))
    return f"{what} needs {has} of {cap} per GPU, short by {short}"
