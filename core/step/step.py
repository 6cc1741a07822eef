"""Steps: the samples of one optimizer step, laid over a topology.

A step is a tuple of sample descriptions. It says what each dp rank of each module has in each microbatch. A `Share` is
that answer for one dp rank and microbatch. It keeps three counts of a sample apart: the rows that a module reads, the
positions in its layers, and the rows that it emits. A source module may have other positions than rows.

Rows are counted through the whole step. Sample i owns the rows ``rows_start[i] .. rows_start[i+1]`` of a
module's output, whichever rank computes them. The rows of a dp rank are one interval, and one dp rank sends
another the overlap of their intervals (`routes`).

Where microbatches have a limit of tokens, the samples say how many microbatches a step has (`core.step.tokens`). It
lies over a topology with as many, so two steps of a job may lie over two.

The stages of a module compute a row of positions (`core.base.row`). Its shape, and that of all messages, depends on
counts only. Microbatches are *alike* if their samples have the same counts, one by one. What holds for the first of
them holds for the others, so a step of like samples costs no more than one microbatch.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample, SegmentGrid, prefix_sums, share
from mimogrid.core.job.descriptions import description_problems, torn_images
from mimogrid.core.job.graph import Node
from mimogrid.core.job.models import Gpt, Own, Regressor
from mimogrid.core.job.tokens import microbatch_multiple
from mimogrid.core.step.cells import CellAssignment
from mimogrid.core.step.tokens import cut_by_tokens
from mimogrid.core.topology.topology import Module, Stage, Topology


def aux_name(module: str) -> str:
    """Return the name of a module's auxiliary loss among the losses."""
    return f"{module}.aux"


@attrs.frozen
class Share:
    """One dp rank's part of a microbatch of a module. Tuples have one entry per sample, in order.

    Attributes:
        samples: The samples' descriptions.
        rows: Rows that the module reads, by feeder in file order; a source module has its own under its name.
        positions: Positions in the module's layers.
        lengths: Rows that the module emits.
        placeholders: The positions of a language model that take rows, feeder by feeder.
        total: Number of samples in the step, over all dp ranks and microbatches.
        shape: (positions, samples) of the hidden states on all cp ranks together, rounded up. Of a row: (T, 1).
        segments: Lengths of the attention segments of the row, end to end; segments without positions are left out.
        grids: The grids of the segments that a source module reads; of other modules none.
        segments_in: For a language model, the grids of the rows that it reads, by feeder, as that emits them.
    """

    samples: tuple[Sample, ...]
    rows: Mapping[str, tuple[int, ...]]
    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    placeholders: tuple[tuple[int, ...], ...]
    total: int
    shape: tuple[int, int]
    segments: tuple[int, ...] = ()
    grids: tuple[tuple[SegmentGrid, ...], ...] = ()
    segments_in: Mapping[str, tuple[tuple[SegmentGrid, ...], ...]] = attrs.field(
        factory=dict[str, tuple[tuple[SegmentGrid, ...], ...]]
    )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no sample has a position."""
        return not any(self.positions)


@attrs.frozen(eq=False)
class SampleSizes:
    """What a sample is in each module, by module; samples of equal counts share one value.

    Attributes:
        rows: The rows that the module emits.
        segments: The lengths of the attention segments in its layers.
        positions: Their sum.
    """

    rows: Mapping[str, int]
    segments: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, int]


@attrs.frozen(eq=False)
class Step:
    """The samples of one optimizer step over a topology.

    Attributes:
        topology: the job's.
        samples: in the order in which they lie in microbatches and dp ranks.
        cells: where each cell of samples begins, and where the last one ends (`core.step.cells`). Microbatches and dp
            ranks are cut between cells. (): each sample is a cell, so all parts have equally many samples.
    """

    topology: Topology
    samples: tuple[Sample, ...]
    cells: tuple[int, ...] = ()
    _sizes: tuple[SampleSizes, ...] = attrs.field(default=(), repr=False)
    _active: dict[tuple[str, int], frozenset[int]] = attrs.field(
        factory=dict[tuple[str, int], frozenset[int]], init=False, repr=False
    )
    _sets: dict[frozenset[int], frozenset[int]] = attrs.field(
        factory=dict[frozenset[int], frozenset[int]], init=False, repr=False
    )
    _shapes: dict[tuple[str, int, int], tuple[int, int]] = attrs.field(
        factory=dict[tuple[str, int, int], tuple[int, int]], init=False, repr=False
    )
    _alike: dict[int, tuple[int, ...]] = attrs.field(
        factory=dict[int, tuple[int, ...]], init=False, repr=False
    )

    @functools.cached_property
    def sizes(self) -> tuple[SampleSizes, ...]:
        """For each sample, what it is in every module."""
        if self._sizes:
            return self._sizes
        sources = self.topology.graph.sources
        known: dict[tuple[object, ...], SampleSizes] = {}
        found: list[SampleSizes] = []
        for sample in self.samples:
            key = (sample.length, *((sample.rows.get(name, 0), sample.grids(name)) for name in sources))
            if key not in known:
                known[key] = self._sizes_of(sample)
            found.append(known[key])
        return tuple(found)

    def _sizes_of(self, sample: Sample) -> SampleSizes:
        graph = self.topology.graph
        rows = graph.rows_out(sample)
        segments = {name: self._segments(name, sample, rows) for name in graph.nodes}
        return SampleSizes(rows, segments, {name: sum(lengths) for name, lengths in segments.items()})

    def _segments(self, name: str, sample: Sample, rows: Mapping[str, int]) -> tuple[int, ...]:
        """Return the attention segments of a sample: those of each grid, or one of all that a module is fed."""
        graph = self.topology.graph
        node = graph.nodes[name]
        if node.is_source:
            spans = map(self.topology.modules[name].model.spans, sample.grids(name))
            return tuple(length for lengths in spans for length in lengths if length)
        text = sample.length if node.reads_text else 0
        whole = graph.rows_in(name, rows, sample) + text
        return (whole,) if whole else ()

    @functools.cached_property
    def rows_out(self) -> tuple[Mapping[str, int], ...]:
        """For each sample, the rows that every module emits."""
        return tuple(sizes.rows for sizes in self.sizes)

    def assigned(self, assigned: CellAssignment) -> "Step":
        """Return the step with its samples in other cells, of as many microbatches as these are for."""
        samples = tuple(map(self.samples.__getitem__, assigned.order))
        sizes = tuple(map(self.sizes.__getitem__, assigned.order))
        return self._cut(samples, sizes, assigned.cells)

    def _cut(
        self, samples: tuple[Sample, ...], sizes: tuple[SampleSizes, ...], cells: tuple[int, ...]
    ) -> "Step":
        topology = self.topology
        if topology.tokens_per_cell:
            topology = topology.with_microbatches((len(cells) - 1) // topology.cell_grid[1])
        return Step(topology, samples, cells, sizes)

    @functools.cached_property
    def sample_tokens(self) -> tuple[int, ...]:
        """The tokens of each sample: its positions in a language model, in the one with most if there are several."""
        texts = self.topology.graph.texts
        return tuple(max((of.positions[name] for name in texts), default=0) for of in self.sizes)

    def cut_by_tokens(self) -> "Step":
        """Return the step in as many microbatches as the limit of their tokens asks for, its samples in their order."""
        cells = cut_by_tokens(
            self.sample_tokens,
            limit=self.topology.tokens_per_cell,
            lanes=self.topology.cell_grid[1],
            multiple=microbatch_multiple(self.topology.spec),
        )
        return self._cut(self.samples, self.sizes, cells)

    @property
    def cell_count(self) -> int:
        """The number of cells."""
        return len(self.cells) - 1 if self.cells else len(self.samples)

    def samples_in(self, cells: range) -> range:
        """Return the samples of contiguous cells."""
        return range(self.cells[cells.start], self.cells[cells.stop]) if self.cells else cells

    def cells_of(self, module: str, dp_rank: int, microbatch: int) -> range:
        """Return the cells that a dp rank has in a microbatch of a module."""
        return self.topology.modules[module].samples(dp_rank, microbatch, self.cell_count)

    def samples_of(self, module: str, dp_rank: int, microbatch: int) -> range:
        """Return the samples that a dp rank has in a microbatch of a module."""
        return self.samples_in(self.cells_of(module, dp_rank, microbatch))

    def part(self, index: int, parts: int) -> range:
        """Return the samples of one of `parts` of the step, each of which has equally many cells."""
        return self.samples_in(share(index, parts, self.cell_count))

    def alike(self, parts: int) -> tuple[int, ...]:
        """Cut the step into `parts` of equally many cells; return, for each part, the first that is like it.

        `parts` must divide the number of cells.
        """
        if parts not in self._alike:
            of_sample = [id(sizes) for sizes in self.sizes]
            first: dict[tuple[int, ...], int] = {}
            self._alike[parts] = tuple(
                first.setdefault((*self._cuts(i, parts), *of_sample[part.start : part.stop]), i)
                for i in range(parts)
                for part in (self.part(i, parts),)
            )
        return self._alike[parts]

    def _cuts(self, index: int, parts: int) -> Iterator[int]:
        """Yield the number of samples of each cell of a part, where cells are not all alike."""
        if self.cells:
            for cell in share(index, parts, self.cell_count):
                yield self.cells[cell + 1] - self.cells[cell]

    @functools.cached_property
    def rows_start(self) -> Mapping[str, tuple[int, ...]]:
        """For each module, where the rows of each sample begin, and the end of the last."""
        return {name: prefix_sums([rows[name] for rows in self.rows_out]) for name in self.topology.modules}

    def rows_of(self, module: str, samples: range) -> tuple[int, int]:
        """Return the interval of a module's rows that belongs to a range of samples."""
        starts = self.rows_start[module]
        return starts[samples.start], starts[samples.stop]

    def share(self, module: str, dp_rank: int, microbatch: int) -> Share:
        """Return a dp rank's part of a microbatch of a module."""
        chosen = self.samples_of(module, dp_rank, microbatch)
        node = self.topology.graph.nodes[module]
        sizes = self.sizes[chosen.start : chosen.stop]
        samples = self.samples[chosen.start : chosen.stop]
        if node.is_source:
            rows = {module: tuple(sample.rows.get(module, 0) for sample in samples)}
        else:
            rows = {feeder: tuple(of.rows[feeder] for of in sizes) for feeder in node.feeders}
        return Share(
            segments_in=self._segments_in(node, samples, [of.rows for of in sizes]),
            samples=samples,
            rows=rows,
            positions=tuple(of.positions[module] for of in sizes),
            lengths=tuple(of.rows[module] for of in sizes),
            placeholders=tuple(
                sample.placeholders.get(module, tuple(range(sum(counts))))
                for sample, counts in zip(samples, zip(*rows.values(), strict=True), strict=True)
            )
            if rows
            else ((),) * len(samples),
            total=len(self.samples),
            shape=self.shape(module, dp_rank, microbatch),
            segments=tuple(length for of in sizes for length in of.segments[module]),
            grids=tuple(sample.grids(module) if node.is_source else () for sample in samples),
        )

    def _segments_in(
        self, node: Node, samples: Sequence[Sample], rows_out: Sequence[Mapping[str, int]]
    ) -> Mapping[str, tuple[tuple[SegmentGrid, ...], ...]]:
        """Return the grids of the rows that a language model reads."""
        graph = self.topology.graph
        return {
            feeder: tuple(map(graph.grids_out, itertools.repeat(feeder), samples, rows_out))
            for feeder in (node.feeders if node.reads_text else ())
        }

    def has_rows(self, module: str, dp_rank: int, microbatch: int) -> bool:
        """Whether a dp rank has rows of its own in a microbatch."""
        start, stop = self.rows_of(module, self.samples_of(module, dp_rank, microbatch))
        return stop > start

    def active(self, module: str, dp_rank: int) -> frozenset[int]:
        """Return the microbatches of a module that a dp rank takes part in.

        A dp rank without rows has nothing to compute. The exception is a module whose experts are spread over dp
        ranks: these compute together, so all of them run if any of them has rows.
        """
        if (module, dp_rank) not in self._active:
            here = self.topology.modules[module]
            firsts = self.alike(here.microbatches)
            there = {
                k
                for k in set(firsts)
                if any(self.has_rows(module, other, k) for other in here.ep_dp_ranks(dp_rank))
            }
            found = frozenset(k for k, first in enumerate(firsts) if first in there)
            self._active[module, dp_rank] = self._sets.setdefault(found, found)
        return self._active[module, dp_rank]

    def hidden_shape(self, stage: Stage, dp_rank: int, microbatch: int) -> tuple[int, int, int]:
        """Return (positions, samples, hidden) of the hidden states between two stages of a module, on one rank.

        Under cp each rank hands on its own part of the positions.
        """
        module = self.topology.modules[stage.module]
        assert module.model.hidden is not None
        positions, samples = self.shape(stage.module, dp_rank, microbatch)
        return positions // module.cp, samples, module.model.hidden

    def shape(self, module: str, dp_rank: int, microbatch: int) -> tuple[int, int]:
        """Return (positions, samples) that a dp rank computes: `Share.shape`."""
        here = self.topology.modules[module]
        place = (module, dp_rank, self.alike(here.microbatches)[microbatch])
        if place not in self._shapes:
            chosen = self.samples_of(module, dp_rank, microbatch)
            positions = [self.sizes[i].positions[module] for i in chosen]
            self._shapes[place] = (
                here.padded_shape(positions, self.topology.sequence)
                if here.padded
                else here.row_shape(sum(positions))
            )
        return self._shapes[place]

    @property
    def tokens(self) -> int:
        """Positions in use in all language sequences: rows and text, without padding."""
        return sum(self.rows_start[name][-1] for name in self.topology.graph.texts)

    @functools.cached_property
    def units(self) -> Mapping[str, float]:
        """For each loss, the count N that its sum is divided by, over the whole step.

        A module's loss has the module's name. Its auxiliary loss is named ``NAME.aux`` and counts samples.
        """
        modules = self.topology.modules.values()
        own = {
            m.name: sum(self._units(m, i) for i in range(len(self.samples)))
            for m in modules
            if m.model.has_loss
        }
        return own | {aux_name(m.name): float(len(self.samples)) for m in modules if m.aux_loss}

    def _units(self, module: Module, index: int) -> float:
        sample = self.samples[index]
        described = sample.units.get(module.name)
        if described is not None:
            return described
        match module.model:
            case Gpt():
                return sample.length
            case Regressor(outputs=outputs):
                return outputs * self.rows_out[index][module.name]
            case Own():
                return 1.0
            case _:
                raise AssertionError(module.model)


def step_of(topology: Topology, samples: tuple[Sample, ...]) -> Step:
    """Lay samples over a topology in their order, in microbatches of a number or of tokens, as the job says.

    Raises PlanError, naming the sample, if one does not fit.
    """
    step = Step(topology, samples)
    sources = {name: topology.modules[name].model for name in topology.graph.sources}
    if unfit := tuple(description_problems(samples, sources)):
        raise PlanError(unfit)
    problems = [
        problem
        for name in topology.graph.texts
        for sample, rows in zip(samples, step.rows_out, strict=True)
        if sample.placeholders or rows[name] > topology.sequence
        for problem in _mismatches(topology, name, sample, rows[name])
    ]
    if problems:
        raise PlanError(problems)
    models = {name: module.model for name, module in topology.modules.items()}
    described = zip(samples, step.rows_out, strict=True)
    torn = (
        torn_images(sample, rows, topology.graph, models) for sample, rows in described if sample.segments
    )
    if problems := list(itertools.chain.from_iterable(torn)):
        raise PlanError(problems)
    return step.cut_by_tokens() if topology.tokens_per_cell else step


def _mismatches(topology: Topology, name: str, sample: Sample, length: int) -> tuple[Problem, ...]:
    rows = length - sample.length
    where = f"sample {sample.id}"
    if length > topology.sequence:
        return (
            Problem(
                where,
                f"has {rows} rows and {sample.length} text tokens for module '{name}', "
                f"more than sequence = {topology.sequence} holds.",
                f"Set sequence = {length} or more in data.options, or cut the sample.",
            ),
        )
    places = sample.placeholders.get(name)
    if places is not None and len(places) != rows:
        return (
            Problem(
                where,
                f"has {len(places)} placeholders for the {rows} rows that module '{name}' gets.",
                "The source must describe one placeholder for every row.",
            ),
        )
    return ()
