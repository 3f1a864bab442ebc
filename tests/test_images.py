"""Any images: sets of TFDS and folders of pictures, small and large, grey and in color, trained on and looked at."""

import contextlib
import functools
import io
import re
import runpy
import sys

import keras
import numpy as np
import pytest
import shapes
from PIL import Image
from runs import Finished, assert_same_weights, once
from sklearn.decomposition import PCA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorflow_datasets.core.features import Text
from test_data import prepare, random_pictures

import train_ae

GAP, TITLE, BACKGROUND = 6, 28, 32  # of a grid: pixels, and the grey between the images

# how to make a set in a folder, the options of a run on it, the shape of its images, and what its data line says
SETS = {
    "color": (
        lambda folder: prepare(folder, shape=(32, 32, 3)),
        ["--tied", "--latent-dim", 5],
        (32, 32, 3),
        r"30 and \(8, 32, 32, 3\) images: tiny/1\.0\.0 in .*test",
    ),
    "odd": (
        lambda folder: prepare(folder, shape=(45, 30, 1), train=40),
        ["--pretrain-steps", 2, "--depth", 2],
        (45, 30, 1),
        r"36 and \(4, 45, 30, 1\) images: tiny/1\.0\.0 in .*train\[90%:\]",
    ),
    "texts": (
        lambda folder: prepare(folder, shape=(10, 12, 3), label=Text(), train=30, validation=25),
        ["--latent-dim", 3, "--depth", 3],
        (10, 12, 3),
        r"30 and \(25, 10, 12, 3\) images: tiny/1\.0\.0 in .*validation",
    ),
    "several": (
        lambda folder: prepare(folder, shape=(None, None, 1), sizes=[(20, 31, 1), (40, 17, 1)], label=False),
        ["--image-size", 13, "--depth", 3, "--tied"],
        (13, 13, 1),
        r"30 and \(8, 13, 13, 1\) images: tiny/1\.0\.0 in .*test",
    ),
    "large": (
        lambda folder: prepare(folder, shape=(64, 64, 3), train=12, test=4),
        ["--depth", 2],
        (64, 64, 3),
        r"12 and \(4, 64, 64, 3\) images: tiny/1\.0\.0 in .*test",
    ),
    "shapes": (
        lambda folder: shapes.draw(folder / "shapes", 60),
        ["--image-size", 12, "--latent-dim", 4, "--depth", 2, "--tied", "--pretrain-steps", 2],
        (12, 12, 3),
        r"54 and \(6, 12, 12, 3\) images: pictures in .*shapes",
    ),
    "grey": (
        lambda folder: random_pictures(folder / "grey", 20, size=(23, 9), mode="L"),
        ["--depth", 2, "--latent-dim", 2],
        (9, 23, 1),
        r"18 and \(2, 9, 23, 1\) images: pictures in .*grey",
    ),
}
STEPS = 4
COMMON = ["--batch-size", 4, "--sample-every", 2, "--checkpoint-every", 2]


def train(name, folder, run_name, steps=STEPS):
    """Run the script's main() in this process, on the set that lies in a folder; return the run and what it printed."""
    source = ["--dataset", folder / name] if (folder / name).is_dir() else ["--dataset", "tiny", "--data-dir", folder]
    arguments = [*COMMON, *source, *SETS[name][1], "--run-name", run_name, "--steps", steps]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        if name in ("color", "odd"):  # their principal axes take seconds, and smaller images show the same
            patch.setattr(train_ae, "fit_pca", lambda images: None)
        assert train_ae.main([*map(str, arguments)]) == 0
    return Finished(folder, run_name), said.getvalue()


@pytest.fixture(scope="session", params=SETS)
def trained(request, tmp_path_factory):
    """The name of a set, a run on it and what the run printed."""

    def make(folder):
        SETS[request.param][0](folder)
        return train(request.param, folder, "whole")

    return request.param, *once(tmp_path_factory, f"images_{request.param}", make)


@functools.cache
def load(folder):
    """Return the data of a run's folder, the trained model, and its outputs for the test images."""
    run = Finished(folder, "whole")
    config = run.json("config.json")
    names = ("dataset", "data_dir", "image_size")
    data = train_ae.load_data(train_ae.Settings(**{name: config[name] for name in names}), 1)
    model = keras.models.load_model(run.logs / "autoencoder.keras")
    return data, model, model.predict(data.test / 255, verbose=0).astype(float)


def pick(labels):
    """Return which test images are shown: the first one of each class, then the first ones, 10 at most."""
    chosen = []
    for label in sorted(set(labels)):
        chosen.append(list(labels).index(label))
    for index in range(len(labels)):
        if index not in chosen and index < 10:
            chosen.append(index)
    return chosen[:10]


def test_run_says_what_it_trains_on(trained):
    name, _, said = trained
    assert re.search(rf"^data +{SETS[name][3]}", said, re.MULTILINE)


def test_model_has_the_shape_of_the_images(trained):
    name, run, _ = trained
    _, model, outputs = load(run.cwd)
    assert model.input_shape == model.output_shape == (None, *SETS[name][2])
    assert np.isfinite(outputs).all()


def test_grid_shows_test_images_above_their_reconstructions(trained):
    name, run, _ = trained
    data, _, outputs = load(run.cwd)
    height, width, channels = SETS[name][2]
    zoom = max(1, 100 // max(height, width))
    high, wide = height * zoom, width * zoom
    chosen = pick(data.labels)
    count = min(10, len(chosen), 1400 // (wide + GAP))
    for step in range(0, STEPS + 1, 2):
        with Image.open(run.samples / f"step_{step:05}.png") as picture:
            assert picture.mode == ("L" if channels == 1 else "RGB")
            assert picture.size == (count * (wide + GAP), TITLE + 2 * (high + GAP)) and picture.width <= 1400
            pixels = np.array(picture).reshape(picture.height, picture.width, channels)
        for row, images in enumerate((data.test / 255, outputs)):
            for column, index in enumerate(chosen[:count]):
                top, left = TITLE + row * (high + GAP), GAP // 2 + column * (wide + GAP)
                found = pixels[top : top + high, left : left + wide].astype(int)
                expected = np.rint(np.clip(images[index], 0, 1) * 255).repeat(zoom, axis=0).repeat(zoom, axis=1)
                if row == 0:
                    np.testing.assert_array_equal(found, expected)
                elif step == STEPS:  # in a batch of another size, sums have other last bits
                    assert np.abs(found - expected).max() <= 1
                pixels[top : top + high, left : left + wide] = BACKGROUND
        assert (pixels[TITLE:] == BACKGROUND).all()


def test_tensorboard_shows_the_same_pictures(trained):
    _, run, _ = trained
    events = EventAccumulator(str(run.logs / "test"), size_guidance={"tensors": 0}).Reload().Tensors("reconstructions")
    assert [event.step for event in events] == [0, 2, 4]
    for event in events:
        width, height, image = event.tensor_proto.string_val
        path = run.samples / f"step_{event.step:05}.png"
        assert image == path.read_bytes()
        assert Image.open(path).size == (int(width), int(height))


def test_latents_are_drawn(trained):
    _, run, _ = trained
    with Image.open(run.samples / "latents.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    assert (pixels.max(axis=2).astype(int) - pixels.min(axis=2) > 60).sum() > 20  # colored points


def structural_similarity(image, output):
    """Return Wang et al.'s index (2004) of two (height, width) images in [0, 1], written anew."""
    size = min(11, *image.shape)
    line = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(values):
        return (np.lib.stride_tricks.sliding_window_view(values, window.shape) * window).sum(axis=(2, 3))

    x, y = mean(image), mean(output)
    xx, yy, xy = mean(image**2) - x**2, mean(output**2) - y**2, mean(image * output) - x * y
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * x * y + c1) * (2 * xy + c2) / ((x**2 + y**2 + c1) * (xx + yy + c2))).mean()


def shifted_error(image, output):
    """Return the smallest squared error of an image against its output moved by up to two pixels each way."""
    height, width = image.shape[:2]
    errors = []
    for down in range(-2, 3):
        for right in range(-2, 3):
            moved = np.zeros_like(output)
            for y in range(max(0, down), min(height, height + down)):
                for x in range(max(0, right), min(width, width + right)):
                    moved[y, x] = output[y - down, x - right]
            errors.append(((image - moved) ** 2).sum())
    return min(errors)


def test_metrics_are_those_of_independent_code(trained):
    _, run, _ = trained
    data, model, outputs = load(run.cwd)
    tests = data.test / 255
    metrics, shown = run.json("metrics.json"), np.clip(outputs, 0, 1)
    squared = (tests - outputs) ** 2
    assert metrics["test_loss"] == pytest.approx(squared.sum(axis=3).mean(), rel=1e-4)
    assert metrics["squared_error"] == pytest.approx(squared.sum(axis=(1, 2, 3)).mean(), rel=1e-4)
    errors = ((tests - shown) ** 2).mean(axis=(1, 2, 3))
    assert metrics["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)
    pairs = list(zip(tests, outputs, strict=True))
    few = pairs if tests[0].size < 2000 else pairs[:2]  # pixel by pixel, it takes long
    found = [train_ae.shift_tolerant_error(x[None].astype("f"), y[None].astype("f"))[0] for x, y in few]
    np.testing.assert_allclose(found, [shifted_error(x, y) for x, y in few], rtol=1e-4)
    if few == pairs:
        assert metrics["shift_tolerant_error"] == pytest.approx(np.mean(found), rel=1e-4)
    channels = [
        structural_similarity(x[..., c], y[..., c])
        for x, y in zip(tests, shown, strict=True)
        for c in range(tests.shape[3])
    ]
    assert metrics["ssim"] == pytest.approx(np.mean(channels), abs=1e-4)
    assert metrics["latent_size"] == np.prod(model.get_layer("encoder").output_shape[1:])


@pytest.mark.parametrize("trained", ["texts", "shapes", "grey", "large"], indirect=True)
def test_principal_components_are_those_of_scikit_learn_up_to_4096_values(trained):
    name, run, _ = trained
    images, tests = (part.reshape(len(part), -1) / 255 for part in load(run.cwd)[0][:2])
    found = run.json("metrics.json")["pca_squared_error"]
    if images[0].size > 4096:
        assert found is None
        return
    (size,) = {"texts": {3}, "shapes": {4}, "grey": {2}}[name]
    pca = PCA(size).fit(images)
    again = pca.inverse_transform(pca.transform(tests))
    assert found == pytest.approx(((tests - again) ** 2).sum(axis=1).mean(), rel=1e-3)


@pytest.mark.parametrize("trained", ["shapes", "grey"], indirect=True)
def test_a_run_in_two_parts_has_the_weights_of_one_to_the_bit(trained):
    name, whole, _ = trained
    _, said = train(name, whole.cwd, "parts", steps=2)
    parts, more = train(name, whole.cwd, "parts")
    assert "step      0" in said and "step      0" not in more  # it did go on, and did not begin anew
    assert_same_weights(parts, whole)
    np.testing.assert_array_equal(
        Image.open(parts.samples / f"step_{STEPS:05}.png"), Image.open(whole.samples / f"step_{STEPS:05}.png")
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (100, 134), (3, 1394), (3, 1395), (5, 1401), (7, 5000)])
def test_a_grid_of_any_images_is_at_most_1400_pixels_wide_and_shows_at_least_one(shape):
    images = np.random.default_rng(0).random((12, *shape, 3), np.float32)
    picture = train_ae.draw_grid(images, images, "step 0")
    assert min(shape[1], 100) <= picture.width <= 1400
    width = np.asarray(picture)[TITLE:].reshape(-1, picture.width, 3)
    assert (width != BACKGROUND).any(axis=(0, 2)).sum() >= min(shape[1], 600)


def test_shapes_are_the_same_each_time_and_of_four_kinds(tmp_path, monkeypatch):
    shapes.draw(tmp_path / "function", 9, 32)
    monkeypatch.setattr(sys, "argv", ["shapes.py", str(tmp_path / "command"), "9", "32"])
    runpy.run_path(shapes.__file__, run_name="__main__")
    drawn = {path.relative_to(tmp_path / "command"): path for path in tmp_path.glob("command/*/*.png")}
    assert sorted(path.parts[0] for path in drawn) == ["circle"] * 3 + ["square"] * 2 + ["star"] * 2 + ["triangle"] * 2
    for path, file in drawn.items():
        assert file.read_bytes() == (tmp_path / "function" / path).read_bytes()
        with Image.open(file) as picture:
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
    assert len({file.read_bytes() for file in drawn.values()}) == 9
    shapes.draw(tmp_path / "other", 1, 32, seed=1)
    assert next(tmp_path.glob("other/*/*.png")).read_bytes() not in {file.read_bytes() for file in drawn.values()}
