"""Schedules: the orders that a job file may name, and which of them split a backward.

A split backward is two actions: the gradient of the inputs, which the stage before waits for, and the gradients of the
weights, which may come later.
"""

from collections.abc import Mapping


GPIPE, ONE_F_ONE_B, INTERLEAVED, ZB_H1, ZB_H2, AUTO = "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "auto"

SPLITS_BACKWARD: Mapping[str, bool] = {
    GPIPE: False,
    ONE_F_ONE_B: False,
    INTERLEAVED: False,
    ZB_H1: True,
    ZB_H2: True,
    AUTO: True,
}
"""Whether an order may split backwards, by its name."""
SCHEDULES = tuple(SPLITS_BACKWARD)
