"""Decisions: whether the world takes a step or skips it, and the loss scale of the next step.

All ranks see the same records (`reductions.exact_terms`), so each computes the same decision from the same numbers
before anything changes. No module moves its loss scale, its step count or its weights on its own. The world skips a
step if

- a gradient or a loss of any rank is not finite; in fp16 the loss scale then falls, and it rises again after a
  number of finite steps;
- the gradient norm or the loss is far above its recent median (`optimizer.skip_above`). The window includes
  skipped steps, so a lasting change of level is accepted after half a window.

>>> skip_state = SkipState(scale=4.0)
>>> rule = OptimizerSpec(loss_scale=LossScaleSpec(interval=2))
>>> for finite in (True, True, False):
...     skip_state, reason = decide(skip_state, rule, loss=1.0, norm=1.0, finite=finite, half=True)
...     print(skip_state.scale, reason or "taken")
4.0 taken
8.0 taken
4.0 a loss or gradient was not finite
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import attrs

from mimogrid.core.job.spec import LossScaleSpec, OptimizerSpec, TrainSpec


@attrs.frozen
class SkipState:
    """The state that decisions depend on besides the step; the same on every rank, and part of a checkpoint.

    Attributes:
        scale: The loss scale; it multiplies every loss before its backward.
        good: Finite steps since the scale last changed.
        losses: Losses of recent steps, oldest first.
        norms: Gradient norms of recent steps, oldest first.
    """

    scale: float = 1.0
    good: int = 0
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()

    @classmethod
    def first(cls, optimizer: OptimizerSpec, precision: str) -> "SkipState":
        """Return the state at the start of a run."""
        return cls(scale=optimizer.loss_scale.initial if precision == "fp16" else 1.0)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "SkipState":
        """Return a skip state from what `attrs.asdict` made of it, read back from JSON."""
        return cls(facts["scale"], facts["good"], tuple(facts["losses"]), tuple(facts["norms"]))


def decide(
    skip_state: SkipState, optimizer: OptimizerSpec, *, loss: float, norm: float, finite: bool, half: bool
) -> tuple[SkipState, str]:
    """Return the skip state after a step, and the reason to skip the step; "" if the world takes it.

    `finite` says whether every gradient of every rank is finite, `half` whether there is a loss scale to adapt.
    """
    if not (finite and math.isfinite(loss) and math.isfinite(norm)):
        return (
            _fallen(skip_state, optimizer.loss_scale) if half else skip_state
        ), "a loss or gradient was not finite"
    rule = optimizer.skip_above
    reason = _too_high("loss", loss, skip_state.losses, rule.loss, rule.window) or _too_high(
        "gradient norm", norm, skip_state.norms, rule.norm, rule.window
    )
    if half:
        skip_state = _risen(skip_state, optimizer.loss_scale)
    if rule.loss:
        skip_state = attrs.evolve(skip_state, losses=(*skip_state.losses, loss)[-rule.window :])
    if rule.norm:
        skip_state = attrs.evolve(skip_state, norms=(*skip_state.norms, norm)[-rule.window :])
    return skip_state, reason


def _too_high(what: str, value: float, recent: tuple[float, ...], most: float, window: int) -> str:
    if not most or len(recent) < window:
        return ""
    median = statistics.median(recent)
    above = value > most * median
    return f"the {what} {value:.4g} is above {most:g} times its recent median {median:.4g}" if above else ""


def _fallen(skip_state: SkipState, rule: LossScaleSpec) -> SkipState:
    return attrs.evolve(skip_state, scale=max(skip_state.scale * rule.backoff, rule.minimum), good=0)


def _risen(skip_state: SkipState, rule: LossScaleSpec) -> SkipState:
    if skip_state.good + 1 < rule.interval:
        return attrs.evolve(skip_state, good=skip_state.good + 1)
    grown = skip_state.scale * rule.growth
    return attrs.evolve(skip_state, scale=grown if math.isfinite(grown) else skip_state.scale, good=0)


def is_passed_over(train: TrainSpec, step: int) -> bool:
    """Whether the job leaves a step out (`train.skip_steps`): nothing reads its samples.

    >>> [is_passed_over(TrainSpec(skip_steps=(1, (3, 4))), step) for step in range(6)]
    [False, True, False, True, True, False]
    """
    return any(
        entry == step if isinstance(entry, int) else entry[0] <= step <= entry[1]
        for entry in train.skip_steps
    )
