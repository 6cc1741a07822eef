"""Packing: where the rows of a share lie in the padded block of positions and samples that a stage computes.

Rows travel flat, sample after sample; a stage computes a block of S positions times B samples, and entry
(s, b) of the block is number s * B + b. A packing holds those numbers as index tensors, made once per share
from what the descriptions say, so that filling a block and emptying it are one operation each. Under context
parallelism a rank's block is its part of the positions, and a packing also says which rows that makes its own.

>>> share = Share((), {"a": (2, 0, 1)}, lengths=(2, 0, 1), placeholders=((0, 1), (), (0,)), total=3)
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
    """What of a share is one context-parallel rank's own.

    Attributes:
        incoming: which of the rows that come in, feeder after feeder, are put into its block.
        outgoing: which of the rows that the module emits lie in its block.
        most: how many rows the rank that emits most of them emits.
        order: where each emitted row lies once every rank's, filled up to `most`, are laid end to end.
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
        padded: (S, B) as the layers compute them: S rounded up to what tensor ranks can share under sequence
            parallelism, and neither of them 0. Nothing outside sees this padding.
        incoming: entry of each incoming row, feeder after feeder, and then of each text token.
        text_tokens: which of the share's tokens are text.
        outgoing: entry of each row that the module emits.
        tokens: entry, in the block that the layers compute on this rank, of each token that it routes to experts.
        mask: [B, 1, 1, keys], added to attention scores; None where no key is padding or all is causal. The
            keys are the padded S, of all context-parallel ranks one after the other.
        portion: which rows these are, where other ranks have the rest.
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
    """How `size` tensor-parallel ranks deal the tokens that they share, so that each is one rank's to route.

    Each has those in its part of the positions where sequence parallelism cuts them, else an equal share.

    >>> [TokenSplit(rank, 2).of([0, 2, 4, 1], (4, 2)) for rank in range(2)]
    [[0, 2], [4, 1]]
    >>> [TokenSplit(rank, 2, by_position=True).of([0, 2, 4, 1], (4, 2)) for rank in range(2)]
    [[0, 2, 1], [0]]
    """

    rank: int = 0
    size: int = 1
    by_position: bool = False

    def of(self, entries: list[int], block: tuple[int, int]) -> list[int]:
        """Return a rank's entries, as they are counted in its own block."""
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
    """Pack an encoder's share: as long as its longest sample; samples without rows are left out."""
    return _pack_rows(_Places.of(share), _Ranks(multiple, cut, token_split, device), dtype)


def pack_text(
    share: Share,
    *,
    sequence: int,
    multiple: int,
    device: torch.device,
    cut: ZigZag = WHOLE,
    token_split: TokenSplit = ALL,
) -> Packing:
    """Pack a language model's share: every sample, `sequence` positions each, rows at their placeholders."""
    return _pack_text(_Places.of(share), _Ranks(multiple, cut, token_split, device), sequence)


def check_placeholders(tokens: Sequence[Tensor], share: Share) -> None:
    """Raise WorldError where the -1 among the tokens of a share's samples are not the placeholders that are described.

    `tokens` are those of its samples that have any.
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
    """What of a share its packing depends on: rows of each feeder and of all, sample by sample, and where they lie."""

    fed: tuple[Counts, ...]
    lengths: Counts
    placeholders: tuple[Counts, ...]

    @classmethod
    def of(cls, share: Share) -> "_Places":
        return cls(tuple(share.rows.values()), share.lengths, share.placeholders)

    def entries(self, columns: Sequence[int], samples: int) -> tuple[list[int], list[int]]:
        """Return the entries of the rows that come in, and those of the rows that the module emits."""
        whole = _entries([range(length) for length in self.lengths], columns, samples)
        return self._incoming(columns, samples), whole

    def _incoming(self, columns: Sequence[int], samples: int) -> list[int]:
        """Return the entries of the rows, feeder after feeder; each feeder's are a block of a sample's places."""
        starts = [0] * len(self.placeholders)
        entries: list[int] = []
        for counts in self.fed:
            blocks = [p[a : a + n] for p, a, n in zip(self.placeholders, starts, counts, strict=True)]
            entries += _entries(blocks, columns, samples)
            starts = [a + n for a, n in zip(starts, counts, strict=True)]
        return entries


@attrs.frozen
class _Ranks:
    """How ranks share a block: what S must be a multiple of, the parts along cp, the tokens that tp ranks route."""

    multiple: int
    cut: ZigZag
    token_split: TokenSplit
    device: torch.device


# Few shares are packed twice in training, but all in evaluation, and by each stage that a rank hosts.


@functools.lru_cache(maxsize=256)
def _pack_rows(places: _Places, ranks: _Ranks, dtype: torch.dtype) -> Packing:
    cut, multiple = ranks.cut, ranks.multiple
    present = [length for length in places.lengths if length]
    longest, samples = max(present, default=0), len(present)
    # Only what is cut over cp is handed on with its padding, so that the next stage cuts it alike.
    positions = longest if cut.size == 1 else _round_up(longest, multiple * cut.size) // cut.size
    padded = max(_round_up(positions, multiple), multiple), max(samples, 1)
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
def _pack_text(places: _Places, ranks: _Ranks, sequence: int) -> Packing:
    samples = len(places.lengths)
    columns = range(samples)
    incoming, outgoing = places.entries(columns, samples)
    taken = set(_entries(places.placeholders, columns, samples))
    text_tokens = [token for token, entry in enumerate(outgoing) if entry not in taken]
    positions = sequence // ranks.cut.size
    padded = _round_up(positions, ranks.multiple), samples
    assert ranks.cut.size == 1 or padded[0] == positions, "the plan makes the parts of a sequence divide"
    return _packing(ranks, (positions, samples), padded, incoming, outgoing, text_tokens=text_tokens)


def _packing(
    ranks: _Ranks,
    block: tuple[int, int],
    padded: tuple[int, int],
    incoming: list[int],
    outgoing: list[int],
    *,
    text_tokens: Sequence[int] = (),
) -> Packing:
    """Return the packing, without a mask, of entries of whole samples; under cp, of those in this rank's part."""
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
    """For each entry of the whole block, which rank has it (`rank`), and its entry in that rank's (`local`)."""

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
        """Return which of the entries are this rank's."""
        return (self.rank[entries] == self.cut.rank).nonzero().squeeze(1)

    def gathered(self, entries: Tensor) -> tuple[Tensor, int]:
        """Return where each lies once every rank's, filled up to the most that one has, are gathered; and the most."""
        ranks = self.rank[entries]
        counts = ranks.bincount(minlength=self.cut.size)
        by_rank = ranks.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        within = torch.empty_like(ranks)
        within[by_rank] = torch.arange(len(ranks)) - starts[ranks[by_rank]]
        most = int(counts.max())
        return ranks * most + within, most


def _entries(places: Sequence[Sequence[int]], columns: Sequence[int], samples: int) -> list[int]:
    """Return the entries of positions, sample by sample; each sample is in a column of so many."""
    return [
        position * samples + column
        for column, positions in zip(columns, places, strict=False)
        for position in positions
    ]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
