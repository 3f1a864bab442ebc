"""The article's graph in TensorFlow 1's terms: typing errors mended, nothing else changed."""

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1


def losses(weights, images, slope=0.2, epsilon=1e-8, loss="summed over channels"):
    """Return the loss of each image in turn, before the update that it makes.

    Args:
        weights: initial values, kernel and bias by turns, of conv1 to conv4 and deconv1 to deconv4.
        images: (steps, 28, 28, 1) float32 in [0, 1].
        slope, epsilon, loss: what the article has by default, for tests that change one of them.
    """
    weights = iter(weights)
    strides = [1, 2, 2, 1]

    def variable(name, shape):
        value = next(weights)
        assert value.shape == tuple(shape), (name, value.shape, shape)
        initializer = tf1.constant_initializer(value)
        return tf1.get_variable(name, shape, initializer=initializer)

    def leakyrelu(x):
        return tf.maximum(x, x * slope)

    def conv2d(input_, filters, name):
        with tf1.variable_scope(name):
            w = variable("w", [3, 3, input_.shape[-1], filters])
            b = variable("b", [filters])
            conv = tf1.nn.conv2d(input_, w, strides, padding="SAME")
            return leakyrelu(tf1.nn.bias_add(conv, b))

    def deconv2d(input_, size, filters, name):
        with tf1.variable_scope(name):
            w = variable("w", [3, 3, filters, input_.shape[-1]])
            b = variable("b", [filters])
            deconv = tf1.nn.conv2d_transpose(
                input_,
                w,
                [1, size, size, filters],
                strides,
                padding="SAME",
            )
            return leakyrelu(tf1.nn.bias_add(deconv, b))

    with tf.Graph().as_default(), tf1.Session() as session:
        input_image = tf1.placeholder(tf.float32, [1, 28, 28, 1], "input_image")
        hidden = conv2d(input_image, 16, "conv1")
        hidden = conv2d(hidden, 32, "conv2")
        hidden = conv2d(hidden, 64, "conv3")
        hidden = conv2d(hidden, 128, "conv4")
        hidden = deconv2d(hidden, 4, 64, "deconv1")
        hidden = deconv2d(hidden, 7, 32, "deconv2")
        hidden = deconv2d(hidden, 14, 16, "deconv3")
        hidden = deconv2d(hidden, 28, 1, "deconv4")
        output = tf.tanh(hidden)
        error = tf.pow(tf.subtract(output, input_image), 2)
        summed = tf1.reduce_sum(error, 3)
        auto_loss = tf1.reduce_mean(summed)
        if loss == "summed over the image":
            auto_loss = tf1.reduce_sum(error)
        if loss == "half":
            auto_loss = auto_loss / 2
        adam = tf1.train.AdamOptimizer(0.001, beta1=0.9, epsilon=epsilon)
        train = adam.minimize(auto_loss)
        session.run(tf1.global_variables_initializer())
        found = []
        for image in images:
            feed = {input_image: image[np.newaxis]}
            value, _ = session.run([auto_loss, train], feed)
            found.append(value)
        return np.array(found)
