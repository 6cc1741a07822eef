"""Sensitivity: what a plan is worth if links are slower, or encoders have more rows, than was assumed."""

from collections.abc import Mapping

import attrs

from mimogrid.core.plan.layouts import Question
from mimogrid.core.step.step import Step


PART = 0.2
"""By how much of it an assumption is changed."""


def changed_questions(question: Question, step: Step) -> Mapping[str, Question]:
    """Return the question with slower links, and with more rows of encoders, by what is changed."""
    gpu, machine = question.spec.gpu, question.machine
    slower = attrs.evolve(gpu, link_efficiency=machine.link_efficiency * (1 - PART))
    more = attrs.evolve(gpu, times={n: machine.times(n) * f for n, f in _with_more_rows(step).items()})
    return {
        f"links {PART:.0%} slower": attrs.evolve(question, spec=attrs.evolve(question.spec, gpu=slower)),
        f"{PART:.0%} more rows": attrs.evolve(question, spec=attrs.evolve(question.spec, gpu=more)),
    }


def _with_more_rows(step: Step) -> dict[str, float]:
    """Return how many times as long each module takes if there are more rows; its text stays as it is."""
    text = sum(sample.length for sample in step.samples)
    positions = {name: step.rows_start[name][-1] for name in step.topology.graph.texts}
    texts = {name: 1 + PART * (1 - text / count) if count else 1.0 for name, count in positions.items()}
    return {name: texts.get(name, 1 + PART) for name in step.topology.modules}
