"""Traffic: the bytes that cross the edges of the module graph in a step, and what a simpler exchange would move.

Forwards count, and backwards if the source trains. A message between stages on the same rank stays there and does
not count.

In the simpler exchange a leader sends all rows of a dp rank to one leader of the other side, which broadcasts them
to its `n` tp and cp ranks: `n` ranks receive every byte from outside. Here each byte crosses once, to one of the
`n` ranks, and these all-gather the rows.
"""

from collections.abc import Iterator

import attrs

from mimogrid.core.job.precision import VALUE_BYTES
from mimogrid.core.step.routes import Message, Routes
from mimogrid.core.step.step import Step
from mimogrid.core.topology.topology import Link


@attrs.frozen
class EdgeTraffic:
    """The traffic of an edge in one step.

    Attributes:
        source: the module that emits the rows.
        target: the module that reads them.
        messages: sends from one rank to another.
        bytes: bytes in these messages.
        bytes_gathered: bytes that the tp and cp ranks of the dp ranks then gather from each other.
        bytes_leader_broadcast: bytes that ranks would receive if leaders exchanged all rows and broadcast them.
    """

    source: str
    target: str
    messages: int
    bytes: int
    bytes_gathered: int
    bytes_leader_broadcast: int


def message_bytes(step: Step, message: Message) -> int:
    """Return the bytes of a message in one direction; 0 if it stays on its rank."""
    if message.rank_source == message.rank_target:
        return 0
    value = VALUE_BYTES[step.topology.spec.precision]
    if message.link.edge:
        return message.rows * message.link.edge.width * value
    positions, samples, hidden = step.hidden_shape(message.link.target, message.dp_rank, message.microbatch)
    return positions * samples * hidden * value


def edge_traffic(step: Step) -> tuple[EdgeTraffic, ...]:
    """Return the traffic of every edge, in the order of `topology.edges`."""
    routes = Routes(step)
    return tuple(_traffic(routes, link) for link in step.topology.links if link.edge)


def _traffic(routes: Routes, link: Link) -> EdgeTraffic:
    """Count what crosses an edge forward, and backward if gradients flow over it."""
    assert link.edge
    topology = routes.step.topology
    messages = tuple(_messages(routes, link))
    row_bytes = link.edge.width * VALUE_BYTES[topology.spec.precision]
    total = row_bytes * sum(message.rows for message in messages)
    crossing = [message for message in messages if message.rank_source != message.rank_target]
    receivers = [_ranks_per_dp_rank(routes, link.target.module)]
    if topology.stages[link.source].trains_up_to(link):
        receivers.append(_ranks_per_dp_rank(routes, link.source.module))
    return EdgeTraffic(
        source=link.edge.source,
        target=link.edge.target,
        messages=len(crossing) * len(receivers),
        bytes=row_bytes * sum(message.rows for message in crossing) * len(receivers),
        bytes_gathered=total * sum(n - 1 for n in receivers),
        bytes_leader_broadcast=total * sum(receivers),
    )


def _messages(routes: Routes, link: Link) -> Iterator[Message]:
    """Yield the messages on a link in a step, in one direction."""
    for microbatch in range(routes.step.topology.modules[link.target.module].microbatches):
        yield from routes.messages(link, microbatch)


def _ranks_per_dp_rank(routes: Routes, module: str) -> int:
    """Return how many ranks hold the rows of one dp rank."""
    grid = routes.step.topology.modules[module].grid
    return grid.extent("tp") * grid.extent("cp")
