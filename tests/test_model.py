"""The model, its objective and its optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import train_ae

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


@pytest.fixture(scope="module")
def autoencoder():
    keras.utils.set_random_seed(3)
    return train_ae.build_autoencoder()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((5, 28, 28, 1), np.float32)


def layers(autoencoder):
    return {layer.name: layer for part in ("encoder", "decoder") for layer in autoencoder.get_layer(part).layers}


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


def test_encoder_and_decoder_can_be_called_alone(autoencoder, images):
    latent = autoencoder.get_layer("encoder")(images)
    assert latent.shape == (5, 2, 2, 128)
    np.testing.assert_array_equal(autoencoder.get_layer("decoder")(latent), autoencoder(images))


def test_leaky_relu_has_slope_0_2_and_the_output_is_tanh_of_it(autoencoder):
    found = layers(autoencoder)
    for name in LAYERS:
        np.testing.assert_allclose(found[name].activation(tf.constant([-2.0, 0.0, 3.0])), [-0.4, 0, 3], rtol=1e-6)
    np.testing.assert_allclose(found["output"](tf.constant([-0.4, 3.0])), np.tanh([-0.4, 3.0]), rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"latent_dim": 30}, {"latent_dim": 30, "tied": True, "depth": 3}]
)
@pytest.mark.parametrize("batch", [1, 5])
def test_training_computes_what_keras_would_to_the_bit(options, batch, images):
    keras.utils.set_random_seed(4)
    autoencoder = train_ae.build_autoencoder(**options)
    weights = [variable.value for variable in autoencoder.trainable_variables]
    for weight in weights:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.1))  # biases too
    (stage,) = train_ae.plan_stages(autoencoder, train_ae.Settings())
    found = []
    for forward in (autoencoder, lambda values: train_ae.pass_through(stage.learning, values)):

        @tf.function(autograph=False)
        def differentiate(values, forward=forward):
            with tf.GradientTape() as tape:
                output = forward(values)
                loss = train_ae.reconstruction_loss(values, output)
            return output, *tape.gradient(loss, weights)

        found.append(differentiate(tf.constant(images[:batch])))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_loss_by_hand():
    images, reconstructions = np.zeros((2, 1, 2, 3), np.float32), np.zeros((2, 1, 2, 3), np.float32)
    reconstructions[0, 0, 0] = [1, 2, 3]  # 14 summed over channels, in one of four places
    images[1, 0, 1] = [0, 0.5, 0]  # 0.25 in another
    assert float(train_ae.reconstruction_loss(images, reconstructions)) == pytest.approx((14 + 0.25) / 4)


def test_adam_is_keras_adam_with_the_articles_epsilon():
    random = np.random.default_rng(1)
    start = [random.normal(size=shape).astype(np.float32) for shape in ((3, 4), (5,))]
    ours, theirs = ([tf.Variable(value) for value in start] for _ in range(2))
    optimizer = train_ae.Adam(ours)
    reference = keras.optimizers.Adam(0.01, beta_1=0.9, beta_2=0.999, epsilon=1e-8)
    for step in range(20):
        gradients = [tf.constant(random.normal(size=v.shape) * 1e-7, tf.float32) for v in ours]
        optimizer.apply(gradients, tf.constant(step, tf.int64), 0.01)
        reference.apply_gradients(zip(gradients, theirs, strict=True))
    for one, other, begin in zip(ours, theirs, start, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4)
        assert np.abs(one.numpy() - begin).max() > 0.01
