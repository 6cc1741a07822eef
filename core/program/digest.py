"""The digest of a plan: what all ranks must have in common before they make a group."""

import hashlib

from mimogrid.core.program.lower import Program


def digest_of(program: Program) -> str:
    """Return a hash of a job as parsed, and of the order and the samples of its first training step."""
    first = program.routes.step
    topology = first.topology
    actions = "\n".join(map(str, program.order.actions))
    text = "\n\n".join(
        (repr(topology.spec), repr(topology.source), actions, repr(first.samples), repr(first.cells))
    )
    return hashlib.sha256(text.encode()).hexdigest()
