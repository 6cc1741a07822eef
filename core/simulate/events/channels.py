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

from mimogrid.core.schedule.actions import Direction, Send, Transfer
from mimogrid.core.simulate.events.folded import End, FoldedProgram
from mimogrid.core.simulate.events.pieces import Pieces
from mimogrid.core.simulate.timeline import Interval, sent_as


class _Channel:
    """The messages of a rank to or from a peer in one direction that are not carried yet, and the last piece of these.

    A message is known by its end here, and by its place among the messages of that transfer.
    """

    __slots__ = ("carried", "waiting")

    def __init__(self) -> None:
        self.waiting: collections.deque[tuple[_Posted, int]] = collections.deque()
        self.carried = 0


class _Posted:
    """One end of a transfer: its post, and for each message the peer's post and the arrival."""

    __slots__ = ("arrivals", "channels", "end", "peer_posts", "post", "rank", "transfer")

    def __init__(
        self, rank: int, transfer: Transfer, end: End, channels: tuple[_Channel | None, ...], post: int
    ) -> None:
        self.rank, self.transfer, self.end, self.channels, self.post = rank, transfer, end, channels, post
        self.peer_posts: list[int] = [-1] * len(channels)
        self.arrivals: list[int] = [-1] * len(channels)


class Channels:
    """All messages of a walk. `matching` gives the other end of each transfer."""

    def __init__(self, folded: FoldedProgram, pieces: Pieces, matching: Mapping[Transfer, Transfer]) -> None:
        self._folded, self._pieces, self._matching = folded, pieces, matching
        self._posted: dict[int, dict[Transfer, _Posted]] = collections.defaultdict(dict)
        self._channels: dict[tuple[int, int, bool, Direction], _Channel] = collections.defaultdict(_Channel)
        self._of_end: dict[End, tuple[_Channel | None, ...]] = {}

    def post(self, rank: int, transfer: Transfer, before: int) -> int:
        """Post one end of each message; return the piece at whose end the rank goes on."""
        end, post = self._folded.end(rank, transfer), before
        channels = self._of_end.get(end)
        if channels is None:
            channels = self._of_end[end] = tuple(self._channels_of(rank, transfer, end))
        if isinstance(transfer, Send) and not end.edge.overlap:
            blocked_s = sum(end.edge.carry_s(size) + end.edge.latency for _, size in end.sizes if size)
            post = self._pieces.add((before,), blocked_s, (rank, transfer))
        posted = self._posted[rank][transfer] = _Posted(rank, transfer, end, channels, post)
        for i, channel in enumerate(channels):
            if channel:
                channel.waiting.append((posted, i))
        return post

    def _channels_of(self, rank: int, transfer: Transfer, end: End) -> Iterator[_Channel | None]:
        """Yield the channel of each message; None for one that takes no time of its own."""
        sends = isinstance(transfer, Send)
        for peer, size in end.sizes:
            carried = size and end.edge.overlap
            yield self._channels[rank, peer, sends, transfer.direction] if carried else None

    def arrivals(self, rank: int, transfer: Transfer) -> list[int]:
        """Return the pieces at whose ends the messages of a transfer have arrived; both ends are posted."""
        posted = self._posted[rank][transfer]
        for i, channel in enumerate(posted.channels):
            if channel:
                while posted.arrivals[i] < 0:
                    self._carry(channel, *channel.waiting.popleft())
            elif posted.arrivals[i] < 0:
                peer_post = posted.peer_posts[i] = self._peer_post(posted, i)
                behind = (posted.post,) if peer_post == posted.post else (posted.post, peer_post)
                posted.arrivals[i] = self._pieces.add(behind)
        return posted.arrivals

    def _carry(self, channel: _Channel, posted: _Posted, i: int) -> None:
        """Carry the next message of a channel: behind the message before it. After the latency it arrives."""
        peer, size = posted.end.sizes[i]
        peer_post = posted.peer_posts[i] = self._peer_post(posted, i)
        behind = tuple({posted.post: None, peer_post: None, channel.carried: None})
        transfer = posted.transfer
        label = (posted.rank, transfer) if isinstance(transfer, Send) else (peer, sent_as(transfer))
        edge = posted.end.edge
        carried = channel.carried = self._pieces.add(behind, edge.carry_s(size), label)
        posted.arrivals[i] = self._pieces.add((carried,), edge.latency, label)

    def _peer_post(self, posted: _Posted, i: int) -> int:
        """Return the piece at whose end a peer has posted its end of a message."""
        peer, _ = posted.end.sizes[i]
        return self._posted[self._folded.classes.leader[peer]][self._matching[posted.transfer]].post

    def intervals(self, ends: Sequence[float]) -> Iterator[tuple[int, Transfer, tuple[Interval, ...]]]:
        """Yield when the messages of a rank's transfer are on their way, if something waits for all of them."""
        for rank, mine in self._posted.items():
            for transfer, posted in mine.items():
                if -1 not in posted.arrivals:
                    both, post = zip(posted.peer_posts, posted.arrivals, strict=True), ends[posted.post]
                    yield rank, transfer, tuple([(max(post, ends[p]), ends[a]) for p, a in both])
