"""Pins: choices of a layout that are made before the search: an axis of a module, the microbatches, the schedule.

    >>> pins = Pins((Pin("language", "tp", 8), Pin("", "schedule", "gpipe")))
    >>> [str(pin) for pin in pins.chosen]
    ['language.tp=8', 'schedule=gpipe']

What makes configurations asks for the values of an axis (`among`), and gets the pinned one in place of those that it
offers. What changes whole layouts asks whether a layout has all pinned values (`broken_by`). Nothing else knows pins.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest
from mimogrid.core.job.schedules import AUTO, ONE_F_ONE_B, SCHEDULES
from mimogrid.core.job.spec import JobSpec, ModuleSpec
from mimogrid.core.job.validation.problems import RECOMPUTES


JOB = ""
"""In place of a module: the job itself."""
ALL_MODULES = "*"
GRID_AXES = ("tp", "cp", "ep", "expert_tp", "pp", "dp")
MODULE_AXES = (*GRID_AXES, "chunks", "recompute", "microbatches")
JOB_AXES = ("microbatches", "schedule")
WORDS: Mapping[str, Sequence[str]] = {"recompute": RECOMPUTES, "schedule": SCHEDULES}
"""What the axes may be whose values are no numbers."""
MOST = 1_000_000
"""Larger numbers are taken for typing errors."""


@attrs.frozen
class Pin:
    """A value that an axis of a module, or of the job, must have."""

    module: str
    axis: str
    value: Any

    def __str__(self) -> str:
        """Return the pin as it is written."""
        return f"{self.module}.{self.axis}={self.value}" if self.module else f"{self.axis}={self.value}"


@attrs.frozen
class Pins:
    """Pins of different axes, in the order in which they are written.

    The number of microbatches of the job is also that of its `main` module, unless that one's own is pinned.
    """

    chosen: tuple[Pin, ...] = ()
    main: str = ""

    def value(self, module: str, axis: str) -> Any:
        """Return what an axis is pinned to; None where it is free.

        `1f1b` is without chunks: with them it is called `interleaved`.
        """
        found = self._values.get((module, axis))
        if found is None and axis == "chunks" and self._values.get((JOB, "schedule")) == ONE_F_ONE_B:
            return 1
        return found

    @functools.cached_property
    def _values(self) -> dict[tuple[str, str], Any]:
        return {(pin.module, pin.axis): pin.value for pin in self.chosen}

    def among(self, module: str, axis: str, offered: Iterable[Any]) -> Sequence[Any]:
        """Return the values that an axis may have: the pinned one, or those that are offered.

        >>> Pins((Pin("language", "tp", 8),)).among("language", "tp", (1, 2, 4)), Pins().among("", "schedule", ["1f1b"])
        ((8,), ('1f1b',))
        """
        value = self.value(module, axis)
        return tuple(offered) if value is None else (value,)

    def values(self, axis: str) -> set[Any]:
        """Return what an axis is pinned to in any module."""
        return {pin.value for pin in self.chosen if pin.axis == axis}

    def dp_beside(self, module: str) -> tuple[int, ...]:
        """Return the dp sizes that other modules are pinned to."""
        return tuple(pin.value for pin in self.chosen if pin.axis == "dp" and pin.module != module)

    def of(self, module: str) -> tuple[Pin, ...]:
        """Return the pins of a module."""
        return tuple(pin for pin in self.chosen if pin.module == module)

    def job_microbatches(self, count: int) -> int:
        """Return the microbatches of a job whose main module has so many: as many, if each module's own allow that.

        >>> Pins((Pin("vision", "microbatches", 24),)).job_microbatches(16)
        8
        """
        pinned = self.value(JOB, "microbatches")
        own = [pin.value for pin in self.chosen if pin.module and pin.axis == "microbatches"]
        return pinned or (count if all(divide(count, each) for each in own) else math.gcd(count, *own))

    def module_microbatches(self, module: str, count: int, samples: int) -> int:
        """Return the microbatches of a module beside the main one, in a job of `count`: fewer where its dp needs that.

        >>> Pins((Pin("vision", "dp", 8),)).module_microbatches("vision", 16, samples=64)
        8
        """
        dp = self.value(module, "dp") or 1
        fewer = (m for m in range(count, 0, -1) if count % m == 0 and samples // m >= dp)
        return self.value(module, "microbatches") or next(fewer, count)

    @property
    def order(self) -> str | None:
        """The schedule that candidates are timed under; `auto` is tried on the best of them, as it takes long."""
        pinned: str | None = self.value(JOB, "schedule")
        return None if pinned == AUTO else pinned

    @property
    def on_the_way(self) -> "Pins":
        """The pins that layouts obey before orders are tried on them."""
        return self if self.value(JOB, "schedule") != AUTO else self.without(Pin(JOB, "schedule", AUTO))

    def without(self, *left_out: Pin) -> "Pins":
        """Return these pins but some."""
        return attrs.evolve(self, chosen=tuple(pin for pin in self.chosen if pin not in left_out))

    def broken_by(self, spec: JobSpec) -> tuple[Pin, ...]:
        """Return the pins that a layout does not have."""
        return tuple(pin for pin in self.chosen if not self._is_met(pin, spec))

    def _is_met(self, pin: Pin, spec: JobSpec) -> bool:
        count = spec.batch.microbatches
        if pin.module:
            return bool(_value_of(spec.modules[pin.module], pin.axis, count) == pin.value)
        if pin.axis == "schedule":
            chunks = any(module.chunks > 1 for module in spec.modules.values())
            return spec.schedule.name == pin.value and not (pin.value == ONE_F_ONE_B and chunks)
        free = self.main not in spec.modules or (self.main, "microbatches") in self._values
        return count == pin.value and (free or spec.modules[self.main].microbatches in {None, count})


FREE = Pins()
"""Nothing is pinned."""


def divide(a: int, b: int) -> bool:
    """Whether one of two numbers divides the other."""
    return max(a, b) % min(a, b) == 0


def _value_of(module: ModuleSpec, axis: str, count: int) -> Any:
    """Return the value of an axis of a module in a job of `count` microbatches."""
    if axis == "microbatches":
        return module.microbatches or count
    return getattr(module.grid if axis in GRID_AXES else module, axis)


# -- as they are written -----------------------------------------------------------------------------------


def parse(words: Iterable[str], modules: Sequence[str]) -> Pins:
    """Read pins such as ``language.tp=8``, ``*.cp=1`` or ``schedule=1f1b`` of a job with these modules.

    Raises PlanError with all that are none. The same pin may stand twice, with one value.

    >>> [str(pin) for pin in parse(["*.cp=1", "microbatches=16"], ["vision", "language"]).chosen]
    ['vision.cp=1', 'language.cp=1', 'microbatches=16']
    """
    found: dict[tuple[str, str], Pin] = {}
    written: dict[tuple[str, str], str] = {}
    problems: list[Problem] = []
    for word in words:
        try:
            pins = [*_read(word, modules)]
        except PlanError as error:
            problems += error.problems
            continue
        for pin in pins:
            axis = pin.module, pin.axis
            if found.setdefault(axis, pin) != pin:
                name = str(pin).partition("=")[0]
                message = f"pins {name} to {pin.value}, and --pin {written[axis]} to {found[axis].value}."
                problems.append(Problem(f"--pin {word}", message, "Leave one of them out."))
            written.setdefault(axis, word)
    if problems:
        raise PlanError(problems)
    return Pins(tuple(found.values()))


def _read(word: str, modules: Sequence[str]) -> Iterator[Pin]:
    """Yield what a word pins, once for each module that it names. Raises PlanError for what is no pin."""
    key, equals, text = word.partition("=")
    module, dot, axis = key.rpartition(".")
    where = f"--pin {word}"
    if not equals or not key or not text:
        remedy = "Write MODULE.AXIS=VALUE, such as language.tp=8, or microbatches=16, or schedule=1f1b."
        raise PlanError([Problem(where, "is no pin.", remedy)])
    if axis not in (MODULE_AXES if dot else JOB_AXES):
        raise PlanError([_unknown_axis(where, axis, modules, of_module=bool(dot))])
    if dot and module not in (ALL_MODULES, *modules):
        remedy = f"Known: {', '.join(modules)}, and * for all of them."
        raise PlanError([Problem(where, f"the job has no module '{module}'.", remedy)])
    value = _value(where, axis, text)
    for name in modules if module == ALL_MODULES else (module,):
        yield Pin(name, axis, value)


def _unknown_axis(where: str, axis: str, modules: Sequence[str], *, of_module: bool) -> Problem:
    """Return what is wrong with the axis of a pin of a module, or else of the job, and what can be pinned."""
    if of_module and axis in JOB_AXES:
        return Problem(where, f"{axis} is of the job, not of a module.", f"Write {axis}=VALUE.")
    if not of_module and axis in MODULE_AXES:
        names = ", ".join(f"{name}.{axis}" for name in (*modules, ALL_MODULES))
        return Problem(where, f"{axis} is of a module, and this names none.", f"Pin one of {names}.")
    whose, known = ("of a module", MODULE_AXES) if of_module else ("of the job", JOB_AXES)
    return Problem(
        where,
        f"'{axis}' is no axis {whose} that can be pinned.",
        f"Those {whose}: {', '.join(known)}.",
    )


def _value(where: str, axis: str, text: str) -> Any:
    """Read the value of an axis: a word, or a number of 1 or more. Raises PlanError."""
    if axis in WORDS:
        if text not in WORDS[axis]:
            remedy = nearest(text, tuple(WORDS[axis]))
            raise PlanError([Problem(where, f"'{text}' is no {axis} that is known.", remedy)])
        return text
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MOST))
    if not digits or not 1 <= int(text) <= MOST:
        raise PlanError(
            [
                Problem(
                    where,
                    f"'{text}' is no whole number from 1 to {MOST:,}.",
                    "Use a number such as 1, 2 or 8.",
                )
            ]
        )
    return int(text)
