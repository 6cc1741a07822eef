"""Timed stages: modules that sleep where others compute, so that any number of them runs on any number of cores."""


def describe(options):
    """Say how wide the rows are that the module emits."""
    return {"width": options["width"]}


def stage(*, width, forward_ms, backward_ms):
    """Build a stage that passes rows on through one layer."""
    from sleeping import Passes  # noqa: PLC0415 -- imports torch

    return Passes(width, forward_ms / 1e3, backward_ms / 1e3)


def loss(*, width, forward_ms, backward_ms):
    """Build the last stage: the sum of squares of what it is fed, through one layer."""
    from sleeping import Judges  # noqa: PLC0415

    return Judges(width, forward_ms / 1e3, backward_ms / 1e3)
