"""Learning rates: the rate of a step, from the job and the step's number alone."""

import math

from mimogrid.core.spec import OptimizerSpec


def learning_rate(optimizer: OptimizerSpec, *, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) of `steps`: linear warm-up, then the decay of the job.

    >>> warm = OptimizerSpec(lr=1.0, warmup_steps=2, decay="linear")
    >>> [learning_rate(warm, step=i, steps=6) for i in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(steps - optimizer.warmup_steps, 1)
    floor = optimizer.final_lr_fraction
    match optimizer.decay:
        case "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
        case "linear":
            left = 1 - done
        case _:
            return optimizer.lr
    return optimizer.lr * (floor + (1 - floor) * left)
