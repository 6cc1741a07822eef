"""Towers and edges: whether the options of a `vit`, of projectors and of language models that read images agree.

Most options are independent. A check is here if two of them contradict each other, or if a stage lacks what an option
needs: rows of deepstack leave with those of the last layer and are added in the first stage of the target.
"""

import math
from collections.abc import Iterator, Mapping

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.job.models import ACTIVATIONS, INTERPOLATIONS, NORMS, POSITIONS, STEMS, BuiltIn, Gpt, Vit
from mimogrid.core.job.placement import layer_ranges
from mimogrid.core.job.projectors import KINDS, Projector, deepstack_layers
from mimogrid.core.job.spec import JobSpec, ModuleSpec
from mimogrid.core.job.validation.checks import above_zero, at_least, one_of


Fact = tuple[str, str, str]
"""An option, what is wrong with it, and the remedy."""


def tower_problems(name: str, spec: JobSpec) -> Iterator[Problem]:
    """Check the options of a module that other options or the stages restrict, and the projectors of its edges."""
    module, where = spec.modules[name], f"modules.{name}"
    model = module.options
    for target, projector in module.projector.items():
        yield from _projector(name, target, projector, module)
    if isinstance(model, Mapping):
        return
    facts = [*_layers(model)]
    if isinstance(model, Vit):
        for key, known in (
            ("stem", STEMS),
            ("positions", POSITIONS),
            ("position_interpolation", INTERPOLATIONS),
        ):
            yield from one_of(f"{where}.options.{key}", getattr(model, key), known)
        facts += [*_positions(model), *_class_token(model), *_leaving(name, module, model, spec)]
    if isinstance(model, Gpt):
        facts += [*_sections(model), *_deepstack(name, module, model, spec)]
    yield from (Problem(f"{where}.options.{key}", message, remedy) for key, message, remedy in facts)


def _layers(model: BuiltIn) -> Iterator[Fact]:
    """Yield what is wrong with options that list layers."""
    for key in ("full_layers", "dense_layers", "deepstack_layers"):
        strange = [layer for layer in getattr(model, key, ()) if layer not in range(model.layers)]
        if strange:
            yield key, f"has {strange[0]}, and the layers are 0 to {model.layers - 1}.", "Name layers only."
    if model.dense_layers and not model.experts:
        yield (
            "dense_layers",
            "lists layers without experts, and none has any.",
            "Leave it out, or set experts.",
        )


def _positions(model: Vit) -> Iterator[Fact]:
    """Yield what is wrong with the positions of a tower."""
    count, rotates = model.position_count, model.positions == "rotary_2d"
    if model.positions == "learned" and not count:
        yield "position_count", "is 0, and positions are learned.", "Set it to the patches of an image."
    if model.position_interpolation == "bilinear" and (not count or math.isqrt(count) ** 2 != count):
        yield "position_count", f"is {count}, and a table that is interpolated is a square.", "Use n * n."
    if rotates and model.head_width % 4:
        message = f"turns heads of width {model.head_width} along two directions, in pairs."
        yield "positions", message, "Give heads a width that is a multiple of 4."
    flat = {
        "merge": model.merge > 1,
        "window": model.window > 0,
        "positions": rotates,
        "position_interpolation": model.position_interpolation != "none",
    }
    if model.stem == "whisper" and (found := [key for key, needs in flat.items() if needs]):
        message = f"reads sounds, which have no height and width; {', '.join(found)} needs them."
        yield "stem", message, "Leave them out, or use a stem of patches."


def _class_token(model: Vit) -> Iterator[Fact]:
    """Yield what does not go with a class token, which lies in no plane of patches."""
    planes = {
        "a window": model.window > 0,
        "positions of height and width": model.positions == "rotary_2d",
        "interpolated positions": model.position_interpolation != "none",
        "a sound": model.stem == "whisper",
    }
    if model.class_token and (found := [what for what, has in planes.items() if has]):
        yield "class_token", f"has no place in {', '.join(found)}.", "Leave the class token out."
    if model.emit_class_token and not model.class_token:
        yield "emit_class_token", "is true, and there is no class token.", "Leave it out."
    if model.emit_class_token and (model.merge > 1 or model.pool > 1):
        message = "is true, and what it would be merged or averaged with are patches."
        yield "emit_class_token", message, "Leave it out, or merge and pool."


def _leaving(name: str, module: ModuleSpec, model: Vit, spec: JobSpec) -> Iterator[Fact]:
    """Yield what is wrong with rows that leave inner layers of a tower."""
    deep, key = model.deepstack_layers, "deepstack_layers"
    if not deep:
        return
    if list(deep) != sorted(set(deep)):
        yield key, f"is {list(deep)}.", "Name each layer once, in ascending order."
    if model.pool > 1:
        yield (
            key,
            "lists layers whose rows leave, and these are not averaged.",
            "Leave out pool, or the layers.",
        )
    if module.recompute == "full":
        message = "lists layers whose rows leave, and recompute = 'full' keeps what goes into a layer only."
        yield key, message, f'Use recompute = "selective" or "none" in modules.{name}.'
    begin = layer_ranges(module, model.layers)[-1].start
    if min(deep) < begin:
        message = f"has layer {min(deep)}, and the last stage, where rows leave, begins at layer {begin}."
        split = f", or a split whose last stage begins at layer {min(deep)}" if min(deep) else ""
        yield key, message, f"Use pp = 1{split}."
    for target in module.feeds:
        if module.projector.get(target, Projector()).kind != "merger":
            message = f"needs a merger for each layer, and the projector to '{target}' is none."
            yield key, message, f'Write kind = "merger" in modules.{name}.projector.{target}.'
        reader = spec.modules[target].options if target in spec.modules else None
        if not isinstance(reader, Gpt) or reader.deepstack != len(deep):
            has = f"deepstack = {reader.deepstack}" if isinstance(reader, Gpt) else "no layers that add them"
            message = f"lists {len(deep)} layers whose rows leave, and module '{target}' has {has}."
            yield key, message, f"Feed a gpt with deepstack = {len(deep)}."


def _sections(model: Gpt) -> Iterator[Fact]:
    """Yield what is wrong with multimodal positions."""
    sections, half = model.rotary_sections, model.head_width // 2
    if not sections:
        return
    if len(sections) != len(("time", "height", "width")) or min(sections) < 0 or sum(sections) != half:
        message = f"is {list(sections)}, and a head of width {model.head_width} has {half} angles."
        yield (
            "rotary_sections",
            message,
            f"Give three numbers, of time, height and width, that add up to {half}.",
        )


def _deepstack(name: str, module: ModuleSpec, model: Gpt, spec: JobSpec) -> Iterator[Fact]:
    """Yield what is wrong with rows that a language model adds after its first layers."""
    if not model.deepstack:
        return
    first = len(layer_ranges(module, model.layers)[0])
    if model.deepstack > first:
        message = f"is {model.deepstack}, and the first stage, where rows come in, has {first} layers."
        yield "deepstack", message, f"Give the first stage {model.deepstack} layers or more, with split."
    if not any(name in of.feeds and _emits_deep(of) for of in spec.modules.values()):
        message = f"is {model.deepstack}, and no module that feeds '{name}' emits rows of inner layers."
        yield "deepstack", message, "Leave it out, or give a vit deepstack_layers."


def _emits_deep(module: ModuleSpec) -> bool:
    return not isinstance(module.options, Mapping) and bool(deepstack_layers(module.options))


def _projector(name: str, target: str, projector: Projector, module: ModuleSpec) -> Iterator[Problem]:
    """Check a projector that the job has written."""
    where = f"modules.{name}.projector.{target}"
    if target not in module.feeds:
        message = f"module '{name}' does not feed '{target}'."
        yield Problem(where, message, nearest(target, module.feeds) if module.feeds else "Take it out.")
    yield from one_of(f"{where}.kind", projector.kind, KINDS)
    yield from one_of(f"{where}.activation", projector.activation, ACTIVATIONS)
    yield from one_of(f"{where}.norm", projector.norm, NORMS)
    yield from above_zero(f"{where}.norm_eps", projector.norm_eps)
    yield from at_least(f"{where}.ffn", projector.ffn, 0, "0: as wide as what it leads to.")
    if projector.kind == "merger" and not isinstance(module.options, Vit):
        message = f"module '{name}' is no vit, and has no patches to merge."
        yield Problem(f"{where}.kind", message, 'Use "linear" or "mlp".')
    if isinstance(module.options, Mapping) and module.width is None:
        message = f"the width of the rows that module '{name}' emits is not known."
        yield Problem(where, message, f"Set modules.{name}.width.")
