"""The article's doubt in a picture: a wrong digit with a small pixel error, and a right one with a large.

python tests/doubt.py   # writes samples/doubt.png
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tensorflow as tf
from matplotlib.figure import Figure

import train_ae

SAMPLES = Path(train_ae.__file__).resolve().parent / "samples"


def cases():
    """Return the first 7 of the test digits, the same with two stray pixels, and moved by 1 down and 2 to the right."""
    with np.load(SAMPLES / "mnist_5k.npz") as file:
        seven = file["test_images"][file["test_labels"] == 7][:1] / np.float32(255)
    stray = seven.copy()
    stray[0, [4, 24], [24, 4]] = 1  # both are black in the 7
    return {"a 7": seven, "two stray pixels": stray, "moved by 1 and 2": np.roll(seven, (1, 2), axis=(1, 2))}


def figures(image, other):
    """Return what the script says of a reconstruction: name to value."""
    return {
        "squared error": float(train_ae.squared_error(image, other)[0]),
        "shift-tolerant error": float(train_ae.shift_tolerant_error(image, other)[0]),
        "PSNR (dB)": float(tf.image.psnr(image, other, 1)[0]),
        "SSIM": float(tf.image.ssim(image, other, 1)[0]),
    }


def draw():
    """Return the picture: the three digits, and under the changed ones all figures."""
    figure = Figure(figsize=(8.4, 3.5))
    digits = cases()
    for axes, (name, image) in zip(figure.subplots(1, 3), digits.items(), strict=True):
        axes.imshow(image[0, ..., 0], cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=name)
        words = figures(digits["a 7"], image) if name != "a 7" else {}
        for row, (what, value) in enumerate(words.items()):
            at = {"transform": axes.transAxes, "va": "top", "weight": "bold" if "tolerant" in what else None}
            axes.text(0, -0.05 - 0.1 * row, what, **at)
            axes.text(1, -0.05 - 0.1 * row, f"{value:.2f}", ha="right", **at)
    figure.subplots_adjust(0.01, 0.29, 0.99, 0.92, wspace=0.15)
    return figure


if __name__ == "__main__":
    draw().savefig(SAMPLES / "doubt.png", dpi=100)
