"""Learning rates: the rate of a step depends on the job and the step's number only."""

import math

from mimogrid.core.job.spec import OptimizerSpec


def learning_rate(optimizer: OptimizerSpec, *, step: int, steps: int, lr: float | None = None) -> float:
    """Return the rate of step `step` (from 0) of `steps`: linear warm-up, then the decay of the job.

    `lr` is the highest rate; None stands for the job's. A "wsd" rate (warm-up, stable, decay) stays at the highest
    until the last `decay_fraction` of all steps and then falls linearly.

    >>> warm = OptimizerSpec(lr=1.0, warmup_steps=2, decay="linear")
    >>> [learning_rate(warm, step=i, steps=6) for i in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    >>> stable = OptimizerSpec(lr=1.0, decay="wsd", decay_fraction=0.5)
    >>> [learning_rate(stable, step=i, steps=4, lr=2.0) for i in range(4)]
    [2.0, 2.0, 2.0, 1.0]
    """
    highest = optimizer.lr if lr is None else lr
    if step < optimizer.warmup_steps:
        return highest * (step + 1) / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(steps - optimizer.warmup_steps, 1)
    floor = optimizer.final_lr_fraction
    match optimizer.decay:
        case "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
        case "linear":
            left = 1 - done
        case "wsd":
            falling = optimizer.decay_fraction * steps
            left = min((steps - step) / falling, 1.0) if falling else 1.0
        case _:
            return highest
    return highest * (floor + (1 - floor) * left)
