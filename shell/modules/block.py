"""Blocks: where the rows and tokens of a share are in a block of positions times samples, padded to one length.

Built-in modules compute a packed row. Networks of host programs compute blocks, as their own programs say. A block has
S positions times B samples (`Share.shape`); entry (s, b) is number s * B + b. Under context parallelism a rank's block
is its part of the positions.

>>> share = Share((), {"a": (2, 0, 1)}, (2, 0, 1), (2, 0, 1), ((0, 1), (), (0,)), total=3, shape=(2, 2))
>>> block = block_of_rows(share, multiple=1, dtype=torch.float32, device=torch.device("cpu"))
>>> block.positions, block.samples, block.incoming.tolist()
(2, 2, [0, 2, 1])
>>> block.mask.squeeze().tolist()  # the second sample has one row only
[[0.0, 0.0], [0.0, -inf]]
"""

import functools
import itertools
import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from mimogrid.core.base.zigzag import WHOLE, ZigZag
from mimogrid.core.step.step import Share
from mimogrid.shell.device.device import SHARES_KEPT, sent
from mimogrid.shell.modules.packing import ALL, Entries, Numbers, Places, TokenSplit


@attrs.frozen(eq=False, kw_only=True)
class Block(Entries):
    """The entries of a share in the block of this rank.

    Attributes:
        positions: S, of this rank under context parallelism.
        samples: B.
        padded: (S, B) as the layers compute them. S is rounded up to what the tp ranks can split under sequence
            parallelism, and both are at least 1. Nothing outside the layers sees this padding.
        tokens: Entry of each token that this rank routes to experts, in the block that its layers compute.
        mask: [B, 1, 1, keys], added to attention scores; None if no key is padding or attention is causal. The
            keys are the padded S of all cp ranks, one after the other.
    """

    positions: int
    samples: int
    padded: tuple[int, int]
    tokens: Tensor
    mask: Tensor | None


@attrs.frozen
class _Ranks:
    """How ranks share a block: the multiple that S is padded to, the parts along cp, the tokens that tp ranks route."""

    multiple: int
    cut: ZigZag
    token_split: TokenSplit
    device: torch.device

    def sizes(self, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (S, B) of this rank's block, and the same as its layers compute them (`Block.padded`)."""
        positions, samples = shape[0] // self.cut.size, shape[1]
        padded = max(-(-positions // self.multiple) * self.multiple, self.multiple), max(samples, 1)
        # Only what the core has padded is cut over cp: the layers of all cp ranks must agree on the keys.
        assert self.cut.size == 1 or positions in {0, padded[0]}, "the core pads what cp ranks share"
        return (positions, samples), padded


def block_of_rows(
    share: Share, *, multiple: int, dtype: torch.dtype, device: torch.device, cut: ZigZag = WHOLE
) -> Block:
    """Return the block of a module that reads rows. Samples without rows are left out of it."""
    return _rows_block(Numbers.of(share), share.shape, _Ranks(multiple, cut, ALL, device), dtype)


def block_of_text(
    share: Share, *, device: torch.device, cut: ZigZag = WHOLE, token_split: TokenSplit = ALL
) -> Block:
    """Return the block of a language model: its text tokens, and the feeders' rows at their placeholders."""
    return _text_block(Numbers.of(share), share.shape, _Ranks(1, cut, token_split, device))


@functools.lru_cache(maxsize=SHARES_KEPT)
def _rows_block(numbers: Numbers, shape: tuple[int, int], ranks: _Ranks, dtype: torch.dtype) -> Block:
    present = torch.tensor([count for count in numbers.positions if count])
    columns = list(itertools.accumulate((count > 0 for count in numbers.positions), initial=0))
    block = _block(numbers, shape, ranks, columns)
    cut, total = ranks.cut, block.padded[0] * ranks.cut.size
    mask = None
    if (present < total).any():
        keys = torch.tensor([p for part in cut.everyone() for p in part.positions(total)])
        mask = torch.zeros(len(present), total, dtype=dtype)
        mask = mask.masked_fill_(keys >= present[:, None], -math.inf)[:, None, None, :]
    return attrs.evolve(block, mask=None if mask is None else sent(mask, ranks.device))


@functools.lru_cache(maxsize=SHARES_KEPT)
def _text_block(numbers: Numbers, shape: tuple[int, int], ranks: _Ranks) -> Block:
    return _block(numbers, shape, ranks, range(shape[1]))


def _block(numbers: Numbers, shape: tuple[int, int], ranks: _Ranks, columns: Sequence[int]) -> Block:
    """Return the block, without a mask; `columns` are those of the samples."""
    (positions, samples), padded = ranks.sizes(shape)
    places = _places(numbers, positions, samples, columns, ranks.cut)
    out = places.local[places.own(torch.arange(len(places.local)))]
    _, routed = ranks.token_split.of(out, padded[0] * padded[1])
    entries = numbers.entries(places, ranks.device)
    return Block(
        **attrs.asdict(entries, recurse=False),
        positions=positions,
        samples=samples,
        padded=padded,
        tokens=sent(routed, ranks.device),
        mask=None,
    )


def _places(numbers: Numbers, positions: int, samples: int, columns: Sequence[int], cut: ZigZag) -> Places:
    """Return where the positions of a share are in the blocks of the cp ranks."""
    rank, local = torch.empty(2, positions * cut.size, dtype=torch.int64)
    for part in cut.everyone():
        own = list(part.positions(positions * cut.size))
        rank[own], local[own] = part.rank, torch.arange(positions)
    counts = zip(columns, numbers.positions, strict=False)
    place, column = (
        torch.tensor(list(of), dtype=torch.int64)
        for of in (
            [p for count in numbers.positions for p in range(count)],
            [column for column, count in counts for _ in range(count)],
        )
    )
    return Places(cut, rank[place], local[place] * samples + column)
