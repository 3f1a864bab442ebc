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

    def variable(name, shape):
        value = next(weights)
        assert value.shape == tuple(shape), (name, value.shape, shape)
        return tf1.get_variable(name, shape, initializer=tf1.constant_initializer(value))

    def leakyrelu(x):
        return tf.maximum(x, x * slope)

    def conv2d(input_, filters, name):
        with tf1.variable_scope(name):
            w = variable("w", [3, 3, input_.shape[-1], filters])
            conv = tf1.nn.conv2d(input_, w, strides=[1, 2, 2, 1], padding="SAME")
            return leakyrelu(tf1.nn.bias_add(conv, variable("b", [filters])))

    def deconv2d(input_, size, filters, name):
        with tf1.variable_scope(name):
            w = variable("w", [3, 3, filters, input_.shape[-1]])
            deconv = tf1.nn.conv2d_transpose(
                input_, w, [1, size, size, filters], [1, 2, 2, 1], padding="SAME"
            )
            return leakyrelu(tf1.nn.bias_add(deconv, variable("b", [filters])))

    with tf.Graph().as_default(), tf1.Session() as session:
        input_image = tf1.placeholder(tf.float32, [1, 28, 28, 1], "input_image")
        hidden = input_image
        for index, filters in enumerate((16, 32, 64, 128), 1):
            hidden = conv2d(hidden, filters, f"conv{index}")
        for index, (size, filters) in enumerate(((4, 64), (7, 32), (14, 16), (28, 1)), 1):
            hidden = deconv2d(hidden, size, filters, f"deconv{index}")
        output = tf.tanh(hidden)
        error = tf.pow(tf.subtract(output, input_image), 2)
        auto_loss = {
            "summed over channels": tf1.reduce_mean(tf1.reduce_sum(error, 3)),
            "summed over the image": tf1.reduce_mean(tf1.reduce_sum(error, [1, 2, 3])),
            "half": tf1.reduce_mean(tf1.reduce_sum(error, 3)) / 2,
        }[loss]
        train = tf1.train.AdamOptimizer(0.001, beta1=0.9, epsilon=epsilon).minimize(auto_loss)
        session.run(tf1.global_variables_initializer())
        feeds = ({input_image: image[None]} for image in images)
        return np.array([session.run([auto_loss, train], feed)[0] for feed in feeds])
