"""Conflicts: pins that no layout has together, why not, and the nearest change of one of them that helps.

A conflict is a smallest set of pins: without any one of them, the others are possible. All modules may lie at rank 0,
so pins are possible together where every module has a configuration on all GPUs, for numbers of microbatches that go
together.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import attrs

from mimogrid.core.base.errors import Problem
from mimogrid.core.job.placement import graph_of
from mimogrid.core.job.schedules import ONE_F_ONE_B
from mimogrid.core.job.spec import GridSpec, JobSpec, ModuleSpec
from mimogrid.core.job.validation.problems import problems_of
from mimogrid.core.plan.configs import ParallelShape
from mimogrid.core.plan.layouts import Question
from mimogrid.core.plan.pins import FREE, GRID_AXES, JOB, WORDS, Pin, Pins, divide
from mimogrid.core.plan.search_space import (
    CHUNKS,
    Sizes,
    counts_within,
    divisors,
    layers_of,
    shape_problem,
    shapes_of,
)
from mimogrid.core.plan.token_limit import lanes_beside


NEAR = 64
"""Of smaller numbers all are tried in place of a pinned one, of larger ones the powers of two and its divisors."""


def conflicts(question: Question, main: str) -> tuple[Problem, ...]:
    """Return the conflicts of the pins of a question around its `main` module; of no pin more than one."""
    possible, left = _Possible(question, main), question.pins
    counted = [pin for pin in left.chosen if pin.axis == "microbatches"] if question.limit else []
    left = left.without(*counted)
    found: list[tuple[Pin, ...]] = []
    while left.chosen and not possible.together(left):
        found.append(_smallest(possible, left))
        left = left.without(*found[-1])
    return (*map(_counted, counted), *(_conflict(possible, pins, left) for pins in found))


def _counted(pin: Pin) -> Problem:
    """Return what is wrong with a number of microbatches where a limit of tokens gives it."""
    message = "batch.tokens_per_microbatch gives the number of microbatches."
    remedy = "Leave the pin out, or count microbatches: --set batch.tokens_per_microbatch=0 --set batch.microbatches=N."
    return Problem(f"--pin {pin}", message, remedy)


def _smallest(possible: "_Possible", pins: Pins) -> tuple[Pin, ...]:
    """Return some of these pins that are not possible together, while without any of them the others are."""
    for pin in pins.chosen:
        if not possible.together(fewer := pins.without(pin)):
            pins = fewer
    return pins.chosen


def _conflict(possible: "_Possible", pins: tuple[Pin, ...], others: Pins) -> Problem:
    question = possible.question
    gpus, what = _gpus(pins, question), _together(pins)
    enough = _Possible(attrs.evolve(question, gpus=max(gpus, question.gpus)), possible.main)
    if enough.together(Pins(pins)):
        message, more = f"{what} needs {gpus:,} GPUs of {question.gpus:,}.", f" Or use --gpus {gpus}."
    else:
        message = _reason(pins, possible)
        more = _larger_limit(possible, pins)
    changes = [str(pin) for pin in _changes(possible, pins, others)]
    remedy = f"The nearest that fits: {', or '.join(changes)}." if changes else "Leave one of them out."
    return Problem(" ".join(f"--pin {pin}" for pin in pins), message, remedy + more)


def _together(pins: Sequence[Pin]) -> str:
    """Return pins in a line; of those of one module the first names it.

    >>> _together([Pin("language", "tp", 8), Pin("language", "cp", 4), Pin("", "microbatches", 6)])
    'language.tp=8 x cp=4 with microbatches=6'
    """
    names = dict.fromkeys(pin.module for pin in pins)
    each = [[pin for pin in pins if pin.module == name] for name in names]
    return " with ".join(
        " x ".join([str(first), *(f"{pin.axis}={pin.value}" for pin in rest)]) for first, *rest in each
    )


@attrs.frozen(eq=False)
class _Possible:
    """What pins of a question are possible together; what was asked of a module is kept."""

    question: Question
    main: str
    _legal: dict[tuple[str, ParallelShape], bool] = attrs.field(
        factory=dict[tuple[str, ParallelShape], bool], init=False
    )
    _configs: dict[tuple[str, int, tuple[Pin, ...], tuple[int, ...]], bool] = attrs.field(
        factory=dict[tuple[str, int, tuple[Pin, ...], tuple[int, ...]], bool], init=False
    )

    def together(self, pins: Pins) -> bool:
        """Whether any layout has all of these pins."""
        samples = len(self.question.samples)
        plain = pins.value(JOB, "schedule") == ONE_F_ONE_B
        if plain and any(pin.axis == "chunks" and pin.value > 1 for pin in pins.chosen):
            return False
        if limit := self.question.limit:
            return self.fewest_lanes(pins) <= limit.lanes
        counts = pins.among(self.main, "microbatches", pins.among(JOB, "microbatches", divisors(samples)))
        return any(self._with_microbatches(count, pins) for count in counts)

    @property
    def _texts(self) -> Sequence[str]:
        return graph_of(self.question.spec).texts

    def fewest_lanes(self, pins: Pins) -> float:
        """Return the fewest lanes that a dp rank of a language model has with these pins; inf if no layout has them."""
        limit = self.question.limit
        assert limit is not None
        layers = layers_of(self.question.spec.modules[self.main]) if self.main in self._texts else 1
        counts = counts_within(limit, pins, layers)
        return min((each for count in counts for each in self._lanes(count, pins)), default=math.inf)

    def _lanes(self, count: int, pins: Pins) -> Iterator[int]:
        """Yield the lanes of a dp rank in layouts with so many microbatches, as far as pins say."""
        if not all(self._has_config(name, count, pins) for name in self.question.spec.modules):
            return
        others = [dp for name in self.question.spec.modules if (dp := pins.value(name, "dp"))]
        mine = (self._found(name, count, pins) for name in self._texts)
        texts = ({dp for _, _, dp in found} for found in mine)
        yield from (lanes_beside(each, others) for each in itertools.product(*texts))

    def _with_microbatches(self, count: int, pins: Pins) -> bool:
        """Whether every module has a configuration, with so many microbatches of the main one."""
        samples, of_job = len(self.question.samples), pins.job_microbatches(count)
        counts = {
            name: pins.module_microbatches(name, of_job, samples) for name in self.question.spec.modules
        }
        counts[self.main] = count
        whole = all(samples % each == 0 and divide(each, of_job) for each in (of_job, *counts.values()))
        whole = whole and self._has_cells((of_job, *counts.values()), pins)
        return whole and all(self._has_config(name, each, pins) for name, each in counts.items())

    def _has_cells(self, counts: Sequence[int], pins: Pins) -> bool:
        """Whether there is a sample for every cell, if samples are assigned to microbatches by cost."""
        spec = self.question.spec
        lanes = math.lcm(*(_least_grid(name, pins).dp for name in spec.modules))
        return spec.batch.balance != "cost" or math.lcm(*counts) * lanes <= len(self.question.samples)

    def _has_config(self, name: str, count: int, pins: Pins) -> bool:
        beside = pins.dp_beside(name) if self.question.limit else ()
        key = name, count, pins.of(name), beside
        if key not in self._configs:
            self._configs[key] = any(True for _ in self._found(name, count, pins))
        return self._configs[key]

    def _found(self, name: str, count: int, pins: Pins) -> Iterator[tuple[int, int, int]]:
        question = self.question
        sizes = Sizes(
            module=name,
            layers=layers_of(question.spec.modules[name]),
            samples=len(question.samples),
            microbatches=count,
            ranks=question.gpus,
            chunks=CHUNKS,
            pins=pins,
            limit=question.limit,
            reads_text=name in self._texts,
            beside=pins.dp_beside(name),
        )
        node = min(question.machine.accelerator.per_node, question.gpus)
        for shape in shapes_of(question.spec, name, node, pins):
            if self._is_legal(name, shape):
                yield from sizes.of(shape)

    def _is_legal(self, name: str, shape: ParallelShape) -> bool:
        if (name, shape) not in self._legal:
            problem = shape_problem(self.question.spec, self.question.facts, name, shape)
            self._legal[name, shape] = problem is None
        return self._legal[name, shape]


# -- why not -----------------------------------------------------------------------------------------------


def _gpus(pins: Sequence[Pin], question: Question) -> int:
    """Return how many GPUs pins need at least: what is free is as small as it can be."""
    return max(_ranks(name, Pins(tuple(pins))) for name in question.spec.modules)


def _ranks(name: str, pins: Pins) -> int:
    grid = _least_grid(name, pins)
    return grid.tp * grid.cp * grid.dp * grid.pp


def _least_grid(name: str, pins: Pins) -> GridSpec:
    """Return the smallest grid that a module may have."""
    size = {axis: pins.value(name, axis) or 1 for axis in GRID_AXES}
    shape = ParallelShape(
        size["tp"], size["cp"], size["ep"], size["expert_tp"], sequence_parallel=size["tp"] > 1
    )
    chunks = pins.value(name, "chunks") or 1
    pp = pins.value(name, "pp") or min(chunks, 2)
    return attrs.evolve(shape.grid(dp=pins.value(name, "dp") or shape.dp_size, pp=pp), offset=0)


def _reason(pins: tuple[Pin, ...], possible: _Possible) -> str:
    """Return why pins are not possible together, in words with their numbers."""
    question, what = possible.question, _together(pins)
    chosen = Pins(pins)
    plain = chosen.value(JOB, "schedule") == ONE_F_ONE_B
    if plain and any(pin.axis == "chunks" for pin in pins):
        return f"{what}: 1f1b is without chunks; with them it is called interleaved."
    for name, module in question.spec.modules.items():
        grid, chunks = _least_grid(name, chosen), chosen.value(name, "chunks") or 1
        if grid.pp * chunks > layers_of(module):
            least = " at least" * (chosen.value(name, "pp") is None)
            stages = f"{what} makes {grid.pp * chunks} stages{least}"
            return f"{stages}, and module '{name}' has {layers_of(module)} layers."
        counted = any(pin.axis == "microbatches" for pin in pins)
        if chunks > 1 and not counted and not question.limit and len(question.samples) % grid.pp:
            return (
                f"{what}: chunks need a multiple of pp={grid.pp} microbatches, "
                f"and {len(question.samples)} samples divide into no such number."
            )
    if question.limit and (lanes := possible.fewest_lanes(chosen)) < math.inf:
        tokens = question.spec.batch.tokens_per_microbatch
        fit, longest = question.limit.lanes, question.facts.sequence
        return (
            f"{what} cuts a dp rank of the language model into {lanes} lanes or more, and "
            f"batch.tokens_per_microbatch={tokens} has room for samples of {longest} tokens in {fit}."
        )
    free = problems_of(_least(question, possible.main, FREE), question.facts)
    found = problems_of(_least(question, possible.main, chosen), question.facts)
    new = next((problem.message for problem in found if problem not in free), None)
    return new or f"no layout on {question.gpus:,} GPUs has {what}."


def _larger_limit(possible: _Possible, pins: tuple[Pin, ...]) -> str:
    """Return the least limit of tokens with which pins are possible together, in words; nothing if none is."""
    question = possible.question
    lanes = possible.fewest_lanes(Pins(pins)) if question.limit else math.inf
    if lanes == math.inf or question.facts.sequence is None:
        return ""
    tokens = int(lanes) * question.facts.sequence
    batch = attrs.evolve(question.spec.batch, tokens_per_microbatch=tokens)
    larger = attrs.evolve(question, spec=attrs.evolve(question.spec, batch=batch))
    fits = _Possible(larger, possible.main).together(Pins(pins))
    return f" Or use --set batch.tokens_per_microbatch={tokens}." if fits else ""


def _least(question: Question, main: str, pins: Pins) -> JobSpec:
    """Return the job with every module on as few ranks as it can be, in as few microbatches."""
    count = pins.job_microbatches(pins.value(main, "microbatches") or pins.value(JOB, "microbatches") or 1)
    modules = {name: _least_module(name, module, pins) for name, module in question.spec.modules.items()}
    return attrs.evolve(question.spec, modules=modules, batch=question.batch(count), world_size=None)


def _least_module(name: str, module: ModuleSpec, pins: Pins) -> ModuleSpec:
    grid, chunks = _least_grid(name, pins), pins.value(name, "chunks") or 1
    stages, layers = grid.pp * chunks, layers_of(module)
    split = (*(1,) * (stages - 1), layers - stages + 1) if 1 < stages <= layers else None
    count = pins.value(name, "microbatches")
    return attrs.evolve(module, grid=grid, chunks=chunks, split=split, microbatches=count)


# -- what else ---------------------------------------------------------------------------------------------


def _changes(possible: _Possible, pins: tuple[Pin, ...], others: Pins) -> list[Pin]:
    """Return, for each of these pins, the nearest value with which all of them and the others are possible."""
    found: list[tuple[float, Pin]] = []
    for pin in pins:
        rest = tuple(each for each in (*pins, *others.chosen) if each != pin)
        for far, value in _nearby(pin, len(possible.question.samples)):
            changed = attrs.evolve(pin, value=value)
            if possible.together(Pins((changed, *rest))):
                found.append((far, changed))
                break
    return [pin for _, pin in sorted(found, key=lambda each: each[0])]


def _nearby(pin: Pin, samples: int) -> list[tuple[float, object]]:
    """Return the other values of a pin with how far they are from it, the nearest first."""
    if pin.axis in WORDS:
        at = WORDS[pin.axis].index(pin.value)
        return [(math.inf, word) for word in (*WORDS[pin.axis][at + 1 :], *WORDS[pin.axis][:at])]
    value: int = pin.value
    small = range(1, 1 + min(2 * value, NEAR))
    powers = [2**power for power in range((2 * value).bit_length())]
    of = samples if pin.axis == "microbatches" else value
    parts = [each for each in range(1, math.isqrt(of) + 1) if of % each == 0]
    both = {*small, *powers, *parts, *(of // each for each in parts)} - {value}
    return sorted((abs(math.log(each / value)), each) for each in both)
