"""Metrics: what metrics.json, latents.npz and examine.py say, by other code; doubt, shapes."""

import re

import doubt
import examine
import helpers
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import train_ae


@pytest.fixture(
    scope="module",
    params=["--latent-dim 3", "--latent-dim 2 --dataset pictures --depth 1"],
)
def run(request, tmp_path_factory):
    """A finished run with noise, in whose folder tests work, and what it leaves."""
    run = helpers.Finished(tmp_path_factory.mktemp("run"))
    helpers.draw_pictures(run.cwd / "pictures")
    options = f"--run-name x --steps 120 --noise 0.4 {request.param}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.cwd)
        assert helpers.here(*options.split()) == 0
        _, run.data, run.model = examine.open_run(run.logs)
        run.saved = run.latents()
        run.images = run.data.prepare(run.data.test_rows).numpy()
        yield run


@pytest.fixture
def figure(monkeypatch):
    """The figure that examine.py draws."""
    figure = Figure()
    monkeypatch.setattr(examine, "Figure", lambda **_: figure)
    return figure


def compute(images, outputs):
    """Return what metrics.json should say, and the squared error of each image."""
    shown = np.square(np.clip(outputs, 0, 1) - images)
    errors = shown.sum(axis=(1, 2, 3))
    metrics = {
        "test_loss": np.square(outputs - images).sum(axis=-1).mean(),
        "squared_error": errors.mean(),
        "psnr": np.mean(-10 * np.log10(errors / images[0].size)),
    }
    return metrics, errors


def add_noise(images):
    """Return images with the noise of the metrics, which compute it for 125 digits at a time."""
    batches = np.array_split(images, max(1, len(images) // 125))
    noisy = []
    for number, batch in enumerate(batches, start=1):
        noise = tf.random.stateless_normal(batch.shape, [0, -number], stddev=0.4)
        noisy.append(np.clip(batch + noise, 0, 1))
    return np.concatenate(noisy)


def project(train, points):
    """Return the components of points by PCA of others, the largest first."""
    covariance = np.cov(train.T)
    _, axes = np.linalg.eigh(covariance)
    return (points - train.mean(axis=0)) @ axes[:, ::-1]


def test_metrics_are_those_of_the_saved_model(run):
    outputs = run.model(run.images).numpy()
    is_clipped = outputs.min() < -0.01
    assert is_clipped or run.images.shape[-1] == 3  # at least digits are clipped
    expected, errors = compute(run.images, outputs)
    assert_allclose(run.saved["errors"], errors, rtol=1e-4)
    noisy, _ = compute(run.images, run.model(add_noise(run.images)))
    mean_image = run.data.images[run.data.train_rows].mean(axis=0) / 255
    deviations = np.square(mean_image - run.images)
    found = run.json("metrics")
    expected |= {
        "noisy_psnr": noisy["psnr"],
        "mean_image_loss": deviations.sum(axis=-1).mean(),
        "steps": 120,
        "seconds": found["seconds"],
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_latents_belong_to_labels_and_files(run, digits):
    saved = run.saved
    latents = run.model.get_layer("encoder")(run.images)
    assert_allclose(saved["latents"], latents, atol=1e-5)
    names = saved["classes"][saved["labels"]]
    images = run.data.images[run.data.test_rows]
    for name, file, image in zip(names, saved["files"], images, strict=True):
        label, number = file.split("/")
        if label == "test":
            label = str(digits["y_test"][int(number)])
            expected = digits["x_test"][int(number)]
        else:
            expected = Image.open(f"pictures/{file}")
        assert name == label
        assert_array_equal(image, expected)


def test_exact_reconstructions_have_a_psnr_of_100(run_here, tmp_path, capsys):
    """Black images of a model that has learned nothing; they are too large for PCA."""
    train = np.random.default_rng(0).integers(0, 256, (9, 65, 65), np.uint8)
    np.savez(
        tmp_path / "black.npz",
        x_train=train,
        x_test=train * 0,
    )
    run = run_here("--dataset", "black.npz", "--steps", 1, "--learning-rate", 1e-30)
    assert run.json("metrics")["psnr"] == 100
    examine.examine_run(run.logs)
    assert "no PCA" in capsys.readouterr().out


def test_examine_prints_and_draws_what_independent_code_finds(run, figure, capsys):
    examine.examine_run(run.logs)
    output = capsys.readouterr().out
    images = run.data.images.reshape(len(run.data.images), -1) / 255
    test = images[run.data.test_rows]
    components = project(images[run.data.train_rows], test)
    latents = run.saved["latents"]
    rest = components[:, latents.shape[1] :]
    metrics = run.json("metrics")
    outputs = run.model(run.images)
    expected = examine.compare(run.images, np.clip(outputs, 0, 1))
    expected |= {
        "test loss": metrics["test_loss"],
        "PSNR (dB) of noisy inputs": examine.psnr(run.images, add_noise(run.images)),
        "PSNR (dB) from noisy inputs": metrics["noisy_psnr"],
        f"squared error of PCA with {latents.shape[1]} numbers": np.square(rest).sum() / len(test),
    }
    for line in re.findall(r"^.{40} *[0-9.]+$", output, re.MULTILINE):
        name = line[:40].strip()
        value = np.mean(expected.pop(name))
        assert float(line[40:]) == pytest.approx(value, abs=1e-3)
    assert not expected

    if latents.shape[1] > 2:
        latents = project(latents, latents)
    for axes, points in zip(figure.axes, [components, latents], strict=True):
        for index, line in enumerate(axes.lines):
            drawn = abs(line.get_xydata())
            own = points[run.saved["labels"] == index, :2]
            assert_allclose(drawn, abs(own), atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 30, 31])
def test_two_to_thirty_classes_have_a_legend_in_plain_text(count, figure, tmp_path):
    names = ["$x$", "\udcff", *"_" * 29][:count]
    examine.draw_latents(
        {"": np.eye(count, 1)},
        np.arange(count),
        names,
        tmp_path / "x.png",
    )
    legend = figure.axes[0].get_legend()
    assert (legend is not None) == (2 <= count <= 30)
    if legend:
        texts = legend.get_texts()
        found = [text.get_text() for text in texts]
        assert found == ["$x$", r"\udcff", *names[2:]]
        assert not texts[0].get_parse_math()


def test_pca_of_mnist_is_that_of_hinton_and_salakhutdinov(full_mnist):
    data = train_ae.load_data(train_ae.Settings(dataset="mnist", data_dir=full_mnist))
    parts = [data.prepare(rows) for rows in (data.train_rows, data.test_rows)]
    rest = examine.image_components(*parts)[:, 30:]
    error = np.square(rest).sum() / 10_000
    assert f"{error:.2f}" == "13.87"


@pytest.fixture(params=["transparent", "deep"])
def mine(request, tmp_path):
    """A folder of pictures that need care: turned by EXIF data, and transparent or of 12 bits;
    those to train on have the darkest and the brightest values.
    """
    draws = np.random.default_rng(2)
    exif = Image.Exif()
    exif[0x0112] = 6
    splits = [("train", 0, 256), ("test", 50, 200)]
    for split, low, high in splits:
        for index in range(6):
            values = draws.integers(low, high, (6, 8, 2), np.uint8)
            folder = tmp_path / "mine" / split
            if request.param == "deep":
                values = values[..., 0] * np.uint16(16)
            else:
                folder = folder / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / f"{index}.png", exif=exif)
    return tmp_path / "mine"


@pytest.mark.parametrize("size", [0, 5])
def test_another_set_is_prepared_as_in_training_to_the_bit(size, mine, run_here, capsys):
    run = run_here("--dataset", mine, "--depth", 1, "--steps", 5, "--image-size", size)
    expected = run.latents()
    capsys.readouterr()
    examine.examine_set(run.logs, str(mine / "test"), with_pictures=True)
    with np.load(run.logs / "examined/test.npz") as file:
        found = dict(file)
    errors = found["errors"]
    assert_array_equal(found["latents"], expected["latents"])
    assert_array_equal(errors, expected["errors"])
    assert [f"test/{file}" for file in found["files"]] == expected["files"].tolist()

    lines = capsys.readouterr().out.splitlines()
    worst = errors.argmax()
    assert lines[-6] == f"{errors[worst]:9.4f} {found['files'][worst]}"
    for index, name in enumerate(found["classes"]):
        own = errors[found["labels"] == index]
        title = f"mean error of {name or 'all'} ({len(own)})"
        assert f"{title:40} {own.mean():9.4f}" in lines

    pictures = run.samples / "examined/test"
    assert (run.samples / "examined/test-worst.png").is_file()
    outputs = run.model().get_layer("decoder")(found["latents"]).numpy()
    outputs = outputs.clip(0, 1)
    for file, output in zip(found["files"], outputs, strict=True):
        drawn = Image.open(pictures / file)
        assert_allclose(drawn, 255 * output.squeeze(), atol=0.51)


def test_readmes_code_prepares_pictures_as_in_training(mine, run_here, tmp_path):
    readme = (helpers.ROOT / "README.md").read_text()
    code = re.search("```python\n(import json.*?)```", readme, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 8
    (tmp_path / "new-pictures").symlink_to("mine/test")
    options = "--depth 1 --steps 2 --image-size 5"
    run = run_here("--dataset", mine, *options.split(), name="RUN")
    names = {}
    exec(code, names)
    expected = run.latents()
    assert_array_equal(names["result"].latents, expected["latents"])
    assert_array_equal(names["result"].errors, expected["errors"])


def test_pictures_that_the_model_cannot_take_are_refused(run):
    others = {
        "mnist_5k": ("pictures", "has colours"),
        "pictures": ("mnist_5k", "has images of 28x28x3, and the model takes 8x4x3"),
    }
    other, said = others[run.json("config")["settings"]["dataset"]]
    with pytest.raises(train_ae.SettingsError, match=said):
        examine.examine_set(run.logs, other)


def test_shift_tolerant_error_ranks_as_a_person_would():
    """By the numbers that the gallery gives for a wrong digit, and for one that has moved."""
    seven, stray, moved = doubt.make_cases().values()
    for image, expected in [
        (stray, [2, 2, 25.93, 0.98]),
        (moved, [81.54, 0, 9.83, 0.24]),
    ]:
        metrics = examine.compare(seven, image)
        assert_allclose(np.concatenate([*metrics.values()]), expected, atol=0.005)
    moved_by_3 = np.roll(seven, 3, axis=1)
    assert examine.shift_tolerant_error(seven, moved_by_3) > 0


def test_scripts_are_run_as_commands(tiny, run_here, tmp_path):
    run = run_here(*tiny, "--steps", 1)
    for name, *arguments, status in [
        ("examine.py", run.logs, 0),
        ("examine.py", run.logs, tiny[1], "--pictures", 0),
        ("examine.py", run.logs, train_ae.BUNDLED, 2),
        ("examine.py", "nowhere", 2),
        ("doubt.py", "doubt.png", 0),
        ("shapes.py", "one", 8, 0),
        ("shapes.py", "other", 8, 0),
    ]:
        process = helpers.call(
            *arguments,
            cwd=tmp_path,
            script=helpers.ROOT / "tests" / name,
        )
        assert process.returncode == status
        assert len(helpers.said(process.stderr)) <= 1
    assert (run.samples / "latents.png").exists()
    assert (tmp_path / "doubt.png").exists()
    one = tmp_path / "one/star/00006.png"
    other = tmp_path / "other/star/00006.png"
    assert one.read_bytes() == other.read_bytes()
