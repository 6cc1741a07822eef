"""Synthetic: random inputs for any module graph, for tests, benchmarks and trying a layout.

Every number is a hash of (seed, sample id, field) or is drawn from a generator seeded by one, so any process
gives the same sample for the same id in any order.

    [data]
    source = "synthetic"
    options = { sequence = 32, rows = { vision = [2, 6] }, absent = { vision = 0.3 }, text = [4, 8] }

A source module reads 2 to 6 rows per sample unless `rows` says otherwise, of width `features` (one number
for all, or one per module) where its model does not settle the width. The text has 4 to 8 tokens, or fewer
where the longest rows leave less room in `sequence`.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.base.hashing import draw_bits, draw_integer, draw_uniform
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.models import BuiltIn, Gpt, Regressor, Transformer, Vit
from mimogrid.core.job.spec import SourceFacts
from mimogrid.shell.job.tables import converted, new_converter


if TYPE_CHECKING:
    import torch


PLACEHOLDER = -1
ROWS = (2, 6)
TEXT = (4, 8)
FEATURES = 16

Models = Mapping[str, BuiltIn | Mapping[str, Any]]
"""Per module, the options of its model."""


@attrs.frozen(kw_only=True)
class Options:
    """`[data] options`. Ranges include both ends; `absent` is the chance that a sample lacks a modality."""

    sequence: int = 32
    rows: Mapping[str, tuple[int, int]] = attrs.field(factory=dict[str, tuple[int, int]])
    absent: Mapping[str, float] = attrs.field(factory=dict[str, float])
    text: tuple[int, int] | None = None
    features: int | Mapping[str, int] = FEATURES


@attrs.frozen(kw_only=True)
class Synthetic:
    """Random samples for a graph.

    `rows` and `absent` hold an entry for every source module; `features` is the width of its rows.
    """

    seed: int
    graph: ModuleGraph
    models: Models
    rows: Mapping[str, tuple[int, int]]
    absent: Mapping[str, float]
    features: Mapping[str, int]
    text: tuple[int, int]

    def describe(self, sample_id: int) -> Sample:
        """Return the counts of a sample; pure, and without torch."""
        seed, has_text = self.seed, bool(self.graph.texts)
        return Sample(
            id=sample_id,
            length=draw_integer(seed, sample_id, "text", *self.text) if has_text else 0,
            rows={name: self._rows(sample_id, name) for name in self.graph.sources},
        )

    def _rows(self, sample_id: int, name: str) -> int:
        chance = self.absent[name]
        if chance and draw_uniform(self.seed, sample_id, f"absent.{name}") < chance:
            return 0
        return draw_integer(self.seed, sample_id, f"rows.{name}", *self.rows[name])

    def load(self, sample_id: int, module: str) -> "Mapping[str, torch.Tensor]":
        """Return what a module reads of a sample beside the rows that others feed it."""
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
        """Tokens, labels and loss weights of all positions in use; the placeholders come first."""
        import torch  # noqa: PLC0415 -- descriptions must stay free of it

        def drawn(field: str) -> torch.Tensor:
            generator = self._generator(sample.id, f"{module}.{field}")
            return torch.randint(0, vocab, (sample.length,), generator=generator)

        return {
            "tokens": torch.cat([torch.full((placeholders,), PLACEHOLDER), drawn("tokens")]),
            "labels": torch.cat([torch.zeros(placeholders, dtype=torch.int64), drawn("labels")]),
            "loss_weights": torch.cat([torch.zeros(placeholders), torch.ones(sample.length)]),
        }

    def _normal(self, sample_id: int, field: str, *shape: int) -> "torch.Tensor":
        """Standard normal numbers that float32 holds exactly, so that every precision sees the same."""
        import torch  # noqa: PLC0415

        drawn = torch.randn(shape, generator=self._generator(sample_id, field), dtype=torch.float64)
        return drawn.to(torch.float32)

    def _generator(self, sample_id: int, field: str) -> "torch.Generator":
        import torch  # noqa: PLC0415

        return torch.Generator().manual_seed(draw_bits(self.seed, sample_id, field))


def synthetic(
    *, graph: ModuleGraph, models: Models, seed: int, options: Mapping[str, Any]
) -> tuple[Synthetic | None, SourceFacts, tuple[Problem, ...]]:
    """Return the source for a graph and what the plan must know of it, or what is wrong with the options."""
    read = converted(new_converter(), options, Options, ("data", "options"))
    if read.value is None:
        return None, SourceFacts(), tuple(Problem(f.where, f.message, f.remedy) for f in read.problems)
    given = read.value
    problems = tuple(_problems(given, graph))
    if problems:
        return None, SourceFacts(), problems
    sources = graph.sources
    features = {name: _features(name, models[name], given) for name in sources}
    rows = {name: given.rows.get(name, ROWS) for name in sources}
    most = {name: high for name, (_, high) in rows.items()}
    text = given.text or _room_for_text(graph, given.sequence, most)
    source = Synthetic(
        seed=seed,
        graph=graph,
        models=models,
        rows=rows,
        absent={name: given.absent.get(name, 0.0) for name in sources},
        features=features,
        text=text,
    )
    facts = SourceFacts(
        sequence=given.sequence if graph.texts else None,
        features=features,
        rows=most,
        length=text[1] if graph.texts else 0,
    )
    return source, facts, ()


def _features(name: str, model: BuiltIn | Mapping[str, Any], given: Options) -> int:
    """The width of a module's rows: as the options say for it, else as its model needs it."""
    if isinstance(given.features, Mapping) and name in given.features:
        return given.features[name]
    if isinstance(model, Vit) and model.features is not None:
        return model.features
    if isinstance(model, Transformer) and not isinstance(model, Vit):
        return model.hidden
    return FEATURES if isinstance(given.features, Mapping) else given.features


def _room_for_text(graph: ModuleGraph, sequence: int, rows: Mapping[str, int]) -> tuple[int, int]:
    """The default range of text tokens, cut to what the longest rows leave of the sequence."""
    longest = graph.rows_out(Sample(id=0, length=0, rows=rows))
    room = sequence - max((longest[name] for name in graph.texts), default=0)
    high = max(1, min(TEXT[1], room))
    return min(TEXT[0], high), high


def _problems(given: Options, graph: ModuleGraph) -> Iterator[Problem]:
    for key in ("rows", "absent", "features"):
        table = getattr(given, key)
        for name in table if isinstance(table, Mapping) else ():
            yield from _not_a_source(f"data.options.{key}.{name}", name, graph)
    for name, span in given.rows.items():
        yield from _bad_range(f"data.options.rows.{name}", span)
    if given.text is not None:
        yield from _bad_range("data.options.text", given.text)
    for name, chance in given.absent.items():
        if not 0 <= chance <= 1:
            yield Problem(
                f"data.options.absent.{name}", f"is {chance}, no chance.", "Use a number from 0 to 1."
            )
    widths = given.features.items() if isinstance(given.features, Mapping) else [("", given.features)]
    for name, width in widths:
        if width < 1:
            where = f"data.options.features.{name}".rstrip(".")
            yield Problem(where, f"is {width}.", "Use a width of 1 or more.")
    if given.sequence < 1:
        yield Problem("data.options.sequence", f"is {given.sequence}.", "Use 1 position or more.")


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
