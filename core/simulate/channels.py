r"""Channels: messages as pieces of time.

    rank 0   F0 --- SEND_F0 .            F1                posting takes no time and does not block
                             \
    channel                   carry --- arrive             bytes / bytes_per_s, in turn; then latency
                             /               \
    rank 1   RECV_F0 -------'                 WAIT --- F0  blocks

Each end of a message keeps its own book of what is on the way: the peer's postings are those of whoever stands for
the peer, and both books come to the same. An edge that does not overlap holds up its sender instead.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence

from mimogrid.core.job.costs import EdgeCosts
from mimogrid.core.schedule.actions import Direction, Send, Transfer
from mimogrid.core.simulate.folded import Folded
from mimogrid.core.simulate.pieces import Pieces
from mimogrid.core.simulate.timeline import sent_as


Channel = tuple[int, int, bool, Direction]
"""A rank, its peer, whether it sends, and in which direction of the pipeline."""


class _Mail:
    """One end of the messages of a transfer: the peers with what each is sent, and the pieces of their ways."""

    __slots__ = ("arrived", "edge", "parcels", "post", "posted")

    def __init__(self, edge: EdgeCosts, parcels: tuple[tuple[int, int], ...], post: int) -> None:
        self.edge = edge
        self.parcels = parcels
        self.post = post
        self.posted: list[int] = [-1] * len(parcels)
        self.arrived: list[int] = [-1] * len(parcels)


class Channels:
    """All messages of a walk. `twins` gives the other end of each transfer."""

    def __init__(self, folded: Folded, pieces: Pieces, twins: Mapping[Transfer, Transfer]) -> None:
        self._folded, self._pieces, self._twins = folded, pieces, twins
        self._mail: dict[tuple[int, Transfer], _Mail] = {}
        self._sent: dict[Channel, collections.deque[tuple[Transfer, int]]] = collections.defaultdict(
            collections.deque
        )
        self._carried: dict[Channel, int] = {}

    def post(self, rank: int, transfer: Transfer, before: int) -> int:
        """Post one end of each message; return the piece at whose end the rank goes on."""
        sends, parcels = isinstance(transfer, Send), self._folded.parcels(rank, transfer)
        _, edge = self._folded.link(transfer)
        holds_up = sends and not edge.overlap
        took = sum(edge.carry_s(size) + edge.latency for _, size in parcels if size) if holds_up else 0.0
        post = self._pieces.add((before,), took, (rank, transfer))
        self._mail[rank, transfer] = _Mail(edge, parcels, post)
        if edge.overlap:
            for i, (peer, size) in enumerate(parcels):
                if size:
                    self._sent[rank, peer, sends, transfer.direction].append((transfer, i))
        return post

    def arrived(self, rank: int, transfer: Transfer) -> list[int]:
        """Return the pieces at whose end the messages of a transfer are there, both ends being posted."""
        mail, sends = self._mail[rank, transfer], isinstance(transfer, Send)
        for i, (peer, size) in enumerate(mail.parcels):
            if size and mail.edge.overlap:
                channel = (rank, peer, sends, transfer.direction)
                while mail.arrived[i] < 0:
                    self._carry(channel, *self._sent[channel].popleft())
            elif mail.arrived[i] < 0:
                mail.posted[i] = self._other_post(peer, transfer)
                mail.arrived[i] = self._pieces.add(tuple(dict.fromkeys((mail.post, mail.posted[i]))))
        return mail.arrived

    def _carry(self, channel: Channel, transfer: Transfer, i: int) -> None:
        """Send the next message of a channel on its way: it is carried after the one before it, and then arrives."""
        rank, peer, sends, _ = channel
        mail = self._mail[rank, transfer]
        mail.posted[i] = self._other_post(peer, transfer)
        behind = dict.fromkeys((mail.post, mail.posted[i], self._carried.get(channel, 0)))
        label = (rank, transfer) if sends else (peer, sent_as(transfer))
        carried = self._pieces.add(tuple(behind), mail.edge.carry_s(mail.parcels[i][1]), label)
        self._carried[channel] = carried
        mail.arrived[i] = self._pieces.add((carried,), mail.edge.latency, label)

    def _other_post(self, peer: int, transfer: Transfer) -> int:
        """Return the piece at whose end a peer has posted its end of a transfer."""
        return self._mail[self._folded.classes.leader[peer], self._twins[transfer]].post

    def ways(self, ends: Sequence[float]) -> Iterator[tuple[int, Transfer, tuple[tuple[float, float], ...]]]:
        """Yield when each message of a rank's transfer is on the way, if somebody waits for all of these."""
        for (rank, transfer), mail in self._mail.items():
            if -1 not in mail.arrived:
                both = zip(mail.posted, mail.arrived, strict=True)
                yield rank, transfer, tuple((max(ends[mail.post], ends[p]), ends[a]) for p, a in both)
