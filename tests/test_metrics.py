"""Metrics: what metrics.json, latents.npz and theory.py say, by independent code; doubt, shapes."""

import doubt
import helpers
import numpy as np
import pytest
import tensorflow as tf
import theory
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
        _, run.data, run.model, run.saved = theory.open_run(run.logs)
        run.images = run.data.test / np.float32(255)
        yield run


@pytest.fixture
def figure(monkeypatch):
    """The figure that theory.py draws."""
    figure = Figure()
    monkeypatch.setattr(theory, "Figure", lambda **_: figure)
    return figure


def compute(images, outputs):
    """Return what metrics.json should say."""
    squares = np.square(outputs - images)
    shown = np.square(np.clip(outputs, 0, 1) - images).mean(axis=(1, 2, 3))
    return {
        "test_loss": squares.sum(axis=-1).mean(),
        "squared_error": squares.sum(axis=(1, 2, 3)).mean(),
        "psnr": np.mean(-10 * np.log10(shown)),
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
    expected |= {"steps": 120, "seconds": found["seconds"]}
    assert found == pytest.approx(expected, rel=1e-5)


def test_psnr_is_that_of_clipped_outputs(default_run, digits):
    images = digits["x_test"] / np.float32(255)
    outputs = default_run.model()(images).numpy()
    assert outputs.min() < -0.01
    psnr = compute(images, outputs)["psnr"]
    assert default_run.json("metrics")["psnr"] == pytest.approx(psnr, rel=1e-5)


def test_latents_belong_to_labels_and_files(run):
    saved = run.saved
    latents = run.model.get_layer("encoder")(run.images)
    np.testing.assert_allclose(saved["latents"], latents, atol=1e-5)
    names = saved["classes"][saved["labels"]]
    for name, file, image in zip(names, saved["files"], run.data.test, strict=True):
        if file:  # which digits have not
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
    theory.main(run.logs)
    assert "no PCA" in capsys.readouterr().out


def test_theory_prints_and_draws_what_independent_code_finds(run, figure, capsys):
    theory.main(run.logs)
    *table, _ = capsys.readouterr().out.splitlines()
    metrics = run.json("metrics")
    train, test = [part.reshape(len(part), -1) / 255 for part in run.data[:2]]
    components = project(train, test)
    latents = run.saved["latents"]
    rest = components[:, latents.shape[1] :]
    expected = theory.compare(run.images, run.model(run.images).numpy())
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
    theory.draw_latents(
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
    rest = theory.image_components(data.train, data.test)[:, 30:]
    assert f"{np.square(rest).sum() / 10_000:.2f}" == "13.87"


def test_shift_tolerant_error_ranks_as_a_person_would():
    """By the numbers that the gallery gives for a wrong digit, and for one that has moved."""
    seven, stray, moved = doubt.make_cases().values()
    for image, expected in [
        (stray, [2, 2, 25.93, 0.98]),
        (moved, [81.54, 0, 9.83, 0.24]),
    ]:
        found = theory.compare(seven, image).values()
        assert [float(value[0]) for value in found] == pytest.approx(expected, abs=0.005)
    assert theory.shift_tolerant_error(seven, np.roll(seven, 3, axis=1)) > 0


def test_scripts_are_run_as_commands(tiny, run_here, tmp_path):
    run = run_here(*tiny, "--steps", 1)
    for name, *arguments, status in [
        ("theory.py", run.logs, 0),
        ("theory.py", "nowhere", 2),
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
