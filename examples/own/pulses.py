"""A custom source: count the loud ones among three to six sounds. The answer is one token."""

from mimogrid.core.base.hashing import draw_integer
from mimogrid.core.base.samples import Sample


ASK = 10  # the tokens 0 to 6 are answers
PLACEHOLDER = -1


class Pulses:
    """Every draw is a hash of the seed, the sample's id and its purpose, so any rank can make it."""

    def __init__(self, seed, frames):
        self.seed = seed
        self.frames = frames

    def describe(self, sample_id):
        """Return the counts of a sample: rows for the ears, two text tokens, one position in the loss."""
        rows = draw_integer(self.seed, sample_id, "sounds", 3, 6)
        return Sample(id=sample_id, length=2, rows={"ears": rows}, units={"language": 1.0})

    def load(self, sample_id, module):
        """Return the tensors that a module reads; called only on ranks that need the sample."""
        import torch  # noqa: PLC0415 -- describing a sample needs no torch

        count = self.describe(sample_id).rows["ears"]
        loud = [draw_integer(self.seed, sample_id, f"loud.{i}", 0, 1) for i in range(count)]
        if module == "ears":
            return {"rows": torch.tensor([[1.0 if is_loud else 0.1] * self.frames for is_loud in loud])}
        answer = sum(loud)
        return {
            "tokens": torch.tensor([PLACEHOLDER] * count + [ASK, answer]),
            "labels": torch.tensor([0] * count + [answer, 0]),
            "loss_weights": torch.tensor([0.0] * count + [1.0, 0.0]),
        }


def pulses(seed, frames, sequence):
    """Open the source: `seed` is the job's, the rest are its options. The plan reads `sequence`, too."""
    return Pulses(seed, frames)
