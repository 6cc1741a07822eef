"""Zig-zag: which positions of a sequence each rank of a context-parallel group computes.

Causal attention gives late positions more to do than early ones. So a sequence is cut into two chunks a rank,
and rank r has chunk r from the front and chunk r from the back: every rank has as many positions as any other,
and as many pairs of a position and one before it.

>>> [list(ZigZag(rank, size=2).positions(8)) for rank in range(2)]
[[0, 1, 6, 7], [2, 3, 4, 5]]
"""

from collections.abc import Iterator

import attrs


@attrs.frozen
class ZigZag:
    """The part of one rank of a group of `size`; of a group of one it is everything."""

    rank: int = 0
    size: int = 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """Which chunks of the sequence the rank has, in order; there are ``2 * size``."""
        return (self.rank, 2 * self.size - 1 - self.rank) if self.size > 1 else (0,)

    def positions(self, total: int) -> tuple[int, ...]:
        """Return the rank's positions, ascending; `total` of them are cut and divide into the chunks."""
        length = self._length(total)
        return tuple(p for chunk in self.chunks for p in range(chunk * length, (chunk + 1) * length))

    def everyone(self) -> "Iterator[ZigZag]":
        """Yield the parts of all ranks of the group, in its order."""
        return (ZigZag(rank, self.size) for rank in range(self.size))

    def gathered(self) -> tuple[int, ...]:
        """Return, chunk by chunk of the sequence, where it lies once the parts of all ranks are laid end to end.

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
