"""Contents: what a checkpoint of a job holds, and the bounds of the numbers beside its tensors.

A checkpoint holds a full tensor for each parameter of the job, under ``module.parameter``, and for each state that
the optimizer keeps of a trained one, under ``optimizer.STATE.module.parameter``. Most optimizers have none before the
first update. The parameters of a custom module, or of a network that a host program gives, are not known here; their
states are.
"""

import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import attrs

from mimogrid.core.job.lora import MARK, held_in
from mimogrid.core.job.models import Own
from mimogrid.core.job.optimizers import EMA, kind_of, states_of
from mimogrid.core.topology.topology import Module, Topology


OPTIMIZER = "optimizer."
"""The prefix of the names of optimizer state; names of weights begin with their module."""

COUNT_MOST = 1 << 53
"""No count in a file reaches this: JSON readers agree on integers below it."""

NETWORK_DTYPES: Mapping[str, str] = {"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""The dtype of a frozen weight, by the precision of the job."""
MAIN_DTYPES: Mapping[str, str] = {"fp64": "F64", "fp32": "F32", "bf16": "F32", "fp16": "F32"}
"""The dtype of a main parameter and of its states, by the precision of the job."""
COUNTER_DTYPES = frozenset({"F32", "F64"})
"""The dtypes of a state that is one value for a whole parameter."""


def is_count(value: object) -> bool:
    """Whether a value from a file is an integer of 0 or more, within bounds."""
    return type(value) is int and 0 <= value < COUNT_MOST


# -- tensors -----------------------------------------------------------------------------------------------


@attrs.frozen
class Described:
    """A full tensor: the dtypes that it may have, by their names in safetensors, and its shape."""

    dtypes: frozenset[str]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{' or '.join(sorted(self.dtypes))} {list(self.shape)}"


Tensors = Mapping[str, Described]
"""Full tensors by name."""


def custom_modules(topology: Topology, found: Tensors) -> frozenset[str]:
    """Return the modules whose parameters the plan does not know.

    Those are custom modules, and built-in ones for which a host program gave a network with other parameters: most
    names of the table are missing among the tensors that were `found`, and others are there.
    """
    return frozenset(
        name
        for name, module in topology.modules.items()
        if isinstance(module.model, Own) or _is_of_a_host(module, found)
    )


def _is_of_a_host(module: Module, found: Tensors) -> bool:
    names = {f"{module.name}.{parameter.name}" for parameter in module.parameters}
    has_any = any(name.startswith(f"{module.name}.") for name in found)
    return has_any and 2 * len(names & found.keys()) < len(names)


def table_of(topology: Topology, found: Tensors, custom: Collection[str], *, steps_taken: int) -> Tensors:
    """Return the tensors of a checkpoint of a job after so many updates.

    What is known only to `custom` modules is taken from the tensors that were `found`.
    """
    keeps = steps_taken > 0 or kind_of(topology.spec.optimizer).starts_with_states
    table: dict[str, Described] = {}
    precision = topology.spec.precision
    for module in topology.modules.values():
        weights = _found_weights(module, found) if module.name in custom else _weights(module, precision)
        for name, weight, trains in weights:
            table[name] = weight
            if trains and keeps:
                table |= _states(topology, name, weight, updated=steps_taken > 0)
    return table


def table_faults(topology: Topology, found: Tensors, *, steps_taken: int) -> Iterator[str]:
    """Yield how tensors that were `found` differ from the table of their job."""
    table = table_of(topology, found, custom_modules(topology, found), steps_taken=steps_taken)
    yield from lacking(table, found)
    yield from (f"has '{name}', which its job does not have." for name in found.keys() - table.keys())
    for name in sorted(found.keys() & table.keys()):
        if found[name].shape == table[name].shape and not found[name].dtypes <= table[name].dtypes:
            yield f"has {found[name]} for '{name}', its job has {table[name]}."


def lacking(table: Tensors, found: Tensors) -> Iterator[str]:
    """Yield what a table has, and those that were `found` have not or in another shape."""
    for name, of in table.items():
        if name not in found:
            what = (
                "which the job's optimizer needs"
                if name.startswith(OPTIMIZER)
                else f"the job needs {list(of.shape)}"
            )
            yield f"has no '{name}', {what}."
        elif found[name].shape != of.shape:
            yield f"has {list(found[name].shape)} for '{name}', the job needs {list(of.shape)}."


def parameter_of(name: str) -> str:
    """Return the parameter whose weight or state has a name."""
    return name.split(".", 2)[2] if name.startswith(OPTIMIZER) else name


def untrained(names: Iterable[str], has: Collection[str]) -> frozenset[str]:
    """Return which parameters did not train in the job of a checkpoint, which `has` tensors of these names.

    Their weights are there without a state. LoRA that this job had not has no weights either.

    >>> has = ["a.x", "optimizer.exp_avg.a.x", "a.y"]
    >>> sorted(untrained(["a.x", "a.y", "a.y.lora.q.b", "a.z"], has))
    ['a.y', 'a.y.lora.q.b']
    """
    with_states = {parameter_of(name) for name in has if name.startswith(OPTIMIZER)}
    return frozenset(name for name in names if name not in with_states and (name in has or MARK in name))


def _weights(module: Module, precision: str) -> Iterator[tuple[str, Described, bool]]:
    """Yield the weights of a module, and whether each is trained."""
    for info in module.stages:
        for parameter in info.parameters:
            trains = parameter.name in info.trainable
            held = NETWORK_DTYPES[held_in(parameter, module.lora, precision, trains=trains)]
            dtypes = frozenset({MAIN_DTYPES[precision] if trains else held})
            yield f"{module.name}.{parameter.name}", Described(dtypes, parameter.unpadded_shape), trains


def _found_weights(module: Module, found: Tensors) -> Iterator[tuple[str, Described, bool]]:
    """Yield the weights of a custom module that were found; one that has any state is trained."""
    trains = any(info.trainable for info in module.stages)
    with_states = {name.split(".", 2)[-1] for name in found if name.startswith(OPTIMIZER)}
    for name, of in found.items():
        if name.startswith(f"{module.name}."):
            yield name, of, trains and name in with_states


def _states(
    topology: Topology, name: str, weight: Described, *, updated: bool
) -> Iterator[tuple[str, Described]]:
    optimizer, dtypes = topology.spec.optimizer, frozenset({MAIN_DTYPES[topology.spec.precision]})
    for state in states_of(optimizer):
        if updated or state != EMA:  # A mean begins with the first update.
            yield f"{OPTIMIZER}{state}.{name}", Described(dtypes, weight.shape)
    for state in kind_of(optimizer).counters:
        yield f"{OPTIMIZER}{state}.{name}", Described(COUNTER_DTYPES, (1,))


# -- what is beside the tensors ----------------------------------------------------------------------------


def written_as(topology: Topology, step: int) -> dict[str, Any]:
    """Return what a manifest tells people of its job and of the step that is next."""
    spec = topology.spec
    return {
        "layout": {
            name: {
                **{axis.name: axis.size for axis in module.grid.axes},
                "ep": spec.modules[name].grid.ep,
                "chunks": spec.modules[name].chunks,
                "offset": module.grid.offset,
            }
            for name, module in topology.modules.items()
        },
        "schedule": spec.schedule.name,
        "precision": spec.precision,
        "data": {"source": spec.data.source, "next_sample": step * spec.batch.global_size},
        "random": {"seed": spec.seed, "next_step": step},
    }


def field_faults(facts: Mapping[str, object]) -> Iterator[str]:
    """Yield which fields of a manifest are missing, of another type, or out of bounds.

    >>> skips = {"scale": 1.0, "good": 0, "losses": [], "norms": []}
    >>> list(field_faults({"step": 3, "steps_taken": 10**9, "watch": skips, "job": ""}))
    ['has 1000000000 for steps_taken, not a count up to its step, 3.']
    """
    for key, (is_valid, what) in _REQUIRED.items():
        if key not in facts:
            yield f"lacks {key}."
        elif not is_valid(facts[key]):
            yield f"has {reprlib.repr(facts[key])} for {key}, not {what}."
    for key, (is_valid, what) in _OPTIONAL.items():
        if key in facts and not is_valid(facts[key]):
            yield f"has {reprlib.repr(facts[key])} for {key}, not {what}."
    step, taken = facts.get("step"), facts.get("steps_taken")
    if is_count(step) and is_count(taken) and cast("int", taken) > cast("int", step):
        yield f"has {taken} for steps_taken, not a count up to its step, {step}."
    if is_count(step) and "watch" in facts and not _is_skip_state(facts["watch"], cast("int", step)):
        yield f"has {reprlib.repr(facts['watch'])} for watch, not a state of skipped steps."


def _is_skip_state(value: object, step: int) -> bool:
    """Whether a value is a `SkipState` that `step` steps can leave."""
    if not isinstance(value, dict):
        return False
    state = cast("dict[object, object]", value)
    return (
        state.keys() == {"scale", "good", "losses", "norms"}
        and _is_number(state["scale"])
        and cast("float", state["scale"]) > 0
        and is_count(state["good"])
        and cast("int", state["good"]) <= step
        and _are_numbers(state["losses"], step)
        and _are_numbers(state["norms"], step)
        and min(cast("list[float]", state["norms"]), default=0) >= 0
    )


def _are_numbers(value: object, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(cast("list[object]", value)) <= most
        and all(map(_is_number, cast("list[object]", value)))
    )


def _is_number(value: object) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (
        type(value) is int and abs(value) < COUNT_MOST
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, str) for k, v in cast("dict[object, object]", value).items()
    )


_Check = tuple[Callable[[object], bool], str]
_REQUIRED: Mapping[str, _Check] = {
    "step": (is_count, "a count"),
    "steps_taken": (is_count, "a count"),
    "watch": (lambda value: isinstance(value, dict), "a table"),
    "job": (_is_text, "text"),
}
_OPTIONAL: Mapping[str, _Check] = {
    "versions": (_are_texts, "texts by name"),
    "machine": (_are_texts, "texts by name"),
    "created": (_is_number, "a time"),
}
"""The fields of a manifest, each with a check of its value and what it should be."""
