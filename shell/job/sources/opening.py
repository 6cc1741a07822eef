"""Opening: the source that a job names, built in or the user's own, with what the plan needs to know of it."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.data.mixture import Mixture
from mimogrid.core.job.graph import ModuleGraph
from mimogrid.core.job.placement import graph_of
from mimogrid.core.job.spec import JobSpec, SourceFacts
from mimogrid.core.job.validation.wiring import PATHS_MOST
from mimogrid.shell.job.builders import FoundFunction, NeedsTorch, PlanWarning, find
from mimogrid.shell.job.sources.source import Source
from mimogrid.shell.job.tables import converted, new_converter


BUILT_IN = ("conversations", "digits", "synthetic")

Opened = tuple[Source | None, SourceFacts, list[Problem]]
"""A source, the facts that the plan needs, and problems. Facts may be known without a source."""


def open_source(spec: JobSpec, *, run_code: bool = True) -> Opened:
    """Open the source that a job names. There is none if it has a problem, or needs torch and torch is not loaded.

    Without `run_code` a source of the user's own is found, but not opened.
    """
    graph = _graph(spec)
    if graph is None:  # The cycle, or too many paths, is reported with the other problems of the plan.
        return None, SourceFacts(), []
    name = spec.data.source
    if spec.data.mix:
        return _mixed(spec, run_code=run_code)
    if name in BUILT_IN:
        return _OPENING[name](spec, graph)
    if ":" in name:
        return _own(spec, graph, run_code=run_code)
    fact = f"'{name}' is not a built-in source." if name else "is missing."
    remedy = f"{nearest(name, BUILT_IN)} Your own: package.module:function."
    return None, SourceFacts(), [Problem("data.source", fact, remedy)]


def _graph(spec: JobSpec) -> ModuleGraph | None:
    try:
        graph = graph_of(spec)
    except ValueError:
        return None
    return graph if graph.paths <= PATHS_MOST else None


def _mixed(spec: JobSpec, *, run_code: bool) -> Opened:
    """Open the sources of a mixture."""
    from mimogrid.shell.job.sources.mixed import Mixed, facts_of  # noqa: PLC0415

    entries, problems = spec.data.mix, list[Problem]()
    if spec.data.source or spec.data.options:
        message = f"is '{spec.data.source}', and the mixture names {len(entries)} sources."
        problems.append(Problem("data.source", message, "Leave it out, or make it one of [[data.mix]]."))
    try:
        mixture = Mixture.of([entry.weight for entry in entries])
    except ValueError as error:
        weights = ", ".join(f"{entry.weight:g}" for entry in entries)
        message, remedy = f"has the weights {weights}: {error}.", "Use weights such as 3 and 1."
        return None, SourceFacts(), [*problems, Problem("data.mix", message, remedy)]
    parts: list[tuple[Source | None, SourceFacts]] = []
    for number, entry in enumerate(entries):
        alone = attrs.evolve(
            spec, data=attrs.evolve(spec.data, source=entry.source, options=entry.options, mix=())
        )
        source, facts, found = open_source(alone, run_code=run_code)
        parts.append((source, facts))
        problems += [
            attrs.evolve(p, where=f"data.mix[{number}]{p.where.removeprefix('data')}") for p in found
        ]
    sources = tuple(source for source, _ in parts if source is not None)
    known = facts_of([facts for _, facts in parts])
    whole = None if problems or len(sources) < len(entries) else Mixed(sources, mixture)
    return whole, SourceFacts() if problems else known, problems


# -- built-in sources --------------------------------------------------------------------------------------
# Only what is used is imported.


def _conversations(spec: JobSpec, graph: ModuleGraph) -> Opened:
    from mimogrid.shell.job.sources.conversations import conversations  # noqa: PLC0415

    source, facts, problems = conversations(spec, graph, spec.data.options)
    return source, facts, list(problems)


def _synthetic(spec: JobSpec, graph: ModuleGraph) -> Opened:
    from mimogrid.shell.job.sources.synthetic import synthetic  # noqa: PLC0415

    models = {module: written.options for module, written in spec.modules.items()}
    source, facts, problems = synthetic(graph=graph, models=models, seed=spec.seed, options=spec.data.options)
    return source, facts, list(problems)


@attrs.frozen(kw_only=True)
class _DigitsOptions:
    sequence: int | None = None


def _digits(spec: JobSpec, graph: ModuleGraph) -> Opened:
    from mimogrid.shell.job.sources.digits import digits  # noqa: PLC0415

    read = converted(new_converter(), spec.data.options, _DigitsOptions, ("data", "options"))
    if read.value is None:
        return None, SourceFacts(), [Problem(f.where, f.message, f.remedy) for f in read.problems]
    source = digits(
        spec.seed, graph.sources, graph.texts, rows_into={t: graph.rows_into(t) for t in graph.texts}
    )
    sequence = read.value.sequence or source.sequence
    facts = SourceFacts(
        sequence=sequence if graph.texts else None,
        vocab=source.vocab,
        features=dict.fromkeys(graph.sources, source.features),
        rows=dict.fromkeys(graph.sources, source.rows_most),
        targets=False,
    )
    problems: list[Problem] = []
    if graph.texts and sequence < source.sequence:
        fact = f"is {sequence}; the longest sample of digits takes {source.sequence} positions."
        remedy = f"Set sequence = {source.sequence} or more, or leave it out."
        problems.append(Problem("data.options.sequence", fact, remedy))
    for name in graph.texts:
        writers = [feeder for feeder in graph.nodes[name].feeders if feeder in graph.texts]
        if writers:
            fact = f"digits has no text for module '{name}', which the language model '{writers[0]}' feeds."
            problems.append(Problem("data.source", fact, "Use source = 'synthetic' or one of your own."))
    return source, facts, problems


_OPENING: Mapping[str, Callable[[JobSpec, ModuleGraph], Opened]] = {
    "conversations": _conversations,
    "digits": _digits,
    "synthetic": _synthetic,
}


# -- sources of the user's own -----------------------------------------------------------------------------


def _own(spec: JobSpec, graph: ModuleGraph, *, run_code: bool) -> Opened:
    """Find a source of the user's own, and run it, unless that needs torch and torch is not loaded."""
    path, options = spec.data.source, spec.data.options
    sequence = options.get("sequence")
    facts = SourceFacts(sequence=sequence if type(sequence) is int else None)
    try:
        found = find(path, where="data.source")
        if not (run_code or found.is_ours):
            _warn(f"'{path}' was not run: what it gives is not known, and not checked.")
            return None, facts, []
        source = _run(found, spec, graph)
    except PlanError as error:
        return None, facts, list(error.problems)
    except NeedsTorch as error:
        _warn(
            f"{error}: what '{path}' gives is not known without torch, and not checked here. "
            "Import torch inside load to have it checked."
        )
        return None, facts, []
    own_facts = getattr(source, "facts", None)
    facts = own_facts() if own_facts else facts
    problems = []
    if graph.texts and facts.sequence is None:
        fact = f"'{path}' does not say how long a sequence of the language model is."
        problems.append(Problem("data.options", fact, "Set sequence = N there, or return it from facts()."))
    return source, facts, problems


def _warn(fact: str) -> None:
    warnings.warn(f"data.source: {fact}", PlanWarning, stacklevel=5)


def _run(found: FoundFunction, spec: JobSpec, graph: ModuleGraph) -> Source:
    """Call the function. Raises PlanError if it raises, or returns something that is not a source."""
    models = {name: module.options for name, module in spec.modules.items()}
    context: dict[str, Any] = {"graph": graph, "models": models, "seed": spec.seed}
    try:
        function = found.function_in(found.run_alone())
        source: Source = function(**(_accepted(function, context) | dict(spec.data.options)))
    except (NeedsTorch, PlanError):
        raise
    except Exception as error:
        message = f"'{found.path}' raised {type(error).__name__}: {error}."
        remedy = f"Correct it, or its options, in {found.spec.origin}."
        raise PlanError([Problem("data.source", message, remedy)]) from error
    lacking = [method for method in ("describe", "load") if not hasattr(source, method)]
    if lacking:
        message = f"what '{found.path}' returned has no {' and no '.join(lacking)}."
        remedy = "Return an object with describe(sample_id) and load(sample_id, module)."
        raise PlanError([Problem("data.source", message, remedy)])
    return source


def _accepted(function: Any, context: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the context that a function's signature has."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(context)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in context.items() if name in names}
