"""A source: a scan of a digit, a spoken digit, or both; their sum, spelt; and the sum as a picture.

Every draw follows from the seed, the sample's id and its purpose, so any rank can make it. The picture to draw is of
scans, too; noise and time of flow matching belong to the sample, so gradients do not depend on the layout.
"""

import functools

from mimogrid.core.base.hashing import draw_bits, draw_integer
from mimogrid.core.base.samples import Sample


TEENS = ("thir", "four", "fif", "six", "seven", "eigh")
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", *(f"{stem}teen" for stem in TEENS)),
)
LETTERS = "".join(sorted(set("".join(WORDS))))
"""The token of a letter is its place here."""
ASK, STOP = len(LETTERS), len(LETTERS) + 1
PLACEHOLDER = -1
SCAN_ROWS, VOICE_ROWS, FRAMES = 4, 4, 16
NOISES = 4  # noises and times of each sample in training


class Sums:
    """Questions in an order that the seed draws: one in four has no sound, one in four no scan."""

    def __init__(self, seed, scans, voices, split):
        self.seed = seed
        self.split = split
        self.scans = scans
        self.by_digit = {d: [path for path in scans if path.name.startswith(str(d))] for d in range(10)}
        self.voices = voices

    def _draw(self, sample_id, purpose, count):
        return draw_integer(self.seed, sample_id, f"{self.split}.{purpose}", 0, count - 1)

    def _random(self, sample_id, purpose):
        import numpy as np  # noqa: PLC0415 -- describing a sample needs neither numpy nor torch

        return np.random.Generator(
            np.random.Philox(key=draw_bits(self.seed, sample_id, f"{self.split}.{purpose}"))
        )

    def _kind(self, sample_id):
        return ("both", "both", "scan", "voice")[self._draw(sample_id, "kind", 4)]

    def _scan(self, sample_id):
        """Return the path of the scan, or None."""
        has = self._kind(sample_id) != "voice"
        return self.scans[self._draw(sample_id, "scan", len(self.scans))] if has else None

    def _spoken(self, sample_id):
        """Return the digit that is spoken, or None."""
        return self._draw(sample_id, "voice", 10) if self._kind(sample_id) != "scan" else None

    def _sum(self, sample_id):
        path, spoken = self._scan(sample_id), self._spoken(sample_id)
        return (int(path.name[0]) if path else 0) + (spoken or 0)

    def describe(self, sample_id):
        """Return the counts of a sample: patches, frames, tokens, positions in the loss. Opens no file."""
        kind, letters = self._kind(sample_id), len(self.answer(sample_id))
        rows = {"vision": 0 if kind == "voice" else SCAN_ROWS, "audio": 0 if kind == "scan" else FRAMES}
        return Sample(id=sample_id, length=1 + letters, rows=rows, units={"language": 1.0 + letters})

    def load(self, sample_id, module):
        """Return the tensors that a module reads; called only on ranks that need the sample."""
        import torch  # noqa: PLC0415

        match module:
            case "vision" | "audio":
                rows = self._patches(sample_id) if module == "vision" else self._spectrogram(sample_id)
                return {"rows": torch.from_numpy(rows)}
            case "generator":
                draws = self._random(sample_id, "flow")
                return {
                    "picture": torch.from_numpy(self._picture(sample_id, draws)[None]),
                    "noise": torch.from_numpy(draws.standard_normal((1, NOISES, 128), "float32")),
                    "time": torch.from_numpy(draws.random((1, NOISES, 1), "float32")),
                }
        prompt, answer = self.prompt(sample_id, module), self.answer(sample_id)
        silent = len(prompt) - 1  # The last token of the prompt predicts the first letter.
        return {
            "tokens": torch.tensor((*prompt, *answer)),
            "labels": torch.tensor([0] * silent + [*answer, STOP]),
            "loss_weights": torch.tensor([0.0] * silent + [1.0] * (len(answer) + 1)),
        }

    def _patches(self, sample_id):
        from media import moved, patches, scan  # noqa: PLC0415

        return patches(moved(scan(self._scan(sample_id)), self._random(sample_id, "move")).astype("float32"))

    def _spectrogram(self, sample_id):
        from media import spectrogram, spoken, voice  # noqa: PLC0415

        sound = voice(self.voices[self._spoken(sample_id)])
        return spectrogram(spoken(sound, self._random(sample_id, "speak")))

    def _picture(self, sample_id, draws):
        """Return the sum as a picture [128] of 8 x 16 pixels: scans of its digits, from -1 (paper) to 1 (ink)."""
        import numpy as np  # noqa: PLC0415
        from media import SIDE, scan  # noqa: PLC0415

        halves = [np.zeros((SIDE, SIDE), np.float32)] * 2
        for i, digit in enumerate(str(self._sum(sample_id)).rjust(2)):
            if digit != " ":
                paths = self.by_digit[int(digit)]
                halves[i] = scan(paths[draws.integers(len(paths))])
        return np.concatenate(halves, axis=1).reshape(-1) * 2 - 1

    def prompt(self, sample_id, module):
        """Return the tokens before the answer."""
        kind = self._kind(sample_id)
        rows = SCAN_ROWS * (kind != "voice") + VOICE_ROWS * (kind != "scan")
        return (*[PLACEHOLDER] * rows, ASK)

    def answer(self, sample_id):
        """Return the letters of the true answer."""
        return tuple(map(LETTERS.index, WORDS[self._sum(sample_id)]))


class Training(Sums):
    """The scans to train with; it also knows those that are held out."""

    tasks = ("add",)

    def __init__(self, seed, scans, voices, held):
        super().__init__(seed, scans, voices, "train")
        self.held = held

    def held_out(self, *, task):
        """Return questions with both a scan that training never sees, and a sound varied in ways of its own."""
        return HeldOut(self, self.held, task)


class HeldOut(Sums):
    """Held-out questions; a classifier that has learned from the scans of training reads the drawings."""

    stop = STOP

    def __init__(self, training, scans, task):
        super().__init__(training.seed, scans, training.voices, task)
        self.training = tuple(training.scans)

    def _kind(self, sample_id):
        return "both"

    def spell(self, tokens):
        """Return an answer as text."""
        return "".join((LETTERS + "?.")[token] for token in tokens)

    def image(self, sample_id):
        """Return the scan as the model sees it."""
        return self._patches(sample_id).reshape(2, 2, 4, 4).transpose(0, 2, 1, 3).reshape(8, 8).clip(0, 1)

    def start(self, sample_id, module):
        """Return the noise that a drawing begins with."""
        import torch  # noqa: PLC0415

        noise = self._random(sample_id, "start").standard_normal((1, 1, 128), "float32")
        return {"noise": torch.from_numpy(noise)}

    def scores(self, sample_id, predictions):
        """Return the fraction of the digits of the sum that the classifier reads, and whether it reads just these."""
        read, true = self._read(predictions), str(self._sum(sample_id)).rjust(2)
        right = [r == t for r, t in zip(read, true, strict=True) if t != " "]
        return {"drawn_digits": sum(right) / len(right), "drawn_sums": float(read == true)}

    def caption(self, sample_id, predictions):
        """Return the question in words, and what the classifier reads of the drawing."""
        asked = f"sees {self._scan(sample_id).name[0]}, hears “{WORDS[self._spoken(sample_id)]}”"
        return f"{asked}, draws {self._read(predictions).strip() or 'nothing'}"

    def picture(self, sample_id, predictions):
        """Return scan, plus, spectrogram, equals and drawing side by side, four pixels for each of a scan."""
        import numpy as np  # noqa: PLC0415
        from media import larger  # noqa: PLC0415

        heard = np.kron(self._spectrogram(sample_id).T[::-1].clip(0, 1), np.ones((1, 3)))
        heard = np.pad(heard, ((4, 4), (0, 0)))  # 24 bands beside 32 pixels
        plus, equals = np.zeros((2, 32, 20))
        plus[15:17, 5:15] = plus[11:21, 9:11] = equals[13:15, 5:15] = equals[18:20, 5:15] = 1
        seen, drawn = larger(self.image(sample_id), 4), larger(_ink(predictions), 4)
        return np.concatenate([seen, plus, heard, equals, drawn], axis=1)

    def _read(self, predictions):
        """Return what the classifier reads of both halves of a drawing; a half with next to no ink is blank."""
        import numpy as np  # noqa: PLC0415

        halves = np.split(_ink(predictions), 2, axis=1)
        digits = _classifier(self.training).predict(np.stack([half.reshape(-1) for half in halves]))
        return "".join(" " if half.mean() < 0.05 else str(d) for half, d in zip(halves, digits, strict=True))


def _ink(predictions):
    """Return a drawing as ink from 0 to 1 [8, 16]."""
    return (predictions["generator"].numpy().reshape(8, 16) / 2 + 0.5).clip(0, 1)


@functools.cache
def _classifier(paths):
    """Return a classifier of digits that has learned from the scans at these paths, and from nothing else."""
    import numpy as np  # noqa: PLC0415
    from media import scan  # noqa: PLC0415
    from sklearn.svm import SVC  # noqa: PLC0415

    inks = np.stack([scan(path).reshape(-1) for path in paths])
    return SVC(gamma=0.25, C=10.0).fit(inks, [int(path.name[0]) for path in paths])


def sums(seed, folder, sequence):
    """Open the source: `seed` is the job's, the rest are its options. The plan reads `sequence`, too."""
    from media import folder_of  # noqa: PLC0415

    train, held, voices = folder_of(folder)
    return Training(seed, train, voices, held)
