"""Synthetic: random samples for any module graph, for tests, benchmarks and trying a layout.

Every number is a hash of (seed, sample id, field), or comes from a generator seeded by such a hash. So every process
gets the same sample for an id, in any order of ids.

    [data]
    source = "synthetic"
    options = { sequence = 32, rows = { vision = [2, 6] }, absent = { vision = 0.3 }, text = [4, 8] }

A source module reads 2 to 6 rows per sample, or as many as `rows` says. Their width is that of its model, or else
`features` (one number for all modules, or one for each). The text has 4 to 8 tokens, or fewer if the longest rows
leave less of `sequence`; tokens are any of the model's, or those below `vocab`.

A tower of images reads segments, each of a grid that is drawn from some. By default these are such as it can read:

    options = { grids = { vision = [[1, 4, 6], [1, 2, 2]] }, segments = { vision = [0, 2] } }
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.base.hashing import draw_bits, draw_integer, draw_uniform
from mimogrid.core.base.samples import Sample, SegmentGrid
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.models import BuiltIn, Gpt, Regressor, Transformer, Vit
from mimogrid.core.job.spec import SourceFacts
from mimogrid.core.models.segments import PLANE, Emission
from mimogrid.shell.job.tables import converted, new_converter


if TYPE_CHECKING:
    import torch


PLACEHOLDER = -1
ROWS = (2, 6)
SEGMENTS = (1, 2)
TEXT = (4, 8)
FEATURES = 16

Models = Mapping[str, BuiltIn | Mapping[str, Any]]
"""For each module, the options of its model."""


@attrs.frozen(kw_only=True)
class Options:
    """`[data] options`. Ranges include both ends. `absent` is the probability that a sample lacks a modality."""

    sequence: int = 32
    rows: Mapping[str, tuple[int, int]] = attrs.field(factory=dict[str, tuple[int, int]])
    grids: Mapping[str, tuple[SegmentGrid, ...]] = attrs.field(factory=dict[str, tuple[SegmentGrid, ...]])
    segments: Mapping[str, tuple[int, int]] = attrs.field(factory=dict[str, tuple[int, int]])
    absent: Mapping[str, float] = attrs.field(factory=dict[str, float])
    text: tuple[int, int] | None = None
    vocab: int | None = None
    features: int | Mapping[str, int] = FEATURES


@attrs.frozen(kw_only=True)
class Synthetic:
    """Random samples for a graph. `absent` and `features` (the width of rows) have all source modules.

    A source module is in `rows`, or in `grids` and `segments`.
    """

    seed: int
    graph: ModuleGraph
    models: Models
    rows: Mapping[str, tuple[int, int]]
    grids: Mapping[str, tuple[SegmentGrid, ...]]
    segments: Mapping[str, tuple[int, int]]
    absent: Mapping[str, float]
    features: Mapping[str, int]
    text: tuple[int, int]
    vocab: int | None

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample. Pure, without torch."""
        seed, has_text = self.seed, bool(self.graph.texts)
        segments = {name: self._segments(sample_id, name) for name in self.grids}
        rows = {name: sum(map(math.prod, grids)) for name, grids in segments.items()}
        return Sample(
            id=sample_id,
            length=draw_integer(seed, sample_id, "text", *self.text) if has_text else 0,
            rows={
                name: rows[name] if name in rows else self._rows(sample_id, name)
                for name in self.graph.sources
            },
            segments=segments,
        )

    def _is_absent(self, sample_id: int, name: str) -> bool:
        chance = self.absent[name]
        return bool(chance) and draw_uniform(self.seed, sample_id, f"absent.{name}") < chance

    def _rows(self, sample_id: int, name: str) -> int:
        if self._is_absent(sample_id, name):
            return 0
        return draw_integer(self.seed, sample_id, f"rows.{name}", *self.rows[name])

    def _segments(self, sample_id: int, name: str) -> tuple[SegmentGrid, ...]:
        if self._is_absent(sample_id, name):
            return ()
        count, known = (
            draw_integer(self.seed, sample_id, f"segments.{name}", *self.segments[name]),
            self.grids[name],
        )
        drawn = (
            draw_integer(self.seed, sample_id, f"grid.{name}.{i}", 0, len(known) - 1) for i in range(count)
        )
        return tuple(known[i] for i in drawn)

    def load(self, sample_id: int, module: str) -> "Mapping[str, torch.Tensor]":
        """Return what a module reads of a sample, besides the rows that other modules feed it."""
        sample, model = self.describe(sample_id), self.models[module]
        rows_in = self.graph.rows_in(module, self.graph.rows_out(sample), sample)
        tensors: dict[str, torch.Tensor] = {}
        if self.graph.nodes[module].is_source:
            tensors["rows"] = self._normal(sample_id, f"{module}.rows", rows_in, self.features[module])
        if isinstance(model, Regressor):
            tensors["targets"] = self._normal(sample_id, f"{module}.targets", rows_in, model.outputs)
        if isinstance(model, Gpt):
            tensors |= self._text(sample, module, model.vocab, rows_in)
        return tensors

    def _text(
        self, sample: Sample, module: str, vocab: int, placeholders: int
    ) -> "Mapping[str, torch.Tensor]":
        """Return tokens, labels and loss weights of all positions in use, the placeholders first."""
        import torch  # noqa: PLC0415 -- descriptions need no torch

        def drawn(field: str) -> torch.Tensor:
            generator = self._generator(sample.id, f"{module}.{field}")
            return torch.randint(0, min(vocab, self.vocab or vocab), (sample.length,), generator=generator)

        return {
            "tokens": torch.cat([torch.full((placeholders,), PLACEHOLDER), drawn("tokens")]),
            "labels": torch.cat([torch.zeros(placeholders, dtype=torch.int64), drawn("labels")]),
            "loss_weights": torch.cat([torch.zeros(placeholders), torch.ones(sample.length)]),
        }

    def _normal(self, sample_id: int, field: str, *shape: int) -> "torch.Tensor":
        """Return standard normal numbers that float32 holds exactly, so every precision gets the same."""
        import torch  # noqa: PLC0415

        drawn = torch.randn(shape, generator=self._generator(sample_id, field), dtype=torch.float64)
        return drawn.to(torch.float32)

    def _generator(self, sample_id: int, field: str) -> "torch.Generator":
        import torch  # noqa: PLC0415

        return torch.Generator().manual_seed(draw_bits(self.seed, sample_id, field))


def synthetic(
    *, graph: ModuleGraph, models: Models, seed: int, options: Mapping[str, Any]
) -> tuple[Synthetic | None, SourceFacts, tuple[Problem, ...]]:
    """Return the source for a graph and the facts for the plan, or the problems of the options."""
    read = converted(new_converter(), options, Options, ("data", "options"))
    if read.value is None:
        return None, SourceFacts(), tuple(Problem(f.where, f.message, f.remedy) for f in read.problems)
    chosen = read.value
    problems = tuple(_problems(chosen, graph))
    if problems:
        return None, SourceFacts(), problems
    sources = graph.sources
    features = {name: _features(name, models[name], chosen) for name in sources}
    grids = _drawn(chosen, graph, models)
    segments = {name: chosen.segments.get(name, SEGMENTS) for name in grids}
    largest = {name: (max(of, key=math.prod),) * segments[name][1] for name, of in grids.items()}
    rows = {name: chosen.rows.get(name, ROWS) for name in sources if name not in grids}
    most = {name: high for name, (_, high) in rows.items()}
    most |= {name: sum(map(math.prod, of)) for name, of in largest.items()}
    text = chosen.text or _text_range(
        graph, chosen.sequence, Sample(id=0, length=0, rows=most, segments=largest)
    )
    source = Synthetic(
        seed=seed,
        graph=graph,
        models=models,
        rows=rows,
        grids=grids,
        segments=segments,
        absent={name: chosen.absent.get(name, 0.0) for name in sources},
        features=features,
        text=text,
        vocab=chosen.vocab,
    )
    facts = SourceFacts(
        sequence=chosen.sequence if graph.texts else None,
        features=features,
        rows=most,
        segments=largest,
        length=text[1] if graph.texts else 0,
    )
    return source, facts, ()


def _features(name: str, model: BuiltIn | Mapping[str, Any], chosen: Options) -> int:
    """Return the width of a module's rows: that of its options, else that of its model, else the default."""
    if isinstance(chosen.features, Mapping) and name in chosen.features:
        return chosen.features[name]
    if isinstance(model, Vit) and model.features is not None:
        return model.features
    if isinstance(model, Transformer) and not isinstance(model, Vit):
        return model.hidden
    return FEATURES if isinstance(chosen.features, Mapping) else chosen.features


def _drawn(chosen: Options, graph: ModuleGraph, models: Models) -> dict[str, tuple[SegmentGrid, ...]]:
    """Return the grids from which segments are drawn, for the modules that read segments."""
    names = [name for name in graph.sources if name not in chosen.rows]
    grids = {name: chosen.grids.get(name) or grids_of(models[name]) for name in names}
    return {name: of for name, of in grids.items() if of}


def grids_of(model: BuiltIn | Mapping[str, Any]) -> tuple[SegmentGrid, ...]:
    """Return grids of images that a model can read; none for one that reads rows however they lie."""
    if not isinstance(model, Vit) or model.stem != "patch":
        return ()
    if model.position_count and model.position_interpolation == "none":
        patches = max(model.position_count - model.class_token, 1)
        side = math.isqrt(patches)
        return ((1, side, side),) if side**2 == patches else ()
    merge = model.merge
    planar = merge > 1 or model.positions == "rotary_2d" or model.window or model.position_count
    return ((1, merge, 2 * merge), (1, merge, merge), (1, 2 * merge, merge)) if planar else ()


def _text_range(graph: ModuleGraph, sequence: int, largest: Sample) -> tuple[int, int]:
    """Return the default range of text tokens, cut to what the longest rows leave of the sequence."""
    try:
        longest = graph.rows_out(largest)
    except ValueError:  # Options that contradict the grids are reported with the data.
        return TEXT
    left = sequence - max((longest[name] for name in graph.texts), default=0)
    high = max(1, min(TEXT[1], left))
    return min(TEXT[0], high), high


def _problems(chosen: Options, graph: ModuleGraph) -> Iterator[Problem]:
    for key in ("rows", "grids", "segments", "absent", "features"):
        table = getattr(chosen, key)
        for name in table if isinstance(table, Mapping) else ():
            yield from _not_a_source(f"data.options.{key}.{name}", name, graph)
    yield from _bad_counts(chosen, graph)
    if chosen.text is not None:
        yield from _bad_range("data.options.text", chosen.text)
    for name, chance in chosen.absent.items():
        if not 0 <= chance <= 1:
            yield Problem(
                f"data.options.absent.{name}", f"is {chance}, no chance.", "Use a number from 0 to 1."
            )
    widths = chosen.features.items() if isinstance(chosen.features, Mapping) else [("", chosen.features)]
    for name, width in widths:
        if width < 1:
            where = f"data.options.features.{name}".rstrip(".")
            yield Problem(where, f"is {width}.", "Use a width of 1 or more.")
    if chosen.vocab is not None and chosen.vocab < 1:
        yield Problem("data.options.vocab", f"is {chosen.vocab}.", "Use 1 token or more.")
    if chosen.sequence < 1:
        yield Problem("data.options.sequence", f"is {chosen.sequence}.", "Use 1 position or more.")


def _bad_counts(chosen: Options, graph: ModuleGraph) -> Iterator[Problem]:
    """Yield what is wrong with the options that say how many rows there are, and how they lie."""
    for key in ("rows", "segments"):
        for name, span in getattr(chosen, key).items():
            yield from _bad_range(f"data.options.{key}.{name}", span)
    for name in chosen.rows.keys() & (chosen.grids.keys() | chosen.segments.keys()):
        fact = f"module '{name}' has both rows and segments."
        yield Problem(f"data.options.rows.{name}", fact, "Give grids and segments, or rows.")
    for name, grids in chosen.grids.items():
        if not grids or any(len(grid) not in {1, PLANE} or min(grid) < 1 for grid in grids):
            remedy = "Give some of the form [frames, height, width] or [length]."
            yield Problem(f"data.options.grids.{name}", f"is {[*map(list, grids)]}.", remedy)
        elif name in graph.sources:
            yield from _unreadable(name, grids, graph.nodes[name].emission)


def _unreadable(name: str, grids: tuple[SegmentGrid, ...], emission: Emission) -> Iterator[Problem]:
    """Yield the grids of which a module can make no rows."""
    for grid in grids:
        try:
            emission.rows(grid)
        except ValueError as error:
            yield Problem(f"data.options.grids.{name}", f"{error}.", "Use sides that divide.")


def _not_a_source(where: str, name: str, graph: ModuleGraph) -> Iterator[Problem]:
    if name in graph.sources:
        return
    if name in graph.texts:
        fact = f"module '{name}' is a language model, which reads text and no rows of the source."
    elif name in graph.nodes:
        fact = f"module '{name}' is fed by {', '.join(graph.nodes[name].feeders)}, not by the source."
    else:
        fact = f"no module is called '{name}'."
    known = f"{nearest(name, graph.sources)} Only modules that nothing feeds read rows of the source."
    yield Problem(where, fact, known if graph.sources else "No module of this job reads rows: take it out.")


def _bad_range(where: str, span: tuple[int, int]) -> Iterator[Problem]:
    low, high = span
    if low < 0:
        yield Problem(where, f"is [{low}, {high}], from a negative number.", "Begin at 0 or more.")
    elif low > high:
        yield Problem(where, f"is [{low}, {high}]: {low} is more than {high}.", f"Write [{high}, {low}].")
