"""The pictures of a run: sample grids pixel by pixel, the animation, the curves and the latents."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from events import scalars
from matplotlib import colors
from PIL import Image
from runs import once
from sklearn.decomposition import PCA

import train_ae
from train_ae import Data, Record, Settings, build_autoencoder, draw_grid, plan_phases

GAP, TITLE, BACKGROUND = 6, 28, 32  # pixels, and the grey between the images


def tile(picture, row, column, height, width):
    """Return the pixels in a place of a grid, (height, width, channels), of tiles of that size."""
    top, left = TITLE + row * (height + GAP), GAP // 2 + column * (width + GAP)
    return np.asarray(picture)[top : top + height, left : left + width].reshape(height, width, -1)


def enlarge(image, zoom):
    return np.kron(image, np.ones((zoom, zoom, 1), np.uint8))


@pytest.mark.parametrize(
    ("shape", "count", "shown", "zoom"),
    [
        ((28, 28, 1), 10, 10, 3),
        ((28, 28, 1), 26, 10, 3),  # ten are shown, whatever there are
        ((28, 28, 1), 1, 1, 3),
        ((33, 17, 3), 4, 4, 3),
        ((7, 5, 1), 10, 10, 14),
        ((1, 1, 3), 3, 3, 100),
        ((64, 64, 3), 20, 10, 1),
        ((140, 134, 3), 12, 10, 1),
        ((140, 135, 1), 12, 9, 1),  # a tenth would be too wide
        ((30, 700, 3), 4, 1, 1),
    ],
    ids=str,
)
def test_grid_pixel_by_pixel(shape, count, shown, zoom):
    random = np.random.default_rng(0)
    originals, outputs = random.integers(0, 256, (2, count, *shape), np.uint8)
    picture = draw_grid(originals / np.float32(255), outputs / np.float32(255), "step 50")
    height, width = zoom * shape[0], zoom * shape[1]
    assert picture.size == (shown * (width + GAP), TITLE + 2 * (height + GAP))
    assert picture.mode == ("RGB" if shape[2] == 3 else "L")
    beside = np.asarray(picture).copy()
    for column in range(shown):
        np.testing.assert_array_equal(tile(picture, 0, column, height, width), enlarge(originals[column], zoom))
        np.testing.assert_array_equal(tile(picture, 1, column, height, width), enlarge(outputs[column], zoom))
        for row in range(2):
            tile(beside, row, column, height, width)[:] = BACKGROUND
    assert set(np.unique(beside[TITLE:])) == {BACKGROUND}  # nothing between and below the images
    title = beside[:TITLE]
    assert title.max() >= 200 and (title == BACKGROUND).mean() > 0.6


@pytest.mark.parametrize(("width", "shrink"), [(1300, 1), (1301, 2), (2600, 2), (2601, 3), (4096, 4)])
def test_large_images_are_shrunk_in_the_grid(width, shrink):
    originals, outputs = np.random.default_rng(0).integers(0, 256, (2, 3, 50, width, 1), np.uint8)
    picture = draw_grid(originals / np.float32(255), outputs / np.float32(255), "")
    height, small = -(-50 // shrink), -(-width // shrink)
    assert picture.width <= 1400
    np.testing.assert_array_equal(tile(picture, 0, 0, height, small), originals[0, ::shrink, ::shrink])
    np.testing.assert_array_equal(tile(picture, 1, 0, height, small), outputs[0, ::shrink, ::shrink])


@pytest.mark.parametrize("channels", [1, 3])
def test_no_grid_is_wider_than_1400_pixels(channels):
    for width in (1, 2, 9, 27, 28, 50, 99, 100, 101, 134, 135, 233, 461, 500, 694, 695, 1299, 1394, 1400, 1401, 4096):
        images = np.zeros((12, 2, width, channels), np.float32)
        assert width <= draw_grid(images, images, "step 50").width <= 1400 or width > 1300


def test_values_beyond_zero_and_one_are_clipped():
    images = np.full((1, 28, 28, 1), -0.5, np.float32)
    images[0, 0, :5, 0] = [1.5, 1.0, 0.5, 0.0, 200 / 255]
    picture = draw_grid(images, images, "")
    for row in range(2):
        np.testing.assert_array_equal(tile(picture, row, 0, 84, 84)[0, :18:3, 0], [255, 255, 128, 0, 200, 0])


class Figure(train_ae.Figure):
    """Matplotlib's figure, each of which is kept."""

    made = ()

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        Figure.made += (self,)


class Sketch(Figure):
    """One whose file is not needed, which spares most of the time."""

    def savefig(self, path):
        path.touch()


@pytest.fixture
def figures(monkeypatch):
    """Return a function that gives the figures of summary.png and latents.png, once they are drawn."""
    monkeypatch.setattr(train_ae, "Figure", Sketch)
    monkeypatch.setattr(Figure, "made", ())
    return lambda: Figure.made


def make_run(folder):
    """Make a run with 61 pictures; return its folders, and the figures of summary.png and latents.png."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(train_ae, "Figure", Figure)
        monkeypatch.setattr(Figure, "made", ())
        train_ae.train(Settings(run_name="x", steps=60, sample_every=1, pretrain_steps=50, latent_dim=2, depth=2))
        summary, latents = Figure.made
    return folder / "logs/x", folder / "samples/x", summary, latents


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return once(tmp_path_factory, "with_61_pictures", make_run)


def same_color(path, color, tolerance=10):
    """Return how many pixels of a picture have a color of the kind #1f77b4."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    return (np.abs(pixels - list(bytes.fromhex(color[1:]))).sum(axis=1) < tolerance).sum()


# --- the animation ---
def test_animation_shows_some_twenty_pictures_at_growing_steps(run):
    _, samples, *_ = run
    pictures = [Image.open(samples / f"step_{step:05}.png") for step in range(61)]
    kept = [np.asarray(picture.convert("L"), float) for picture in pictures]
    fewer_greys = [np.asarray(picture.quantize(method=2).convert("L"), float) for picture in pictures]
    with Image.open(samples / "training.gif") as gif:
        assert gif.info["loop"] == 0  # without end
        found, durations = [], []
        for index in range(gif.n_frames):
            gif.seek(index)
            frame = np.asarray(gif.convert("L"), float)
            found.append(int(np.argmin([np.abs(frame - picture).mean() for picture in fewer_greys])))
            assert np.abs(frame - kept[found[-1]]).mean() < 4
            durations.append(gif.info["duration"])
    assert found[0] == 0 and found[-1] == 60
    assert 15 <= len(found) <= 30
    gaps = np.diff(found)
    assert gaps.min() >= 1 and gaps[0] == 1 and (gaps[1:] >= gaps[:-1] - 1).all() and gaps[-1] > 4
    assert durations[-1] > durations[0] == max(durations[:-1])  # the result stays for a while


# --- the curves ---
BLUE, ORANGE, GREEN = "#1f77b4", "#ff7f0e", "#2ca02c"  # matplotlib's tab:blue, tab:orange and tab:green


def lines(figure):
    """Return the lines of a summary by color and whether they are pale, as the losses of single steps are."""
    (axes,) = figure.axes
    found = {}
    for line in axes.lines:
        key = colors.to_hex(line.get_color()), (line.get_alpha() or 1) < 1
        found.setdefault(key, []).append(line)
    return found, axes


def points(line):
    return line.get_xydata().T


def test_summary_shows_all_losses_where_they_belong(run):
    logs, samples, summary, _ = run
    found, axes = lines(summary)
    (training,), (test,) = found[BLUE, True], found[ORANGE, False]
    np.testing.assert_allclose(points(training), scalars(logs / "train"))
    np.testing.assert_allclose(points(test), scalars(logs / "test"))
    assert points(test).shape == (2, 61)
    pairs = {points(line)[0, 0]: points(line) for line in found[GREEN, True]}
    assert sorted(pairs) == [-150, -100, -50]  # left of step 0, in the order in which they were trained
    for begin, name in ((-150, "conv1"), (-100, "conv2"), (-50, "latent")):
        steps, losses = scalars(logs / "pretrain" / name)
        np.testing.assert_allclose(pairs[begin], (steps + begin, losses))
    labels = [text.get_text().split(",")[0] for text in axes.get_legend().get_texts()]
    assert set(labels) == {"training", "pretraining", "10 test images"}
    assert labels.count("pretraining") == labels.count("training")  # not once for each pair
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "step" and axes.get_title() == "reconstruction loss"
    for color in (BLUE, ORANGE, GREEN):
        assert same_color(samples / "summary.png", color) > 50


def make_record(folder, losses, shape=(28, 28, 1), labels=(0, 1, 1), classes=("a", "b"), pretrained=(), steps=0):
    """Return a record of a run that had these losses, and one picture."""
    settings = Settings(run_name="x", steps=steps or len(losses), depth=1, pretrain_steps=len(pretrained))
    images = np.random.default_rng(0).integers(0, 256, (len(labels), *shape), np.uint8)
    phases = plan_phases(build_autoencoder(shape, 1), settings)
    record = Record(folder, folder, settings, Data(images, images, np.array(labels), list(classes), ""), phases)
    record.log_test(0)
    for name, values in (("train", losses), ("pretrain/conv1", pretrained)):
        for step, value in enumerate(values):
            with record.writers[name].as_default(step=step):
                tf.summary.scalar("loss", value)
    for writer in record.writers.values():
        writer.flush()
    return record


@pytest.mark.parametrize(("steps", "half"), [(1, 0), (45, 2), (200, 10), (1200, 25)])
def test_smoothed_losses_are_not_shifted(steps, half, tmp_path, figures):
    """A smoothed value is the mean of as many steps to its left as to its right: a jump stays where it is."""
    jump = steps // 2
    losses = np.where(np.arange(steps) < jump, 1.0, 2.0)
    pretrained = losses[::-1] if steps == 200 else ()
    make_record(tmp_path, losses, pretrained=pretrained).draw(np.zeros((3, 2)), None)
    found, _ = lines(figures()[0])
    curves = [(0, losses, BLUE)] + [(-steps, losses[::-1], GREEN)] * len(pretrained[:1])
    for begin, values, color in curves:
        (smooth,), (single,) = found[color, False], found[color, True]
        (smoothed_steps, smoothed), (all_steps, all_values) = points(smooth), points(single)
        assert smooth.get_label().endswith(f"mean of {2 * half + 1}")
        np.testing.assert_array_equal(all_steps, begin + np.arange(steps))
        np.testing.assert_allclose(all_values, values)
        places = np.arange(half, steps - half)
        np.testing.assert_array_equal(smoothed_steps, begin + places)
        np.testing.assert_allclose(smoothed, [values[k - half : k + half + 1].mean() for k in places], rtol=1e-5)


@pytest.mark.parametrize("kept", [0, 30])
def test_summary_is_drawn_without_losses_that_are_lost(kept, tmp_path, figures, monkeypatch, capsys):
    """As when somebody removes the events of a run that is then resumed."""
    monkeypatch.setattr(train_ae, "Figure", Figure)  # with its file: a plot without points must not fail there
    record = make_record(tmp_path, np.ones(kept), steps=100)
    record.draw(np.zeros((3, 2)), None)
    assert f"lacks {100 - kept} losses" in capsys.readouterr().out
    found, _ = lines(figures()[0])
    assert points(found[BLUE, True][0]).shape == (2, kept)
    assert (tmp_path / "summary.png").stat().st_size > 1000


# --- the latents ---
def aligned(points, others):
    """Return points with the signs of their columns as of others."""
    return points * np.sign((points * others).sum(axis=0))


def test_latents_of_two_numbers_are_drawn_as_they_are(run, digits):
    logs, samples, _, figure = run
    encoder = keras.models.load_model(logs / "autoencoder.keras").get_layer("encoder")
    images, labels = digits["test_images"] / np.float32(255), digits["test_labels"]
    latents = encoder.predict(images, verbose=0)
    components = PCA(2, svd_solver="covariance_eigh").fit(digits["train_images"].reshape(-1, 784) / 255)
    components = components.transform(images.reshape(-1, 784))
    left, right = figure.axes
    assert [axes.get_title() for axes in (left, right)] == ["images: the first two principal components", "latents"]
    for axes, points in ((left, components), (right, latents)):
        assert [line.get_label() for line in axes.lines] == list("0123456789")
        drawn = np.zeros_like(points)
        for digit, line in enumerate(axes.lines):
            drawn[labels == digit] = line.get_xydata()
        np.testing.assert_allclose(aligned(drawn, points) if axes is left else drawn, points, atol=5e-3)
    for index in range(10):
        assert same_color(samples / "latents.png", colors.to_hex(f"C{index}"), 40) > 50, index


@pytest.mark.parametrize("size", [1, 40])
def test_other_latents_are_drawn_by_their_principal_components(size, tmp_path, figures):
    random = np.random.default_rng(4)
    count = 30
    latents = (random.normal(size=(count, size)) * np.arange(1, size + 1) + 5).astype(np.float32)
    make_record(tmp_path, [1.0], labels=[0, 1, 2] * 10, classes="abc").draw(latents, random.normal(size=(count, 784)))
    left, right = figures()[1].axes
    assert right.get_title() == "latents: the first two principal components"
    drawn = np.zeros((count, 2))
    for label, line in enumerate(right.lines):
        drawn[label::3] = line.get_xydata()
    expected = PCA(min(2, size), svd_solver="full").fit_transform(latents)
    np.testing.assert_allclose(np.abs(drawn[:, :size]), np.abs(expected), rtol=1e-3, atol=1e-3)
    if size == 1:
        assert not drawn[:, 1].any()
    assert len(left.lines) == 3


@pytest.mark.parametrize(("count", "legend"), [(1, False), (30, True), (31, False)])
def test_classes_have_a_legend_where_they_are_few(count, legend, tmp_path, figures):
    labels, classes = list(range(count)), [f"class {index}" for index in range(count)]
    record = make_record(tmp_path, [1.0], shape=(4, 4, 3), labels=labels, classes=classes)
    record.draw(np.random.default_rng(0).normal(size=(count, 2)), None)  # None: of large images
    (axes,) = figures()[1].axes
    assert axes.get_title() == "latents" and len(axes.lines) == count
    assert (axes.get_legend() is not None) == legend
    if legend:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == classes


def test_thousand_latents_are_drawn_at_most(tmp_path, figures):
    record = make_record(tmp_path, [1.0], shape=(1, 1, 1), labels=[0] * 1200, classes=["a"])
    record.draw(np.random.default_rng(0).normal(size=(1200, 2)), None)
    (axes,) = figures()[1].axes
    assert len(axes.lines[0].get_xydata()) == 1000


def test_colour_pictures_have_colour_in_every_picture(tmp_path, monkeypatch):
    """A folder of red and blue images, 15 x 10: the grids and the animation are in colour."""
    random = np.random.default_rng(0)
    for name, color in (("red", (230, 20, 20)), ("blue", (20, 20, 230))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(15):
            pixels = np.clip(random.normal(color, 10, (15, 10, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "data", "--run-name", "x", "--steps", "5", "--depth", "2", "--latent-dim", "3"]
    assert train_ae.main(words) == 0
    metrics = json.loads((tmp_path / "logs/x/metrics.json").read_text())
    assert metrics["latent_size"] == 3 and metrics["pca_squared_error"] > 0
    for name in ("step_00000.png", "step_00005.png", "training.gif"):
        pixels = np.asarray(Image.open(tmp_path / "samples/x" / name).convert("RGB")).astype(int)
        assert pixels.shape == (TITLE + 2 * (90 + GAP), 3 * (60 + GAP), 3), name  # six times as large; 3 to test
        red, blue = pixels[..., 0] - pixels[..., 2] > 150, pixels[..., 2] - pixels[..., 0] > 150
        assert red.sum() > 2000 and blue.sum() > 2000, name
