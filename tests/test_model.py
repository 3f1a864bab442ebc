"""The model: its shapes, its initial weights, and what it computes, also once saved and loaded."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from train_ae import Settings, build_autoencoder

# (height, width, channels), depth and latent_dim, and the shape of a latent.
MODELS = {
    ((28, 28, 1), 4, 0): (2, 2, 128),
    ((64, 64, 3), 1, 0): (32, 32, 16),
    ((45, 30, 3), 3, 0): (6, 4, 64),
    ((7, 5, 3), 4, 30): (30,),
    ((1, 2, 1), 3, 0): (1, 1, 64),
    ((1, 1, 3), 4, 6): (6,),
}


def make(shape, **options):
    """Return a model, and its weights by name."""
    model = build_autoencoder(shape, Settings(**options))
    weights = {variable.path: variable for variable in model.variables}
    return model, weights


leaky = tf.nn.leaky_relu  # of slope 0.2 by default


def reconstruct(weights, images, depth, latent_dim):
    """Return latents and outputs as TensorFlow's own functions compute them."""

    def layer(name):
        return weights[f"{name}/kernel"], weights[f"{name}/bias"]

    hidden = images
    shapes = []
    for number in range(1, depth + 1):
        shapes.append(hidden.shape)
        kernel, bias = layer(f"conv{number}")
        hidden = tf.nn.conv2d(hidden, kernel, 2, "SAME")
        hidden = leaky(hidden + bias)
    latents = hidden
    if latent_dim:
        flat = tf.reshape(hidden, (len(images), -1))
        kernel, bias = layer("latent")
        latents = flat @ kernel + bias
        kernel, bias = layer("expand")
        expanded = leaky(latents @ kernel + bias)
        hidden = tf.reshape(expanded, hidden.shape)
    for number in range(1, depth + 1):
        shape = shapes.pop()
        kernel, bias = layer(f"deconv{number}")
        hidden = tf.nn.conv2d_transpose(hidden, kernel, shape, 2, "SAME")
        hidden = leaky(hidden + bias)
    return latents, tf.tanh(hidden)


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_model_computes_what_its_layers_say_also_once_saved(case, tmp_path):
    """A leaky ReLU of slope 0.2 after each layer but the latent, and tanh at the end."""
    shape, depth, latent_dim = case
    model, weights = make(shape, depth=depth, latent_dim=latent_dim)
    draws = np.random.default_rng(5)
    for variable in weights.values():  # biases too are no longer 0
        change = draws.normal(scale=0.1, size=variable.shape)
        variable.assign_add(change)
    images = draws.random((3, *shape), np.float32)
    latents, outputs = reconstruct(weights, images, depth, latent_dim)
    assert latents.shape == (3, *MODELS[case])
    model.save(tmp_path / "x.keras")
    loaded = keras.models.load_model(tmp_path / "x.keras")
    for each in (model, loaded):
        found = each.get_layer("encoder")(images)
        assert_allclose(found, latents, rtol=1e-4, atol=1e-5)
        assert_allclose(each(images), outputs, rtol=1e-4, atol=1e-5)
        decoded = each.get_layer("decoder")(found)
        assert_array_equal(decoded, each(images))


def test_default_model_has_the_size_of_the_articles():
    model, _ = make((28, 28, 1))
    assert model.count_params() == 194_177


@pytest.mark.parametrize(
    ("initializer", "shape", "options"),
    [
        ("article", (28, 28, 1), {}),  # by default only for images like the article's
        ("article", (28, 28, 3), {"initializer": "article", "latent_dim": 30}),
        ("glorot", (28, 28, 1), {"latent_dim": 30}),
        ("glorot", (28, 28, 1), {"initializer": "glorot"}),
        ("glorot", (28, 28, 3), {}),
        ("glorot", (28, 27, 1), {}),
    ],
)
def test_initial_weights(initializer, shape, options):
    _, weights = make(shape, **options)
    values = []
    for name, variable in weights.items():
        value = variable.numpy()
        if name.endswith("bias"):
            assert not value.any(), name
            continue
        if initializer == "article" and value.ndim == 4:
            # Normal, cut at two deviations of 0.02, which leaves a deviation of 0.0176.
            limit = 0.04
            deviation = 0.0176
        else:
            # Glorot's uniform distribution.
            *window, inputs, outputs = value.shape
            limit = np.sqrt(6 / np.prod(window) / (inputs + outputs))
            deviation = limit / np.sqrt(3)
        largest = np.abs(value).max()
        assert 0.9 * limit < largest <= limit, name
        assert value.std() == pytest.approx(deviation, rel=0.1), name
        assert abs(value.mean()) < deviation / 4, name
        values.extend(value.flat)
    assert len({*values}) > 0.9 * len(values)  # layers of equal shape begin with other values
