"""The article's doubt in a picture: python tests/doubt.py [FILE], by default samples/doubt.png

A wrong digit has a small error, pixel by pixel, and a right digit has a large one.
"""

import sys

import examine
import numpy as np
from matplotlib.figure import Figure

import train_ae


def make_cases():
    """Return the first 7 of the test digits, and changed ones, {title: (1, 28, 28, 1)}."""
    with np.load(train_ae.BUNDLED) as file:
        sevens = file["x_test"][file["y_test"] == 7]
    seven = sevens[:1] / np.float32(255)
    stray = seven.copy()
    stray[0, [4, 24], [24, 4]] = 1  # both are black in the 7
    return {
        "a 7": seven,
        "two stray pixels": stray,
        "moved by 1 and 2": np.roll(seven, (1, 2), axis=(1, 2)),
    }


def draw(cases):
    """Return the picture: the digits, and under the changed ones their metrics."""
    figure = Figure(figsize=(8.4, 3.5))
    for axes, (title, image) in zip(figure.subplots(1, 3), cases.items(), strict=True):
        axes.imshow(image[0, ..., 0], cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=title)
        if title == "a 7":
            continue
        metrics = examine.compare(cases["a 7"], image)
        for row, (name, values) in enumerate(metrics.items()):
            place = {
                "y": -0.05 - 0.1 * row,
                "va": "top",
                "transform": axes.transAxes,
            }
            weight = "bold" if "tolerant" in name else "normal"
            axes.text(0, s=name, weight=weight, **place)
            axes.text(1, s=f"{values[0]:.2f}", weight=weight, ha="right", **place)
    figure.subplots_adjust(0.01, 0.29, 0.99, 0.92, wspace=0.15)
    return figure


if __name__ == "__main__":
    path = sys.argv[1] if sys.argv[1:] else train_ae.BUNDLED.parent / "doubt.png"
    draw(make_cases()).savefig(path, dpi=100)
