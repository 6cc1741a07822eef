"""A generator behind a language model: it draws the answer. `mimogrid check` asks this file, which needs no torch."""


def build(*, reads, width, blocks, steps):
    """Build the network; called with the options of the job file, on the ranks that host the module."""
    from flow import Flow  # noqa: PLC0415 -- imports torch

    return Flow(reads, width, blocks, steps)
