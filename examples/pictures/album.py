"""A source over a folder of PNG files that are called LABEL-ANYTHING.png. Every tenth picture is held out."""

from pathlib import Path

from mimogrid.core.base.hashing import draw_integer
from mimogrid.core.base.samples import Sample


ROWS = 4  # that the encoder makes of a picture
ASK, STOP = 10, 11  # the tokens 0 to 9 are labels
PLACEHOLDER = -1


class Album:
    """Pictures in an order that the seed draws; a sample is a picture, a question and its answer."""

    def __init__(self, paths, seed):
        self.paths = paths
        self.seed = seed

    def _path(self, sample_id):
        return self.paths[draw_integer(self.seed, sample_id, "picture", 0, len(self.paths) - 1)]

    def describe(self, sample_id):
        """Return the counts of a sample: rows of the encoder, text tokens, positions in the loss. Opens no file."""
        return Sample(id=sample_id, length=3, rows={"eyes": ROWS}, units={"language": 2.0})

    def load(self, sample_id, module):
        """Return the tensors that a module reads; called only on ranks that need the sample."""
        import numpy as np  # noqa: PLC0415 -- describing a sample needs neither numpy nor torch
        import torch  # noqa: PLC0415
        from PIL import Image  # noqa: PLC0415

        path = self._path(sample_id)
        if module == "eyes":
            pixels = np.asarray(Image.open(path), dtype=np.float32) / 255
            return {"pixels": torch.from_numpy(pixels)[None, None]}  # the first dim counts pictures
        label = int(path.name.partition("-")[0])
        return {
            "tokens": torch.tensor([PLACEHOLDER] * ROWS + [ASK, label, STOP]),
            "labels": torch.tensor([0] * ROWS + [label, STOP, 0]),
            "loss_weights": torch.tensor([0.0] * ROWS + [1.0, 1.0, 0.0]),
        }


class Training(Album):
    """The pictures to train with; it also knows those that are held out."""

    tasks = ("read",)

    def __init__(self, paths, held, seed):
        super().__init__(paths, seed)
        self.held = held

    def held_out(self, *, task):
        """Return the pictures that training never sees."""
        return HeldOut(self.held, self.seed)


class HeldOut(Album):
    """Held-out pictures, in the order of the folder, as questions with one true answer."""

    stop = STOP

    def _path(self, sample_id):
        return self.paths[sample_id % len(self.paths)]

    def prompt(self, sample_id, module):
        """Return the tokens before the answer."""
        return (*[PLACEHOLDER] * ROWS, ASK)

    def answer(self, sample_id):
        """Return the true answer."""
        return (int(self._path(sample_id).name.partition("-")[0]),)

    def spell(self, tokens):
        """Return an answer as text."""
        return " ".join(map(str, tokens))

    def image(self, sample_id):
        """Return the picture, white on black, as values from 0 to 1."""
        import numpy as np  # noqa: PLC0415
        from PIL import Image  # noqa: PLC0415

        return np.asarray(Image.open(self._path(sample_id)), dtype=np.float32) / 255


def album(seed, folder, sequence):
    """Open the source: `seed` is the job's, the rest are its options. The plan reads `sequence`, too."""
    paths = sorted((Path(__file__).parent / folder).glob("[0-9]-*.png"))
    if not paths:
        raise FileNotFoundError(f"no pictures LABEL-ANYTHING.png in {folder}: run make.py")
    return Training([p for i, p in enumerate(paths) if i % 10], paths[::10], seed)
