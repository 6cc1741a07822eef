"""Zig-zag: which positions of a sequence each rank of a context-parallel group computes.

Under causal attention late positions cost more than early ones. So a sequence is split into two chunks per rank, and
rank r has chunk r from the front and chunk r from the back. All ranks then have the same number of positions, and of
pairs of a position and an earlier one.

>>> [list(ZigZag(rank, size=2).positions(8)) for rank in range(2)]
[[0, 1, 6, 7], [2, 3, 4, 5]]
"""

from collections.abc import Iterator

import attrs


@attrs.frozen
class ZigZag:
    """The part of one rank in a group of `size` ranks; in a group of one it is the whole sequence."""

    rank: int = 0
    size: int = 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunks of the sequence that the rank has, in order; there are ``2 * size`` chunks."""
        return (self.rank, 2 * self.size - 1 - self.rank) if self.size > 1 else (0,)

    def positions(self, total: int) -> tuple[int, ...]:
        """Return the rank's positions out of `total`, ascending; the number of chunks divides `total`."""
        length = self._length(total)
        return tuple(p for chunk in self.chunks for p in range(chunk * length, (chunk + 1) * length))

    def everyone(self) -> "Iterator[ZigZag]":
        """Yield the parts of all ranks of the group, in order of rank."""
        return (ZigZag(rank, self.size) for rank in range(self.size))

    def gathered(self) -> tuple[int, ...]:
        """Return for each chunk of the sequence its place when the parts of all ranks lie end to end.

        >>> ZigZag(0, size=2).gathered()
        (0, 2, 3, 1)
        """
        laid = [chunk for part in self.everyone() for chunk in part.chunks]
        return tuple(laid.index(chunk) for chunk in range(len(laid)))

    def _length(self, total: int) -> int:
        count = 2 * self.size if self.size > 1 else 1
        assert total % count == 0, f"{total} positions in {count} chunks"
        return total // count


WHOLE = ZigZag()
