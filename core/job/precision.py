"""Precision: how many bytes a value has, in the networks and in the optimizer, by the job's `precision`."""

from collections.abc import Mapping


VALUE_BYTES: Mapping[str, int] = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight that a network computes with, and of an activation."""
MAIN_BYTES: Mapping[str, int] = {"fp64": 8, "fp32": 4, "bf16": 4, "fp16": 4}
"""Bytes of a gradient, of a main parameter and of each state that the optimizer keeps for it."""
HALF = frozenset({"bf16", "fp16"})
"""Precisions in which networks compute with a rounded copy of the main parameters."""
