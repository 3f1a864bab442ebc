"""Metrics: what metrics.json, latents.npz and examine.py say, by other code; doubt, shapes."""

import re

import doubt
import examine
import helpers
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
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
        run.images = run.data.images[run.data.test_rows] / np.float32(255)
        yield run


@pytest.fixture
def figure(monkeypatch):
    """The figure that examine.py draws."""
    figure = Figure()
    monkeypatch.setattr(examine, "Figure", lambda **_: figure)
    return figure


def compute(images, outputs):
    """Return what metrics.json should say."""
    shown = np.square(np.clip(outputs, 0, 1) - images)
    return {
        "test_loss": np.square(outputs - images).sum(axis=-1).mean(),
        "squared_error": shown.sum(axis=(1, 2, 3)).mean(),
        "psnr": np.mean(-10 * np.log10(shown.mean(axis=(1, 2, 3)))),
    }


def add_noise(images):
    """Return images with the noise of the metrics, which compute it for 125 digits at a time."""
    noisy = []
    for number, batch in enumerate(np.array_split(images, -(-len(images) // 125)), start=1):
        noise = tf.random.stateless_normal(batch.shape, [0, -number], stddev=0.4)
        noisy.append(np.clip(batch + noise, 0, 1))
    return np.concatenate(noisy)


def project(train, points):
    """Return the components of points by PCA of others, the largest first."""
    _, axes = np.linalg.eigh(np.cov(train.T))
    return (points - train.mean(axis=0)) @ axes[:, ::-1]


def test_metrics_are_those_of_the_saved_model(run):
    expected = compute(run.images, run.model(run.images))
    noisy = compute(run.images, run.model(add_noise(run.images)))
    expected |= {f"noisy_{name}": value for name, value in noisy.items()}
    found = run.json("metrics")
    mean_image = run.data.images[run.data.train_rows].mean(axis=0) / 255
    constant = np.square(mean_image - run.images).sum(axis=-1).mean()
    expected |= {"steps": 120, "seconds": found["seconds"], "mean_image_loss": constant}
    assert found == pytest.approx(expected, rel=1e-5)


def test_errors_and_psnr_are_those_of_clipped_outputs(default_run, digits):
    images = digits["x_test"] / np.float32(255)
    outputs = default_run.model()(images).numpy()
    assert outputs.min() < -0.01
    expected = compute(images, outputs)
    metrics = default_run.json("metrics")
    for name in ("psnr", "squared_error"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
    saved = default_run.latents()
    shown = np.square(np.clip(outputs, 0, 1) - images).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(saved["errors"], shown, rtol=1e-4)
    assert saved["files"].tolist() == [str(number) for number in range(1000)]


def test_latents_belong_to_labels_and_files(run):
    saved = run.saved
    latents = run.model.get_layer("encoder")(run.images)
    np.testing.assert_allclose(saved["latents"], latents, atol=1e-5)
    names = saved["classes"][saved["labels"]]
    images = run.data.images[run.data.test_rows]
    for name, file, image in zip(names, saved["files"], images, strict=True):
        if not file.isdecimal():  # as those of digits are
            assert file.startswith(f"{name}/")
            np.testing.assert_array_equal(Image.open(f"pictures/{file}"), image)


def test_exact_reconstructions_have_a_psnr_of_100(run_here, tmp_path, capsys):
    """Black images of a model that has learned nothing; they are too large for PCA."""
    white = np.full((9, 65, 65), 255, "u1")
    np.savez(
        tmp_path / "black.npz",
        x_train=white,
        x_test=white * 0,
    )
    run = run_here("--dataset", "black.npz", "--steps", 1, "--learning-rate", 1e-30)
    assert run.json("metrics")["psnr"] == 100
    examine.examine_run(run.logs)
    assert "no PCA" in capsys.readouterr().out


def test_examine_prints_and_draws_what_independent_code_finds(run, figure, capsys):
    examine.examine_run(run.logs)
    table = re.findall(r"^.{40} *[0-9.]+$", capsys.readouterr().out, re.MULTILINE)
    metrics = run.json("metrics")
    images = run.data.images.reshape(len(run.data.images), -1) / 255
    train, test = images[run.data.train_rows], images[run.data.test_rows]
    components = project(train, test)
    latents = run.saved["latents"]
    rest = components[:, latents.shape[1] :]
    expected = examine.compare(run.images, np.clip(run.model(run.images), 0, 1))
    expected |= {
        "test loss": metrics["test_loss"],
        "PSNR (dB) of noisy inputs": compute(run.images, add_noise(run.images))["psnr"],
        "PSNR (dB) from noisy inputs": metrics["noisy_psnr"],
        "squared error of PCA of that size": np.square(rest).sum() / len(test),
    }
    for line in table:
        value = np.mean(expected.pop(line[:40].strip()))
        assert float(line[40:]) == pytest.approx(value, abs=1e-3)
    assert not expected

    if latents.shape[1] > 2:
        latents = project(latents, latents)
    for axes, points in zip(figure.axes, [components, latents], strict=True):
        for index, line in enumerate(axes.lines):
            drawn = points[run.saved["labels"] == index, :2]
            np.testing.assert_allclose(abs(line.get_xydata()), abs(drawn), atol=1e-4)


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
        assert [text.get_text() for text in texts] == ["$x$", r"\udcff", *names[2:]]
        assert not texts[0].get_parse_math()


def test_pca_of_mnist_is_that_of_hinton_and_salakhutdinov(full_mnist):
    data = train_ae.load_data(train_ae.Settings(dataset="mnist", data_dir=full_mnist))
    parts = [data.images[rows] for rows in (data.train_rows, data.test_rows)]
    rest = examine.image_components(*parts)[:, 30:]
    assert f"{np.square(rest).sum() / 10_000:.2f}" == "13.87"


def save_strange_pictures(folder):
    """Save pictures that need care: turned by EXIF data, transparent, and of 12 bits."""
    draws = np.random.default_rng(2)
    for split, count in (("train", 12), ("test", 6)):
        for index in range(count):
            kind = ("turned", "transparent", "grey")[index % 3]
            path = folder / split / kind / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = draws.integers(0, 256, (8, 6), np.uint8)
            exif = Image.Exif()
            if kind == "turned":
                exif[0x0112] = 6
                picture = Image.fromarray(grey.T.copy())
            else:
                picture = Image.fromarray(grey)
            if kind == "transparent":
                picture.putalpha(Image.fromarray(255 - grey))
            picture.save(path, exif=exif)
    return folder


def save_deep_pictures(folder):
    """Save grey pictures of 12 bits in 16, those to train on with the darkest and the brightest."""
    draws = np.random.default_rng(3)
    for split, low, high in (("train", 0, 4096), ("test", 900, 3000)):
        for index in range(6):
            path = folder / split / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(low, high, (8, 6), np.uint16)).save(path)
    return folder


@pytest.mark.parametrize("save", [save_strange_pictures, save_deep_pictures])
@pytest.mark.parametrize("size", [0, 5])
def test_another_set_is_prepared_as_in_training_to_the_bit(save, size, run_here, tmp_path, capsys):
    folder = save(tmp_path / "mine")
    run = run_here("--dataset", folder, "--depth", 1, "--steps", 5, "--image-size", size)
    expected = run.latents()
    capsys.readouterr()
    examine.examine_set(run.logs, str(folder / "test"), with_pictures=True)
    with np.load(run.logs / "examined" / "test.npz") as file:
        found = dict(file)
    for name in ("latents", "errors"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert [f"test/{file}" for file in found["files"]] == expected["files"].tolist()
    lines = capsys.readouterr().out.splitlines()
    worst = found["files"][found["errors"].argmax()]
    assert lines[-6].split() == [f"{found['errors'].max():.4f}", worst]
    for index, name in enumerate(found["classes"]):
        error = found["errors"][found["labels"] == index].mean()
        assert any(f"of {name or 'all'} (" in line and f"{error:.4f}" in line for line in lines)
    pictures = run.samples / "examined" / "test"
    assert (pictures / "worst.png").is_file()
    model = run.model()
    data = train_ae.load_data(train_ae.Settings(dataset=str(folder), image_size=size))
    outputs = np.clip(model(data.images[data.test_rows] / np.float32(255)), 0, 1)
    for file, output in zip(found["files"], outputs, strict=True):
        drawn = np.asarray(Image.open(pictures / file))
        np.testing.assert_allclose(drawn, 255 * output.squeeze(), atol=0.51)


@pytest.mark.parametrize("save", [save_strange_pictures, save_deep_pictures])
def test_readmes_code_prepares_pictures_as_in_training(save, run_here, tmp_path):
    readme = (helpers.ROOT / "README.md").read_text()
    code = readme.split("```python\nimport json")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 8
    save(tmp_path / "mine")
    (tmp_path / "new-pictures").symlink_to("mine/test")
    run = run_here("--dataset", "mine", "--depth", 1, "--steps", 2, "--image-size", 5, name="RUN")
    names = {}
    exec("import json" + code, names)
    for name in ("latents", "errors"):
        np.testing.assert_array_equal(names["arrays"][name], run.latents()[name])
    assert names["outputs"].shape == names["data"].images.shape


@pytest.mark.parametrize(
    ("shape", "said"),
    [((8, 8, 1), "has images of 8x8x1, and the model takes 8x6x1"), ((8, 6, 3), "has colours")],
)
def test_pictures_that_the_model_cannot_take(shape, said, run_here, tmp_path):
    draws = np.random.default_rng(0)
    np.save(tmp_path / "mine.npy", draws.integers(0, 256, (20, 8, 6), np.uint8))
    np.save(tmp_path / "other.npy", draws.integers(0, 256, (3, *shape), np.uint8))
    run = run_here("--dataset", "mine.npy", "--depth", 1, "--steps", 1)
    with pytest.raises(train_ae.SettingsError, match=said):
        examine.examine_set(run.logs, "other.npy")


def test_shift_tolerant_error_ranks_as_a_person_would():
    """By the numbers that the gallery gives for a wrong digit, and for one that has moved."""
    seven, stray, moved = doubt.make_cases().values()
    for image, expected in [
        (stray, [2, 2, 25.93, 0.98]),
        (moved, [81.54, 0, 9.83, 0.24]),
    ]:
        found = examine.compare(seven, image).values()
        assert [float(value[0]) for value in found] == pytest.approx(expected, abs=0.005)
    assert examine.shift_tolerant_error(seven, np.roll(seven, 3, axis=1)) > 0


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
