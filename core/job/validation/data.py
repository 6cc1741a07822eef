"""Whether the data fits the modules that read it."""

from collections.abc import Iterator

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.descriptions import description_problems
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.models import Gpt, Regressor, Transformer, Vit
from mimogrid.core.job.placement import graph_of, largest_sample, model_of
from mimogrid.core.job.spec import OVERFLOWS, JobSpec, ModuleSpec, SourceFacts
from mimogrid.core.job.validation.checks import one_of


def data_problems(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    """Check that the source has what modules read, and in the width that they read."""
    graph = graph_of(spec)
    yield from one_of("data.overflow", spec.data.overflow, OVERFLOWS)
    for name in graph.sources:
        yield from _features(name, spec.modules[name], source)
    if not source.targets:
        for name, module in spec.modules.items():
            if isinstance(module.options, Regressor):
                yield Problem(
                    "data.source",
                    f"'{spec.data.source}' has no targets for the regressor '{name}'.",
                    "Use source = 'synthetic' or a source of your own.",
                )
    models = {name: model_of(name, spec, source) for name in graph.sources}
    if unfit := tuple(description_problems([largest_sample(graph, source)], models)):
        for problem in unfit:
            yield attrs.evolve(problem, where="data.source", message=f"its largest sample {problem.message}")
        return
    for name in graph.texts:
        yield from _text(name, spec.modules[name], source)
        if spec.data.overflow == "error":
            yield from _overflow(name, graph, source)


def _features(name: str, module: ModuleSpec, source: SourceFacts) -> Iterator[Problem]:
    width, model, where = source.features.get(name), module.options, f"modules.{name}.options"
    if isinstance(model, Vit):
        if width is None and model.features is None:
            yield Problem(
                f"{where}.features",
                f"the source does not say how wide the patch rows of module '{name}' are.",
                "Set features to their width.",
            )
        elif None not in (width, model.features) and width != model.features:
            yield Problem(
                f"{where}.features",
                f"module '{name}' reads rows of width {model.features}, the source gives {width}.",
                f"Set features = {width} or leave it out.",
            )
    elif isinstance(model, Transformer) and width not in (None, model.hidden):
        yield Problem(
            f"{where}.hidden",
            f"module '{name}' reads rows of width {model.hidden}, the source gives {width}.",
            f"Set hidden = {width}, or use a vit, which embeds rows of any width.",
        )


def _text(name: str, module: ModuleSpec, source: SourceFacts) -> Iterator[Problem]:
    model = module.options
    assert isinstance(model, Gpt)
    if source.vocab is not None and model.vocab < source.vocab:
        yield Problem(
            f"modules.{name}.options.vocab",
            f"module '{name}' knows {model.vocab} tokens, the source uses {source.vocab}.",
            f"Set vocab = {source.vocab} or more.",
        )


def _overflow(name: str, graph: ModuleGraph, source: SourceFacts) -> Iterator[Problem]:
    if source.sequence is None or source.length is None:
        return
    rows = graph.rows_out(largest_sample(graph, source))[name] - source.length
    if rows + source.length > source.sequence:
        yield Problem(
            "data.options.sequence",
            f"a sample of module '{name}' can have {rows} rows and {source.length} text tokens, "
            f"more than sequence = {source.sequence} holds.",
            f"Set sequence = {rows + source.length} or more, give fewer rows, or set data.overflow.",
        )
