"""Rows: what the layers of a stage must know of the row of positions that they compute.

Megatron hands its `packed_seq_params` to the attention of every layer, also where a layer is recomputed in the backward
of another microbatch. A `PackedRow` takes that place. Megatron reads one attribute of it: by ``qkv_format = "thd"`` it
gives the core attention [T, N, D] without the dimension of samples.
"""

from collections.abc import Mapping

import attrs
from torch import Tensor

from mimogrid.core.base.row import Pieces, Run, runs
from mimogrid.shell.megatron.cache import CachedRow


SEGMENTS = "segments"
"""The segmentation of layers that attend to whole segments."""
WINDOWS = "windows"
"""The segmentation of layers of a tower that attend within windows of an image."""


@attrs.frozen(eq=False)
class PackedRow:
    """The row of a share on this rank.

    Attributes:
        pieces: The ranges of the row of all cp ranks that this rank has, in the order of its own row.
        segmentations: By name, the lengths of the segments within which layers attend, end to end.
        positions: The rotary positions, int64 [P, T]: P numbers for each position of this rank's row.
        order: Under cp, where each position of the row of all ranks is when their rows lie end to end, int64.
        entries: The positions of this rank's row that it routes to experts; never padding.
        sample_of: The sample of each of these.
        samples: The number of samples in the share.
        keys: The keys from which each position draws in training, int64 [T]; None: there is no dropout.
        keys_between: Those of the positions that this rank has between the layers; under sequence parallelism a part.
        cached: What was before the row, and keeps it; None: it is computed alone.
    """

    pieces: Pieces
    segmentations: Mapping[str, tuple[int, ...]]
    positions: Tensor
    order: Tensor | None
    entries: Tensor
    sample_of: Tensor
    samples: int
    keys: Tensor | None = None
    keys_between: Tensor | None = None
    cached: CachedRow | None = None
    _runs: dict[tuple[str, bool, int], tuple[tuple[Run, ...], ...]] = attrs.field(
        factory=dict[tuple[str, bool, int], tuple[tuple[Run, ...], ...]], init=False, repr=False
    )

    qkv_format = "thd"

    def runs(self, segmentation: str, *, causal: bool, window: int = 0) -> tuple[tuple[Run, ...], ...]:
        """Return how layers of a segmentation attend."""
        key = segmentation, causal, window
        if key not in self._runs:
            lengths = self.segmentations[segmentation]
            self._runs[key] = runs(self.pieces, lengths, causal=causal, window=window)
        return self._runs[key]
