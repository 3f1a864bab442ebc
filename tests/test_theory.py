"""The options that show the article's theory: depth, size of the latent, tied weights, stacking, and its doubt."""

import itertools
import json
import subprocess
import sys

import doubt
import keras
import numpy as np
import pytest
import tensorflow as tf
from events import read, scalars
from PIL import Image
from runs import Finished, call_here, once
from sklearn.decomposition import PCA
from test_model import conv, deconv, dense, leaky, named_weights, reconstruct, shake

import train_ae
from train_ae import Data, Settings, build_autoencoder, compute_metrics, main, plan_phases

PAIRS = [("conv1", "deconv4"), ("conv2", "deconv3"), ("conv3", "deconv2"), ("conv4", "deconv1"), ("latent", "expand")]


@pytest.fixture(autouse=True)
def seed():
    """Initial weights are the same in every run of the tests."""
    keras.utils.set_random_seed(0)


def pairs_of(weights):
    """Return the names of the layers of each pair, from the outside in."""
    depth = sum(name.startswith("conv") and name.endswith("kernel") for name in weights)
    pairs = [(f"conv{i}", f"deconv{depth + 1 - i}") for i in range(1, depth + 1)]
    return pairs + [("latent", "expand")] * ("latent/kernel" in weights)


def twin_kernels(weights):
    """Return the kernels of each pair of layers, a dense one's second transposed."""
    found = []
    for pair in pairs_of(weights):
        one, other = (tf.convert_to_tensor(weights[f"{name}/kernel"]).numpy() for name in pair)
        found.append((one, other.T if other.ndim == 2 else other))
    return found


# --- phases and their steps ---
@pytest.mark.parametrize("latent_dim", [0, 6])
def test_phases_are_pairs_from_the_outside_in(latent_dim):
    model = build_autoencoder((33, 17, 3), 4, latent_dim)
    phases = plan_phases(model, Settings(latent_dim=latent_dim, pretrain_steps=7, steps=9))
    pairs = PAIRS[: 4 + bool(latent_dim)]
    assert [(phase.name, phase.steps) for phase in phases] == [
        *((f"pretrain/{one}", 7) for one, _ in pairs),
        ("train", 9),
    ]
    images = np.random.default_rng(0).random((3, 33, 17, 3), np.float32)
    weights = named_weights(model)
    for phase, pair in zip(phases, pairs, strict=False):
        own = [weights[f"{name}/{kind}"] for name in pair for kind in ("kernel", "bias")]
        assert [id(variable) for variable in phase.model.trainable_variables] == [id(variable) for variable in own]
    shapes = [(33, 17, 3), (17, 9, 16), (9, 5, 32), (5, 3, 64), (3 * 2 * 128,)]
    hidden = tf.constant(images)
    for index, (phase, shape) in enumerate(zip(phases[:-1], shapes, strict=False)):
        target = phase.frozen(images) if phase.frozen else images
        target_by_hand = tf.reshape(hidden, target.shape)
        np.testing.assert_allclose(target, target_by_hand, rtol=1e-4, atol=1e-7)
        assert target.shape == phase.model(target).shape == (3, *shape)
        if index < 4:
            hidden = conv(weights, f"conv{index + 1}", hidden)
    outermost = deconv(weights, "deconv4", conv(weights, "conv1", images), images.shape)
    np.testing.assert_allclose(phases[0].model(images), tf.tanh(outermost), rtol=1e-4, atol=1e-7)
    assert phases[-1].model is model and phases[-1].frozen is None
    assert [phase.name for phase in plan_phases(model, Settings(latent_dim=latent_dim))] == ["train"]


EPSILON = 0.01  # with the article's, the last bits of a gradient of about 0 would decide a whole step


def pair_output(weights, index, target):
    """Return what the pair of layers `index`, from 0, makes of the output of the layers before it."""
    if target.shape.rank == 2:
        return leaky(dense(weights, "expand", dense(weights, "latent", target)))
    return deconv(weights, PAIRS[index][1], conv(weights, PAIRS[index][0], target), target.shape)


def learn_as_one(start, forward, batches, tied):
    """Train with Keras's Adam, in a tied model with one variable for each two kernels; return the weights."""
    pairs = [(f"{one}/kernel", f"{other}/kernel") for one, other in PAIRS if tied and f"{one}/kernel" in start]
    shared = {other: one for one, other in pairs}
    variables = {name: tf.Variable(value) for name, value in start.items() if name not in shared}

    def weights():
        transposed = {
            other: tf.transpose(variables[one]) if "latent" in one else variables[one] for other, one in shared.items()
        }
        return variables | transposed

    adam = keras.optimizers.Adam(0.01, epsilon=EPSILON)
    for batch in batches:
        with tf.GradientTape() as tape:
            target, output = forward(weights(), batch)
            loss = tf.reduce_mean(tf.reduce_sum((target - output) ** 2, axis=-1))
        used = tape.watched_variables()
        adam.apply_gradients(zip(tape.gradient(loss, used), used, strict=True))
    return {name: value.numpy() for name, value in weights().items()}


@pytest.mark.parametrize(
    ("place", "latent_dim", "tied"),
    [(-1, 0, True), (-1, 6, True), (1, 0, True), (4, 6, True), (-1, 6, False), (4, 6, False)],
)
def test_steps_are_those_of_one_shared_kernel(place, latent_dim, tied):
    """The whole model, its second pair alone, or its dense pair alone: a tied kernel moves by the sum of gradients."""
    model = build_autoencoder((13, 10, 3), 4, latent_dim)
    shake(model)
    weights = named_weights(model)
    if tied:
        for one, other in PAIRS[: 4 + bool(latent_dim)]:
            value = weights[f"{one}/kernel"].numpy()
            weights[f"{other}/kernel"].assign(value.T if value.ndim == 2 else value)
    start = {name: variable.numpy() for name, variable in weights.items()}
    images = np.random.default_rng(2).integers(0, 256, (20, 13, 10, 3), np.uint8)
    settings = Settings(batch_size=5, learning_rate=0.01, pretrain_steps=9, tied=tied, latent_dim=latent_dim, seed=3)
    phase = plan_phases(model, settings)[place]
    phase = phase._replace(optimizer=train_ae.FusedAdam(0.01, epsilon=EPSILON))
    phase.optimizer.build(phase.model.trainable_variables)
    order = [train_ae.batch_indices(tf.constant(step, tf.int64), 5, 20, 3).numpy() for step in range(6)]
    batches = images[order].astype(np.float32) / 255

    def forward(weights, batch):
        if place == -1:
            return batch, reconstruct(weights, batch, 4, latent_dim)[1]
        hidden = tf.constant(batch)
        for index in range(place):
            hidden = conv(
                {name: tf.stop_gradient(value) for name, value in weights.items()}, f"conv{index + 1}", hidden
            )
        hidden = tf.reshape(hidden, (len(batch), -1)) if place == 4 else hidden
        return hidden, pair_output(weights, place, hidden)

    expected = learn_as_one(start, forward, batches, tied)
    train_steps = train_ae.make_train_steps(phase, tf.constant(images), settings, tf.summary.create_noop_writer())
    losses = [*train_steps(0, 4).numpy(), *train_steps(4, 6).numpy()]
    first = forward({name: tf.constant(value) for name, value in start.items()}, batches[0])
    assert losses[0] == pytest.approx(np.square(first[0] - first[1]).sum(axis=-1).mean(), rel=1e-5)
    assert len(losses) == 6 and int(phase.optimizer.iterations) == 6
    learning = {id(variable) for variable in phase.model.trainable_variables}
    for name, variable in weights.items():
        assert np.array_equal(variable.numpy(), start[name]) == (id(variable) not in learning), name
        np.testing.assert_allclose(variable.numpy(), expected[name], rtol=1e-5, atol=2e-6, err_msg=name)
    if tied:
        for one, other in twin_kernels(weights):
            np.testing.assert_array_equal(one, other)


def test_cosine_falls_from_the_whole_rate_to_none(monkeypatch):
    """In each phase. Here an update takes the learning rate off each weight, so that weights tell the rates."""

    def update_step(_, gradient, variable, learning_rate):
        variable.assign_sub(tf.zeros_like(variable) + learning_rate)

    monkeypatch.setattr(train_ae.FusedAdam, "update_step", update_step)
    for schedule, shape in (("cosine", 0.5 + 0.5 * np.cos(np.pi * np.arange(8) / 8)), ("constant", np.ones(8))):
        settings = Settings(schedule=schedule, steps=8, pretrain_steps=8, learning_rate=0.004, depth=1)
        for phase in plan_phases(build_autoencoder((4, 4, 1), 1), settings):
            images, writer = tf.zeros((2, 4, 4, 1), tf.uint8), tf.summary.create_noop_writer()
            train_steps = train_ae.make_train_steps(phase, images, settings, writer)
            values = [phase.model.trainable_variables[0].numpy()]
            for step in range(8):
                train_steps(step, step + 1)
                values.append(phase.model.trainable_variables[0].numpy())
            rates = -np.diff(values, axis=0).reshape(8, -1)
            np.testing.assert_allclose(rates, np.repeat(0.004 * shape[:, None], rates.shape[1], 1), atol=1e-7)


# --- whole runs ---
class Stacked(Finished):
    """A run with pretraining: its weights before each phase and after the last, its kernels after each call."""

    def __init__(self, folder, options):
        super().__init__(folder, "x")
        self.before, self.twins, weights = [], [], {}
        make = train_ae.make_train_steps

        def look():
            return {name: value.numpy() for name, value in weights.items()}

        def plan(autoencoder, settings):
            weights.update(named_weights(autoencoder))
            return plan_phases(autoencoder, settings)

        def make_train_steps(*arguments):
            self.before.append(look())
            self.twins.append([])
            train_steps = make(*arguments)

            def call(first, last):
                losses = train_steps(first, last)
                self.twins[-1].append(twin_kernels(look()))
                return losses

            return call

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.chdir(folder)
            monkeypatch.setattr(train_ae, "plan_phases", plan)
            monkeypatch.setattr(train_ae, "make_train_steps", make_train_steps)
            settings = {"pretrain_steps": 240, "steps": 20, "learning_rate": 0.003}
            self.metrics = train_ae.train(Settings(run_name="x", **settings, **options))
        self.before.append(look())
        self.tied, self.latent_dim = options.get("tied", False), options.get("latent_dim", 0)
        self.pairs = pairs_of(weights)

    def model(self):
        return keras.models.load_model(self.logs / "autoencoder.keras")


@pytest.fixture(scope="session", params=[{}, {"tied": True, "latent_dim": 6}], ids=str)
def stacked(request, tmp_path_factory):
    name = "stacked_tied" if request.param else "stacked"
    return once(tmp_path_factory, name, lambda folder: Stacked(folder, request.param))


def test_pretraining_moves_one_pair_at_a_time(stacked):
    assert len(stacked.pairs) == len(stacked.before) - 2 == 4 + bool(stacked.latent_dim)
    for pair, before, after in zip(stacked.pairs, stacked.before, stacked.before[1:], strict=False):
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        assert moved == {f"{name}/{kind}" for name in pair for kind in ("kernel", "bias")}
    before, after = stacked.before[-2:]
    assert not any(np.array_equal(before[name], after[name]) for name in before)


def test_pretraining_lowers_the_loss_of_each_pair(stacked):
    names = [name for name, _ in stacked.pairs]
    assert sorted(path.name for path in (stacked.logs / "pretrain").iterdir()) == sorted(names)
    for name in names:
        steps, losses = scalars(stacked.logs / "pretrain" / name)
        assert list(steps) == [*range(240)]
        assert np.mean(losses[-40:]) < 0.8 * np.mean(losses[:40]), name
    assert [event.step for event in read(stacked.logs / "train").Tensors("loss")] == [*range(20)]


def test_tied_kernels_are_equal_to_the_bit_throughout(stacked):
    """From the beginning of a pair's training on; kernels that are not tied part."""
    assert len(stacked.twins) == len(stacked.pairs) + 1 and all(len(looks) >= 1 for looks in stacked.twins)
    for phase, looks in enumerate(stacked.twins):
        for one, other in itertools.chain(*(kernels[: phase + 1] for kernels in looks)):
            assert np.array_equal(one, other) == stacked.tied
    for one, other in twin_kernels(stacked.before[-1]):
        assert np.array_equal(one, other) == stacked.tied
    for name, value in named_weights(stacked.model()).items():
        np.testing.assert_array_equal(value.numpy(), stacked.before[-1][name])


OPENING = """
import sys
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
images = np.load(sys.argv[2])
latents = model.get_layer("encoder")(images)
np.savez(sys.argv[3], latents=latents, outputs=model(images), decoded=model.get_layer("decoder")(latents))
assert "train_ae" not in sys.modules
"""


@pytest.mark.parametrize("stacked", [{"tied": True, "latent_dim": 6}], indirect=True, ids=str)
def test_saved_model_opens_without_the_script(stacked, tmp_path):
    """In a process of its own, isolated, where no folder of this project is on the path."""
    images = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    np.save(tmp_path / "images.npy", images)
    files = [stacked.logs / "autoencoder.keras", tmp_path / "images.npy", tmp_path / "found.npz"]
    subprocess.run([sys.executable, "-I", "-c", OPENING, *map(str, files)], cwd=tmp_path, check=True, timeout=300)
    latents, outputs = reconstruct(stacked.before[-1], images, 4, stacked.latent_dim)
    with np.load(tmp_path / "found.npz") as found:
        assert found["latents"].shape == (3, 6)
        np.testing.assert_allclose(found["latents"], latents, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["outputs"], outputs, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found["outputs"], found["decoded"])


# --- figures ---
def gaussian_ssim(images, outputs, size):
    """Return the SSIM of each image (Wang et al. 2004): Gaussian windows of deviation 1.5, averaged over channels."""
    place = np.arange(size) - (size - 1) / 2
    window = np.exp(-(place**2) / 2 / 1.5**2)
    window = np.outer(window, window) / window.sum() ** 2

    def blur(values):
        views = np.lib.stride_tricks.sliding_window_view(values, (size, size), axis=(1, 2))
        return np.einsum("...ij,ij", views, window)

    mean_x, mean_y = blur(images), blur(outputs)
    spread = blur(images**2) + blur(outputs**2) - mean_x**2 - mean_y**2
    together = blur(images * outputs) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * (2 * together + c2) / (spread + c2)
    return found.mean(axis=(1, 2, 3))


def smallest_shifted_error(images, outputs):
    """Return each image's smallest squared error over shifts of up to 2 pixels, where black comes in at the edges."""
    height, width = images.shape[1:3]
    errors = []
    for down, right in itertools.product(range(-2, 3), repeat=2):
        moved = np.zeros_like(outputs)
        for y, x in itertools.product(range(height), range(width)):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[:, y, x] = outputs[:, y - down, x - right]
        errors.append(np.square(moved - images).sum(axis=(1, 2, 3)))
    return np.min(errors, axis=0)


@pytest.mark.parametrize(
    ("shape", "count", "first"), [((28, 28, 1), 12, 12), ((33, 17, 3), 100, 50), ((7, 5, 1), 9, 9)]
)
def test_figures_are_those_of_independent_code(shape, count, first):
    """Also beyond [0, 1], where PSNR and SSIM judge what is shown; SSIM is that of the first batch alone."""
    random = np.random.default_rng(6)
    smooth = np.add.outer(np.arange(shape[0]), np.arange(shape[1]))[None, ..., None] * random.random(
        (count, 1, 1, shape[2])
    )
    test = np.rint(127 + 127 * np.sin(smooth)).astype(np.uint8)
    images = test / 255
    outputs = (np.roll(images, 1, axis=2) + random.normal(scale=0.2, size=images.shape)).astype(np.float32)
    assert outputs.min() < 0 and outputs.max() > 1
    latents, losses, place = random.random((count, 2, 3)).astype(np.float32), [], [0]

    def evaluate(batch):
        start = place[0]
        place[0] += len(batch)
        np.testing.assert_array_equal(batch, test[start : place[0]])
        losses.append((len(batch), random.random()))
        return tensors(batch, latents[start : place[0]], outputs[start : place[0]], losses[-1][1])

    data = Data(test, test, np.zeros(count, int), [""], "")
    metrics, kept, components = compute_metrics(evaluate, data)
    shown = np.clip(outputs, 0, 1)
    assert losses[0][0] == first and sum(size for size, _ in losses) == count
    assert metrics["test_loss"] == pytest.approx(sum(size * loss for size, loss in losses) / count, rel=1e-5)
    assert metrics["squared_error"] == pytest.approx(np.square(images - outputs).sum(axis=(1, 2, 3)).mean(), rel=1e-5)
    tolerant = smallest_shifted_error(images, outputs).mean()
    assert tolerant < 0.9 * metrics["squared_error"]
    assert metrics["shift_tolerant_error"] == pytest.approx(tolerant, rel=1e-5)
    psnr = -10 * np.log10(np.square(images - shown).mean(axis=(1, 2, 3)))
    assert metrics["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    ssim = gaussian_ssim(images[:first], shown[:first].astype(float), min(11, *shape[:2]))
    assert metrics["ssim"] == pytest.approx(ssim.mean(), abs=1e-5)
    assert metrics["latent_size"] == 6
    np.testing.assert_array_equal(kept, latents.reshape(count, 6))
    assert len(components) == count


def fit_sklearn(train):
    return PCA(svd_solver="full").fit(train.reshape(len(train), -1) / 255)


@pytest.fixture(scope="session")
def digits_pca(digits, tmp_path_factory):
    return once(tmp_path_factory, "digits_pca", lambda folder: fit_sklearn(digits["train_images"]))


def pca_error(pca, test, size):
    """Return the squared error an image that a PCA of scikit-learn's leaves with so many components."""
    values = test.reshape(len(test), -1) / 255
    drawn = pca.transform(values)[:, :size] @ pca.components_[:size] + pca.mean_
    return np.square(drawn - values).sum(axis=1).mean()


def colours(shape, train, test):
    random = np.random.default_rng(7)
    mixed = random.normal(size=(train + test, 12)) @ random.normal(size=(12, np.prod(shape)))
    mixed = 127 + 20 * mixed + random.normal(scale=5, size=mixed.shape)
    images = np.clip(mixed, 0, 255).astype(np.uint8).reshape(-1, *shape)
    return images[:train], images[train:]


def tensors(batch, latents, outputs, loss):
    """Return what a model's evaluation gives for a batch of uint8 images."""
    return [tf.constant(part, tf.float32) for part in (batch / np.float32(255), latents, outputs, loss)]


def constant(size):
    """Return a model, for compute_metrics, of which the size of the latents alone counts."""
    return lambda batch: tensors(batch, np.zeros((len(batch), size)), np.zeros(batch.shape), 0)


def check_pca(train, test, sizes, pca, monkeypatch):
    """Compare the script's PCA with one by scikit-learn."""
    fitted = train_ae.fit_pca(train)
    monkeypatch.setattr(train_ae, "fit_pca", lambda images: fitted if images is train else None)
    data, values = Data(train, test, np.zeros(len(test), int), [""], ""), train[0].size
    for size in sizes:
        metrics, _, found = compute_metrics(constant(size), data)
        assert metrics["pca_squared_error"] == pytest.approx(pca_error(pca, test, size), rel=2e-4)
    expected = pca.transform(test.reshape(len(test), -1) / 255)
    np.testing.assert_allclose(np.abs(found[:, :5]), np.abs(expected[:, :5]), atol=5e-3)  # signs are arbitrary
    assert compute_metrics(constant(values), data)[0]["pca_squared_error"] == 0  # as many as pixels: nothing is lost


def test_pca_of_digits_is_scikit_learns(digits, digits_pca, monkeypatch):
    check_pca(digits["train_images"], digits["test_images"][:100], (2, 30, 512), digits_pca, monkeypatch)


def test_pca_of_colour_images_is_scikit_learns(monkeypatch):
    train, test = colours((9, 7, 3), 400, 50)
    check_pca(train, test, (1, 8, 100), fit_sklearn(train), monkeypatch)


def test_exact_reconstructions_have_a_finite_psnr():
    """Black images are exact wherever the output is not positive; JSON has no word for the infinite."""
    images = np.zeros((4, 8, 8, 1), np.uint8)

    def evaluate(batch):
        return tensors(batch, np.zeros((len(batch), 2)), np.full(batch.shape, -0.5), 0.25)

    metrics, *_ = compute_metrics(evaluate, Data(images, images, np.zeros(4, int), [""], ""))
    assert metrics["psnr"] == 100 and metrics["squared_error"] == 16
    json.dumps(metrics, allow_nan=False)


def test_large_images_have_no_pca():
    """Above 4,096 values it would take minutes."""
    for shape, given in (((64, 64, 1), True), ((17, 241, 1), False), ((64, 64, 3), False), ((300, 200, 3), False)):
        random = np.random.default_rng(1)
        images = random.integers(0, 256, (4, *shape), np.uint8)
        with pytest.MonkeyPatch.context() as monkeypatch:  # the axes of as many values, in no time
            monkeypatch.setattr(train_ae, "fit_pca", lambda images: (np.zeros(4096, np.float32), np.eye(4096)))
            metrics, _, components = compute_metrics(constant(6), Data(images, images, np.zeros(4, int), [""], ""))
        assert (metrics["pca_squared_error"] is not None) == (components is not None) == given
    assert json.loads(json.dumps(metrics))["pca_squared_error"] is None


def test_pca_of_the_whole_of_mnist_is_hinton_and_salakhutdinovs(full_mnist):
    data = train_ae.load_data(Settings(data_dir=full_mnist), 60_000)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    mean, axes = train_ae.fit_pca(data.train)
    components = (data.test.reshape(-1, 784) / np.float32(255) - mean) @ axes
    assert f"{np.square(components[:, 30:]).sum(axis=1).mean():.2f}" == "13.87"


def test_every_run_is_compared_with_pca_of_its_size(stacked, digits, digits_pca):
    size = stacked.latent_dim or 512
    expected = pca_error(digits_pca, digits["test_images"], size)
    assert stacked.metrics["latent_size"] == size
    assert stacked.metrics["pca_squared_error"] == pytest.approx(expected, rel=1e-3)


def test_figures_of_a_run_are_its_models(stacked, digits):
    images, metrics = digits["test_images"] / np.float32(255), stacked.metrics
    outputs = stacked.model().predict(images, batch_size=500, verbose=0)
    errors = np.square(outputs - images).sum(axis=(1, 2, 3))
    assert metrics["squared_error"] == pytest.approx(errors.mean(), rel=1e-5)
    assert metrics["test_loss"] == pytest.approx(errors.mean() / 784, rel=1e-5)
    shown = np.clip(outputs, 0, 1)
    psnr = -10 * np.log10(np.square(shown - images).mean(axis=(1, 2, 3)))
    assert metrics["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    ssim = tf.image.ssim(images[:64], shown[:64], 1).numpy()
    assert metrics["ssim"] == pytest.approx(ssim.mean(), abs=1e-5)
    assert metrics["shift_tolerant_error"] <= metrics["squared_error"]
    assert stacked.json("metrics.json") == metrics
    table = read(stacked.logs / "metrics")
    for name in ("test_loss", "squared_error", "shift_tolerant_error", "psnr", "ssim", "pca_squared_error"):
        (event,) = table.Tensors(f"test_metrics/{name.removeprefix('test_')}")
        assert tf.make_ndarray(event.tensor_proto) == pytest.approx(metrics[name], rel=1e-5)


# --- the command line ---
@pytest.mark.parametrize(
    "arguments",
    [
        "--depth 0",
        "--depth 5",
        "--depth 1.5",
        "--latent-dim -1",
        "--latent-dim 4097",
        "--latent-dim x",
        "--pretrain-steps -1",
        "--schedule linear",
        "--tied yes",
    ],
)
def test_options_are_refused_where_they_make_no_sense(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = call_here(*arguments.split())
    said = capsys.readouterr()
    assert status == 2 and not said.out and len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_cosine_run_is_not_made_longer(tiny, tmp_path, monkeypatch, capsys):
    """Its learning rate has come to its end."""
    monkeypatch.chdir(tmp_path)
    words = [*tiny, "--run-name", "x", "--schedule", "cosine", "--steps"]
    assert main([*words, "20"]) == 0
    capsys.readouterr()
    assert main([*words, "30"]) == 2
    said = capsys.readouterr().err
    assert "steps 20" in said and "30" in said and len(said.splitlines()) == 1
    assert main([*words, "20"]) == 0


def test_defaults_are_the_article_program():
    article = {"depth": 4, "latent_dim": 0, "tied": False, "pretrain_steps": 0, "schedule": "constant"}
    assert vars(Settings(run_name="x", **article)) == vars(Settings(run_name="x"))


# --- the doubt ---
def test_shift_tolerant_error_ranks_as_a_person_would():
    """The article's two cases: a 7 with two stray pixels is wrong, a 7 a little to the side is right."""
    seven, stray, moved = doubt.cases().values()
    wrong, right = doubt.figures(seven, stray), doubt.figures(seven, moved)
    assert wrong["squared error"] < right["squared error"] / 10
    assert wrong["PSNR (dB)"] > right["PSNR (dB)"] and wrong["SSIM"] > right["SSIM"]  # these rank them wrongly, too
    assert (wrong["shift-tolerant error"], right["shift-tolerant error"]) == (2, 0)


def test_picture_of_the_doubt_is_the_one_in_the_readme(tmp_path):
    doubt.draw().savefig(tmp_path / "doubt.png", dpi=100)
    drawn, kept = (
        np.asarray(Image.open(path).convert("L"), float)
        for path in (tmp_path / "doubt.png", doubt.SAMPLES / "doubt.png")
    )
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 2
