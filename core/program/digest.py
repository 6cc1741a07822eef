"""The digest of a plan: what all ranks must have in common before they make a group."""

import hashlib

from mimogrid.core.program.lower import orders
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Topology


def digest_of(topology: Topology, first: Step) -> str:
    """Return a hash of the job as parsed, its order, and the samples of its first step."""
    order = "\n".join(map(str, orders(topology)[True].actions))
    text = "\n\n".join((repr(topology.spec), repr(topology.source), order, repr(first.samples)))
    return hashlib.sha256(text.encode()).hexdigest()
