"""A synthetic set of colour pictures: python tests/shapes.py FOLDER [COUNT] [SIZE]

Each shows a circle, a square, a star or a triangle of random colour, place, size and angle, on a
background that runs from one colour to another. They lie in subfolders named by shape. The same
call draws the same pictures.
"""

import argparse
from cmath import pi, rect
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# How far each corner is from the middle.
SHAPES = {
    "circle": [],
    "square": [1] * 4,
    "star": [1, 0.45] * 5,
    "triangle": [1] * 3,
}


def to_rgb(hue, saturation, value):
    """Return a colour as Pillow has it."""
    parts = hsv_to_rgb(hue % 1, saturation, value)
    return tuple(round(255 * part) for part in parts)


def draw_shape(corners, size, uniform):
    """Return one picture, size x size, RGB."""
    large = 4 * size  # scaled down at the end: smooth edges
    hue = uniform()
    colors = []
    for value in uniform(0.2, 0.6, 4):
        near = hue + uniform(-0.07, 0.07)
        colors.append(to_rgb(near, uniform(0.4, 0.75), value))
    background = Image.fromarray(np.array(colors, np.uint8).reshape(2, 2, 3))
    picture = background.resize((large, large), Image.Resampling.BILINEAR, (0.5, 0.5, 1.5, 1.5))

    color = to_rgb(hue + uniform(0.2, 0.8), uniform(0.6, 0.95), 1)
    radius = uniform(0.22, 0.4) * large
    x, y = uniform(radius + 0.03 * large, 0.97 * large - radius, 2)
    turn = uniform(0, 2 * pi)
    points = []
    for index, corner in enumerate(corners):
        angle = turn + 2 * pi * index / len(corners)
        spoke = rect(radius * corner, angle)
        points.append((x + spoke.real, y + spoke.imag))
    pen = ImageDraw.Draw(picture)
    if points:
        pen.polygon(points, color)
    else:
        pen.circle((x, y), 0.88 * radius, color)
    return picture.resize((size, size), Image.Resampling.BOX)


def draw(folder, count=2000, size=64):
    """Draw `count` pictures, as many of each shape as can be, as PNG files in subfolders."""
    uniform = np.random.default_rng(0).uniform
    for index in range(count):
        name = list(SHAPES)[index % 4]
        path = Path(folder, name, f"{index:05}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_shape(SHAPES[name], size, uniform).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("folder")
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("size", type=int, nargs="?", default=64)
    draw(**vars(parser.parse_args()))
