"""Parameters by name, and whether the patterns that freeze them match any."""

import difflib
import re
from collections.abc import Iterator, Mapping

import attrs

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.job.lora import lora_parameters
from mimogrid.core.job.models import Own, Vit
from mimogrid.core.job.placement import edge_shape, matches_any, model_of
from mimogrid.core.job.spec import JobSpec, ModuleSpec, SourceFacts


def freezing_problems(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    """Check that `frozen` and `trainable` are not both set, and that every pattern matches a parameter."""
    for name, module in spec.modules.items():
        if module.lora is not None and module.frozen is not False:
            yield Problem(
                f"modules.{name}",
                f"module '{name}' says both lora and frozen.",
                "lora freezes all but its own parameters: leave frozen out. trainable names what trains besides.",
            )
        elif module.trainable is not None and module.frozen is not False:
            yield Problem(
                f"modules.{name}",
                f"module '{name}' says both trainable and frozen.",
                "trainable freezes the rest, frozen trains the rest: keep one of them.",
            )
        else:
            yield from _patterns(name, module, spec, source)


def _patterns(name: str, module: ModuleSpec, spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    """Check that every pattern matches a parameter; those of a custom module are not known."""
    if isinstance(module.options, Mapping):
        return
    key, patterns = "trainable", module.trainable or ()
    if isinstance(module.frozen, tuple):
        key, patterns = "frozen", module.frozen
    names = names_of(name, spec, source) if patterns else []
    for pattern in patterns:
        if not any(matches_any(n, (pattern,)) for n in names):
            yield Problem(
                f"modules.{name}.{key}",
                f"the pattern '{pattern}' matches no parameter of module '{name}'.",
                nearest_parameter(pattern, names),
            )


def names_of(name: str, spec: JobSpec, source: SourceFacts) -> list[str]:
    """Return the names of a module's parameters, projectors included; of a custom module only its projectors'."""
    model = model_of(name, spec, source)
    if isinstance(model, Vit) and model.features is None:
        model = attrs.evolve(model, features=1)
    names = [parameter.name for parameter in model.parameters()]
    lora = spec.modules[name].lora
    if lora is not None and not isinstance(model, Own):
        names += [parameter.name for parameter in lora_parameters(model, lora)]
    for target in spec.modules[name].feeds:
        if target in spec.modules:
            written = spec.modules[name].projector.get(target)
            width, projector = edge_shape(model, model_of(target, spec, source), written)
            if projector and model.hidden:
                names += [p.name for p in projector.parameters(target, model, width)]
    return names


def nearest_parameter(pattern: str, names: list[str]) -> str:
    """Return the remedy for a pattern: a similar name, or the kinds of names; a large model has too many to list."""
    close = difflib.get_close_matches(pattern, names, n=1)
    kinds = dict.fromkeys(re.sub(r"\d+", "*", name) for name in names)
    return nearest(pattern, names) if close else f"Its parameters: {', '.join(kinds)}."
