"""Write the folder of pictures of this example: handwritten digits as PNG files, each named after its label.

    python examples/pictures/make.py

They come with scikit-learn. A folder of your own works as well, if its files are called LABEL-ANYTHING.png.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(folder=Path(__file__).parent / "png"):
    """Write all 1,797 pictures, of 8 x 8 pixels each."""
    folder.mkdir(exist_ok=True)
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        Image.fromarray((pixels * 15.9375).astype(np.uint8)).save(folder / f"{label}-{number:04}.png")
    return folder


if __name__ == "__main__":
    print(main())
