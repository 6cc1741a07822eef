"""The optimizer: its class, its numbers, its groups of parameters."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from mimogrid.core.base.errors import Problem, nearest
from mimogrid.core.job.optimizers import KINDS, REFUSED, kind_of, matches
from mimogrid.core.job.spec import GroupSpec, JobSpec, LossScaleSpec, OptimizerSpec, SourceFacts
from mimogrid.core.job.validation.checks import above_zero, at_least, finite, one_of
from mimogrid.core.job.validation.parameters import names_of, nearest_parameter


DECAYS = ("constant", "cosine", "linear", "wsd")


def optimizer_problems(optimizer: OptimizerSpec) -> Iterator[Problem]:
    """Check the numbers of the optimizer."""
    yield from _kind(optimizer)
    yield from one_of("optimizer.decay", optimizer.decay, DECAYS)
    yield from finite("optimizer.lr", optimizer.lr, "Use 0 or more; 0 leaves the parameters as they are.")
    if optimizer.eps is not None:
        yield from above_zero("optimizer.eps", optimizer.eps)
    yield from above_zero("optimizer.bucket_mb", optimizer.bucket_mb)
    yield from finite("optimizer.cut_mb", optimizer.cut_mb, "0 turns cuts off.")
    yield from finite("optimizer.clip_norm", optimizer.clip_norm, "0 turns clipping off.")
    yield from finite("optimizer.weight_decay", optimizer.weight_decay)
    yield from at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    if not 0 <= optimizer.ema < 1:
        yield Problem(
            "optimizer.ema", f"is {optimizer.ema}.", "Use a number from 0 to below 1, such as 0.999."
        )
    for key in ("final_lr_fraction", "decay_fraction"):
        if not 0 <= getattr(optimizer, key) <= 1:
            yield Problem(f"optimizer.{key}", f"is {getattr(optimizer, key)}.", "Use a number from 0 to 1.")
    if not all(0 <= beta < 1 for beta in optimizer.betas or ()):
        yield Problem(
            "optimizer.betas",
            f"is {list(optimizer.betas or ())}: each is how much of a running mean is kept.",
            "Use numbers from 0 to below 1, such as [0.9, 0.95].",
        )
    yield from _loss_scale(optimizer.loss_scale)
    where, skip = "optimizer.skip_above", optimizer.skip_above
    yield from at_least(f"{where}.window", skip.window, 1)
    for key in ("norm", "loss"):
        if getattr(skip, key) and not 1 < getattr(skip, key) < math.inf:
            yield Problem(f"{where}.{key}", f"is {getattr(skip, key)}.", "Use a number above 1; 0: no limit.")


def _kind(optimizer: OptimizerSpec) -> Iterator[Problem]:
    """Check the class of the optimizer, and whether it has the arguments that the job sets."""
    where, name = "optimizer.name", optimizer.name.lower()
    if name in REFUSED:
        yield Problem(where, f"'{optimizer.name}' {REFUSED[name]}.", f"Use one of {', '.join(KINDS)}.")
    elif name not in KINDS:
        yield Problem(where, f"'{optimizer.name}' is not known.", nearest(name, tuple(KINDS)))
    if name not in KINDS:
        return
    kind = kind_of(optimizer)
    unknown = {
        "betas": kind.betas is None and optimizer.betas is not None,
        "eps": kind.eps is None and optimizer.eps is not None,
        "weight_decay": not kind.decays
        and any((optimizer.weight_decay, *(group.weight_decay for group in optimizer.groups))),
    }
    for key in (key for key, wrong in unknown.items() if wrong):
        yield Problem(f"optimizer.{key}", f"{kind.name} takes no {key}.", "Leave it out.")
    for key, value in optimizer.options.items():
        if key not in kind.options:
            known = nearest(key, tuple(kind.options)) if kind.options else "It has none: leave it out."
            yield Problem(f"optimizer.options.{key}", f"{kind.name} has no option '{key}'.", known)
        elif not _is_like(value, kind.options[key]):
            yield Problem(
                f"optimizer.options.{key}",
                f"is {value!r}; {kind.name} takes a value such as {kind.options[key]!r}.",
                "Use a value of that kind.",
            )


def _is_like(value: object, default: object) -> bool:
    """Whether a value has the kind of a default: a boolean, a number, or a pair of numbers."""
    if isinstance(default, tuple):
        pair = tuple(cast("Iterable[object]", value)) if isinstance(value, list | tuple) else ()
        return len(pair) == len(cast("tuple[object, ...]", default)) and all(_is_like(v, 0.0) for v in pair)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, int | float) and 0 <= value < math.inf


def _loss_scale(rule: LossScaleSpec) -> Iterator[Problem]:
    where = "optimizer.loss_scale"
    for key in ("initial", "minimum"):
        value = getattr(rule, key)
        if not (0 < value < math.inf and math.frexp(value)[0] == 0.5):  # noqa: PLR2004
            remedy = "Use a power of two, such as 65536: then scaling rounds nothing."
            yield Problem(f"{where}.{key}", f"is {value}, not a power of two.", remedy)
    for key, legal in (("growth", (2.0, 4.0)), ("backoff", (0.5, 0.25))):
        if getattr(rule, key) not in legal:
            remedy = f"Use {legal[0]} or {legal[1]}: then scaling rounds nothing."
            yield Problem(f"{where}.{key}", f"is {getattr(rule, key)}.", remedy)
    yield from at_least(f"{where}.interval", rule.interval, 1)


def group_problems(spec: JobSpec, source: SourceFacts) -> Iterator[Problem]:
    """Check that every group matches a parameter; those of custom modules are not known before they are built."""
    if not spec.optimizer.groups:
        return
    known = [(module, name) for module in spec.modules for name in names_of(module, spec, source)]
    own = {name for name, module in spec.modules.items() if isinstance(module.options, Mapping)}
    for i, group in enumerate(spec.optimizer.groups):
        where = f"optimizer.groups[{i}]"
        if group.lr is not None:
            yield from finite(f"{where}.lr", group.lr, "Use 0 or more; 0 leaves the parameters as they are.")
        if group.weight_decay is not None:
            yield from finite(f"{where}.weight_decay", group.weight_decay)
        if not group.modules and not group.match:
            yield Problem(where, "matches every parameter.", "Name modules = [...] or match = [...].")
        strangers = [module for module in group.modules if module not in spec.modules]
        for module in strangers:
            remedy = nearest(module, tuple(spec.modules))
            yield Problem(f"{where}.modules", f"no module is called '{module}'.", remedy)
        if strangers or own & set(group.modules or spec.modules):
            continue
        for pattern in group.match:
            alone = GroupSpec(modules=group.modules, match=(pattern,))
            if not any(matches(alone, module, name) for module, name in known):
                names = [f"{m}.{n}" for m, n in known if m in (group.modules or spec.modules)]
                fact = f"the pattern '{pattern}' matches no parameter."
                yield Problem(f"{where}.match", fact, nearest_parameter(pattern, names))
