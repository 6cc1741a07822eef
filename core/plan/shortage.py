"""Shortage: where nothing fits, what lacks least, and the nearest changes with which something does, in words.

Each change is tried: the layout that is named with it fits.
"""

from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.base.units import in_bytes
from mimogrid.core.plan.candidates import Candidates
from mimogrid.core.plan.layouts import Question, least_lack, shown
from mimogrid.core.plan.search import Search
from mimogrid.core.plan.search_space import SearchSpace
from mimogrid.core.plan.walk import any_that_fits
from mimogrid.core.pricing.accelerators import ACCELERATORS
from mimogrid.core.schedule.tuning import GB
from mimogrid.core.step.step import Step


LARGER = (1.0, 1.2, 1.5, 2.0, 3.0)
"""How many times the memory that lacks least is tried."""
MORE = (2, 4, 8, 16)
"""How many times the GPUs are tried."""
ROOM = 1.01
"""How many times the memory of a layout is asked for: numbers of bytes are written with three digits."""


def nearest_fit(search: Search, step: Step, spaces: Mapping[str, SearchSpace], candidates: Candidates) -> str:
    """Return what lacks least where nothing fits, and what would fit; a search that was stopped tries no change."""
    question, main = search.evaluator.question, search.evaluator.main
    pinned = [layout for layout in search.layouts if not question.pins.broken_by(layout.spec)]
    words, needed = least_lack(candidates, pinned, spaces, question)
    changes = () if search.stopped else _changes(question, main, step, needed)
    return ". ".join((words, *changes))


def _changes(question: Question, main: str, step: Step, needed: float) -> Iterator[str]:
    """Yield the changes with which something fits: fewer pins, more memory, more GPUs."""
    pins = question.pins.chosen
    for left_out in (*((pin,) for pin in pins), *([pins] if len(pins) > 1 else [])):
        freed = attrs.evolve(question, pins=question.pins.without(*left_out))
        if fits := any_that_fits(freed, main, step):
            yield f"Without {' '.join(f'--pin {pin}' for pin in left_out)} this fits: {shown(fits.spec)}"
            return
    for more in LARGER if needed else ():
        gpu = attrs.evolve(question.spec.gpu, memory_gb=more * ROOM * needed / GB)
        if fits := any_that_fits(
            attrs.evolve(question, spec=attrs.evolve(question.spec, gpu=gpu)), main, step
        ):
            enough = ROOM * max(fits.peak_bytes.values())
            larger = [name for name, gpu in ACCELERATORS.items() if gpu.memory_bytes >= enough]
            kinds = f" ({', '.join(larger)})" if larger else ""
            yield f"On GPUs of {in_bytes(enough)} or more{kinds} this fits: {shown(fits.spec)}"
            break
    for gpus in (more * question.gpus for more in MORE):
        if fits := any_that_fits(attrs.evolve(question, gpus=gpus), main, step):
            yield f"On {gpus:,} of these GPUs this fits: {shown(fits.spec)}"
            break
