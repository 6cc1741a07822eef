"""An image encoder that takes pixels. This file needs no torch, so `mimogrid check` can ask it."""


def describe(options):
    """Return what the plan must know: the width of the rows that the module emits."""
    return {"width": options["width"]}


def build(*, width):
    """Build the network; called with the options of the job file, on the ranks that host the module."""
    from convnet import Eyes  # noqa: PLC0415 -- imports torch

    return Eyes(width)
