"""Precision: the bytes of a value, in the networks and in the optimizer, by the `precision` of the job."""

from collections.abc import Mapping


VALUE_BYTES: Mapping[str, int] = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight in a network, and of an activation."""
MAIN_BYTES: Mapping[str, int] = {"fp64": 8, "fp32": 4, "bf16": 4, "fp16": 4}
"""Bytes of a gradient, of a main parameter, and of each optimizer state."""
HALF = frozenset({"bf16", "fp16"})
"""The precisions in which networks compute with a rounded copy of the main parameters."""
