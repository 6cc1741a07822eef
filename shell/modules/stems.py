"""Stems: the positions that the first layer of a tower sees, from the rows that the tower reads.

A patch stem multiplies each patch by a matrix, puts a class token before each frame, adds learned positions and may
normalize. A stem of sound has Whisper's two convolutions, the second at every other frame. Rows of a share lie end to
end, segment after segment; so do positions. Parameters have the names of the core's table.

Shapes in names: R rows, F features, P positions of the layers, H hidden.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from mimogrid.core.base.samples import SegmentGrid
from mimogrid.core.job.models import CONVOLUTION, Vit
from mimogrid.core.models.positions import interpolation
from mimogrid.core.models.tower import frame_sizes
from mimogrid.shell.device.device import SHARES_KEPT, sent
from mimogrid.shell.megatron.layers import Affine
from mimogrid.shell.megatron.weight_grad_store import WeightGradStore
from mimogrid.shell.modules.norms import norm_of


Grids = tuple[SegmentGrid, ...]


class PatchStem(nn.Module):
    """Patches: a linear layer, class tokens, learned positions and a norm, as far as the model has them."""

    def __init__(self, model: Vit, *, dtype: torch.dtype, weight_grads: WeightGradStore) -> None:
        super().__init__()
        assert model.features is not None
        self.model = model
        self.input = Affine(
            model.features,
            model.hidden,
            dtype=dtype,
            weight_grads=weight_grads,
            bias=model.patch_bias,
        )
        self.class_token: nn.Parameter | None = None
        if model.class_token:
            self.class_token = nn.Parameter(torch.empty(model.hidden, dtype=dtype))
        self.positions = _table(model, dtype) if model.position_count else None
        self.pre_norm = (
            norm_of(model.norm, model.hidden, eps=model.norm_eps, dtype=dtype) if model.pre_norm else None
        )

    def forward(self, rows_RF: Tensor, grids: Grids) -> Tensor:
        """Return the positions [P, H] in the order of the layers."""
        places, length = _places(self.model, grids, rows_RF.device)
        rows_RH = self.input(rows_RF)
        if self.positions is not None:
            rows_RH = rows_RH + self._learned(grids, rows_RH)
        positions_PH: Tensor = rows_RH.new_zeros(length, rows_RH.shape[1]).index_copy(0, places[0], rows_RH)
        if self.class_token is not None:
            token_H: Tensor = self.class_token
            if self.positions is not None:
                token_H = token_H + self.positions.weight[0]
            positions_PH = positions_PH.index_copy(0, places[1], token_H.expand(len(places[1]), -1))
        if self.pre_norm is not None:
            positions_PH = self.pre_norm(positions_PH)
        return positions_PH

    def _learned(self, grids: Grids, like: Tensor) -> Tensor:
        """Return the learned positions of the rows [R, H]."""
        assert self.positions is not None
        model, table = self.model, self.positions.weight
        if model.position_interpolation == "none":
            return functional.embedding(_counted(grids, int(model.class_token), like.device), table)
        taps_R4, weights_R4 = _taps(grids, model.position_count, model.merge, like.dtype, like.device)
        return (functional.embedding(taps_R4, table) * weights_R4[:, :, None]).sum(dim=1)


class SoundStem(nn.Module):
    """Sound: two convolutions of width 3 over the frames of each segment, and learned positions.

    A segment of n frames has n // 2 positions. A frame more than that, at the end, is seen by the convolutions only.
    """

    def __init__(self, model: Vit, *, dtype: torch.dtype, weight_grads: WeightGradStore) -> None:
        super().__init__()
        assert model.features is not None
        kernel = {"kernel_size": CONVOLUTION, "padding": CONVOLUTION // 2, "dtype": dtype}
        self.input = nn.ModuleDict(
            {
                "conv1": skip_init(nn.Conv1d, model.features, model.hidden, **kernel),
                "conv2": skip_init(nn.Conv1d, model.hidden, model.hidden, stride=2, **kernel),
            }
        )
        self.positions = _table(model, dtype)

    def forward(self, rows_RF: Tensor, grids: Grids) -> Tensor:
        """Return the positions [P, H]; neighbouring segments of one length are computed together."""
        runs = [(frames, len(tuple(run))) for frames, run in itertools.groupby(frame_sizes(grids))]
        parts = rows_RF.split([frames * count for frames, count in runs])
        hidden = [self._convolved(part, *run) for part, run in zip(parts, runs, strict=True)]
        return torch.cat([rows_RF.new_zeros(0, self.positions.embedding_dim), *hidden])

    def _convolved(self, rows_RF: Tensor, frames: int, count: int) -> Tensor:
        """Return the positions of `count` segments of so many frames."""
        sound_NFR = rows_RF.view(count, frames, -1).transpose(1, 2)
        for name in ("conv1", "conv2"):
            sound_NFR = functional.gelu(self.input[name](sound_NFR))
        length = frames // 2
        return (sound_NFR.transpose(1, 2)[:, :length] + self.positions.weight[:length]).flatten(0, 1)


def stem_of(model: Vit, *, dtype: torch.dtype, weight_grads: WeightGradStore) -> nn.Module:
    """Return the stem of a tower."""
    kind = SoundStem if model.stem == "whisper" else PatchStem
    return kind(model, dtype=dtype, weight_grads=weight_grads)


def _table(model: Vit, dtype: torch.dtype) -> nn.Embedding:
    table: nn.Embedding = skip_init(nn.Embedding, model.position_count, model.hidden, dtype=dtype)
    return table


# Every stage and microbatch of one share asks again, and images of a batch often have the same sizes.


@functools.lru_cache(maxsize=SHARES_KEPT)
def _places(model: Vit, grids: Grids, device: torch.device) -> tuple[tuple[Tensor, Tensor], int]:
    """Return the positions of rows and of class tokens, and how many positions there are."""
    found = model.rows_in_layers(grids)
    return (sent_places(found.rows, device), sent_places(found.class_tokens, device)), found.length


@functools.lru_cache(maxsize=SHARES_KEPT)
def _counted(grids: Grids, first: int, device: torch.device) -> Tensor:
    """Return the number of each patch in its frame, counted from `first`."""
    return sent_places([first + patch for count in frame_sizes(grids) for patch in range(count)], device)


@functools.lru_cache(maxsize=SHARES_KEPT)
def _taps(
    grids: Grids, count: int, merge: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the rows of a square table that the position of each patch is made of, and their weights [R, 4]."""
    side = round(count**0.5)
    found = interpolation([(frames, height, width) for frames, height, width in grids], side, merge)
    weights = torch.tensor(found.weights, dtype=dtype).view(-1, 4)
    return sent_places(found.rows, device).view(-1, 4), sent(weights, device)


def sent_places(places: Sequence[object], device: torch.device) -> Tensor:
    """Return places in a tensor as an index on a device."""
    return sent(torch.tensor(places, dtype=torch.int64), device)
