"""Cache: keys and values of the positions that a stage has computed, for the tokens that come behind them.

While a language model generates, each pass has one new position of every sample. It attends to the keys and values of
all positions before it, which the layers of the stage keep: those of this tp rank's heads, and under context
parallelism those of the positions of all ranks. Keys are kept as they are turned.

Shapes in names: T positions of a row, P those of a sample; N heads, D head width.
"""

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Cache:
    """What the layers of one stage keep.

    Attributes:
        ends: by the id of a sample, the rotary position of the token that comes next.
        kept: by sample and layer, keys and values [P, N, D].
    """

    ends: dict[int, int] = attrs.field(factory=dict[int, int])
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = attrs.field(
        factory=dict[tuple[int, int], tuple[Tensor, Tensor]]
    )


@attrs.frozen(eq=False)
class CachedRow:
    """The samples of a row, which are its segments, with the cache of what was before."""

    cache: Cache
    samples: tuple[int, ...]
    lengths: tuple[int, ...]

    def joined(self, layer: int, key_TND: Tensor, value_TND: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Add keys and values to those before; return all those of each sample, or None: these are the first."""
        known = self.cache.kept
        goes_on = bool(self.samples) and (self.samples[0], layer) in known
        lengths = list(self.lengths)
        keys, values = (of[: sum(lengths)].split(lengths) for of in (key_TND, value_TND))
        for sample, *new in zip(self.samples, keys, values, strict=True):
            before = known.get((sample, layer))
            key, value = new if before is None else map(torch.cat, zip(before, new, strict=True))
            known[sample, layer] = key, value
        return [known[sample, layer] for sample in self.samples] if goes_on else None


def padded(of_samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return keys or values of several samples with zeros behind them [n, P, N, D], and which are none, [n, P]."""
    lengths = torch.tensor([len(each) for each in of_samples], device=of_samples[0].device)
    whole = torch.nn.utils.rnn.pad_sequence(of_samples, batch_first=True)
    return whole, torch.arange(whole.shape[1], device=lengths.device) < lengths[:, None]
