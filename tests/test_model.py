"""The model, its objective, its optimizer and the order of its images."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import train_ae
from train_ae import build_autoencoder

LAYERS = {
    "conv1": ((14, 14, 16), (3, 3, 1, 16)),
    "conv2": ((7, 7, 32), (3, 3, 16, 32)),
    "conv3": ((4, 4, 64), (3, 3, 32, 64)),
    "conv4": ((2, 2, 128), (3, 3, 64, 128)),
    "deconv1": ((4, 4, 64), (3, 3, 64, 128)),
    "deconv2": ((7, 7, 32), (3, 3, 32, 64)),
    "deconv3": ((14, 14, 16), (3, 3, 16, 32)),
    "deconv4": ((28, 28, 1), (3, 3, 1, 16)),
}
FILTERS = [16, 32, 64, 128]
# images of many sizes, and the height and width after each layer of the encoder
SIZES = {
    (28, 28, 1): [(14, 14), (7, 7), (4, 4), (2, 2)],
    (45, 30, 1): [(23, 15), (12, 8), (6, 4), (3, 2)],
    (33, 17, 3): [(17, 9), (9, 5), (5, 3), (3, 2)],
    (7, 5, 1): [(4, 3), (2, 2), (1, 1), (1, 1)],
    (64, 64, 3): [(32, 32), (16, 16), (8, 8), (4, 4)],
    (1, 2, 3): [(1, 1), (1, 1), (1, 1), (1, 1)],
}


@pytest.fixture(autouse=True)
def seed():
    """Initial weights are the same in every run of the tests."""
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="module")
def autoencoder():
    keras.utils.set_random_seed(3)
    return build_autoencoder((28, 28, 1))


def pictures(shape, count=3):
    return np.random.default_rng(0).random((count, *shape), np.float32)


def layers(autoencoder):
    return {layer.name: layer for part in ("encoder", "decoder") for layer in autoencoder.get_layer(part).layers}


def named_weights(autoencoder):
    """Return the weights by names such as conv1/kernel."""
    return {"/".join(variable.path.split("/")[-2:]): variable for variable in autoencoder.trainable_variables}


def shake(autoencoder):
    """Give all weights other values than their initial ones, biases too."""
    random = np.random.default_rng(5)
    for variable in autoencoder.trainable_variables:
        variable.assign(variable + random.normal(scale=0.1, size=variable.shape).astype(np.float32))


def leaky(values):
    return tf.maximum(values, 0.2 * values)


def conv(weights, name, images):
    return leaky(tf.nn.conv2d(images, weights[f"{name}/kernel"], 2, "SAME") + weights[f"{name}/bias"])


def deconv(weights, name, images, shape):
    upsampled = tf.nn.conv2d_transpose(images, weights[f"{name}/kernel"], shape, 2, "SAME")
    return leaky(upsampled + weights[f"{name}/bias"])


def dense(weights, name, values):
    return values @ tf.convert_to_tensor(weights[f"{name}/kernel"]) + weights[f"{name}/bias"]


def reconstruct(weights, images, depth, latent_dim):
    """Return the latents and the output of an autoencoder with these weights, in the terms of tf.nn."""
    hidden, shapes = tf.convert_to_tensor(images), []
    for index in range(1, depth + 1):
        shapes.append(hidden.shape)
        hidden = conv(weights, f"conv{index}", hidden)
    latents = hidden
    if latent_dim:
        latents = dense(weights, "latent", tf.reshape(hidden, (len(images), -1)))
        hidden = tf.reshape(leaky(dense(weights, "expand", latents)), hidden.shape)
    for index in range(1, depth + 1):
        hidden = deconv(weights, f"deconv{index}", hidden, shapes.pop())
    return latents, tf.tanh(hidden)


def test_layers_have_the_stated_shapes(autoencoder):
    found = layers(autoencoder)
    assert list(found) == [*LAYERS, "output"]
    for name, (shape, kernel) in LAYERS.items():
        assert found[name].output.shape == (None, *shape), name
        assert found[name].kernel.shape == kernel, name
    assert autoencoder.output_shape == (None, 28, 28, 1)
    assert autoencoder.count_params() == 194_177


def test_weights_begin_as_truncated_normal_and_zero(autoencoder):
    kernels = {name: layers(autoencoder)[name].kernel.numpy() for name in LAYERS}
    for name, kernel in kernels.items():
        assert np.abs(kernel).max() <= 0.04, name  # cut at two standard deviations
        assert not layers(autoencoder)[name].bias.numpy().any(), name
    # A normal distribution cut at two standard deviations keeps 0.8796 of its standard deviation.
    assert np.std(np.concatenate([kernel.ravel() for kernel in kernels.values()])) == pytest.approx(0.0176, rel=0.01)
    assert not np.array_equal(kernels["conv2"].ravel(), kernels["deconv3"].ravel())  # of one shape, yet drawn apart


def test_weights_begin_as_glorots_with_a_latent():
    for name, variable in named_weights(build_autoencoder((28, 28, 1), latent_dim=30)).items():
        value = variable.numpy()
        if name.endswith("bias"):
            assert not value.any(), name
            continue
        limit = np.sqrt(6 / (value.shape[-1] + value.shape[-2]) / np.prod(value.shape[:-2]))
        assert 0.9 * limit < np.abs(value).max() <= limit, name
        assert np.std(value) == pytest.approx(limit / np.sqrt(3), rel=0.15), name


def test_encoder_and_decoder_can_be_called_alone(autoencoder):
    images = pictures((28, 28, 1), 5)
    latents = autoencoder.get_layer("encoder")(images)
    assert latents.shape == (5, 2, 2, 128)
    np.testing.assert_array_equal(autoencoder.get_layer("decoder")(latents), autoencoder(images))


def test_leaky_relu_has_slope_0_2_and_the_output_is_tanh_of_it(autoencoder):
    found = layers(autoencoder)
    for name in LAYERS:
        np.testing.assert_allclose(found[name].activation(tf.constant([-2.0, 0.0, 3.0])), [-0.4, 0, 3], rtol=1e-6)
    np.testing.assert_allclose(found["output"](tf.constant([-0.4, 3.0])), np.tanh([-0.4, 3.0]), rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_images_of_any_size_keep_their_shape(shape, depth):
    """Odd sizes halve rounding up, and the decoder goes the same way back; a latent changes nothing of that."""
    latent_dim = 6 if (depth + shape[0]) % 2 else 0
    model = build_autoencoder(shape, depth, latent_dim)
    found, filters, sizes = layers(model), [shape[2], *FILTERS], [shape[:2], *SIZES[shape]]
    assert model.input_shape == model.output_shape == (None, *shape)
    for i in range(1, depth + 1):
        one, other = found[f"conv{i}"], found[f"deconv{depth + 1 - i}"]
        assert one.output.shape == (None, *sizes[i], filters[i])
        assert other.output.shape == (None, *sizes[i - 1], filters[i - 1])
        assert one.kernel.shape == other.kernel.shape == (3, 3, filters[i - 1], filters[i])
    count = sum(18 * a * b + a + b for a, b in itertools.pairwise(filters[: depth + 1]))
    if latent_dim:
        values = np.prod(sizes[depth]) * filters[depth]
        assert found["latent"].kernel.shape == (values, 6) and found["expand"].kernel.shape == (6, values)
        count += 2 * values * 6 + 6 + values
    assert model.count_params() == count
    latents = model.get_layer("encoder")(images := pictures(shape))
    assert latents.shape == ((3, 6) if latent_dim else (3, *sizes[depth], filters[depth]))
    assert model.get_layer("decoder")(latents).shape == images.shape


@pytest.mark.parametrize("latent_dim", [0, 6])
@pytest.mark.parametrize("shape", [(28, 28, 1), (45, 30, 1), (33, 17, 3), (7, 5, 1)], ids=str)
def test_model_computes_what_its_layers_say_also_once_saved(shape, latent_dim, tmp_path):
    model, images = build_autoencoder(shape, 3, latent_dim), pictures(shape)
    shake(model)
    latents, outputs = reconstruct(named_weights(model), images, 3, latent_dim)
    np.testing.assert_allclose(model.get_layer("encoder")(images), latents, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model(images), outputs, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "x.keras")
    again = keras.models.load_model(tmp_path / "x.keras")
    assert again.count_params() == model.count_params()
    np.testing.assert_array_equal(again(images), model(images))
    np.testing.assert_array_equal(again.get_layer("decoder")(again.get_layer("encoder")(images)), model(images))


def test_latents_are_linear():
    *_, flat, latent = build_autoencoder((28, 28, 1), 2, 6).get_layer("encoder").layers
    latent.bias.assign(np.arange(6.0))
    eye = np.eye(flat.output.shape[1], dtype=np.float32)[:3]
    for values in (eye, -eye, -1000 * eye):
        expected = values @ latent.kernel.numpy() + np.arange(6)
        np.testing.assert_allclose(latent(values), expected, rtol=1e-5, atol=1e-6)


def test_loss_by_hand():
    images, outputs = np.zeros((2, 1, 2, 3), np.float32), np.zeros((2, 1, 2, 3), np.float32)
    outputs[0, 0, 0] = [1, 2, 3]  # 14 summed over channels, in one of four places
    images[1, 0, 1] = [0, 0.5, 0]  # 0.25 in another
    assert float(train_ae.reconstruction_loss(images, outputs)) == pytest.approx((14 + 0.25) / 4)


@pytest.mark.parametrize("scale", [1e-7, 1e-3])  # the smaller of the size of the first gradients, and of epsilon
def test_adam_is_keras_adam_with_the_articles_epsilon(scale):
    random = np.random.default_rng(1)
    start = [random.normal(size=shape).astype(np.float32) for shape in ((3, 4), (5,), (2, 2, 2, 3))]
    ours, theirs = ([keras.Variable(value) for value in start] for _ in range(2))
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 40)
    optimizer = train_ae.FusedAdam(schedule, epsilon=1e-8)
    reference = keras.optimizers.Adam(schedule, beta_1=0.9, beta_2=0.999, epsilon=1e-8)
    optimizer.build(ours)
    apply = tf.function(optimizer.apply, autograph=False)
    for _ in range(20):
        gradients = [tf.constant(random.normal(size=v.shape) * scale, tf.float32) for v in ours]
        apply(gradients)
        reference.apply_gradients(zip(gradients, theirs, strict=True))
    assert int(optimizer.iterations) == 20
    for one, other, begin in zip(ours, theirs, start, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-6)  # steps are of 1e-2
        assert np.abs(one.numpy() - begin).max() > 0.01


def test_adam_of_a_run_has_the_articles_constants(autoencoder):
    (phase,) = train_ae.plan_phases(autoencoder, train_ae.Settings())
    adam = phase.optimizer
    assert (adam.beta_1, adam.beta_2, adam.epsilon) == (0.9, 0.999, 1e-8)
    assert float(adam.learning_rate) == pytest.approx(0.001)


@pytest.mark.parametrize(("batch_size", "count"), [(1, 40), (8, 40), (7, 40)])
def test_each_epoch_has_every_image_once_in_another_order(batch_size, count):
    def epochs(seed):
        steps = range(-(-3 * count // batch_size))
        indices = (train_ae.batch_indices(tf.constant(step, tf.int64), batch_size, count, seed) for step in steps)
        return np.concatenate(list(indices))[: 3 * count].reshape(3, count)

    found, other = epochs(0), epochs(1)
    orders = [*found, *other]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
    assert len({tuple(order) for order in [*orders, range(count)]}) == 7
    np.testing.assert_array_equal(found, epochs(0))
