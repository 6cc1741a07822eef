"""The digest of a plan: what all ranks must have in common before they make a group."""

import hashlib

from mimogrid.core.schedule.order import Order
from mimogrid.core.step.step import Step


def digest_of(first: Step, order: Order) -> str:
    """Return a hash of a job as parsed, its order for training, and the samples of its first step."""
    topology = first.topology
    actions = "\n".join(map(str, order.actions))
    text = "\n\n".join(
        (repr(topology.spec), repr(topology.source), actions, repr(first.samples), repr(first.cells))
    )
    return hashlib.sha256(text.encode()).hexdigest()
