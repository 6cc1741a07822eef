"""Overflow: what becomes of a sample that has more positions than a language sequence holds (`[data] overflow`).

    error      the step is refused, and the sample named
    truncate   its text is cut at the end
    drop       it stays in the order of samples, and has nothing: no rows, no text, no weight in a loss

A sample is dropped rather than cut if a placeholder would be cut off, or if no text is left. Both are functions of the
description, so every rank knows the counts of a step before anything is loaded. The sum of a loss's weights is known
after a cut only where each token weighs 1, so a sample that describes other `units` is not cut.

>>> graph = ModuleGraph.of({"vision": ("vit", ("language",)), "language": ("gpt", ())})
>>> sample = Sample(id=0, length=7, rows={"vision": 3})
>>> fitted(sample, graph, sequence=8, overflow="truncate").length
5
>>> fitted(sample, graph, sequence=3, overflow="truncate") == fitted(sample, graph, sequence=8, overflow="drop")
True
"""

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.graph import ModuleGraph


def fitted(sample: Sample, graph: ModuleGraph, *, sequence: int, overflow: str) -> Sample:
    """Return a sample as a job takes it. Raises PlanError for a sample that cannot be cut."""
    if overflow == "error" or not graph.texts:
        return sample
    try:
        rows = graph.rows_out(sample)
    except ValueError:  # A segment that a module cannot read; `step_of` says so.
        return sample
    over = max(rows[name] for name in graph.texts) - sequence
    if over <= 0:
        return sample
    shorter = attrs.evolve(sample, length=sample.length - over)
    if (
        overflow == "drop"
        or shorter.length < 1
        or any(_cuts_rows(shorter, graph, name) for name in graph.texts)
    ):
        return Sample(id=sample.id, length=0, rows={}, units=dict.fromkeys(graph.nodes, 0.0))
    changed = [name for name, count in graph.rows_out(shorter).items() if count != rows[name]]
    if described := [name for name in changed if name in sample.units]:
        fact = f"has {over} positions too many, and describes units for {', '.join(described)}."
        remedy = "Leave units out if every token weighs 1, cut the sample in the source, or set data.overflow = 'drop'."
        raise PlanError([Problem(f"sample {sample.id}", fact, remedy)])
    return shorter


def _cuts_rows(shorter: Sample, graph: ModuleGraph, name: str) -> bool:
    """Whether a language model would lose a placeholder."""
    places = shorter.placeholders.get(name, ())
    return max(places, default=-1) >= graph.rows_out(shorter)[name]
