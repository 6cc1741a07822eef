"""Readings: what the layers of a language model read of each sample beside its tokens, on every stage.

A batch of Megatron's has the positions by which a model with mrope turns, a mask of what each position does not see, or
the segments of samples that are packed into a row (THD). Segments become a mask: causal inside each of them. Megatron's
kernels for packed rows are CUDA's.

>>> packed = {"cu_seqlens_q": torch.tensor([0, 2, 3, 6]), "cu_seqlens_kv": torch.tensor([0, 2, 3, 6])}
>>> [reading.segments.tolist() for reading in readings_of(None, None, packed, (2, 3))]
[[0, 0, 1], [2, 2, 2]]

Shapes in names: B samples, S positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from mimogrid.core.base.errors import Problem


@attrs.frozen
class Reader:
    """What a language model reads.

    Attributes:
        is_turned: whether it turns by three position ids for each position (mrope).
        learns_positions: whether position ids choose among learned embeddings.
        causal_only: why its layers read no mask; "": they read one.
    """

    is_turned: bool = False
    learns_positions: bool = False
    causal_only: str = ""


READS_MASKS = Reader()
"""The networks of a model without mrope and learned positions, whose attention reads masks."""
JOBS_OWN = Reader(causal_only="the job's own networks are causal")
"""The networks of a job that were not built by Megatron."""


@attrs.frozen(eq=False)
class Reading:
    """What is read of a sample beside its tokens; None: nothing.

    `turn` [3, S] has its positions under mrope. `hidden` [S, S] is True where a position (first dim) does not see
    another. `segments` [S] numbers the segment of each position, inside which attention is causal.
    """

    turn: Tensor | None = None
    hidden: Tensor | None = None
    segments: Tensor | None = None


def readings_of(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    packing: Mapping[str, Any] | None,
    shape: tuple[int, int],
) -> list[Reading]:
    """Return what is read of each sample of a batch [B, S], whose arguments `unreadable` finds nothing wrong with."""
    samples, positions = shape
    none: Sequence[Tensor | None] = (None,) * samples
    turns = position_ids.unbind(1) if position_ids is not None and position_ids.dim() == _TURNS else none
    masks = none
    if attention_mask is not None and not _is_causal(attention_mask):
        masks = attention_mask.expand(samples, 1, positions, positions)[:, 0].unbind(0)
    segments = none if packing is None else _segments(packing["cu_seqlens_q"], shape).unbind(0)
    return [Reading(*of_sample) for of_sample in zip(turns, masks, segments, strict=True)]


def hidden_of(readings: Sequence[Reading], positions: int, device: torch.device) -> Tensor | None:
    """Return the mask [B, 1, S, S] of a block with so many positions, as Megatron's attentions take it.

    True says that a position does not see another. Padding sees itself. None: all samples are causal.
    """
    if all(reading.hidden is None and reading.segments is None for reading in readings):
        return None
    mask = ~torch.eye(positions, dtype=torch.bool, device=device).repeat(len(readings), 1, 1, 1)
    for of_sample, reading in zip(mask, readings, strict=True):
        if reading.hidden is not None:
            size, hidden = len(reading.hidden), reading.hidden.to(device)
        elif reading.segments is not None:
            segments = reading.segments.to(device)
            size, hidden = len(segments), segments != segments[:, None]
            hidden = hidden | _later(size, device)
        else:
            size, hidden = positions, _later(positions, device)
        of_sample[0, :size, :size] = hidden
    return mask


def unreadable(  # noqa: PLR0917 -- the arguments of a batch, and who reads them
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    packing: Mapping[str, Any] | None,
    shape: tuple[int, int],
    reader: Reader | None,
    cp: int,
) -> Iterator[Problem]:
    """Yield why a language model cannot read what a batch [B, S] has beside tokens.

    `cp` is the number of ranks that the positions are split over. A rank without a stage of the model does not judge
    (no reader).
    """
    if reader is None:
        return
    causal_only = reader.causal_only or (f"positions are split over cp={cp}" if cp > 1 else "")
    problems = list(_packing_problems(packing, shape, causal_only))
    segments = None
    if packing is not None and not problems:
        segments = _segments(packing["cu_seqlens_q"], shape)
    yield from problems
    yield from _position_problems(position_ids, shape, reader, segments)
    if attention_mask is None or _is_causal(attention_mask.cpu()):
        return
    if packing is not None:
        yield Problem(
            "attention_mask", "comes with packing_kwargs, which say the same.", "Leave one of them out."
        )
        return
    yield from _mask_problems(attention_mask, shape, causal_only)


def _mask_problems(mask: Tensor, shape: tuple[int, int], causal_only: str) -> Iterator[Problem]:
    samples, positions = shape
    of = tuple(mask.shape)
    if mask.dtype != torch.bool or of not in {(n, 1, positions, positions) for n in (1, samples)}:
        fact = f"of shape {of} and {mask.dtype} is no mask of the batch."
        remedy = f"Give bools {[samples, 1, positions, positions]}, True where a position is not seen."
        yield Problem("attention_mask", fact, remedy)
    elif causal_only:
        fact = f"of shape {of} is not the causal one, and {causal_only}."
        yield Problem(
            "attention_mask", fact, "Leave it out; what is padding is left out of the loss by loss_mask."
        )
    elif mask.all(dim=-1).any():
        sample, _, position = mask.all(dim=-1).nonzero()[0].tolist()
        fact = f"hides everything from position {position} of sample {sample}."
        yield Problem("attention_mask", fact, "Let each position see itself; loss_mask leaves padding out.")


_CUMULATIVE = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


def _packing_problems(
    packing: Mapping[str, Any] | None, shape: tuple[int, int], causal_only: str
) -> Iterator[Problem]:
    if packing is None:
        return
    given = [packing[name] for name in _CUMULATIVE if packing.get(name) is not None]
    if packing.get("cu_seqlens_q") is None or any(not torch.equal(given[0], other) for other in given[1:]):
        fact = "says nothing of queries (cu_seqlens_q), or other segments of keys, or of padding between segments."
        yield Problem("packing_kwargs", fact, "Give cu_seqlens_q and cu_seqlens_kv, which are the same.")
    elif causal_only:
        fact = f"packs several samples into a row, and {causal_only}."
        remedy = "Leave it out and give each sample a row, or build the layers with layer_spec and cp = 1."
        yield Problem("packing_kwargs", fact, remedy)
    else:
        samples, positions = shape
        ends = given[0].tolist()
        missing = set(range(0, samples * positions + 1, positions)) - set(ends)
        if missing or ends != sorted({*ends}) or ends[-1] != samples * positions:
            fact = (
                f"has segments that end at {ends[:8]}, which do not cut {samples} rows of {positions} positions into "
                "parts."
            )
            remedy = "Let them begin at 0 and end where each row ends; padding is a segment."
            yield Problem("packing_kwargs", fact, remedy)


def _position_problems(
    ids: Tensor | None, shape: tuple[int, int], reader: Reader, segments: Tensor | None
) -> Iterator[Problem]:
    """Yield why position ids are not those of a job: they count up, or are three for each position under mrope."""
    if reader.is_turned:
        if ids is None or tuple(ids.shape) != (3, *shape):
            fact = f"has the shape {None if ids is None else tuple(ids.shape)}; the model turns by mrope."
            yield Problem("position_ids", fact, f"Give {(3, *shape)} on every rank of the language model.")
        return
    if ids is None:
        return
    if tuple(ids.shape) != shape:
        fact = f"has the shape {tuple(ids.shape)}, input_ids has {shape}."
        yield Problem("position_ids", fact, "Give one value for each position; three are for mrope.")
        return
    counted = torch.arange(shape[1]).expand(shape)
    if torch.equal(ids.cpu(), counted):
        return
    if segments is None or not torch.equal(ids.cpu(), _counted_inside(segments)):
        fact = "do not count up from 0, as a job's positions do."
        yield Problem(
            "position_ids", fact, "Leave them out, or count up in each row, or in each packed segment."
        )
    elif reader.learns_positions:
        fact = "begin anew in each packed segment, and the model has learned positions, which a job counts by row."
        yield Problem("position_ids", fact, "Count up in each row, or use rotary positions.")


def _segments(cu_seqlens: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the number of the segment of each position [B, S]; segments lie end to end, row after row."""
    lengths = cu_seqlens.cpu().to(torch.int64).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths).view(shape)


def _counted_inside(segments_BS: Tensor) -> Tensor:
    """Return the positions inside the segments of rows [B, S]."""
    flat = segments_BS.flatten()
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), flat.bincount().cumsum(0)[:-1]))
    return (torch.arange(len(flat)) - starts[flat]).view_as(segments_BS)


def _later(positions: int, device: torch.device) -> Tensor:
    """Return which positions are later than each, [S, S]."""
    return torch.ones(positions, positions, dtype=torch.bool, device=device).triu(1)


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask [..., S, S] is causal: True, as in Megatron, for later positions and no others."""
    if mask.dtype != torch.bool or mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:  # noqa: PLR2004
        return False
    return bool((mask == _later(mask.shape[-1], mask.device)).all())


_TURNS = 3
"""The number of dims of the position ids of mrope."""
