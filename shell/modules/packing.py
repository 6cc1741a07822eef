"""Packing: where the rows and tokens of a share are in the row of positions that a stage computes.

Rows travel flat, feeder after feeder. A stage computes one row: the positions of the share's samples end to end
(`core.base.row`). A packing says as index tensors where in the row of this rank each incoming row and token goes, and
which of its positions leave it, so that filling a row and emptying it are one operation each. Under context parallelism
a rank has a part of the positions, and the packing also says which rows are in that part.

>>> share = Share((), {"a": (2, 0, 1)}, (3, 2, 1), (3, 2, 1), ((1, 2), (), (0,)), 3, (6, 1), segments=(3, 2, 1))
>>> packing = pack(share, length=6, device=torch.device("cpu"))
>>> packing.incoming.tolist(), packing.text_tokens.tolist(), packing.row.positions.tolist()
([1, 2, 5, 0, 3, 4], [0, 3, 4], [[0, 1, 2, 0, 1, 0]])
"""

import functools
import itertools
from collections.abc import Iterable, Sequence

import attrs
import torch
from torch import Tensor

from mimogrid.core.base.errors import WorldError
from mimogrid.core.base.row import pieces
from mimogrid.core.base.samples import prefix_sums
from mimogrid.core.base.samples import share as share_of
from mimogrid.core.base.zigzag import WHOLE, ZigZag
from mimogrid.core.step.step import Share
from mimogrid.shell.device.device import SHARES_KEPT, sent
from mimogrid.shell.megatron.rows import SEGMENTS, PackedRow


SHOWN = 8
"""Positions that an error names."""

Counts = tuple[int, ...]
"""Rows of each sample, or positions in one."""


@attrs.frozen(eq=False)
class Portion:
    """The rows of a share that belong to one context-parallel rank.

    Attributes:
        incoming: Indices of the incoming rows, feeder after feeder, that this rank takes.
        outgoing: Indices of the share's positions that this rank computes.
        most: The largest number of positions that any cp rank computes.
        order: Place of each of the share's positions when those of all cp ranks lie end to end, each padded to `most`.
    """

    incoming: Tensor
    outgoing: Tensor
    most: int
    order: Tensor


@attrs.frozen(eq=False, kw_only=True)
class Entries:
    """Where the rows and tokens of a share are among the positions that this rank computes.

    Attributes:
        incoming: Entry of each incoming row, feeder after feeder, and then of each text token.
        text_tokens: Indices of the share's positions that are text.
        outgoing: Entry of each of the share's positions.
        portion: The rows of this cp rank; None without context parallelism.
    """

    incoming: Tensor
    text_tokens: Tensor
    outgoing: Tensor
    portion: Portion | None


@attrs.frozen(eq=False, kw_only=True)
class Packing(Entries):
    """The entries of a share in the row of this rank, the length of that row, and what its layers know of it.

    `sample_at` and `place_at` have for each position of the row its sample in the share and its place there, int64 [S].
    """

    length: int
    row: PackedRow
    sample_at: Tensor
    place_at: Tensor


@attrs.frozen
class TokenSplit:
    """Which of the tokens that `size` tp ranks have in common each of them routes to experts.

    Under sequence parallelism a rank routes the tokens in its part of the row, else an equal share.

    >>> [TokenSplit(rank, 2).of(torch.tensor([0, 2, 4, 1]), 8)[1].tolist() for rank in range(2)]
    [[0, 2], [4, 1]]
    >>> [TokenSplit(rank, 2, by_position=True).of(torch.tensor([0, 2, 4, 1]), 8)[1].tolist() for rank in range(2)]
    [[0, 2, 1], [0]]
    """

    rank: int = 0
    size: int = 1
    by_position: bool = False

    def of(self, entries: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return which of some entries of a row are this rank's, and their numbers in its own part."""
        if not self.by_position:
            mine = share_of(self.rank, self.size, len(entries))
            return torch.arange(mine.start, mine.stop), entries[mine.start : mine.stop]
        part = length // self.size
        which = (entries // part == self.rank).nonzero().squeeze(1)
        return which, entries[which] - part * self.rank


ALL = TokenSplit()


def pack(
    share: Share,
    *,
    length: int,
    device: torch.device,
    cut: ZigZag = WHOLE,
    token_split: TokenSplit = ALL,
    positions: tuple[Counts, ...] = (),
    finer: tuple[tuple[str, Counts], ...] = (),
) -> Packing:
    """Pack a share into rows of a length: the feeders' rows at their placeholders, and the text tokens between.

    `positions` are the rotary positions of the row of all cp ranks, axis by axis, where they do not count within each
    segment. `finer` are further segmentations, by name.
    """
    return _packed(
        Numbers.of(share),
        share.segments,
        length=length,
        cut=cut,
        token_split=token_split,
        device=device,
        positions=positions,
        finer=finer,
    )


def check_placeholders(tokens: Sequence[Tensor], share: Share) -> None:
    """Raise WorldError if the tokens of a share do not have -1 exactly at the placeholders of its description.

    `tokens` has one tensor for each sample that has any.
    """
    present = (
        (s, p) for s, n, p in zip(share.samples, share.positions, share.placeholders, strict=True) if n
    )
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
class Numbers:
    """The part of a share that its entries depend on: rows of each feeder, positions and placeholders of samples.

    A source module has a position for each vector that enters its layers, whatever rows these are made of.
    """

    fed: tuple[Counts, ...]
    positions: Counts
    placeholders: tuple[Counts, ...]

    @classmethod
    def of(cls, share: Share) -> "Numbers":
        """Return the numbers of a share."""
        if any(share.grids):
            whole = tuple(tuple(range(count)) for count in share.positions)
            return cls((share.positions,), share.positions, whole)
        return cls(tuple(share.rows.values()), share.positions, share.placeholders)

    def rows(self) -> Tensor:
        """Return the positions in the share of the incoming rows, feeder after feeder.

        Each feeder takes the next placeholders of a sample, as many as it has rows there.
        """
        begins, taken = prefix_sums(self.positions), [0] * len(self.positions)
        found: list[int] = []
        for counts in self.fed:
            for i, count in enumerate(counts):
                found += [begins[i] + p for p in self.placeholders[i][taken[i] : taken[i] + count]]
                taken[i] += count
        return _numbers(found)

    def entries(self, places: "Places", device: torch.device) -> Entries:
        """Return the entries of complete samples at their places; under cp, of this rank's part."""
        total = sum(self.positions)
        rows, out = self.rows(), torch.arange(total)
        is_text = torch.ones(total, dtype=torch.bool).index_fill_(0, rows, value=False)
        text = is_text.nonzero().squeeze(1)
        portion = None
        if places.cut.size > 1:
            of_rows, out, text = places.own(rows), places.own(out), text[places.own(text)]
            rows = rows[of_rows]
            order, most = places.gathered()
            portion = Portion(sent(of_rows, device), sent(out, device), most, sent(order, device))
        return Entries(
            incoming=sent(places.local[torch.cat((rows, text))], device),
            text_tokens=sent(text, device),
            outgoing=sent(places.local[out], device),
            portion=portion,
        )

    def samples(self) -> Tensor:
        """Return the sample of each position of the share."""
        return torch.arange(len(self.positions)).repeat_interleave(_numbers(self.positions))


@attrs.frozen(eq=False)
class Places:
    """For each position of a share: which cp rank computes it, and its entry there (`local`)."""

    cut: ZigZag
    rank: Tensor
    local: Tensor

    def own(self, positions: Tensor) -> Tensor:
        """Return the indices of those positions that are this rank's."""
        return (self.rank[positions] == self.cut.rank).nonzero().squeeze(1)

    def gathered(self) -> tuple[Tensor, int]:
        """Return the place of each position after a gather of all ranks' positions, and the largest count of a rank.

        Each rank pads its positions to that count before the gather, and has them in the order of the share.
        """
        counts = self.rank.bincount(minlength=self.cut.size)
        by_rank = self.rank.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        within = torch.empty_like(self.rank)
        within[by_rank] = torch.arange(len(self.rank)) - starts[self.rank[by_rank]]
        most = int(counts.max())
        return self.rank * most + within, most


# Evaluation packs every share twice, and each stage that a rank hosts packs the same share.


@functools.lru_cache(maxsize=SHARES_KEPT)
def _packed(
    numbers: Numbers,
    segments: Counts,
    *,
    length: int,
    cut: ZigZag,
    token_split: TokenSplit,
    device: torch.device,
    positions: tuple[Counts, ...],
    finer: tuple[tuple[str, Counts], ...],
) -> Packing:
    places = _places(segments, cut)
    mine = places.own(torch.arange(sum(segments)))
    which, routed = token_split.of(places.local[mine], length)
    samples = numbers.samples()
    within = torch.stack((samples, _within(numbers.positions)[0]))
    sample_at, place_at = sent(_local(within, mine, places, length), device)
    turned = torch.tensor(positions, dtype=torch.int64) if positions else _within(segments)
    row = PackedRow(
        pieces=pieces(segments, cut),
        segmentations={SEGMENTS: segments, **dict(finer)},
        positions=sent(_local(turned, mine, places, length), device),
        order=sent(places.rank * length + places.local, device) if cut.size > 1 else None,
        entries=sent(routed, device),
        sample_of=sent(samples[mine[which]], device),
        samples=len(numbers.positions),
    )
    entries = numbers.entries(places, device)
    return Packing(
        **attrs.asdict(entries, recurse=False), length=length, row=row, sample_at=sample_at, place_at=place_at
    )


def _places(segments: Counts, cut: ZigZag) -> Places:
    """Return where the positions of a row are."""
    rank, local = torch.empty(2, sum(segments), dtype=torch.int64)
    for part in cut.everyone():
        own = _numbers(itertools.chain(*itertools.chain(*pieces(segments, part))))
        rank[own], local[own] = part.rank, torch.arange(len(own))
    return Places(cut, rank, local)


def _within(segments: Counts) -> Tensor:
    """Return the position of each position within its segment, int64 [1, T of all ranks]."""
    lengths = _numbers(segments)
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return (torch.arange(len(starts)) - starts)[None]


def _local(of_all_PT: Tensor, mine: Tensor, places: Places, length: int) -> Tensor:
    """Return what this rank's positions have of a tensor of all positions, int64 [P, length]; zeros for padding."""
    local = of_all_PT.new_zeros(len(of_all_PT), length)
    local[:, places.local[mine]] = of_all_PT[:, mine]
    return local


def _numbers(of: Iterable[int]) -> Tensor:
    return torch.tensor(tuple(of), dtype=torch.int64)
