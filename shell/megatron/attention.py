"""Attention: rotary positions, then torch's scaled dot product, within the segments of a row.

Nothing rounds: a module in fp64 computes everything in fp64, rotary angles included. Neighbouring segments of equal
lengths are one batched product over views, and no pair of positions of different segments is computed.

Shapes in names: T positions of a row; n segments, L positions of each; N heads, D head width; P rotary axes. Of the
blocks that networks of host programs compute: S positions, B samples.
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from mimogrid.core.base.row import Run, pieces
from mimogrid.core.base.zigzag import ZigZag
from mimogrid.core.job.models import BuiltIn, Gpt, Vit
from mimogrid.core.models.frequencies import axes, frequencies, parse_scaling
from mimogrid.shell.device.device import SHARES_KEPT, sent
from mimogrid.shell.megatron.cache import padded
from mimogrid.shell.megatron.draws import WEIGHTS, child, draw_of, kept
from mimogrid.shell.megatron.rows import SEGMENTS, PackedRow


@attrs.frozen
class Rotary:
    """The rotary positions of a model: angles per position of each pair of a head's values.

    `scaled` has the angles where they do not follow from `base` alone, and `factor` multiplies cosines and sines.
    `axes` says which of the numbers of a position turns each pair, if a position has several.
    """

    base: float = 10_000.0
    scaled: tuple[float, ...] | None = None
    factor: float = 1.0
    axes: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: BuiltIn) -> "Rotary | None":
        """Return those of a model; None if nothing turns. Raises PlanError if its scaling is not known."""
        if isinstance(model, Vit) and model.positions == "learned":
            return None
        if isinstance(model, Vit) and model.positions == "rotary_2d":
            angles = frequencies(model.head_width // 2, model.rotary_base)
            return cls(scaled=2 * angles, axes=(0,) * len(angles) + (1,) * len(angles))
        turned: tuple[int, ...] = ()
        if isinstance(model, Gpt) and model.rotary_sections:
            turned = axes(model.rotary_sections, interleaved=model.rotary_sections_interleaved)
        if not model.rotary_scaling:
            return cls(model.rotary_base, axes=turned)
        scaling = parse_scaling("rotary_scaling", model.rotary_scaling)
        angles = frequencies(model.head_width, model.rotary_base, scaling=scaling)
        return cls(model.rotary_base, angles, scaling.attention_factor, turned)


class CoreAttention(nn.Module):
    """Rotary attention of the local heads within segments. There may be fewer key-value heads than heads.

    The `segmentation` names the segments of the row within which the layer attends. Under context parallelism the row
    is this rank's part, and the keys and values of all ranks are gathered and put in the order of the segments.

    Networks of host programs pass blocks [S, B, N, D] and no row; see `_of_block`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attn_mask_type: AttnMaskType,
        pg_collection: ProcessGroupCollection,
        rotary: Rotary | None = Rotary(),
        window: int = 0,
        segmentation: str = SEGMENTS,
        layer: int = 0,
        **_: object,
    ) -> None:
        super().__init__()
        self.draw, self.tp = draw_of(WEIGHTS, layer), pg_collection.tp
        self.window, self.layer = window, layer
        self.rotary = rotary
        self.segmentation = segmentation
        self.dropout = float(config.attention_dropout)
        self.causal = attn_mask_type is AttnMaskType.causal
        self.cp = pg_collection.cp
        self.cut = ZigZag(self.cp.rank(), self.cp.size())
        # Under sequence parallelism Megatron runs all of the block on the random states that differ along tp.
        self.forks = self.dropout > 0 and not config.sequence_parallel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedRow | None = None,
        **_: object,
    ) -> Tensor:
        """Return [T, N * D] for a row, [S, B, N * D] for a block."""
        if packed_seq_params is None:
            return self._of_block(query, key, value, attention_mask)
        return self._of_row(query, key, value, packed_seq_params).flatten(1)

    def _of_row(
        self,
        query_TND: Tensor,
        key_TND: Tensor,
        value_TND: Tensor,
        row: PackedRow,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend within the segments of a row. Positions behind the last one, which pad the row, give zeros."""
        query, key, value = query_TND, key_TND, value_TND
        if self.rotary is not None:
            cos, sin = rotary_table(row, query.shape[-1], query.dtype, self.rotary)
            query, key = (_Rotation.apply(heads, cos, sin) for heads in (query, key))  # type: ignore[no-untyped-call]
        if row.order is not None:
            both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=self.cp)
            key, value = both.index_select(0, row.order).chunk(2, dim=-1)
        if row.cached is not None and (found := row.cached.joined(self.layer, key, value)) is not None:
            return self._behind(query, row, found)
        by_chunk = row.runs(self.segmentation, causal=self.causal, window=self.window)
        asked = [run.count * len(run.queries) for run in itertools.chain(*by_chunk)]
        padding = len(query) - sum(asked)
        queries = iter(_split(query, [*asked, *[padding] * (padding > 0)]))
        drawing = iter(
            ()
            if row.keys is None or not self.dropout
            else child(row.keys, self.draw).split([*asked, padding])
        )
        forked = get_cuda_rng_tracker().fork() if self.forks and self.training else contextlib.nullcontext()
        with forked:
            mixed = [
                self._attend(next(queries), keys, values, run, mask, next(drawing, None))
                for of_chunk in by_chunk
                for run, keys, values in zip(
                    of_chunk, _segments(key, of_chunk), _segments(value, of_chunk), strict=True
                )
            ]
        if padding:
            mixed.append(query.new_zeros(padding, *query.shape[1:]))
        if not asked:
            # The backward of the gather is joint, so a rank without positions takes part in it, too.
            mixed[0] = mixed[0] + (query[:0].sum() + key[:0].sum() + value[:0].sum())
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _behind(self, query_TND: Tensor, row: PackedRow, found: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attend from the one position that each sample has in a row to all positions of the sample so far."""
        assert set(row.segmentations[SEGMENTS]) == {1}
        mixed_TND = torch.zeros_like(query_TND)
        mine = [sample for chunk in row.pieces for piece in chunk for sample in piece]
        if not mine:  # another cp rank has them
            return mixed_TND
        keys, values = zip(*(found[sample] for sample in mine), strict=True)
        last = -self.window if self.window else None
        key_nPND, seen_nP = padded([key[last:] for key in keys])
        value_nPND, _ = padded([value[last:] for value in values])
        query_nN1D = query_TND[: len(mine), :, None]
        mixed_nN1D = functional.scaled_dot_product_attention(
            query_nN1D,
            key_nPND.transpose(1, 2),
            value_nPND.transpose(1, 2),
            attn_mask=seen_nP[:, None, None],
            enable_gqa=query_nN1D.shape[1] != key_nPND.shape[2],
        )
        mixed_TND[: len(mine)] = mixed_nN1D[:, :, 0]
        return mixed_TND

    def _attend(  # noqa: PLR0917 -- three tensors, and how
        self,
        query_TND: Tensor,
        key_TND: Tensor,
        value_TND: Tensor,
        run: Run,
        mask: Tensor | None,
        drawing_T: Tensor | None,
    ) -> Tensor:
        """Attend within the segments of a run, all at once; causally each query to the keys up to itself.

        With `drawing`, the keys of the queries' draws, weights are dropped.
        """
        keys = slice(run.keys.start, run.keys.stop)
        query = query_TND.unflatten(0, (run.count, -1))
        key, value = (of.unflatten(0, (run.count, -1))[:, keys] for of in (key_TND, value_TND))
        is_causal = False
        if self.causal and mask is None and len(run.queries) > 1:
            window = self.window or len(run.keys)
            is_causal = len(run.queries) == len(run.keys) <= window
            mask = None if is_causal else _visible(len(run.queries), len(run.keys), window, query.device)
        query_nNLD, key_nNLD, value_nNLD = (of.transpose(1, 2) for of in (query, key, value))
        if drawing_T is not None:
            if is_causal:
                mask = _visible(len(run.queries), len(run.keys), len(run.keys), query.device)
            scale = 1 / query.shape[-1] ** 0.5
            weights = attention_weights(query_nNLD * scale, key_nNLD, mask)
            mixed_nNLD = self._without_dropped(weights, drawing_T, run) @ repeated(value_nNLD, query.shape[2])
            return mixed_nNLD.transpose(1, 2).flatten(0, 1)
        mixed_nNLD = functional.scaled_dot_product_attention(
            query_nNLD,
            key_nNLD,
            value_nNLD,
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return mixed_nNLD.transpose(1, 2).flatten(0, 1)

    def _without_dropped(self, weights_nNLK: Tensor, drawing_T: Tensor, run: Run) -> Tensor:
        """Return attention weights without some. A draw hangs on the query, the head in the model, and the key."""
        device, heads = weights_nNLK.device, weights_nNLK.shape[1]
        head_N1 = torch.arange(heads, device=device)[:, None] + self.tp.rank() * heads
        of_heads = child(drawing_T.view(run.count, 1, -1), head_N1)
        numbers = torch.arange(run.keys.start, run.keys.stop, device=device)
        return weights_nNLK * kept(of_heads[..., None], numbers, self.dropout) * (1 / (1 - self.dropout))

    def _of_block(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within the samples of a block [S, B, N, D], which is a row of B segments of S positions.

        A `mask` [B, 1, 1 or S, keys] stands in place of causality. It is added to the scores, 0 or minus infinity. Or
        it is Megatron's, True where a position does not see a key. Under context parallelism S are this rank's
        positions, and a mask has the keys of all ranks, rank after rank.
        """
        positions, samples = query.shape[:2]
        row = _block_row(positions, samples, self.cut, query.device)
        chunks = len(self.cut.chunks)
        query, key, value = (_to_row(heads, chunks) for heads in (query, key, value))
        if mask is not None and self.cut.size > 1:
            mask = mask[..., _by_position(positions, self.cut).to(mask.device)]
        if mask is not None and mask.dtype is torch.bool:
            mask = ~mask
        mixed = self._of_row(query, key, value, row, mask)
        return _to_block(mixed, positions, samples, chunks).flatten(2)


def attention_weights(query_nNLD: Tensor, key_nNKD: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax of scaled queries times keys, [n, N, L, K]; `mask` says which keys are seen, or is added."""
    scores = query_nNLD @ repeated(key_nNKD, query_nNLD.shape[1]).transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def repeated(of_groups: Tensor, heads: int) -> Tensor:
    """Return keys or values for as many heads as there are queries."""
    return of_groups.repeat_interleave(heads // of_groups.shape[1], dim=1)


# -- views of rows -----------------------------------------------------------------------------------------


def _split(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split rows in one operation, whose backward is one concatenation; slices would each fill a tensor with zeros."""
    return rows.split(list(sizes)) if len(sizes) > 1 else (rows,)


def _segments(rows_TND: Tensor, of: Sequence[Run]) -> list[Tensor]:
    """Return the rows of the segments of each run; between runs lie segments of which this rank has no part."""
    sizes: list[int] = []
    places: list[int] = []
    end = 0
    for run in of:
        sizes += [run.start - end] * (run.start > end)
        places.append(len(sizes))
        sizes.append(run.stop - run.start)
        end = run.stop
    sizes += [len(rows_TND) - end] * (len(rows_TND) > end)
    parts = _split(rows_TND, sizes)
    return [parts[place] for place in places]


@functools.lru_cache(maxsize=SHARES_KEPT)
def _visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return which of the first `keys` positions each of the last `queries` of them may see, [queries, keys].

    These are its own and the `window` - 1 before it.
    """
    earlier = keys - queries
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(earlier).triu(earlier - window + 1)


# -- rotary positions --------------------------------------------------------------------------------------


class _Rotation(torch.autograd.Function):
    """Rotates the halves (x, y) of each head to (x cos - y sin, y cos + x sin), position by position.

    Backward rotates the other way. Megatron's own function needs about thirty small operations, this one three.
    """

    @staticmethod
    def forward(ctx: Any, heads_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.table = cos, sin
        return _turned(heads_TND, cos, sin, direction=1)

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grad_TND, *ctx.table, direction=-1), None, None


def _turned(heads_TND: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    turned = heads_TND * cos
    left, right = turned.chunk(2, dim=-1)
    x, y = heads_TND.chunk(2, dim=-1)
    left.addcmul_(y, sin, value=-direction)
    right.addcmul_(x, sin, value=direction)
    return turned


@functools.lru_cache(maxsize=SHARES_KEPT)
def rotary_table(row: PackedRow, width: int, dtype: torch.dtype, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Return the cosines [T, 1, D] and sines [T, 1, D / 2] of the positions of a row.

    Angles are computed in the compute dtype, but at least in fp32.
    """
    exact: dict[str, Any] = {
        "dtype": torch.promote_types(dtype, torch.float32),
        "device": row.positions.device,
    }
    if rotary.scaled is None:
        turns = rotary.base ** -(torch.arange(0, width, 2, **exact) / width)
    else:
        turns = sent(torch.tensor(rotary.scaled, dtype=exact["dtype"]), exact["device"])
    positions = row.positions.to(exact["dtype"])
    angles = torch.outer(positions[0], turns)[:, None, :]
    if rotary.axes:
        turning = sent(torch.tensor(rotary.axes), exact["device"])
        angles = (positions.index_select(0, turning).t() * turns)[:, None, :]
    cos, sin = torch.cat((angles, angles), dim=-1).cos(), angles.sin()
    if rotary.factor != 1:
        cos, sin = cos * rotary.factor, sin * rotary.factor
    return cos.to(dtype), sin.to(dtype)


# -- blocks of host programs -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _block_row(positions: int, samples: int, cut: ZigZag, device: torch.device) -> PackedRow:
    """Return the row that a block of S positions of this rank times B samples is."""
    lengths, own = (positions * cut.size,) * samples, cut.positions(positions * cut.size)
    chunks = torch.tensor(own).view(len(cut.chunks), -1).repeat_interleave(samples, dim=0).flatten()
    order = None
    if cut.size > 1:
        in_segment = _by_position(positions, cut)
        chunk = positions // 2
        # In a rank's row a chunk of all samples comes before the other chunk.
        rank, place = in_segment // positions, in_segment % positions
        start = (rank * 2 + place // chunk) * chunk * samples + place % chunk
        order = (start + torch.arange(samples)[:, None] * chunk).flatten()
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedRow(
        pieces(lengths, cut),
        {SEGMENTS: lengths},
        sent(chunks[None], device),
        None if order is None else sent(order, device),
        nothing,
        nothing,
        samples,
    )


@functools.lru_cache(maxsize=64)
def _by_position(positions: int, cut: ZigZag) -> Tensor:
    """Return where each position of a sample is when the parts of all cp ranks lie end to end, int64."""
    laid = [p for part in cut.everyone() for p in part.positions(positions * cut.size)]
    return torch.tensor(laid).argsort()


def _to_row(heads_SBND: Tensor, chunks: int) -> Tensor:
    """Return [T, N, D]: chunk by chunk, sample by sample."""
    row: Tensor = heads_SBND.unflatten(0, (chunks, -1)).transpose(1, 2).flatten(0, 2)
    return row


def _to_block(heads_TND: Tensor, positions: int, samples: int, chunks: int) -> Tensor:
    """Return [S, B, N, D]."""
    block: Tensor = (
        heads_TND.unflatten(0, (chunks, samples, positions // chunks)).transpose(1, 2).flatten(0, 1)
    )
    return block
