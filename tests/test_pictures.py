"""The pictures of a run, pixel by pixel."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from train_ae import COLUMNS, GAP, INK, MARGIN, PAPER, SCALE, draw_grid, draw_summary

STRIDE = 28 * SCALE + GAP


def tile(picture, row, column):
    """Return the enlarged image in a place of a grid."""
    top, left = STRIDE // 2 + row * STRIDE, MARGIN + column * STRIDE
    return np.asarray(picture)[top : top + 28 * SCALE, left : left + 28 * SCALE]


def enlarge(image):
    return np.kron(image[..., 0], np.ones((SCALE, SCALE), np.uint8))


@pytest.mark.parametrize("count", [10, 26])
def test_grid_pixel_by_pixel(count):
    random = np.random.default_rng(0)
    originals, drawn = random.integers(0, 256, (2, count, 28, 28, 1), np.uint8)
    picture = draw_grid(originals / np.float32(255), drawn / np.float32(255), "step 50")
    for index in range(count):
        row, column = divmod(index, COLUMNS)
        np.testing.assert_array_equal(tile(picture, 2 * row, column), enlarge(originals[index]))
        np.testing.assert_array_equal(tile(picture, 2 * row + 1, column), enlarge(drawn[index]))
    rows = 2 * -(-count // COLUMNS)
    beside = np.asarray(picture).copy()
    for row in range(rows):
        for column in range(COLUMNS if count > row // 2 * COLUMNS + COLUMNS else count - row // 2 * COLUMNS):
            tile_ = beside[STRIDE // 2 + row * STRIDE :, MARGIN + column * STRIDE :][: 28 * SCALE, : 28 * SCALE]
            tile_[:] = PAPER
    assert set(np.unique(beside[:, MARGIN - GAP :][STRIDE // 2 :])) == {PAPER}  # nothing between and below the tiles
    for words in (beside[: STRIDE // 2], beside[STRIDE // 2 :, : MARGIN - GAP]):
        assert words.max() >= INK - 10 and (words == PAPER).mean() > 0.8  # the title, and the names of the rows


def test_values_beyond_zero_and_one_are_clipped():
    images = np.full((1, 28, 28, 1), [-0.5], np.float32)
    images[0, 0, :5, 0] = [1.5, 1.0, 0.5, 0.0, 200 / 255]
    picture = draw_grid(images, images, "")
    np.testing.assert_array_equal(tile(picture, 0, 0)[0, : 6 * SCALE : SCALE], [255, 255, 128, 0, 200, 0])


@pytest.mark.parametrize("steps", [1, 60, 3000])
def test_summary_shows_both_curves_and_the_digits(steps, tmp_path):
    random = np.random.default_rng(1)
    originals = random.random((10, 28, 28, 1), np.float32)
    record = SimpleNamespace(
        tests={}, losses=dict(enumerate(random.random(steps) / 50)), grid=lambda k: tmp_path / f"{k}.png"
    )
    for step in sorted({*range(0, steps, 50), steps}):
        record.tests[step] = 0.1 / (1 + step)
        draw_grid(originals, originals * step / steps, "").save(record.grid(step))
    draw_summary(record, tmp_path / "summary.png")
    pixels = np.asarray(Image.open(tmp_path / "summary.png").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # matplotlib's tab:blue and tab:orange
        assert (np.abs(pixels - colour).sum(axis=1) < 10).sum() > 50
