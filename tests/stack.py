"""Stack an autoencoder layer by layer, as the article's deep autoencoder, for --weights.

    python tests/stack.py FILE.keras STEPS [options of train_ae.py]

    python tests/stack.py stacked.keras 400 --dataset mnist --batch-size 64
    python train_ae.py --weights stacked.keras --dataset mnist --batch-size 64

From the images inward, each layer of the encoder and its mirror in the decoder learn, for STEPS
steps, to reconstruct what the trained layers before make of the images.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_ae  # before TensorFlow, whose environment it sets

# isort: split
import keras
import tensorflow as tf


def list_pairs(autoencoder):
    """Return pairs of lists of layers: of the encoder, and their mirrors, from the images inward.

    Each list has one layer with weights; "latent" comes with the flattening before it, "expand"
    with the reshaping after it, and the last of the decoder with the activation of the output.
    """
    encoder = []
    begins = True
    for layer in autoencoder.get_layer("encoder").layers[1:]:
        encoder += [[]] if begins else []
        encoder[-1].append(layer)
        begins = bool(layer.weights)
    decoder = []
    for layer in autoencoder.get_layer("decoder").layers[1:]:
        decoder += [[]] if layer.weights else []
        decoder[-1].append(layer)
    return list(zip(encoder, reversed(decoder), strict=True))


@tf.function(autograph=False)
def train_step(frozen, pair, training, step):
    """Update the weights of a pair of layers; return the squared error, summed over channels."""
    clean, noisy = train_ae.make_batch(training, step)
    targets = frozen(clean, training=False)
    inputs = frozen(noisy, training=False)
    variables = pair.trainable_variables
    with tf.GradientTape() as tape:
        outputs = pair(inputs, training=True)
        loss = tf.reduce_mean(tf.reduce_sum(tf.square(outputs - targets), axis=-1))
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    if training.settings.tied:
        train_ae.tie_gradients(gradients, variables)
    training.optimizer.apply(gradients, variables)
    if training.settings.tied:
        train_ae.tie_kernels(variables)
    return loss


def stack(settings, steps):
    """Return a stacked autoencoder, and the losses of each pair of layers by name."""
    train_ae.configure_tensorflow(settings)
    data = train_ae.load_data(settings)
    autoencoder = train_ae.build_autoencoder(data.image_shape, settings)
    if settings.tied:
        train_ae.tie_kernels(autoencoder.trainable_variables)
    tensors = (*data.to_tensors(), data.preparation)
    settings = settings.model_copy(update={"steps": steps})  # for the cosine schedule
    images = keras.Input(data.image_shape)
    hidden = images
    losses = {}
    for encode, decode in list_pairs(autoencoder):
        frozen = keras.Model(images, hidden)
        pair = keras.Sequential([keras.Input(hidden.shape[1:]), *encode, *decode])
        optimizer = train_ae.make_optimizer(pair, settings)
        training = train_ae.Training(autoencoder, optimizer, *tensors, settings)
        name = encode[-1].name
        numbers = tf.range(steps, dtype=tf.int64)
        losses[name] = [float(train_step(frozen, pair, training, step)) for step in numbers]
        print(f"{name:8} loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}", flush=True)
        for layer in encode:
            hidden = layer(hidden)
    return autoencoder, losses


if __name__ == "__main__":
    if not re.fullmatch(r".*\.keras [1-9]\d*", " ".join(sys.argv[1:3])):
        sys.exit(train_ae.fail("usage: stack.py FILE.keras STEPS [train_ae.py's options]", 2))
    try:
        autoencoder, _ = stack(train_ae.parse_arguments(sys.argv[3:]), int(sys.argv[2]))
        autoencoder.save(sys.argv[1])
    except train_ae.SettingsError as error:
        sys.exit(train_ae.fail(error, 2))
    except (train_ae.RunError, OSError) as error:
        sys.exit(train_ae.fail(error))
    print(f"use it with --weights {sys.argv[1]}")
