"""Packing: where the rows of a share lie in the padded block of positions and samples that a stage computes.

Rows travel flat, sample after sample. A stage computes a block of S positions times B samples, whose shape is the
share's (`Share.shape`). Entry (s, b) of the block is number s * B + b. A packing holds those numbers as index
tensors, so that filling a block and emptying it are one operation each. Under context parallelism a rank's block is
its part of the positions, and the packing also says which rows are in that part.

>>> share = Share((), {"a": (2, 0, 1)}, (2, 0, 1), placeholders=((0, 1), (), (0,)), total=3, shape=(2, 2))
>>> packing = pack_rows(share, multiple=1, dtype=torch.float32, device=torch.device("cpu"))
>>> packing.positions, packing.samples, packing.incoming.tolist()
(2, 2, [0, 2, 1])
>>> packing.mask.squeeze().tolist()  # the second sample has one row only
[[0.0, 0.0], [0.0, -inf]]
"""

import functools
import itertools
import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from mimogrid.core.base.errors import WorldError
from mimogrid.core.base.samples import share as share_of
from mimogrid.core.base.zigzag import WHOLE, ZigZag
from mimogrid.core.step.step import Share
from mimogrid.shell.device.device import sent


SHOWN = 8
"""Positions that an error names."""

Counts = tuple[int, ...]
"""Rows of each sample, or positions in one."""


@attrs.frozen(eq=False)
class Portion:
    """The rows of a share that belong to one context-parallel rank.

    Attributes:
        incoming: Indices of the incoming rows, feeder after feeder, that this rank puts into its block.
        outgoing: Indices of the module's rows that lie in this rank's block.
        most: The largest number of rows that any cp rank emits.
        order: Position of each emitted row in the concatenation of all cp ranks' rows, each padded to `most`.
    """

    incoming: Tensor
    outgoing: Tensor
    most: int
    order: Tensor


@attrs.frozen(eq=False)
class Packing:
    """Index tensors of a share.

    Attributes:
        positions: S, of this rank under context parallelism.
        samples: B.
        padded: (S, B) as the layers compute them. S is rounded up to what the tp ranks can split under sequence
            parallelism, and both are at least 1. Nothing outside the layers sees this padding.
        incoming: Entry of each incoming row, feeder after feeder, and then of each text token.
        text_tokens: Indices of the share's tokens that are text.
        outgoing: Entry of each row that the module emits.
        tokens: Entry of each token that this rank routes to experts, in the block that its layers compute.
        mask: [B, 1, 1, keys], added to attention scores; None if no key is padding or attention is causal. The
            keys are the padded S of all cp ranks, one after the other.
        portion: The rows of this cp rank; None without context parallelism.
    """

    positions: int
    samples: int
    padded: tuple[int, int]
    incoming: Tensor
    text_tokens: Tensor
    outgoing: Tensor
    tokens: Tensor
    mask: Tensor | None
    portion: Portion | None = None


@attrs.frozen
class TokenSplit:
    """Which of the tokens that `size` tp ranks have in common each of them routes to experts.

    Under sequence parallelism a rank routes the tokens in its part of the positions, else an equal share.

    >>> [TokenSplit(rank, 2).of([0, 2, 4, 1], (4, 2)) for rank in range(2)]
    [[0, 2], [4, 1]]
    >>> [TokenSplit(rank, 2, by_position=True).of([0, 2, 4, 1], (4, 2)) for rank in range(2)]
    [[0, 2, 1], [0]]
    """

    rank: int = 0
    size: int = 1
    by_position: bool = False

    def of(self, entries: list[int], block: tuple[int, int]) -> list[int]:
        """Return the entries of this rank, numbered as in its own block."""
        if not self.by_position:
            mine = share_of(self.rank, self.size, len(entries))
            return entries[mine.start : mine.stop]
        positions, samples = block
        part = positions // self.size * samples
        return [entry - part * self.rank for entry in entries if entry // part == self.rank]


ALL = TokenSplit()


def pack_rows(
    share: Share,
    *,
    multiple: int,
    dtype: torch.dtype,
    device: torch.device,
    cut: ZigZag = WHOLE,
    token_split: TokenSplit = ALL,
) -> Packing:
    """Pack the share of a module that reads rows. Samples without rows are left out of the block."""
    return _pack_rows(_Places.of(share), _Ranks(multiple, cut, token_split, device), dtype)


def pack_text(
    share: Share,
    *,
    multiple: int,
    device: torch.device,
    cut: ZigZag = WHOLE,
    token_split: TokenSplit = ALL,
) -> Packing:
    """Pack the share of a language model: its text tokens, and the feeders' rows at their placeholders."""
    return _pack_text(_Places.of(share), _Ranks(multiple, cut, token_split, device))


def check_placeholders(tokens: Sequence[Tensor], share: Share) -> None:
    """Raise WorldError if the tokens of a share do not have -1 exactly at the placeholders of its description.

    `tokens` has one tensor for each sample that has any.
    """
    present = ((s, p) for s, n, p in zip(share.samples, share.lengths, share.placeholders, strict=True) if n)
    for (sample, described), of_sample in zip(present, tokens, strict=True):
        found = (of_sample < 0).nonzero().squeeze(1).tolist()
        if sorted(described) != found:
            raise WorldError(
                f"sample {sample.id}: its tokens have {len(found)} placeholders (-1), its description has "
                f"{len(described)}, and they must be at the same positions.\n"
                f"    tokens: {_shown(found)}; description: {_shown(sorted(described))}. "
                "The source's load and describe disagree."
            )


def _shown(positions: Sequence[int]) -> str:
    shown = ", ".join(map(str, positions[:SHOWN]))
    return f"{shown}, ..." if len(positions) > SHOWN else shown or "none"


@attrs.frozen
class _Places:
    """The part of a share that its packing depends on: rows of each feeder, lengths, placeholders and shape."""

    fed: tuple[Counts, ...]
    lengths: Counts
    placeholders: tuple[Counts, ...]
    shape: tuple[int, int]

    @classmethod
    def of(cls, share: Share) -> "_Places":
        return cls(tuple(share.rows.values()), share.lengths, share.placeholders, share.shape)

    def entries(self, columns: Sequence[int], samples: int) -> tuple[list[int], list[int]]:
        """Return the entries of the incoming rows, and those of the rows that the module emits."""
        emitted = _entries([range(length) for length in self.lengths], columns, samples)
        return self._incoming(columns, samples), emitted

    def _incoming(self, columns: Sequence[int], samples: int) -> list[int]:
        """Return the entries of the incoming rows, feeder after feeder.

        Each feeder takes the next placeholders of a sample, as many as it has rows there.
        """
        starts = [0] * len(self.placeholders)
        entries: list[int] = []
        for counts in self.fed:
            blocks = [p[a : a + n] for p, a, n in zip(self.placeholders, starts, counts, strict=True)]
            entries += _entries(blocks, columns, samples)
            starts = [a + n for a, n in zip(starts, counts, strict=True)]
        return entries


@attrs.frozen
class _Ranks:
    """How ranks share a block: the multiple that S is padded to, the parts along cp, the tokens that tp ranks route."""

    multiple: int
    cut: ZigZag
    token_split: TokenSplit
    device: torch.device

    def block(self, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (S, B) of this rank's block, and the same as its layers compute them (`Packing.padded`)."""
        positions, samples = shape[0] // self.cut.size, shape[1]
        padded = max(_round_up(positions, self.multiple), self.multiple), max(samples, 1)
        # Only what the core has padded is cut over cp: the layers of all cp ranks must agree on the keys.
        assert self.cut.size == 1 or positions in {0, padded[0]}, "the core pads what cp ranks share"
        return (positions, samples), padded


# Evaluation packs every share twice, and each stage that a rank hosts packs the same share.


@functools.lru_cache(maxsize=256)
def _pack_rows(places: _Places, ranks: _Ranks, dtype: torch.dtype) -> Packing:
    cut, present = ranks.cut, [length for length in places.lengths if length]
    (positions, samples), padded = ranks.block(places.shape)
    columns = list(itertools.accumulate((length > 0 for length in places.lengths), initial=0))
    keys = [p for part in cut.everyone() for p in part.positions(padded[0] * cut.size)]
    mask = None
    if any(length < len(keys) for length in present):
        real = torch.tensor(keys) < torch.tensor(present)[:, None]
        mask = torch.zeros(samples, len(keys), dtype=dtype).masked_fill_(~real, -math.inf)
        mask = sent(mask[:, None, None, :], ranks.device)
    incoming, outgoing = places.entries(columns, samples)
    return attrs.evolve(_packing(ranks, (positions, samples), padded, incoming, outgoing), mask=mask)


@functools.lru_cache(maxsize=256)
def _pack_text(places: _Places, ranks: _Ranks) -> Packing:
    block, padded = ranks.block(places.shape)
    samples = block[1]
    columns = range(samples)
    incoming, outgoing = places.entries(columns, samples)
    of_rows = set(_entries(places.placeholders, columns, samples))
    text_tokens = [token for token, entry in enumerate(outgoing) if entry not in of_rows]
    return _packing(ranks, block, padded, incoming, outgoing, text_tokens=text_tokens)


def _packing(
    ranks: _Ranks,
    block: tuple[int, int],
    padded: tuple[int, int],
    incoming: list[int],
    outgoing: list[int],
    *,
    text_tokens: Sequence[int] = (),
) -> Packing:
    """Return the packing, without a mask, of the entries of complete samples; under cp, of this rank's part."""
    cut, device = ranks.cut, ranks.device
    rows_in, out, text = (
        torch.tensor(numbers, dtype=torch.int64) for numbers in (incoming, outgoing, text_tokens)
    )
    text_in, portion = out[text], None
    if cut.size > 1:
        parts = _Parts.of(cut, block)
        of_rows, of_text, of_out = parts.own(rows_in), parts.own(text_in), parts.own(out)
        order, most = parts.gathered(out)
        portion = Portion(sent(of_rows, device), sent(of_out, device), most, sent(order, device))
        text = text[of_text]
        rows_in, text_in, out = (
            parts.local[whole[own]] for whole, own in ((rows_in, of_rows), (text_in, of_text), (out, of_out))
        )
    routed = torch.tensor(ranks.token_split.of(out.tolist(), padded), dtype=torch.int64)
    return Packing(
        *block,
        padded=padded,
        incoming=sent(torch.cat((rows_in, text_in)), device),
        text_tokens=sent(text, device),
        outgoing=sent(out, device),
        tokens=sent(routed, device),
        mask=None,
        portion=portion,
    )


@attrs.frozen(eq=False)
class _Parts:
    """For each entry of the block of all cp ranks: which rank has it, and its entry in that rank's block (`local`)."""

    cut: ZigZag
    rank: Tensor
    local: Tensor

    @classmethod
    def of(cls, cut: ZigZag, block: tuple[int, int]) -> "_Parts":
        positions, samples = block
        rank, local = torch.empty(2, positions * cut.size, samples, dtype=torch.int64)
        for part in cut.everyone():
            own = list(part.positions(positions * cut.size))
            rank[own] = part.rank
            local[own] = torch.arange(positions * samples).view(positions, samples)
        return cls(cut, rank.flatten(), local.flatten())

    def own(self, entries: Tensor) -> Tensor:
        """Return the indices of those entries that are this rank's."""
        return (self.rank[entries] == self.cut.rank).nonzero().squeeze(1)

    def gathered(self, entries: Tensor) -> tuple[Tensor, int]:
        """Return the position of each entry after a gather of all ranks' entries, and the largest count of a rank.

        Each rank pads its entries to that count before the gather.
        """
        ranks = self.rank[entries]
        counts = ranks.bincount(minlength=self.cut.size)
        by_rank = ranks.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        within = torch.empty_like(ranks)
        within[by_rank] = torch.arange(len(ranks)) - starts[ranks[by_rank]]
        most = int(counts.max())
        return ranks * most + within, most


def _entries(places: Sequence[Sequence[int]], columns: Sequence[int], samples: int) -> list[int]:
    """Return the entries of positions, sample by sample; `columns` are the samples' columns in the block."""
    return [
        position * samples + column
        for column, positions in zip(columns, places, strict=False)
        for position in positions
    ]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
