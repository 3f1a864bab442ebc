"""Objective, optimizer, training step and pretraining: losses and weights against other code."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import article
import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf

import train_ae

# --------------------------------------------------------------------------------------------------
# The article's graph


@pytest.fixture(scope="module")
def ours(default_run, digits):
    """The losses of the default run, its initial weights, and its images in their order."""
    keras.utils.set_random_seed(0)
    model, _ = train_ae.build_autoencoder((28, 28, 1), train_ae.Settings())
    train = digits["x_train"]
    order = [train_ae.batch_indices(step, 1, len(train), 0)[0] for step in range(500)]
    images = train[order].reshape(-1, 28, 28, 1) / np.float32(255)
    return default_run.losses()[:500], model.get_weights(), images


def test_losses_are_the_articles(ours):
    losses, weights, images = ours
    reference = article.losses(weights, images)
    np.testing.assert_allclose(losses[:10], reference[:10], rtol=1e-5)
    assert losses.mean() == pytest.approx(reference.mean(), rel=0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 1e-7},
        {"slope": 0.01},
        {"slope": 0.3},
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
# Order of the images, and the optimizer


def draw_orders(size, seed, steps):
    """Return the orders of 40 images in three epochs, whose steps are taken in any order."""
    batches = {}
    for step in steps:
        batches[step] = train_ae.batch_indices(step, size, 40, seed)
    indices = np.concatenate([batches[step] for step in sorted(batches)])
    return indices[:120].reshape(3, 40)


@pytest.mark.parametrize("size", [1, 7, 8, 40])
def test_each_epoch_has_every_image_once_in_another_order(size):
    steps = range(-(-120 // size))
    orders = draw_orders(size, 0, steps)
    others = draw_orders(size, 1, steps)
    every = np.arange(40)
    different = {tuple(order) for order in [every, *orders, *others]}
    assert len(different) == 7
    for order in different:
        np.testing.assert_array_equal(np.sort(order), every)
    np.testing.assert_array_equal(draw_orders(size, 0, reversed(steps)), orders)


@pytest.mark.parametrize("count", [20, 300])
def test_an_epoch_leaves_nothing_of_an_order(count):
    """By chance, one image is at the place that it has in the file, or had in the epoch before."""
    file = np.arange(count)
    epochs = [train_ae.batch_indices(epoch, count, count, 0) for epoch in range(30)]
    assert np.mean(np.equal(epochs, file)) < 2 / count
    assert np.mean(np.equal(epochs[1:], epochs[:-1])) < 2 / count


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("scale", [1e-7, 1e-3])  # where epsilon counts, and of first gradients
def test_fused_adam_is_keras_adam(scale, schedule):
    draws = np.random.default_rng(1)
    rate = 0.01
    if schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, 20)
    start = draws.normal(size=(3, 4)).astype(np.float32)
    ours = keras.Variable(start)
    theirs = keras.Variable(start)
    fused = train_ae.FusedAdam(rate, epsilon=1e-8)
    reference = keras.optimizers.Adam(rate, epsilon=1e-8)
    for _ in range(20):
        gradient = tf.constant(scale * draws.normal(size=(3, 4)), tf.float32)
        fused.apply([gradient], [ours])
        reference.apply([gradient], [theirs])
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert np.abs(ours - start).max() > 0.01


# --------------------------------------------------------------------------------------------------
# Whole runs, and the same computed by other code

# Layers that mirror each other, from the outside in.
PAIRS = {
    "conv1": (["conv1"], ["deconv2", "output"]),
    "conv2": (["conv2"], ["deconv1"]),
    "latent": (["flatten", "latent"], ["expand", "reshape"]),
}
MIRRORED = {
    "deconv2/kernel": "conv1/kernel",
    "deconv1/kernel": "conv2/kernel",
    "expand/kernel": "latent/kernel",
}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The options of a run of a second: 20 colour images, two layers, and more than one epoch."""
    path = tmp_path_factory.mktemp("arrays") / "x.npz"
    images = np.random.default_rng(2).integers(0, 256, (22, 13, 10, 3))
    images = images.astype(np.uint8)
    np.savez(path, x_train=images[:20], x_test=images[20:])
    return ["--dataset", str(path), "--depth", "2", "--batch-size", "4", "--steps", "6"]


def squared_error(images, outputs):
    return tf.reduce_mean(tf.reduce_sum((images - outputs) ** 2, axis=-1))


def absolute_error(images, outputs):
    return tf.reduce_mean(tf.abs(images - outputs))


class Reference:
    """A run's training by Keras's Adam, with one variable for two kernels that are tied."""

    def __init__(self, settings, objective):
        self.settings = settings
        with np.load(settings.dataset) as file:
            self.images = file["x_train"] / np.float32(255)
        keras.utils.clear_session()  # layers without names are "flatten" and "reshape" again
        keras.utils.set_random_seed(settings.seed)
        model, _ = train_ae.build_autoencoder(self.images.shape[1:], settings)
        layers = model.get_layer("encoder").layers + model.get_layer("decoder").layers
        self.layers = {layer.name: layer for layer in layers}
        self.variables = {}
        for variable in model.variables:
            self.variables[variable.path] = tf.Variable(variable.numpy())
        self.losses = {}
        names = [name for name in PAIRS if name in self.layers]
        if settings.pretrain_steps:
            for place, name in enumerate(names):
                phase = f"pretrain/{name}"
                steps = settings.pretrain_steps
                self.train(phase, names[:place], [name], squared_error, steps)
        self.train("train", [], names, objective, settings.steps)

    def value(self, path):
        """Return a weight; of a tied kernel, that of the encoder."""
        if not self.settings.tied or path not in MIRRORED:
            return tf.convert_to_tensor(self.variables[path])
        value = tf.convert_to_tensor(self.variables[MIRRORED[path]])
        return tf.transpose(value) if value.ndim == 2 else value

    def apply(self, names, images):
        """Return what layers make of images."""
        for name in names:
            layer = self.layers[name]
            weights = [self.value(variable.path) for variable in layer.variables]
            images, _ = layer.stateless_call(weights, [], images)
        return images

    def train(self, phase, frozen, pairs, objective, steps):
        """Train pairs of layers to reconstruct what frozen ones make of the images."""
        settings = self.settings
        rate = settings.learning_rate
        if settings.schedule == "cosine":
            rate = keras.optimizers.schedules.CosineDecay(rate, steps)
        adam = keras.optimizers.Adam(rate, epsilon=1e-8)
        losses = self.losses[phase] = []
        for step in range(steps):
            order = train_ae.batch_indices(step, settings.batch_size, 20, settings.seed)
            targets = self.images[order]
            draws = tf.random.stateless_normal(targets.shape, [settings.seed, step])
            hidden = np.clip(targets + settings.noise * draws.numpy(), 0, 1)
            for name in frozen:
                targets = self.apply(PAIRS[name][0], targets)
                hidden = self.apply(PAIRS[name][0], hidden)
            with tf.GradientTape() as tape:
                for name in pairs:
                    hidden = self.apply(PAIRS[name][0], hidden)
                for name in reversed(pairs):
                    hidden = self.apply(PAIRS[name][1], hidden)
                loss = objective(targets, hidden)
            variables = tape.watched_variables()
            adam.apply(tape.gradient(loss, variables), variables)
            losses.append(float(loss))

    def check(self, run):
        """Assert that a run has these losses and weights, and kernels that are equal if tied."""
        for phase, losses in self.losses.items():
            np.testing.assert_allclose(run.losses(phase), losses, rtol=5e-5)
        weights = {}
        for variable in run.model().variables:
            weights[variable.path] = variable.numpy()
        assert weights.keys() == self.variables.keys()
        for path, value in weights.items():
            expected = self.value(path)
            # A step moves each of them by 1e-3.
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=5e-5, err_msg=path)
        for path in weights.keys() & MIRRORED.keys():
            value = weights[path]
            value = value.T if value.ndim == 2 else value
            is_equal = np.array_equal(value, weights[MIRRORED[path]])
            assert is_equal == self.settings.tied, path


@pytest.mark.parametrize(
    ("more", "objective"),
    [
        ("--seed 3", squared_error),
        ("--seed 5 --noise 0.3", squared_error),
        ("--tied --schedule cosine", squared_error),
        ("--latent-dim 6 --pretrain-steps 5 --schedule cosine", absolute_error),
        ("--latent-dim 6 --pretrain-steps 5 --tied --noise 0.3", squared_error),
    ],
)
def test_run_is_what_other_code_computes(more, objective, options, run_here, monkeypatch):
    if objective is absolute_error:  # as if the script was edited
        monkeypatch.setattr(train_ae, "reconstruction_loss", objective)
    arguments = [*options, *more.split()]
    run = run_here(*arguments)
    settings = train_ae.parse_arguments(arguments)
    Reference(settings, objective).check(run)


# --------------------------------------------------------------------------------------------------
# Several devices


def train_on_two_devices(folder, arguments):
    """Train on two devices, and return what takes all images, a share or convolves, and where.

    They stand for GPUs, which not every machine has: so the strategy is another one.
    """
    os.chdir(folder)
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * 3
    tf.config.set_logical_device_configuration(cpu, devices)
    strategy = tf.distribute.MirroredStrategy(["CPU:1", "CPU:2"])
    train_ae.make_strategy = lambda _: strategy
    make_train_steps = train_ae.make_train_steps
    found = set()

    def make_and_look(*given):
        train_steps = make_train_steps(*given)
        function = train_steps.get_concrete_function()
        for tensor in function.captured_inputs:
            if tensor.dtype == tf.uint8:
                found.add(("images", tensor.device[-5:]))
        for part in function.graph.as_graph_def().library.function:
            arguments = part.signature.input_arg
            images = {argument.name for argument in arguments if argument.type == tf.uint8}
            for node in part.node_def:
                if node.op == "Conv2D" or images & set(node.input):
                    found.add((node.op, node.device[-5:]))
                if node.op == "StridedSlice" and node.attr["T"].type == tf.float32.as_datatype_enum:
                    found.add(("share", node.device[-5:]))
        return train_steps

    train_ae.make_train_steps = make_and_look
    with tf.device("CPU:1"):  # TensorFlow puts on the first GPU whatever has no other place
        assert helpers.here(*arguments) == 0
    return found


def test_two_devices_train_as_one_and_get_only_their_share(options, tmp_path):
    arguments = [*options, "--latent-dim", "6", "--tied", "--noise", "0.3", "--run-name", "x"]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        found = pool.submit(train_on_two_devices, tmp_path, arguments).result()
    settings = train_ae.parse_arguments(arguments)
    Reference(settings, squared_error).check(helpers.Finished(tmp_path))
    on_the_host = {("images", "CPU:0"), ("GatherV2", "CPU:0"), ("share", "CPU:0")}
    assert found == on_the_host | {("Conv2D", "CPU:1"), ("Conv2D", "CPU:2")}
