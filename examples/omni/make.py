"""Write the media of this example: scans of handwritten digits as PNG files, and spoken digits as WAV files.

    python examples/omni/make.py

The scans come with scikit-learn, the voices with captcha (`pip install captcha`): one voice, each digit once.
"""

import shutil
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(folder=Path(__file__).parent / "media"):
    """Write 1,797 scans of 8 x 8 pixels, and ten sounds of a quarter of a second."""
    for name in ("scans", "voices"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        Image.fromarray((pixels * 15.9375).astype(np.uint8)).save(folder / f"scans/{label}-{number:04}.png")
    for digit in range(10):
        with as_file(files("captcha") / f"data/{digit}/default.wav") as path:
            shutil.copyfile(path, folder / f"voices/{digit}.wav")
    return folder


if __name__ == "__main__":
    print(main())
