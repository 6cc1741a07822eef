"""Traffic: how much crosses the edges of the module graph in a step, and how much a simpler way would move.

Forward and, where the source trains, backward. A message between stages that share a rank stays where it is
and is not counted. The way to compare with sends a dp rank's rows whole to one leader of the other side, which
broadcasts them to the ranks along its tp and cp; there `n` ranks receive every byte. Here each byte crosses
once, to one of the `n`, and they gather the whole among themselves.
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
        bytes: what these messages carry.
        bytes_gathered: what the ranks along tp and cp of a dp rank then pass among themselves.
        bytes_leader_broadcast: what would be received if leaders exchanged whole dp ranks and broadcast them.
    """

    source: str
    target: str
    messages: int
    bytes: int
    bytes_gathered: int
    bytes_leader_broadcast: int


def message_bytes(step: Step, message: Message) -> int:
    """Return how large a message is, one way; nothing where it stays on its rank."""
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
    """Count what crosses an edge forward, and backward where the source trains up to it."""
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
    """Yield the messages over a link in a step, one way."""
    for microbatch in range(routes.step.topology.modules[link.target.module].microbatches):
        yield from routes.messages(link, microbatch)


def _ranks_per_dp_rank(routes: Routes, module: str) -> int:
    """Return how many ranks receive a dp rank's rows."""
    grid = routes.step.topology.modules[module].grid
    return grid.extent("tp") * grid.extent("cp")
