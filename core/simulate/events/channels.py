r"""Channels: messages as pieces of time.

    rank 0   F0 --- SEND_F0 .            F1                posting takes no time and does not block
                             \
    channel                   carry --- arrive             bytes / bytes_per_s, one by one; then latency
                             /               \
    rank 1   RECV_F0 -------'                 WAIT --- F0  blocks

Each end of a message has its own copy of the channel. The peer's postings are those of the leader of the peer's class,
and both copies come to the same times. On an edge that does not overlap, a send blocks its rank instead.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence

from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.schedule.actions import Direction, Send, Transfer
from mimogrid.core.simulate.events.folded import FoldedProgram
from mimogrid.core.simulate.events.pieces import Pieces
from mimogrid.core.simulate.timeline import Interval, sent_as


Channel = tuple[int, int, bool, Direction]
"""A rank, its peer, whether the rank sends, and the direction in the pipeline."""


class _Posted:
    """One end of a transfer: its post, and for each message the peer, the bytes, the peer's post, and the arrival."""

    __slots__ = ("arrivals", "edge", "peer_posts", "post", "sizes")

    def __init__(self, edge: EdgeCosts, sizes: tuple[tuple[int, int], ...], post: int) -> None:
        self.edge = edge
        self.sizes = sizes
        self.post = post
        self.peer_posts: list[int] = [-1] * len(sizes)
        self.arrivals: list[int] = [-1] * len(sizes)


class Channels:
    """All messages of a walk. `matching` gives the other end of each transfer."""

    def __init__(self, folded: FoldedProgram, pieces: Pieces, matching: Mapping[Transfer, Transfer]) -> None:
        self._folded, self._pieces, self._matching = folded, pieces, matching
        self._posted: dict[tuple[int, Transfer], _Posted] = {}
        self._queues: dict[Channel, collections.deque[tuple[Transfer, int]]] = collections.defaultdict(
            collections.deque
        )
        self._carried: dict[Channel, int] = {}

    def post(self, rank: int, transfer: Transfer, before: int) -> int:
        """Post one end of each message; return the piece at whose end the rank goes on."""
        sends, sizes = isinstance(transfer, Send), self._folded.sizes(rank, transfer)
        _, edge = self._folded.link(transfer)
        blocks = sends and not edge.overlap
        blocked_s = sum(edge.carry_s(size) + edge.latency for _, size in sizes if size) if blocks else 0.0
        post = self._pieces.add((before,), blocked_s, (rank, transfer))
        self._posted[rank, transfer] = _Posted(edge, sizes, post)
        if edge.overlap:
            for i, (peer, size) in enumerate(sizes):
                if size:
                    self._queues[rank, peer, sends, transfer.direction].append((transfer, i))
        return post

    def arrivals(self, rank: int, transfer: Transfer) -> list[int]:
        """Return the pieces at whose ends the messages of a transfer have arrived; both ends are posted."""
        posted, sends = self._posted[rank, transfer], isinstance(transfer, Send)
        for i, (peer, size) in enumerate(posted.sizes):
            if size and posted.edge.overlap:
                channel = (rank, peer, sends, transfer.direction)
                while posted.arrivals[i] < 0:
                    self._carry(channel, *self._queues[channel].popleft())
            elif posted.arrivals[i] < 0:
                posted.peer_posts[i] = self._peer_post(peer, transfer)
                posted.arrivals[i] = self._pieces.add(
                    tuple(dict.fromkeys((posted.post, posted.peer_posts[i])))
                )
        return posted.arrivals

    def _carry(self, channel: Channel, transfer: Transfer, i: int) -> None:
        """Carry the next message of a channel: behind the message before it. After the latency it arrives."""
        rank, peer, sends, _ = channel
        posted = self._posted[rank, transfer]
        posted.peer_posts[i] = self._peer_post(peer, transfer)
        behind = dict.fromkeys((posted.post, posted.peer_posts[i], self._carried.get(channel, 0)))
        label = (rank, transfer) if sends else (peer, sent_as(transfer))
        carried = self._pieces.add(tuple(behind), posted.edge.carry_s(posted.sizes[i][1]), label)
        self._carried[channel] = carried
        posted.arrivals[i] = self._pieces.add((carried,), posted.edge.latency, label)

    def _peer_post(self, peer: int, transfer: Transfer) -> int:
        """Return the piece at whose end a peer has posted its end of a transfer."""
        return self._posted[self._folded.classes.leader[peer], self._matching[transfer]].post

    def intervals(self, ends: Sequence[float]) -> Iterator[tuple[int, Transfer, tuple[Interval, ...]]]:
        """Yield when the messages of a rank's transfer are on their way, if something waits for all of them."""
        for (rank, transfer), posted in self._posted.items():
            if -1 not in posted.arrivals:
                both = zip(posted.peer_posts, posted.arrivals, strict=True)
                yield rank, transfer, tuple((max(ends[posted.post], ends[p]), ends[a]) for p, a in both)
