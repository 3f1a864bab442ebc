"""A synthetic set of colour pictures: python tests/shapes.py FOLDER [COUNT] [SIZE].

Each shows a circle, a square, a triangle or a star of random colour, place, size and angle, on a background that runs
from one colour to another. They lie in subfolders named by shape. The same call draws the same pictures.
"""

import colorsys
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CORNERS = {"circle": 0, "square": 4, "star": 10, "triangle": 3}
DETAIL = 4  # drawn so many times as large, then scaled down: smooth edges


def draw_shape(name, size, random):
    """Return one picture, size x size, RGB."""
    hue = random.random()
    corners = [
        colorsys.hsv_to_rgb((hue + random.uniform(-0.07, 0.07)) % 1, random.uniform(0.4, 0.75), value)
        for value in random.uniform(0.2, 0.6, 4)
    ]
    corners = Image.fromarray(np.rint(np.reshape(corners, (2, 2, 3)) * 255).astype(np.uint8))
    large = size * DETAIL
    picture = corners.resize((large, large), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    bright = colorsys.hsv_to_rgb((hue + random.uniform(0.2, 0.8)) % 1, random.uniform(0.6, 0.95), 1)
    color = tuple(round(255 * part) for part in bright)
    radius = random.uniform(0.22, 0.4) * large
    x, y = random.uniform(radius + 0.03 * large, 0.97 * large - radius, 2)
    turn = random.uniform(0, 2 * math.pi)
    draw = ImageDraw.Draw(picture)
    if name == "circle":
        draw.circle((x, y), 0.88 * radius, color)
    else:
        count = CORNERS[name]
        points = []
        for corner in range(count):
            reach = radius * (0.45 if name == "star" and corner % 2 else 1)
            angle = turn + 2 * math.pi * corner / count
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        draw.polygon(points, color)
    return picture.resize((size, size), Image.Resampling.BOX)


def draw(folder, count=2000, size=64, seed=0):
    """Draw `count` pictures, as many of each shape as can be, as PNG files in subfolders of a folder."""
    random = np.random.default_rng(seed)
    for index in range(count):
        name = list(CORNERS)[index % len(CORNERS)]
        path = Path(folder, name, f"{index:05}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_shape(name, size, random).save(path)


if __name__ == "__main__":
    draw(sys.argv[1], *map(int, sys.argv[2:4]))
