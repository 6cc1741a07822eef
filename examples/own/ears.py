"""A module of one's own: what the plan must know of it, and how to build it. This file needs no torch."""


def describe(options):
    """Say what the plan must know: how wide the rows are that the module emits."""
    return {"width": options["width"]}


def build(*, width, frames):
    """Build the network; called on the ranks that hold it, with the options of the job file."""
    from network import Ears  # noqa: PLC0415 -- imports torch

    return Ears(width, frames)
