"""Packing: where the rows of a share lie in the padded block of positions and samples that a stage computes.

Rows travel flat, sample after sample; a stage computes a block of S positions times B samples, and entry
(s, b) of the block is number s * B + b. A packing holds those numbers as index tensors, made once per share
from what the descriptions say, so that filling a block and emptying it are one operation each.

>>> share = Share((), {"a": (2, 0, 1)}, lengths=(2, 0, 1), placeholders=((0, 1), (), (0,)))
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

from mimogrid.core.errors import WorldError
from mimogrid.core.steps import Share


Counts = tuple[int, ...]
Places = tuple[tuple[int, ...], ...]


@attrs.frozen(eq=False)
class Packing:
    """Index tensors of a share.

    Attributes:
        positions: S.
        samples: B.
        padded: (S, B) as the layers compute them: S rounded up to what tensor ranks can share under sequence
            parallelism, and neither of them 0. Nothing outside sees this padding.
        incoming: entry of each incoming row, feeder after feeder, and then of each text token.
        text_tokens: which of the share's tokens are text.
        outgoing: entry of each row that the module emits.
        mask: [B, 1, 1, padded S], added to attention scores; None where no key is padding or all is causal.
    """

    positions: int
    samples: int
    padded: tuple[int, int]
    incoming: Tensor
    text_tokens: Tensor
    outgoing: Tensor
    mask: Tensor | None


def pack_rows(share: Share, *, multiple: int, dtype: torch.dtype, device: torch.device) -> Packing:
    """Pack an encoder's share: as long as its longest sample; samples without rows are left out."""
    return _pack_rows(
        rows=tuple(share.rows.values()),
        lengths=share.lengths,
        places=share.placeholders,
        multiple=multiple,
        dtype=dtype,
        device=device,
    )


def pack_text(share: Share, *, sequence: int, multiple: int, device: torch.device) -> Packing:
    """Pack a language model's share: every sample, `sequence` positions each, rows at their placeholders."""
    return _pack_text(
        rows=tuple(share.rows.values()),
        lengths=share.lengths,
        places=share.placeholders,
        sequence=sequence,
        multiple=multiple,
        device=device,
    )


def check_placeholders(tokens: Tensor, share: Share, packing: Packing) -> None:
    """Raise WorldError where the -1 among a share's tokens are not the placeholders that are described.

    Reads the tokens: ask before they go to a device that computes asynchronously.
    """
    text = tokens.index_select(0, packing.text_tokens)
    missing = tokens.numel() - text.numel()
    if int((tokens < 0).sum()) == missing and not bool((text < 0).any()):
        return
    start = 0
    for sample, length, described in zip(share.samples, share.lengths, share.placeholders, strict=True):
        found = (tokens[start : start + length] < 0).nonzero().squeeze(1).tolist()
        start += length
        if sorted(described) != found:
            raise WorldError(
                f"sample {sample.id}: its tokens have {len(found)} placeholders (-1), its description has "
                f"{len(described)}, and they must be at the same positions.\n"
                f"    tokens: {_shown(found)}; description: {_shown(sorted(described))}. "
                "The source's load and describe disagree."
            )


def _shown(positions: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, positions[:most]))
    return f"{shown}, ..." if len(positions) > most else shown or "none"


# Few shares are packed twice in training, but all in evaluation, and by each stage that a rank hosts.


@functools.lru_cache(maxsize=256)
def _pack_rows(
    *,
    rows: tuple[Counts, ...],
    lengths: Counts,
    places: Places,
    multiple: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Packing:
    present = [length for length in lengths if length]
    positions, samples = max(present, default=0), len(present)
    padded = _round_up(positions, multiple), max(samples, 1)
    columns = list(itertools.accumulate((length > 0 for length in lengths), initial=0))
    valid = _entries([range(length) for length in lengths], columns, samples)
    mask = None
    if any(length < padded[0] for length in present):
        keys = torch.arange(padded[0], device=device)
        real = keys < torch.tensor(present, device=device)[:, None]
        mask = torch.zeros(samples, padded[0], dtype=dtype, device=device).masked_fill_(~real, -math.inf)
        mask = mask[:, None, None, :]
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    outgoing = torch.tensor(valid, dtype=torch.int64, device=device)
    # One feeder's rows lie as the emitted ones do; several feeders' are interleaved sample by sample.
    incoming = outgoing if len(rows) == 1 else _incoming(rows, places, columns, samples, device)
    return Packing(positions, samples, padded, incoming, nothing, outgoing, mask)


@functools.lru_cache(maxsize=256)
def _pack_text(
    *,
    rows: tuple[Counts, ...],
    lengths: Counts,
    places: Places,
    sequence: int,
    multiple: int,
    device: torch.device,
) -> Packing:
    samples = len(lengths)
    columns = range(samples)
    valid = _entries([range(length) for length in lengths], columns, samples)
    taken = set(_entries(places, columns, samples))
    text_tokens = [token for token, entry in enumerate(valid) if entry not in taken]
    outgoing = torch.tensor(valid, dtype=torch.int64, device=device)
    chosen = torch.tensor(text_tokens, dtype=torch.int64, device=device)
    rows_in = _incoming(rows, places, columns, samples, device)
    return Packing(
        positions=sequence,
        samples=samples,
        padded=(_round_up(sequence, multiple), samples),
        incoming=torch.cat((rows_in, outgoing.index_select(0, chosen))),
        text_tokens=chosen,
        outgoing=outgoing,
        mask=None,
    )


def _incoming(
    rows: tuple[Counts, ...],
    places: Places,
    columns: Sequence[int],
    samples: int,
    device: torch.device,
) -> Tensor:
    """Entries of the rows, feeder after feeder; each feeder's are a block of a sample's places."""
    starts = [0] * len(places)
    entries: list[int] = []
    for counts in rows:
        blocks = [p[a : a + n] for p, a, n in zip(places, starts, counts, strict=True)]
        entries += _entries(blocks, columns, samples)
        starts = [a + n for a, n in zip(starts, counts, strict=True)]
    return torch.tensor(entries, dtype=torch.int64, device=device)


def _entries(places: Sequence[Sequence[int]], columns: Sequence[int], samples: int) -> list[int]:
    return [
        position * samples + column
        for column, positions in zip(columns, places, strict=False)
        for position in positions
    ]


def _round_up(number: int, multiple: int) -> int:
    return max(1, -(-number // multiple)) * multiple
