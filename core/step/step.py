"""Steps: what the samples of one optimizer step make of a topology.

A step is a tuple of descriptions laid over the modules. It answers how many rows each dp rank of each module
has in each microbatch, and so every shape of the step; a `Share` is that answer as one stage sees it.

Rows are counted through the whole step: sample i of the step owns the rows ``rows_start[i] ..
rows_start[i+1]`` of a module's output, whichever rank computes them. The share of a dp rank is therefore one
interval of rows, and what one dp rank sends another is the overlap of two intervals (`routes`).

Shapes follow from rows alone. So where microbatches are *alike*, their samples having the same rows one by one,
what is known of the first holds for the others, and a step of like samples costs no more than one microbatch.
"""

import functools
from collections.abc import Mapping

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample, prefix_sums
from mimogrid.core.job.models import Gpt, Own, Regressor
from mimogrid.core.topology.topology import Module, Stage, Topology


def aux_name(module: str) -> str:
    """Return how a module's auxiliary loss is called among the losses."""
    return f"{module}.aux"


@attrs.frozen
class Share:
    """One dp rank's part of a microbatch, as a module sees it. Everything is per sample, in order.

    Attributes:
        samples: the samples' descriptions.
        rows: rows that the module reads; for a source module under its own name, else by feeder in file order.
        lengths: for a language model, positions in use (rows and text); else the rows that come in.
        placeholders: for a language model, the positions that take rows, feeder by feeder.
        total: how many samples the step has, in all dp ranks and microbatches.
    """

    samples: tuple[Sample, ...]
    rows: Mapping[str, tuple[int, ...]]
    lengths: tuple[int, ...]
    placeholders: tuple[tuple[int, ...], ...]
    total: int

    @property
    def is_empty(self) -> bool:
        """No position at all: there is nothing to compute."""
        return not any(self.lengths)


@attrs.frozen(eq=False)
class Step:
    """The samples of one optimizer step over a topology."""

    topology: Topology
    samples: tuple[Sample, ...]
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
    def rows_out(self) -> tuple[Mapping[str, int], ...]:
        """Per sample, the rows that every module emits; samples of which these are equal share one value."""
        graph = self.topology.graph
        sources = graph.sources
        known: dict[tuple[int, ...], Mapping[str, int]] = {}
        found: list[Mapping[str, int]] = []
        for sample in self.samples:
            key = (sample.length, *(sample.rows.get(name, 0) for name in sources))
            if key not in known:
                known[key] = graph.rows_out(sample)
            found.append(known[key])
        return tuple(found)

    def alike(self, parts: int) -> tuple[int, ...]:
        """Cut the step into equal parts; return, for each, the first whose samples have the same rows.

        `parts` divides the number of samples.
        """
        if parts not in self._alike:
            size = len(self.samples) // parts
            of_sample = [id(rows) for rows in self.rows_out]
            first: dict[tuple[int, ...], int] = {}
            self._alike[parts] = tuple(
                first.setdefault(tuple(of_sample[i * size : (i + 1) * size]), i) for i in range(parts)
            )
        return self._alike[parts]

    @functools.cached_property
    def rows_start(self) -> Mapping[str, tuple[int, ...]]:
        """Per module, where the rows that it emits for each sample begin, and their end."""
        return {name: prefix_sums([rows[name] for rows in self.rows_out]) for name in self.topology.modules}

    def rows_of(self, module: str, samples: range) -> tuple[int, int]:
        """Return the interval of a module's rows that belongs to a range of samples."""
        starts = self.rows_start[module]
        return starts[samples.start], starts[samples.stop]

    def share(self, module: str, dp_rank: int, microbatch: int) -> Share:
        """Return a dp rank's part of a microbatch of a module."""
        chosen = self.topology.modules[module].samples(dp_rank, microbatch, len(self.samples))
        node = self.topology.graph.nodes[module]
        emitted = [self.rows_out[i] for i in chosen]
        samples = self.samples[chosen.start : chosen.stop]
        if node.is_source:
            rows = {module: tuple(sample.rows.get(module, 0) for sample in samples)}
        else:
            rows = {feeder: tuple(rows[feeder] for rows in emitted) for feeder in node.feeders}
        return Share(
            samples=samples,
            rows=rows,
            lengths=tuple(rows[module] for rows in emitted),
            placeholders=tuple(
                sample.placeholders.get(module, tuple(range(sum(counts))))
                for sample, counts in zip(samples, zip(*rows.values(), strict=True), strict=True)
            )
            if rows
            else ((),) * len(samples),
            total=len(self.samples),
        )

    def has_rows(self, module: str, dp_rank: int, microbatch: int) -> bool:
        """Whether a dp rank has anything of its own in a microbatch."""
        samples = self.topology.modules[module].samples(dp_rank, microbatch, len(self.samples))
        start, stop = self.rows_of(module, samples)
        return stop > start

    def active(self, module: str, dp_rank: int) -> frozenset[int]:
        """Return the microbatches of a module that a dp rank takes part in.

        A dp rank without rows has nothing to compute; but where experts are spread over dp ranks, those dp ranks
        compute together, and one of them without rows runs along while any other has some.
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
        """Return (positions, samples, hidden) of the hidden states between two stages of a module.

        A language model pads to the sequence length of the job; others to the longest sample of the share,
        and leave out the samples without rows. Under cp each rank hands on its own part of the positions.
        """
        module = self.topology.modules[stage.module]
        assert module.model.hidden is not None
        positions, samples = self.positions(stage.module, dp_rank, microbatch)
        return positions // module.cp, samples, module.model.hidden

    def positions(self, module: str, dp_rank: int, microbatch: int) -> tuple[int, int]:
        """Return how many positions a dp rank computes of each sample, padding included, and of how many samples."""
        here = self.topology.modules[module]
        place = (module, dp_rank, self.alike(here.microbatches)[microbatch])
        if place not in self._shapes:
            samples = here.samples(dp_rank, microbatch, len(self.samples))
            if isinstance(here.model, Gpt):
                self._shapes[place] = self.topology.sequence, len(samples)
            else:
                present = [rows for i in samples if (rows := self.rows_out[i][module])]
                self._shapes[place] = here.padded(max(present, default=0)), len(present)
        return self._shapes[place]

    @property
    def tokens(self) -> int:
        """Positions in use of all language sequences: rows and text, without padding."""
        return sum(self.rows_start[name][-1] for name in self.topology.graph.texts)

    @functools.cached_property
    def units(self) -> Mapping[str, float]:
        """Per loss, the count N that its sum is divided by: a sum over the whole step.

        A module's own loss goes by its name, its auxiliary loss by ``NAME.aux``; that one counts samples.
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
        given = sample.units.get(module.name)
        if given is not None:
            return given
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
    """Lay samples over a topology. Raises PlanError, naming the sample, where one does not fit."""
    step = Step(topology, samples)
    problems = [
        problem
        for name in topology.graph.texts
        for sample, rows in zip(samples, step.rows_out, strict=True)
        if sample.placeholders or rows[name] > topology.sequence
        for problem in _mismatches(topology, name, sample, rows[name])
    ]
    if problems:
        raise PlanError(problems)
    return step


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
