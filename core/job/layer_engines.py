"""Engines: whether a built-in module uses local layers or those of transformer-engine.

Both have the same parameters under the same names, so a checkpoint of one loads into the other. Local layers run on
any device in any precision, and round nothing more than the precision says. Layers of transformer-engine are faster in
half precision on CUDA, and only they multiply in fp8. A module's `engine` names one of the two or leaves the choice to
the machine:

>>> from mimogrid.core.job.models import Vit
>>> from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec
>>> module = ModuleSpec(model="vit", options=Vit(layers=1, hidden=8, heads=2))
>>> job = JobSpec(modules={"v": module}, data=DataSpec(source="-"), batch=BatchSpec(global_size=1), precision="bf16")
>>> choose("v", job, missing="")
Choice(engine='transformer_engine', reason='', version='')
>>> choose("v", job, missing="there is no CUDA device")
Choice(engine='local', reason='there is no CUDA device', version='')
"""

from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.base.errors import PlanError, Problem
from mimogrid.core.job.models import PARTS, BuiltIn
from mimogrid.core.job.precision import HALF
from mimogrid.core.job.schedules import SPLITS_BACKWARD
from mimogrid.core.job.spec import JobSpec, ModuleSpec


AUTO, LOCAL, TRANSFORMER_ENGINE = "auto", "local", "transformer_engine"
ENGINES = (AUTO, LOCAL, TRANSFORMER_ENGINE)
FORMATS = ("none", "hybrid", "e4m3")
"""Formats of fp8: `hybrid` is e4m3 in the forward and e5m2 in the backward."""
FP8_MULTIPLE = 16
"""The sizes of a matrix product in fp8 are multiples of this."""


@attrs.frozen
class Choice:
    """The layers that a module gets on a machine.

    `reason` says why they are local although the job would permit transformer-engine. `version` is that of
    transformer-engine if the layers are its own: kernels and fp8 recipes depend on it.
    """

    engine: str
    reason: str
    version: str = ""


def choose(name: str, spec: JobSpec, *, missing: str, version: str = "") -> Choice:
    """Return the layers that a module gets.

    `missing` says what transformer-engine lacks on this machine ("": nothing), `version` which version is installed.
    Raises PlanError if the job asks for layers that the machine does not have.
    """
    module, where = spec.modules[name], f"modules.{name}"
    if module.engine == LOCAL:
        return Choice(LOCAL, "the job asks for local layers")
    against = list(_objections(module, spec))
    if module.engine == AUTO and spec.precision not in HALF:
        against.append(f"in {spec.precision} local layers are as good")
    if not missing and not against:
        return Choice(TRANSFORMER_ENGINE, "", version)
    if module.engine == TRANSFORMER_ENGINE:
        remedy = 'Install mimogrid[gpu] on a machine with CUDA, or use engine = "auto".'
        raise PlanError([Problem(f"{where}.engine", f"asks for transformer-engine, but {missing}.", remedy)])
    if module.fp8 != "none":
        remedy = 'Install mimogrid[gpu] on a machine with CUDA, or use fp8 = "none".'
        raise PlanError([Problem(f"{where}.fp8", f"needs transformer-engine, but {missing}.", remedy)])
    return Choice(LOCAL, "; ".join(filter(None, (missing, *against))))


def unlike(choices: Mapping[int, Mapping[str, Choice]]) -> Iterator[str]:
    """Yield the modules that ranks would compute with different layers; `choices` are by rank and module.

    >>> there, not_there = Choice(TRANSFORMER_ENGINE, ""), Choice(LOCAL, "transformer-engine is not installed")
    >>> list(unlike({0: {"v": there}, 1: {"l": not_there}, 2: {"l": not_there}}))
    []
    >>> print(*unlike({0: {"l": there}, 1: {"l": not_there}, 2: {"l": not_there}}))
    modules.l: transformer_engine on ranks [0], local on ranks [1, 2] (transformer-engine is not installed)
    >>> old, new = Choice(TRANSFORMER_ENGINE, "", "2.9.0"), Choice(TRANSFORMER_ENGINE, "", "2.11.0")
    >>> print(*unlike({0: {"l": old}, 1: {"l": new}, 2: {"l": old}}))
    modules.l: transformer_engine 2.9.0 on ranks [0, 2], transformer_engine 2.11.0 on ranks [1]
    """
    for name in sorted({name for chosen in choices.values() for name in chosen}):
        ranks: dict[Choice, list[int]] = {}
        for rank, chosen in sorted(choices.items()):
            if name in chosen:
                ranks.setdefault(chosen[name], []).append(rank)
        if len({(choice.engine, choice.version) for choice in ranks}) > 1:
            found = (
                f"{choice.engine} {choice.version}".strip()
                + f" on ranks {on}"
                + (f" ({choice.reason})" if choice.reason else "")
                for choice, on in ranks.items()
            )
            yield f"modules.{name}: {', '.join(found)}"


def engine_problems(name: str, spec: JobSpec) -> Iterator[Problem]:
    """Yield what a module asks for and no machine can do."""
    module, where = spec.modules[name], f"modules.{name}"
    asks_for_fp8 = module.fp8 != "none"
    if module.engine == TRANSFORMER_ENGINE or asks_for_fp8:
        key = "fp8" if asks_for_fp8 else "engine"
        for fact in _objections(module, spec):
            remedy = 'Leave out fp8, and use engine = "auto" or "local".'
            yield Problem(f"{where}.{key}", f"transformer-engine cannot compute this module: {fact}.", remedy)
    if not asks_for_fp8:
        return
    if module.engine == LOCAL:
        remedy = 'Use engine = "auto" or "transformer_engine".'
        yield Problem(f"{where}.fp8", "local layers do not multiply in fp8.", remedy)
    if spec.precision != "bf16":
        fact = f"multiplies in fp8 what is otherwise bf16, and the precision is {spec.precision}."
        yield Problem(f"{where}.fp8", fact, 'Use precision = "bf16".')
    if isinstance(module.options, BuiltIn):
        for size in ("hidden", "ffn"):
            value, parts = getattr(module.options, size), module.grid.tp
            if value % (FP8_MULTIPLE * parts):
                fact = f"needs sizes in multiples of {FP8_MULTIPLE}; {size} is {value} over tp = {parts}."
                yield Problem(f"{where}.fp8", fact, f"Use a multiple of {FP8_MULTIPLE * parts}.")
    if module.grid.cp > 1:
        yield Problem(f"{where}.fp8", "does not go with context parallelism yet.", "Use cp = 1.")


def _objections(module: ModuleSpec, spec: JobSpec) -> Iterator[str]:
    """Yield the reasons why layers of transformer-engine cannot compute a module."""
    if not isinstance(module.options, BuiltIn):
        yield "it is not a built-in model"
    elif module.options.experts:
        yield "its layers have experts"
    elif options := module.options.changed(PARTS):
        yield f"it changes {', '.join(options)}"
    if module.lora is not None:
        yield "LoRA is beside local layers"
    if spec.precision == "fp64":
        yield "it knows no fp64"
    if SPLITS_BACKWARD.get(spec.schedule.name):
        yield f"schedule '{spec.schedule.name}' may split its backward in two"
