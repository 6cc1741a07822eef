"""A custom module: what the plan must know about it, and how to build it. This file needs no torch."""


def describe(options):
    """Return what the plan must know: the width of the rows that the module emits."""
    return {"width": options["width"]}


def build(*, width, frames):
    """Build the network; called with the options of the job file, on the ranks that host the module."""
    from network import Ears  # noqa: PLC0415 -- imports torch

    return Ears(width, frames)
