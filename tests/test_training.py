"""Objective, optimizer, training step and --weights: losses and weights against other code."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import article
import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal
from stack import stack

import train_ae

# --------------------------------------------------------------------------------------------------
# The article's graph


@pytest.fixture(scope="module")
def ours(default_run, digits):
    """The losses of the default run, its initial weights, and its images in their order."""
    model = train_ae.build_autoencoder((28, 28, 1), train_ae.Settings())
    order = train_ae.batch_indices(0, 500, 4000, 0)  # of 500 batches of one image, too
    images = digits["x_train"][order] / np.float32(255)
    return default_run.losses()[:500], model.get_weights(), images


def test_losses_are_the_articles(ours):
    losses, weights, images = ours
    reference = article.losses(weights, images)
    assert_allclose(losses[:10], reference[:10], rtol=1e-5)
    assert losses.mean() == pytest.approx(reference.mean(), rel=0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 1e-7},
        {"slope": 0.01},
        {"loss": "summed over the image"},
        {"loss": "half"},
    ],
    ids=str,
)
def test_another_program_is_told_apart(ours, change):
    losses, weights, images = ours
    reference = article.losses(weights, images[:10], **change)
    assert np.abs(losses[:10] / reference - 1).max() > 1e-5


# --------------------------------------------------------------------------------------------------
# Order of the images


def test_each_epoch_has_every_image_once_in_another_order():
    orders = [range(40)]
    for seed in (0, 1):
        batches = [train_ae.batch_indices(step, 7, 40, seed) for step in range(18)]
        epochs = np.concatenate(batches)[:120]
        orders.extend(epochs.reshape(3, 40))
    assert len(np.unique(orders, axis=0)) == 7
    assert_array_equal(np.sort(orders), [range(40)] * 7)


@pytest.mark.parametrize("count", [20, 300])
def test_an_epoch_leaves_nothing_of_an_order(count):
    """By chance, one image is at the place that it has in the file, or had in the epoch before."""
    epochs = [train_ae.batch_indices(epoch, count, count, 0) for epoch in range(30)]
    assert np.mean(np.equal(epochs, range(count))) < 2 / count
    assert np.mean(np.equal(epochs[1:], epochs[:-1])) < 2 / count


# --------------------------------------------------------------------------------------------------
# Whole runs, and the same computed by other code

MIRRORED = {
    "deconv2/kernel": "conv1/kernel",
    "deconv1/kernel": "conv2/kernel",
    "expand/kernel": "latent/kernel",
}

IMAGES = np.random.default_rng(2).integers(0, 256, (22, 13, 10, 3), np.uint8)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The options of a run of a second: 20 colour images, two layers, and more than one epoch."""
    path = tmp_path_factory.mktemp("arrays") / "x.npz"
    np.savez(path, x_train=IMAGES[:20], x_test=IMAGES[20:])
    return f"--dataset {path} --depth 2 --batch-size 4 --steps 6".split()


class Reference:
    """Training by Keras's Adam, with one variable for two kernels that are tied."""

    def __init__(self, arguments):
        settings = train_ae.parse_arguments(arguments)
        keras.utils.clear_session()  # layers without names are "flatten" and "reshape" again
        model = train_ae.build_autoencoder(IMAGES.shape[1:], settings)
        if settings.weights:
            model = keras.models.load_model(settings.weights)
        layers = model.get_layer("encoder").layers[1:] + model.get_layer("decoder").layers[1:]
        self.settings = settings
        self.layers = {layer.name: layer for layer in layers}
        self.variables = {each.path: tf.Variable(each.numpy()) for each in model.variables}

    def value(self, path):
        """Return a weight; of a tied kernel, that of the encoder."""
        if not self.settings.tied or path not in MIRRORED:
            return self.variables[path]
        value = self.variables[MIRRORED[path]]
        return tf.transpose(value) if path == "expand/kernel" else value

    def apply(self, names, images):
        """Return what layers make of images."""
        for name in names:
            layer = self.layers[name]
            weights = [self.value(variable.path) for variable in layer.variables]
            images, _ = layer.stateless_call(weights, [], images)
        return images

    def train(self, names, frozen=()):
        """Train layers to reconstruct what frozen ones make of the images; return the losses."""
        settings = self.settings
        rate = settings.learning_rate
        if settings.schedule == "cosine":
            rate = keras.optimizers.schedules.CosineDecay(rate, settings.steps)
        adam = keras.optimizers.Adam(rate, epsilon=1e-8)
        losses = []
        for step in range(settings.steps):
            order = train_ae.batch_indices(step, settings.batch_size, 20, settings.seed)
            targets = IMAGES[order] / np.float32(255)
            draws = tf.random.stateless_normal(targets.shape, [settings.seed, step])
            noisy = np.clip(targets + settings.noise * draws, 0, 1)
            targets = self.apply(frozen, targets)
            inputs = self.apply(frozen, noisy)
            with tf.GradientTape() as tape:
                outputs = self.apply(names, inputs)
                loss = train_ae.reconstruction_loss(targets, outputs)
            variables = tape.watched_variables()
            adam.apply(tape.gradient(loss, variables), variables)
            losses.append(float(loss))
        return losses

    def check(self, run):
        """Assert that a run has these losses and weights, and kernels that are equal if tied."""
        assert_allclose(run.losses(), self.train(self.layers), rtol=5e-5)
        weights = {each.path: each.numpy() for each in run.model().variables}
        assert weights.keys() == self.variables.keys()
        for path, value in weights.items():
            # A step moves each of them by 1e-3.
            assert_allclose(value, self.value(path), rtol=1e-4, atol=5e-5, err_msg=path)
        self.variables = weights
        for path, value in weights.items():
            assert_array_equal(value, self.value(path))


@pytest.mark.parametrize(
    "more",
    ["--seed 5 --noise 0.3", "--tied --schedule cosine", "--latent-dim 6"],
)
def test_run_is_what_other_code_computes(more, options, run_here, monkeypatch):
    def quartic_error(images, outputs):
        return tf.reduce_mean((images - outputs) ** 4)

    monkeypatch.setattr(train_ae, "reconstruction_loss", quartic_error)  # as if it was edited
    arguments = [*options, *more.split()]
    Reference(arguments).check(run_here(*arguments))


# --------------------------------------------------------------------------------------------------
# Starting from another run's model


def test_a_run_starts_from_the_weights_of_a_model_that_fits(options, run_here, capsys):
    path = run_here(*options).logs / "autoencoder.keras"
    options = [*options, *f"--weights {path} --seed 3".split()]
    second = run_here(*options, name="second")
    assert f"\nweights  {path}\n" in capsys.readouterr().out
    Reference(options).check(second)
    for other in ("--depth 1", "--latent-dim 6", "--dataset mnist_5k", "--weights none.keras"):
        assert helpers.here(*options, *other.split()) == 2, other
        (line,) = capsys.readouterr().err.splitlines()
        assert "--weights" in line


# --------------------------------------------------------------------------------------------------
# Several devices


def train_on_two_devices(folder, arguments):
    """Train on two devices, and return what gathers images, takes a share or convolves, and where.

    They stand for GPUs, which not every machine has: so the strategy is another one.
    """
    os.chdir(folder)
    (cpu,) = tf.config.list_physical_devices("CPU")
    devices = [tf.config.LogicalDeviceConfiguration()] * 3
    tf.config.set_logical_device_configuration(cpu, devices)
    train_ae.make_strategy = lambda _: tf.distribute.MirroredStrategy(["CPU:1", "CPU:2"])
    fit = train_ae.fit
    found = set()

    def look_and_fit(training, *rest):
        found.add(f"images on {training.images.device[-5:]}")
        compiled = tf.function(train_ae.train_steps)
        steps = compiled.get_concrete_function(training, tf.constant(0), tf.constant(1))
        for part in steps.graph.as_graph_def().library.function:
            for node in part.node_def:
                if node.op in ("GatherV2", "StridedSlice", "Conv2D"):
                    found.add(f"{node.op} on {node.device[-5:]}")
        fit(training, *rest)

    train_ae.fit = look_and_fit
    with tf.device("CPU:1"):  # TensorFlow puts on the first GPU whatever has no other place
        assert helpers.here(*arguments) == 0
    return found


def test_two_devices_train_as_one_and_get_only_their_share(options, tmp_path):
    more = "--run-name x --latent-dim 6 --tied --noise 0.3"
    arguments = [*options, *more.split()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        found = pool.submit(train_on_two_devices, tmp_path, arguments).result()
    Reference(arguments).check(helpers.Finished(tmp_path))
    assert found == {
        "images on CPU:0",
        "GatherV2 on CPU:0",
        "StridedSlice on CPU:0",
        "Conv2D on CPU:1",
        "Conv2D on CPU:2",
    }


# Layers that are trained together: one of the encoder, and its mirror in the decoder.
STACK = {
    "conv1": "conv1 deconv2 output",
    "conv2": "conv2 deconv1",
    "latent": "flatten latent expand reshape",
}


@pytest.mark.parametrize("more", ["--noise 0.3", "--tied --schedule cosine"])
def test_stack_trains_each_pair_of_layers_in_turn(more, options):
    arguments = [*options, "--latent-dim", "6", *more.split()]
    _, losses = stack(train_ae.parse_arguments(arguments), 6)
    reference = Reference(arguments)
    frozen = []
    for name, trained in STACK.items():
        expected = reference.train(trained.split(), frozen)
        assert_allclose(losses[name], expected, rtol=5e-5, err_msg=name)
        frozen.append(name)
    assert frozen == list(losses)
