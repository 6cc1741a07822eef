"""Towers: the stages of a `vit`.

A stem makes the positions of the layers from the rows of a share, a stack of layers computes them, and each emitted row
is made of some of them (`core.models.tower`). Every cp rank computes the stem of the whole share and takes its own part
of the positions. Behind the layers all cp ranks get all positions, and each makes a part of the emitted rows. So
weights before and behind the layers have partial gradients along cp, as those of the layers have.

Shapes are named as in `interface`; P positions of a share.
"""

import functools
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from mimogrid.core.base.samples import share as share_of
from mimogrid.core.job.models import Vit
from mimogrid.core.step.step import Share
from mimogrid.shell.device.device import SHARES_KEPT
from mimogrid.shell.megatron.names import TransformerBlock, gather_from_sequence_parallel_region
from mimogrid.shell.megatron.rows import WINDOWS
from mimogrid.shell.modules.norms import norm_of
from mimogrid.shell.modules.packing import Packing
from mimogrid.shell.modules.stems import Grids, sent_places, stem_of
from mimogrid.shell.modules.transformer import Context, TransformerStage
from mimogrid.shell.modules.weights import layout_name


class TowerStage(TransformerStage):
    """A stage of a `vit`."""

    def __init__(self, context: Context, model: Vit) -> None:
        super().__init__(context, model)
        self.vit = model
        info, pools = context.info, model.pool > 1
        self.network = TransformerBlock(
            self.config,
            self.spec,
            post_layer_norm=model.final_norm and not pools,
            post_process=info.last,
            pg_collection=self.collection,
        )
        assert len(self.decoder.layers) == len(info.layers)
        self.stem = (
            stem_of(model, dtype=context.dtype, weight_grads=self.weight_grads) if info.first else None
        )
        self.final_norm = (
            norm_of(model.norm, model.hidden, eps=model.norm_eps, dtype=context.dtype)
            if info.last and pools and model.final_norm
            else None
        )
        self.without_key_bias()
        self._inner: dict[int, Tensor] = {}
        for layer in sorted({*model.deepstack_layers} & {*info.layers}):
            place = info.layers.index(layer)
            self.decoder.layers[place].register_forward_hook(functools.partial(_keep, self._inner, layer))

    @property
    def decoder(self) -> TransformerBlock:
        """The stack of layers."""
        return self.network

    def weight_name(self, built: str) -> str:
        """Return the layout-independent name of a parameter from its name in this module."""
        if built.startswith("stem."):
            return built.removeprefix("stem.")
        return layout_name(built.replace("network.", "decoder.", 1), self.info.layers)

    def segmentations(self, share: Share) -> Mapping[str, tuple[int, ...]]:
        """Return the windows, if there are any."""
        if not self.vit.window:
            return {}
        return {WINDOWS: tuple(itertools.chain.from_iterable(map(self.vit.windows, _grids(share))))}

    def enter(self, inputs: Mapping[str, Tensor], share: Share, packing: Packing) -> Tensor:
        """Return the positions that the stem makes of the rows of the data."""
        assert self.stem is not None
        positions_PH = self.stem(inputs["rows"], _grids(share))
        if packing.portion is not None:
            positions_PH = positions_PH.index_select(0, packing.portion.incoming)
        return self.row_of(positions_PH, packing)

    def leave(
        self, hidden_S1H: Tensor, inputs: Mapping[str, Tensor], share: Share, packing: Packing
    ) -> dict[str, Tensor]:
        """Return the rows for each target."""
        device, cp = hidden_S1H.device, (self.cp.rank(), self.cp.size())
        places = _emitted(self.vit, _grids(share), cp, device)
        rows_PH = self._rows(hidden_S1H, packing, places)
        deep = [
            self._rows(self.complete(self._inner.pop(layer)), packing, places)
            for layer in self.vit.deepstack_layers
        ]
        if self.vit.pool > 1:
            rows_PH = rows_PH.unflatten(0, (-1, self.vit.pool)).mean(dim=1)
        if self.final_norm is not None:
            rows_PH = self.final_norm(rows_PH)
        total = sum(share.lengths)
        emitted = self.emit(rows_PH, deep)
        return {target: self._joined(rows, total) for target, rows in emitted.items()}

    def _rows(self, hidden_S1H: Tensor, packing: Packing, places: Tensor | None) -> Tensor:
        """Return the positions that this cp rank's emitted rows are made of."""
        rows_PH = self._whole(hidden_S1H, packing)
        return rows_PH if places is None else rows_PH.index_select(0, places)

    def _whole(self, hidden_S1H: Tensor, packing: Packing) -> Tensor:
        """Return the positions of all cp ranks; each rank gets the sum of the gradients that all of them have."""
        rows_PH, portion = hidden_S1H.flatten(0, 1).index_select(0, packing.outgoing), packing.portion
        if portion is None or not portion.most:
            return rows_PH
        rows_PH = functional.pad(rows_PH, (0, 0, 0, portion.most - len(rows_PH)))
        every: Tensor = gather_from_sequence_parallel_region(rows_PH, group=self.cp)
        return every.index_select(0, portion.order)

    def _joined(self, rows: Tensor, total: int) -> Tensor:
        """Return the emitted rows of all cp ranks. Each rank gets the gradients of its own rows."""
        size = self.cp.size()
        if size == 1 or not total:
            return rows
        most = -(-total // size)
        rows = functional.pad(rows, (0, 0, 0, most - len(rows)))
        rows = gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False, group=self.cp)
        return rows.index_select(0, _order(size, total, rows.device))


def _keep(
    inner: dict[int, Tensor], layer: int, _module: object, _arguments: object, output: tuple[Tensor, object]
) -> None:
    """Keep what an inner layer gives until the stage's rows leave; the hook holds no stage, which would be a cycle."""
    inner[layer], _ = output


def _grids(share: Share) -> Grids:
    return tuple(itertools.chain.from_iterable(share.grids))


# Every stage and microbatch of one share asks again, and images of a batch often have the same sizes.


@functools.lru_cache(maxsize=SHARES_KEPT)
def _emitted(model: Vit, grids: Grids, cp: tuple[int, int], device: torch.device) -> Tensor | None:
    """Return the positions that this cp rank's emitted rows are made of; None: all, in order."""
    found = model.rows_in_layers(grids)
    rank, size = cp
    mine = share_of(rank, size, len(found.emitted) // found.group)
    places = found.emitted[mine.start * found.group : mine.stop * found.group]
    return None if places == tuple(range(found.length)) else sent_places(places, device)


@functools.lru_cache(maxsize=SHARES_KEPT)
def _order(size: int, total: int, device: torch.device) -> Tensor:
    """Return the place of each of `total` rows after a gather of the ranks' shares, each padded to the largest."""
    most, shares = -(-total // size), [share_of(rank, size, total) for rank in range(size)]
    return sent_places(
        [rank * most + i for rank, rows in enumerate(shares) for i in range(len(rows))], device
    )
