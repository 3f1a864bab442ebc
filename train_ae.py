"""Train a convolutional autoencoder on MNIST, on your own images, or on any TFDS image dataset.

    python train_ae.py                                        # 3,000 steps on MNIST digits
    python train_ae.py --dataset my-pictures --image-size 64 --batch-size 32
    tensorboard --logdir logs --samples_per_plugin images=1000

Four stride-2 convolutions encode an image, four transposed convolutions decode it, and Adam
minimizes the squared error, by default of one image per step. The default run takes about ten
seconds on two EPYC cores and reaches a test loss of 0.0144. The model and its training follow a
Chinese-language article written for TensorFlow 1, "Rebuilding images with autoencoders, and an
implementation in Python".

To resume a run that ended for any reason, even kill -9, repeat its command with --run-name and the
name of its folder in logs. The results are the same as without the interruption.

Sections: settings, model, objective, optimizer, phases, tied kernels, training step, data, metrics,
files and pictures, the run, resuming, devices, training. The method comes first; train(), near the
end, shows a whole run.
"""

import argparse
import gc
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
)

# --------------------------------------------------------------------------------------------------
# Settings: each one is a command-line option, and its docstring is the help text.

# Channels of the encoder's convolutions, of which --depth uses the first; the decoder mirrors them.
FILTERS = (16, 32, 64, 128)


class SettingsError(ValueError):
    """An unusable setting or input; the message says what to do. Exit status 2."""


class RunError(Exception):
    """A run that failed; the message says what to do. Exit status 1."""


def default_initializer(values: dict[str, Any]) -> str:
    """Return "article" for the article's own model on MNIST, else "glorot".

    With the article's standard deviation of 0.02, a model learns the colours of other pictures only
    after many steps. pydantic passes the settings that are declared above `initializer`.
    """
    # "mnist" of mnist.npz, or of mnist:3.0.1.
    name = re.split("[.:]", Path(values["dataset"]).name)[0]
    is_mnist = name in ("mnist", "mnist_5k")
    return "article" if is_mnist and values["latent_dim"] == 0 else "glorot"


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Folder = Annotated[Path, BeforeValidator(os.path.expanduser)]


class Settings(BaseModel):
    """Every setting of a run. Raises pydantic's ValidationError, a ValueError, for a bad value."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    steps: Count = 3000
    """updates of the weights, after those of pretraining"""
    batch_size: Count = 1
    """images in each step"""
    learning_rate: PositiveFloat = 0.001
    """learning rate of Adam"""
    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate: constant, or cosine, which falls to 0 by the end of each training"""
    depth: int = Field(default=len(FILTERS), ge=1, le=len(FILTERS))
    """convolutions of the encoder, and of the decoder"""
    latent_dim: CountOrZero = 0
    """size of the latent vector, or 0 to use the output of the last convolution as the latent"""
    tied: bool = False
    """give each layer of the decoder the kernel of its mirrored layer in the encoder"""
    pretrain_steps: CountOrZero = 0
    """steps of layer-wise pretraining for each pair of mirrored layers"""
    noise: NonNegativeFloat = 0.0
    """denoising: standard deviation of Gaussian noise added to the inputs, which are in [0, 1]"""
    dataset: Annotated[str, BeforeValidator(os.path.expanduser)] = Field("mnist_5k", min_length=1)
    """mnist_5k (bundled digits), a folder of pictures, a .npz or .npy file, or a TFDS dataset"""
    image_size: CountOrZero = 0
    """height and width that images are cropped and scaled to, or 0 to keep their size"""
    # Must stay below dataset and latent_dim, on which its default depends.
    initializer: Literal["article", "glorot"] = Field(default_factory=default_initializer)
    """initial weights of the convolutions, article or glorot (default: article for MNIST without
    --latent-dim)"""
    seed: CountOrZero = 0
    """seed of the initial weights, the order of the images, and the noise"""
    sample_every: Count = 50
    """steps between previews: pictures of test images and their reconstructions"""
    checkpoint_every: Count = 500
    """steps between checkpoints"""
    data_dir: Folder | None = None
    """folder of TFDS datasets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)"""
    run_name: str = Field(
        default_factory=lambda: f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$",
    )
    """name of a new run, or of one to resume: up to 100 letters, digits, _, - and ., not starting
    with - or . (default: date and time)"""
    log_dir: Folder = Path("logs")
    """folder for TensorBoard's files, checkpoints, the model and metrics"""
    sample_dir: Folder = Path("samples")
    """folder for pictures"""


def parse_arguments(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line; exit with one line and status 2 for a bad one."""
    parser = argparse.ArgumentParser(
        description="Train a convolutional autoencoder on MNIST, or on images of your own.",
        epilog="example: python train_ae.py --dataset my-pictures --image-size 64 --batch-size 32",
        argument_default=argparse.SUPPRESS,  # Settings has the defaults
        usage="python train_ae.py [options]",
        allow_abbrev=False,
    )
    # One line, and without the usage.
    parser.error = lambda text: parser.exit(2, f"train_ae.py: {' '.join(text.split())}\n")
    for name, field in Settings.model_fields.items():
        option = "--" + name.replace("_", "-")
        action = "store_true" if field.annotation is bool else "store"
        text = field.description or ""
        if field.default_factory is None and field.default is not None:
            text += f" (default: {field.default})"
        parser.add_argument(option, action=action, help=text)
    values = vars(parser.parse_args(arguments))
    try:
        return Settings(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = problem["loc"][0]
        meaning = Settings.model_fields[name].description
        parser.error(f"--{name.replace('_', '-')} {values[name]}: {problem['msg']} ({meaning})")


if __name__ == "__main__":
    # Help and errors need not wait for the imports below, which take seconds.
    command_line_settings = parse_arguments()
    os.environ["MPLBACKEND"] = "agg"  # importing matplotlib fails if a user's is unknown

# oneDNN is four times slower on one small image. For large batches, set the variable to 1.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever ~/.keras/keras.json says
gc.disable()  # garbage collection would add a second to the imports

import contextlib
import io
import json
import math
import socket
import threading
import time
import zlib
from itertools import chain, pairwise, repeat

import filelock
import keras
import matplotlib.style
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tensorboard.plugins.image.metadata import create_summary_metadata
from tqdm import tqdm

gc.freeze()  # later collections skip what the imports made
gc.enable()


# --------------------------------------------------------------------------------------------------
# Model


CONVOLUTION = {  # shared by all convolutions and transposed convolutions
    "kernel_size": 3,
    "strides": 2,
    "padding": "same",
    "activation": "leaky_relu",  # Keras's default slope is 0.2, as in the article
}


def make_initializer(settings):
    """Return a new initializer: layers that shared one would start with equal weights."""
    if settings.initializer == "article":
        return keras.initializers.TruncatedNormal(stddev=0.02)
    return keras.initializers.GlorotUniform()  # Glorot & Bengio 2010


def build_encoder(image_shape, settings):
    """Return the encoder's input, at [0], and the output of each of its layers."""
    encoded = [keras.Input(image_shape)]
    for number, filters in enumerate(FILTERS[: settings.depth], start=1):
        layer = layers.Conv2D(
            filters,
            kernel_initializer=make_initializer(settings),
            name=f"conv{number}",
            **CONVOLUTION,
        )
        encoded.append(layer(encoded[-1]))
    if settings.latent_dim:
        flat = layers.Flatten()(encoded[-1])
        # Not in the article: "latent" and "expand" keep Keras's default initializer, Glorot's.
        encoded.append(layers.Dense(settings.latent_dim, name="latent")(flat))
    return encoded


def build_decoder(encoded, settings):
    """Return the decoder's input and the output of each layer, shaped like `encoded` reversed."""
    restored = [keras.Input(encoded[-1].shape[1:])]
    if settings.latent_dim:
        shape = encoded[-2].shape[1:]
        expand = layers.Dense(math.prod(shape), activation="leaky_relu", name="expand")
        restored.append(layers.Reshape(shape)(expand(restored[-1])))
    inputs_of_convolutions = encoded[: settings.depth]  # the images, the output of conv1, …
    for number, to_restore in enumerate(reversed(inputs_of_convolutions), start=1):
        _, height, width, channels = to_restore.shape
        layer = layers.Conv2DTranspose(
            channels,
            # 2n and 2n - 1 both halve to n: the padding tells which one to restore.
            output_padding=(1 - height % 2, 1 - width % 2),
            kernel_initializer=make_initializer(settings),
            name=f"deconv{number}",
            **CONVOLUTION,
        )
        restored.append(layer(restored[-1]))
    # Tanh after a leaky ReLU is an odd choice for images in [0, 1], kept from the article.
    restored[-1] = layers.Activation("tanh", name="output")(restored[-1])
    return restored


def build_autoencoder(
    image_shape: Sequence[int], settings: Settings
) -> tuple[keras.Model, list[tuple]]:
    """Return the autoencoder and, from the images inward, pairs of tensors: one of the encoder, and
    the one of the decoder that is to reconstruct it.

    The autoencoder maps (batch, *image_shape) float32 in [0, 1] to the same shape in (-1, 1), and
    consists of two models, "encoder" and "decoder". Each convolution halves height and width,
    rounding up; `latent_dim` adds a fully connected layer. The pairs for a depth of 2: images and
    output; the outputs of conv1 and deconv1; and the latent and the decoder's input.
    """
    encoded = build_encoder(image_shape, settings)
    restored = build_decoder(encoded, settings)
    encoder = keras.Model(encoded[0], encoded[-1], name="encoder")
    decoder = keras.Model(restored[0], restored[-1], name="decoder")
    autoencoder = keras.Sequential([encoded[0], encoder, decoder], name="autoencoder")
    return autoencoder, list(zip(encoded, reversed(restored), strict=True))


# --------------------------------------------------------------------------------------------------
# Objective


def squared_error_per_pixel(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Return the squared error, summed over the last axis, averaged over the others.

    The last axis holds the channels of an image or a layer, or a latent.
    """
    return tf.reduce_mean(tf.reduce_sum(tf.square(outputs - targets), axis=-1))


def reconstruction_loss(images: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Return the loss to minimize, a scalar. For another objective, change this function.

    Both arguments are (batch, height, width, channels) float32. The loss must be a mean over the
    images, since the losses of several devices, and of batches of test images, are averaged.
    """
    return squared_error_per_pixel(images, outputs)


# --------------------------------------------------------------------------------------------------
# Optimizer


class FusedAdam(keras.optimizers.Adam):
    """Adam (Kingma & Ba 2015) as TensorFlow's fused operation: 25% less time per step.

    Uses _momentums, _velocities and _get_variable_index(), which are Keras's own; written for 3.15.
    """

    def update_step(self, gradient, variable, learning_rate):
        """Update a variable and its first and second moments."""
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations.value + 1, tf.float32)
        # `variable` is a tf.Variable; Keras's variables, such as the moments, hold one as `value`.
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=self.beta_1**step,
            beta2_power=self.beta_2**step,
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


# --------------------------------------------------------------------------------------------------
# Phases: the layer-wise pretraining, if any, then the training of the whole model


class Phase(NamedTuple):
    """A stage of a run: `model` learns to reconstruct what `frozen` makes of the images.

    With noise, its inputs are what `frozen` makes of the noisy images.
    """

    name: str  # "train", or "pretrain/" and the name of a layer
    frozen: keras.Model  # the layers of the encoder before `model`; the identity in "train"
    model: keras.Model
    loss: Callable  # of targets and outputs
    steps: int
    optimizer: keras.optimizers.Optimizer


def make_phase(name, frozen, model, loss, steps, settings):
    """Return a phase with its optimizer."""
    rate = settings.learning_rate
    if settings.schedule == "cosine":  # Loshchilov & Hutter 2017
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    optimizer = FusedAdam(rate, epsilon=1e-8)  # TensorFlow 1's, as in the article; Keras's is 1e-7
    optimizer.build(model.trainable_variables)  # makes the moments now, for checkpoints to hold
    return Phase(name, frozen, model, loss, steps, optimizer)


def plan_phases(autoencoder, tensor_pairs, settings):
    """Return the phases of a run: pretraining, if any, and training.

    In pretraining, a layer of the encoder and the mirrored one of the decoder learn to reconstruct
    the output of the frozen layers before them.
    """
    images, _ = tensor_pairs[0]
    phases = []
    if settings.pretrain_steps:
        for (outer, outer_restored), (inner, inner_restored) in pairwise(tensor_pairs):
            # One layer of the encoder, to the inner tensor, and its mirror, back to the outer one.
            encode = keras.Model(outer, inner)
            decode = keras.Model(inner_restored, outer_restored)
            phase = make_phase(
                name=f"pretrain/{encode.layers[-1].name}",
                frozen=keras.Model(images, outer),
                model=keras.Sequential([encode, decode]),
                # Most targets are activations: squared error, whatever the objective for images.
                loss=squared_error_per_pixel,
                steps=settings.pretrain_steps,
                settings=settings,
            )
            phases.append(phase)
    phase = make_phase(
        name="train",
        frozen=keras.Model(images, images),
        model=autoencoder,
        loss=reconstruction_loss,
        steps=settings.steps,
        settings=settings,
    )
    return [*phases, phase]


# --------------------------------------------------------------------------------------------------
# Tied kernels: the decoder's are copies of the encoder's, in the layout of the mirrored layer


def mirror(kernel):
    """Return a kernel in the layout of the mirrored layer: transposed if fully connected.

    A transposed convolution stores (height, width, output, input): already its mirror's shape.
    """
    return tf.transpose(kernel) if len(kernel.shape) == 2 else kernel


def pair_kernels(variables):
    """Return (encoder, decoder) indices of mirrored kernels: the first with the last, and so on.

    `variables` are in the order of the layers.
    """
    kernels = [index for index, variable in enumerate(variables) if variable.name == "kernel"]
    half = len(kernels) // 2
    return list(zip(kernels[:half], reversed(kernels[half:]), strict=True))


def tie_kernels(variables):
    """Give the decoder's kernels the values of the encoder's."""
    for encoder_index, decoder_index in pair_kernels(variables):
        variables[decoder_index].assign(mirror(variables[encoder_index].value))


# --------------------------------------------------------------------------------------------------
# Training step


def batch_indices(step, batch_size, count, seed):
    """Return the indices, among `count` images, of the batch of a step: (batch_size,) int64.

    Each image occurs once per epoch, and each epoch is shuffled anew. The batch depends only on the
    seed and the step, unlike that of a stateful data pipeline: this is what makes resuming exact.
    """
    position = step * batch_size + tf.range(batch_size, dtype=tf.int64)
    epoch = position // count
    # The operation takes three numbers as the seed of each index.
    seeds = tf.stack([seed * tf.ones_like(epoch), epoch, tf.zeros_like(epoch)], axis=1)
    return tf.raw_ops.RandomIndexShuffle(
        index=position % count,
        seed=seeds,
        max_index=tf.constant(count - 1, tf.int64),
        rounds=4 if count >= 4000 else 8,  # 4 rounds, the default, hardly shuffle a small set
    )


def to_float(images):
    """Return uint8 images as float32 in [0, 1]."""
    return tf.cast(images, tf.float32) / 255


def add_noise(images, stddev, seed, number):
    """Return images in [0, 1] with Gaussian noise, a pure function of the arguments, clipped."""
    noise = tf.random.stateless_normal(tf.shape(images), [seed, number], stddev=stddev)
    return tf.clip_by_value(images + noise, 0, 1)


def make_batch(images, step, settings):
    """Return the clean and the noisy images of a step, (batch, height, width, channels) each."""
    indices = batch_indices(step, settings.batch_size, len(images), settings.seed)
    clean = to_float(tf.gather(images, indices))
    if not settings.noise:
        return clean, clean
    return clean, add_noise(clean, settings.noise, settings.seed, step)


def update_weights(phase, inputs, targets, settings, replicas):
    """Update the weights with one replica's share of a batch; return its share of the loss.

    Shares are summed over the replicas: gradients by the optimizer, losses by the caller.
    """
    variables = phase.model.trainable_variables
    with tf.GradientTape() as tape:
        loss = phase.loss(targets, phase.model(inputs, training=True)) / replicas
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    if settings.tied:  # the kernel that both layers use gets the sum of their gradients
        for encoder_index, decoder_index in pair_kernels(variables):
            gradients[encoder_index] += mirror(gradients[decoder_index])
    phase.optimizer.apply(gradients, variables)
    return loss


def make_train_steps(phase, images, settings, writer):
    """Return a compiled function, train_steps(first, stop): it runs steps `first` to `stop` - 1 of
    the phase and returns their losses.

    `images` is the whole training set, uint8. One call runs many steps, and writes their summaries:
    Keras's fit(), or one call per step, would take several times as long for one small image.

    train_steps() calls train_step(), which calls replica_step() on each device.
    """
    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync

    def replica_step(step):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.device("CPU:0"):  # the training set stays there: only a share goes to a GPU
            # Drawn for the whole batch, the noise does not depend on the number of replicas.
            clean, noisy = make_batch(images, step, settings)
            clean_share = clean[replica::replicas]
            noisy_share = noisy[replica::replicas]
        targets = phase.frozen(clean_share, training=False)
        inputs = phase.frozen(noisy_share, training=False)
        return update_weights(phase, inputs, targets, settings, replicas)

    def train_step(step):
        loss = strategy.reduce("SUM", strategy.run(replica_step, [step]), axis=None)
        if settings.tied:
            tie_kernels(phase.model.trainable_variables)
        with tf.name_scope("/"):  # otherwise the loop would be part of the tag: while/loss
            # Training and previews share a tag, and so a chart. Pretraining has another one, since
            # its steps also start at 0.
            tag = "loss" if phase.name == "train" else "loss/pretraining"
            tf.summary.scalar(tag, loss, step)
        return loss

    # AutoGraph would take a second, and find nothing to convert.
    @tf.function(input_signature=[tf.TensorSpec((), tf.int64)] * 2, autograph=False)
    def train_steps(first, stop):
        with writer.as_default():  # leaving this block adds a flush to the graph: one per call
            return tf.map_fn(
                train_step,
                tf.range(first, stop),
                parallel_iterations=1,  # in order: each step needs the weights of the one before
                fn_output_signature=tf.float32,
            )

    return train_steps


# --------------------------------------------------------------------------------------------------
# Data: three readers. Each yields, for every image, (image, is_test, label, file), where the image
# is (height, width, channels).

BUNDLED = Path(__file__).resolve().parent / "samples" / "mnist_5k.npz"


class Data(NamedTuple):
    """Images, (n, height, width, channels) uint8, and metadata of the test images."""

    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray  # (n,) int, indices of `classes`
    classes: np.ndarray  # names
    files: np.ndarray  # (n,) names


def find_test_split(splits):
    """Return the name of the split to test on, or "" if there are no splits."""
    if "train" in splits:
        for name in ("test", "val", "valid", "validation"):
            if name in splits:
                return name
    return ""


def find_files(folder, excluded):
    """Yield all files below a folder, in order, following links, skipping excluded folders."""
    excluded = excluded | {folder.resolve()}  # following a link back to it would never end
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif path.resolve() not in excluded:
            yield from find_files(path, excluded)


def open_picture(path):
    """Return a picture, (height, width, channels), or None if Pillow cannot read the file."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith(("I", "F")):  # more than eight bits
            return np.asarray(picture)[..., np.newaxis]
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return np.asarray(picture.convert("RGB"))
    except MemoryError:
        raise
    except Exception:  # Pillow raises many errors for broken files
        return None


def read_folder(folder, settings):
    """Read the pictures in a folder. Its subfolders are classes, or splits that contain classes.

    Raises SettingsError if there are no pictures.
    """
    # What runs write is not data.
    excluded = {settings.log_dir.resolve(), settings.sample_dir.resolve()}
    if folder.resolve() in excluded:
        raise SettingsError(f"runs write into {folder}: use another --log-dir or --sample-dir")
    subfolders = [path.name for path in folder.iterdir() if path.is_dir()]
    test_split = find_test_split(subfolders)
    if test_split:
        splits = ["train", test_split]
        unused = [path.name for path in sorted(folder.iterdir()) if path.name not in splits]
        print(f"splits   train and {test_split}; not used: {', '.join(unused) or 'nothing'}")
    elif subfolders == ["train"]:
        splits = ["train"]
    else:
        splits = ["."]  # the folder itself
    found = dict.fromkeys(splits, 0)
    skipped = []
    for split in splits:
        for path in find_files(folder / split, excluded):
            image = open_picture(path) if path.is_file() else None  # opening a pipe would block
            if image is None:
                skipped.append(path)
                continue
            found[split] += 1
            *folders, _ = path.relative_to(folder / split).parts
            label = folders[0] if folders else ""
            yield image, split == test_split, label, path.relative_to(folder).as_posix()
    if skipped:
        print(f"skipped  {len(skipped):,} files that Pillow cannot read, such as {skipped[0]}")
    for split, count in found.items():
        if count == 0:
            raise SettingsError(
                f"no pictures in {folder / split}: {len(skipped):,} files were skipped (to read a"
                " TFDS dataset, give its name, and its folder as --data-dir)"
            )


def read_arrays(path):
    """Read a NumPy file of one array, or of x_train, y_train, x_test, y_test as in Keras."""
    try:
        arrays = np.load(path)
        arrays = {"x_train": arrays} if isinstance(arrays, np.ndarray) else dict(arrays)
    except MemoryError:
        raise
    except Exception as error:  # NumPy raises many errors for damaged files
        raise SettingsError(f"{path} is missing or damaged: {error}") from error
    for split in ["train", "test"] if "x_test" in arrays else ["train"]:
        images = np.asarray(arrays.get(f"x_{split}"))  # np.asarray(None) is refused below
        labels = arrays.get(f"y_{split}", np.full(images.shape[:1], "")).flatten()
        is_numeric = images.dtype.kind in "buif"
        is_image = is_numeric and images.ndim in (3, 4) and images.size > 0
        if not is_image or len(labels) != len(images):
            raise SettingsError(
                f"{path} must have numbers as x_{split}, (n, height, width) or (n, height, width,"
                f" channels), and n labels as y_{split}, if any"
            )
        for image, label in zip(images, labels, strict=True):
            yield np.atleast_3d(image), split == "test", label, ""


def read_tfds(name, data_dir):
    """Read a TFDS image dataset; download it if needed."""
    import absl.logging  # slow imports, used only here
    import requests
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity("error")  # TFDS's own calls cause warnings
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        features = dict(builder.info.features)
        is_one_size = None not in features["image"].shape
    except Exception as error:  # TFDS raises many errors for a wrong name
        raise SettingsError(
            f"{name!r} is not a folder, a .npz or .npy file, or a TFDS image dataset: {error}"
        ) from error
    if not builder.is_prepared():
        try:
            # Without a network, TFDS itself would try for minutes.
            requests.head("https://storage.googleapis.com", timeout=3)
            builder.download_and_prepare()
        except Exception as error:  # whatever broke the download
            raise RunError(
                f"{name} is not in {builder.data_dir}, and cannot be downloaded: see README.md"
                f" about offline use ({error})"
            ) from error
    # Labels without names are numbers or texts.
    to_name = getattr(features.get("label"), "int2str", tf.compat.as_str_any)
    wanted = {key: True for key in ("image", "label") if key in features}
    decoders = tfds.decode.PartialDecoding(wanted)
    batch_size = 1000 if is_one_size else 1  # batches are three times faster
    test_split = find_test_split(builder.info.splits)
    try:
        for split in ["train", test_split] if test_split else ["train"]:
            batches = builder.as_dataset(split=split, decoders=decoders, batch_size=batch_size)
            for batch in tfds.as_numpy(batches):
                labels = batch.get("label", repeat(""))  # without labels, "" for each image
                for image, label in zip(batch["image"], labels, strict=False):
                    is_unlabelled = np.array_equal(label, -1)  # as in many test splits
                    class_name = "" if is_unlabelled else to_name(label)
                    yield image, split == test_split, class_name, ""
    except (ValueError, tf.errors.OpError) as error:
        raise RunError(
            f"{builder.data_dir} has no train split, or is damaged: download it again ({error})"
        ) from error


def choose_reader(settings):
    """Return the reader for `dataset`."""
    path = BUNDLED if settings.dataset == "mnist_5k" else Path(settings.dataset)
    if path.suffix in (".npz", ".npy"):
        return read_arrays(path)
    # The README's "mnist" is TFDS's dataset, even if there is a folder of that name.
    if path.is_dir() and settings.dataset != "mnist":
        return read_folder(path, settings)
    return read_tfds(settings.dataset, settings.data_dir)


def resize(image, size):
    """Crop an image to a square and scale it: (size, size, channels)."""
    if image.dtype != np.uint8:
        image = image.astype(np.float32)  # Pillow scales only these two types
    channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0)]
    return np.stack([ImageOps.fit(channel, (size, size)) for channel in channels], axis=-1)


def to_eight_bits(images, low, high):
    """Return images as uint8: scaled from their range, `low` to `high`, if not 8-bit already."""
    if not np.isfinite([low, high]).all() or low == high:
        raise SettingsError(
            f"pixels range from {low:g} to {high:g}: they must be finite, and not all equal"
        )
    if images.dtype == np.uint8 and high > 1:  # masks of 0 and 1 are scaled too
        return images
    print(f"values   from {low:g} to {high:g}, scaled to 0 to 255")
    return np.rint(np.interp(images, [low, high], [0, 255])).astype(np.uint8)


def read_images(settings):
    """Return all images, (n, height, width, channels) uint8, and (is_test, label, file) of each."""
    images = []
    details = []
    # Ranges and types are those before resizing, and shapes those after it.
    low = np.inf
    high = -np.inf
    kinds = set()
    for image, *rest in tqdm(choose_reader(settings), "reading", delay=2, disable=None):
        low = np.minimum(low, image.min())  # Python's min() could lose NaN
        high = np.maximum(high, image.max())
        dtype = image.dtype
        if settings.image_size:
            image = resize(image, settings.image_size)
        kinds.add(f"{dtype} {image.shape}")
        if len(kinds) > 1:
            raise SettingsError(
                f"images differ in type or shape: {', '.join(sorted(kinds))} (for one shape, add"
                " --image-size, such as 64; for one type, convert them)"
            )
        images.append(image)
        details.append(rest)
    if not images or images[0].shape[2] not in (1, 3):
        raise SettingsError(f"{settings.dataset} must contain images with 1 or 3 channels")
    images = to_eight_bits(np.stack(images), low, high)
    if (images == images[..., :1]).all():  # grey, even if saved as RGB
        images = images[..., :1]
    return np.ascontiguousarray(images), details  # checksums need contiguous memory


def load_data(settings: Settings) -> Data:
    """Return the images of a run; without a test split, a random tenth is for testing.

    Raises SettingsError, and RunError for a download that fails.
    """
    images, details = read_images(settings)
    is_test, labels, files = map(np.array, zip(*details, strict=True))
    train_rows = np.flatnonzero(~is_test)
    test_rows = np.flatnonzero(is_test)
    if len(test_rows) == 0:
        order = np.random.default_rng(settings.seed).permutation(len(images))
        train_rows, test_rows = np.split(order, [len(images) * 9 // 10])
    if settings.batch_size > len(train_rows):
        raise SettingsError(
            f"{settings.dataset} has {len(train_rows):,} training images, too few for --batch-size"
            f" {settings.batch_size}"
        )
    classes, labels = np.unique(labels, return_inverse=True)
    return Data(
        train=images[train_rows],
        test=images[test_rows],
        labels=labels[test_rows],
        classes=classes.astype(str),
        files=files[test_rows],
    )


# --------------------------------------------------------------------------------------------------
# Metrics


def make_evaluate(autoencoder, seed):
    """Return a compiled function, evaluate(images, stddev, number): it returns the inputs, which
    are the uint8 images with the noise of this number, the outputs, the latents, and the metrics.

    The metrics are means over the images: the loss; the squared error, summed over an image; and
    the PSNR of outputs clipped to [0, 1], in dB, at most 100.
    """
    encoder = autoencoder.get_layer("encoder")
    decoder = autoencoder.get_layer("decoder")
    _, height, width, _ = autoencoder.input_shape
    signature = [
        tf.TensorSpec(autoencoder.input_shape, tf.uint8),
        tf.TensorSpec((), tf.float32),
        tf.TensorSpec((), tf.int64),
    ]

    @tf.function(input_signature=signature, autograph=False)
    def evaluate(images, stddev, number):
        targets = to_float(images)
        inputs = add_noise(targets, stddev, seed, number)
        latents = encoder(inputs, training=False)
        outputs = decoder(latents, training=False)
        psnr = tf.image.psnr(targets, tf.clip_by_value(outputs, 0, 1), max_val=1)
        metrics = {
            "test_loss": reconstruction_loss(targets, outputs),
            "squared_error": squared_error_per_pixel(targets, outputs) * height * width,
            "psnr": tf.reduce_mean(tf.minimum(psnr, 100)),
        }
        return inputs, outputs, latents, metrics

    return evaluate


def split_batches(images):
    """Return the images in batches of about 100,000 values: larger ones are not faster."""
    return np.array_split(images, min(len(images), math.ceil(images.size / 100_000)))


def compute_metrics(evaluate, images, stddev=0):
    """Return the metrics of all images, and their latents."""
    latents = []
    metrics = []
    batches = split_batches(images)
    for number, batch in enumerate(tqdm(batches, "testing", delay=2, disable=None), start=1):
        # Negative: no training step has the same noise.
        _, _, batch_latents, batch_metrics = evaluate(batch, stddev, -number)
        latents.append(batch_latents)
        metrics.append(batch_metrics)
    sizes = [len(batch) for batch in batches]
    means = tf.nest.map_structure(
        lambda *values: float(np.average(values, weights=sizes)), *metrics
    )
    return means, np.concatenate(latents)


# --------------------------------------------------------------------------------------------------
# Files and pictures


GAP = 2  # between the images of a picture, in pixels
TITLE_HEIGHT = 28  # in pixels
BACKGROUND = 32  # of pictures: a grey that suits any page


def is_chief():
    """Return whether this process writes the files: among several workers, the first one does."""
    return tf.distribute.get_strategy().extended.should_checkpoint


def write_atomically(path, save):
    """Have `save` write a temporary file, then rename it to `path`, if this is the chief.

    Raises RunError.
    """
    if not is_chief():
        return
    part = path.with_name(f".part-{path.name}")  # a prefix: the suffix selects the format
    try:
        save(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def write_json(path, values):
    """Write a dictionary as JSON."""
    write_atomically(path, lambda part: part.write_text(json.dumps(values, indent=2)))


def write_arrays(path, arrays):
    """Write a dictionary of arrays as .npz."""
    write_atomically(path, lambda part: np.savez(part, **arrays))


def open_writer(folder):
    """Return a writer of TensorBoard's events.

    It flushes at the end of a `with` block, and only then: more often would take longer.
    """
    if not is_chief():
        return tf.summary.create_noop_writer()
    return tf.summary.create_file_writer(str(folder), max_queue=10**6, flush_millis=10**9)


def choose_preview_images(data):
    """Return up to ten test images: one of each class, then others; fewer if they are wide."""
    _, chosen = np.unique(data.labels, return_index=True)
    others = np.setdiff1d(np.arange(len(data.test)), chosen)
    count = max(1, min(10, 1400 // data.test.shape[2]))
    return data.test[np.concatenate([chosen, others])[:count]]


def draw_grid(rows, title):
    """Return a picture of rows of images, each (n, height, width, channels) in [0, 1]."""
    pixels = np.rint(np.clip(rows, 0, 1) * 255).astype(np.uint8)
    zoom = max(1, 100 // max(pixels.shape[2:4]))  # small images are enlarged to 100 pixels
    # Before and after each axis: rows, images, height, width, channels.
    gaps = [(0, 0), (0, 0), (0, GAP), (GAP // 2, GAP // 2), (0, 0)]
    tiles = np.pad(pixels, gaps, constant_values=BACKGROUND)
    pasted = np.vstack([np.hstack(row) for row in tiles])
    grid = Image.fromarray(pasted.squeeze())  # Pillow has no axis for a single channel
    grid = ImageOps.scale(grid, zoom, Image.Resampling.NEAREST)
    color = (BACKGROUND,) * len(grid.getbands())
    grid = ImageOps.expand(grid, (0, TITLE_HEIGHT, 0, 0), color)
    font = ImageFont.load_default(size=16)
    ImageDraw.Draw(grid).text((6, TITLE_HEIGHT // 2), title, "white", font, anchor="lm")
    return grid


def draw_animation(paths, path):
    """Write a GIF of about twenty of the pictures, most of them from the beginning."""
    if not is_chief():  # the pictures are not there
        return
    frames = []
    # Geometric spacing favours the beginning, and repeats indices there: hence unique().
    for index in np.unique(np.geomspace(1, len(paths), 28).astype(int)) - 1:
        try:
            # 16 grey levels make the file three times smaller.
            frames.append(Image.open(paths[index]).point(lambda value: value // 16 * 17))
        except (OSError, SyntaxError) as error:  # Pillow raises either for damaged files
            print(f"warning  {path} is made without {paths[index]}: {error}")
    if not frames:
        return
    times = [300] * (len(frames) - 1) + [3000]  # ms
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    write_atomically(path, lambda part: frames[0].save(part, **options))


@matplotlib.style.context("default")  # whatever a matplotlibrc says
def draw_summary(losses, previews, path):
    """Plot the losses of each phase, averaged over 1% of its steps, and the preview losses."""
    axes = Figure(figsize=(9, 5)).subplots()
    pretraining_steps = sum(map(len, losses.values())) - len(losses["train"])
    start = -pretraining_steps  # training starts at 0
    for name, values in losses.items():
        parts = np.array_split(values, min(len(values), 100))
        ends = start + np.cumsum([len(part) for part in parts])
        axes.semilogy(ends, [part.mean() for part in parts], label=name)
        start += len(values)
    axes.semilogy(list(previews), list(previews.values()), label="preview")
    axes.set(xlabel="step", title="reconstruction loss")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    write_atomically(path, axes.figure.savefig)


# --------------------------------------------------------------------------------------------------
# The run: its state, and what it writes


class Run:
    """A run: its folders, the state that checkpoints hold, and what it writes.

    There are two counts of steps: that of a phase in curves, pictures and lines that begin with
    "step", and that of all phases in checkpoints, the progress bar and other messages.
    """

    def __init__(self, settings, data):
        self.settings = settings
        self.data = data
        self.log_folder = settings.log_dir / settings.run_name
        self.sample_folder = settings.sample_dir / settings.run_name
        keras.utils.set_random_seed(settings.seed)  # of the initial weights
        self.autoencoder, tensor_pairs = build_autoencoder(data.train.shape[1:], settings)
        if settings.tied:
            tie_kernels(self.autoencoder.trainable_variables)
        self.phases = plan_phases(self.autoencoder, tensor_pairs, settings)
        self.evaluate = make_evaluate(self.autoencoder, settings.seed)
        self.preview_images = choose_preview_images(data)
        optimizers = [phase.optimizer for phase in self.phases]
        owners = [self.autoencoder, *optimizers]
        variables = chain.from_iterable(owner.variables for owner in owners)
        # Paths are unique, since Keras numbers the optimizers.
        self.variables = {variable.path: variable for variable in variables}
        # The losses of all steps so far: how many there are is the step to resume from.
        self.losses = {phase.name: np.zeros(0, np.float32) for phase in self.phases}
        self.preview_losses = {}  # by step

    def steps_done(self):
        """Return the number of steps trained so far, in all phases."""
        return sum(map(len, self.losses.values()))

    def list_checkpoints(self):
        """Return the paths of the checkpoints in order; other files are left alone."""
        return sorted(self.log_folder.glob(f"checkpoints/step_{'[0-9]' * 12}.npz"))

    def restore(self):
        """Load the newest usable checkpoint. Raises RunError if there are only unusable ones."""
        checkpoints = self.list_checkpoints()
        for path in reversed(checkpoints):
            try:
                with np.load(path) as arrays:
                    for name, variable in self.variables.items():
                        variable.assign(arrays[name])
                    self.losses = {name: arrays[name] for name in self.losses}
                    previews = arrays["previews"]
                    self.preview_losses = {int(step): loss for step, loss in previews}
                return
            except Exception as error:  # NumPy raises many errors for damaged files
                print(f"warning  {path} is skipped: damaged, or of another run ({error!r})")
        if checkpoints:
            raise RunError(f"no checkpoint in {self.log_folder} is usable: use another --run-name")

    def open_writers(self):
        """Open TensorBoard's event files, and write the model's graph."""
        names = [*self.losses, "preview"]
        self.writers = {name: open_writer(self.log_folder / name) for name in names}
        with self.writers["preview"].as_default():
            tf.summary.graph(self.evaluate.get_concrete_function().graph)

    def check_finite(self, values):
        """Raise RunError if a value is infinite or not a number."""
        if not np.isfinite(values).all():
            raise RunError(
                f"loss or weights not finite by step {self.steps_done():,}: use a lower"
                " --learning-rate"
            )

    def save(self):
        """Write a checkpoint, and keep only the last three.

        The events of its steps are already on disk, so the curves of a resumed run have no gaps.
        After kill -9, events after the checkpoint are written again, with equal values.
        """
        arrays = {path: variable.numpy() for path, variable in self.variables.items()}
        for array in arrays.values():
            self.check_finite(array)
        arrays |= self.losses | {"previews": np.array(list(self.preview_losses.items()))}
        path = self.log_folder / "checkpoints" / f"step_{self.steps_done():012}.npz"
        write_arrays(path, arrays)
        older = [other for other in self.list_checkpoints() if other < path]
        for other in older[:-2]:
            other.unlink(missing_ok=True)

    def log_preview(self, step):
        """Write the picture after `step` updates; return the preview loss, that of its images."""
        noise = self.settings.noise
        inputs, outputs, _, metrics = self.evaluate(self.preview_images, noise, -1)
        loss = float(metrics["test_loss"])
        self.check_finite(loss)
        rows = [self.preview_images / 255, inputs, outputs] if noise else [inputs, outputs]
        grid = draw_grid(rows, f"step {step:,}   preview loss {loss:.4f}")
        png = io.BytesIO()
        grid.save(png, "png", compress_level=1)  # the default takes twice the time
        path = self.sample_folder / f"step_{step:05}.png"
        write_atomically(path, lambda part: part.write_bytes(png.getvalue()))
        with self.writers["preview"].as_default(step=step):
            tf.summary.scalar("loss", loss)
            # Width, height, encoded file. tf.summary.image would take half a second more per run.
            image = [str(grid.width), str(grid.height), png.getvalue()]
            metadata = create_summary_metadata(display_name=None, description=None)
            tf.summary.write("reconstructions", tf.constant(image), metadata=metadata)
        self.preview_losses[step] = loss
        return loss

    def finish(self):
        """Write the model, the latents of the test images, and the figures; return the metrics."""
        write_atomically(self.log_folder / "autoencoder.keras", self.autoencoder.save)
        metrics, latents = compute_metrics(self.evaluate, self.data.test)
        if self.settings.noise:
            noisy, _ = compute_metrics(self.evaluate, self.data.test, self.settings.noise)
            metrics |= {f"noisy_{name}": value for name, value in noisy.items()}
        arrays = {
            "latents": latents,
            "labels": self.data.labels,
            "classes": self.data.classes,
            "files": self.data.files,
        }
        write_arrays(self.log_folder / "latents.npz", arrays)
        pictures = [self.sample_folder / f"step_{step:05}.png" for step in self.preview_losses]
        draw_animation(pictures, self.sample_folder / "training.gif")
        draw_summary(self.losses, self.preview_losses, self.sample_folder / "summary.png")
        return metrics


# --------------------------------------------------------------------------------------------------
# Resuming

# Places may always differ, and the name of a data set, whose content is compared by checksum.
PLACES = {"log_dir", "sample_dir", "data_dir", "dataset"}
# These may differ, with a warning, when a run resumes. A changed script may change every number;
# the others change only the last digits.
WARNED = {
    "checksum of the script",
    "tensorflow",
    "keras",
    "onednn",
    "devices",
    "threads",
    "replicas",
}


def list_devices():
    """Return the names of the devices that this process trains on, such as GPU:0."""
    devices = tf.distribute.get_strategy().extended.worker_devices
    return [name.split("device:")[-1] for name in devices]


def make_config(settings, data):
    """Return the settings, and what else determines a run's numbers."""
    return settings.model_dump(mode="json") | {
        "FILTERS": list(FILTERS),
        "checksum of training images": zlib.crc32(data.train),
        "checksum of test images": zlib.crc32(data.test),
        "checksum of labels": zlib.crc32(data.labels),
        "checksum of the script": zlib.crc32(Path(__file__).read_bytes()),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "onednn": os.environ["TF_ENABLE_ONEDNN_OPTS"],
        "devices": list_devices(),
        "threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "replicas": tf.distribute.get_strategy().num_replicas_in_sync,
    }


def check_config(path, config):
    """Raise SettingsError if a run was started with a different config.

    More steps are allowed at a constant learning rate. Differences in WARNED are printed.
    """
    try:
        # The defaults stand in for settings that have been added to the script since.
        before = Settings().model_dump(mode="json") | json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SettingsError(
            f"{path}, with the settings of the run, is lost or damaged: use another --run-name"
            f" ({error})"
        ) from error
    for name, now in config.items():
        old = before.get(name)
        if old == now or name in PLACES | {"run_name"}:  # a run's folder may be renamed
            continue
        message = f"{path.parent} has been run with {name} {old}, but it is now {now}"
        is_extended = name == "steps" and config["schedule"] == "constant" and old < now
        if name in WARNED:
            print(f"warning  {message}: its numbers may differ")
        elif not is_extended:
            raise SettingsError(f"{message}: resume with the old value, or use another --run-name")


@contextlib.contextmanager
def open_run(run, config):
    """Lock, check and restore a run, and open its event files, for a `with` block."""
    (run.log_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    run.sample_folder.mkdir(parents=True, exist_ok=True)
    config_path = run.log_folder / "config.json"
    lock = contextlib.nullcontext()
    if is_chief():
        lock = filelock.FileLock(run.log_folder / ".lock", blocking=False)
    try:
        with lock:
            # Checkpoints without a config are refused.
            if config_path.exists() or run.list_checkpoints():
                check_config(config_path, config)
            run.restore()
            write_json(config_path, config)
            run.open_writers()
            yield
    except filelock.Timeout:
        raise SettingsError(f"another process is training the run of {run.log_folder}") from None


# --------------------------------------------------------------------------------------------------
# Devices, and several machines


def has_workers():
    """Return whether this process is one of several workers."""
    return "TF_CONFIG" in os.environ


def gather_from_workers(numbers):
    """Return each worker's numbers, (replicas, n) int64, once all of them have arrived."""
    strategy = tf.distribute.get_strategy()
    row = tf.constant([numbers], tf.int64)
    rows = strategy.experimental_distribute_values_from_function(lambda _: row)
    return strategy.gather(rows, axis=0).numpy()


def compare_workers(config):
    """Raise SettingsError if there are workers and their configs differ."""
    if not has_workers():
        return
    checksums = [zlib.crc32(repr(value).encode()) for value in config.values()]
    columns = gather_from_workers(checksums).T
    may_differ = PLACES | {"threads"}  # machines may have more or fewer cores
    for (name, value), column in zip(config.items(), columns, strict=True):
        if len(set(column)) > 1 and name not in may_differ:
            # Others may still be comparing: if this worker ended now, they would only notice that.
            with contextlib.suppress(tf.errors.OpError):
                gather_from_workers([0])
            raise SettingsError(f"{name} is {value} here, but must be the same for all workers")


def is_listening(host, port):
    """Return whether a worker listens at an address. Raises OSError for an unknown host."""
    try:
        socket.create_connection((host, port), timeout=1).close()
        return True
    except socket.gaierror:  # waiting would not help
        raise
    except OSError:
        return False


def wait_for_workers():
    """Wait until all workers of TF_CONFIG listen. TensorFlow's own wait would ignore SIGTERM."""
    config = json.loads(os.environ["TF_CONFIG"])
    addresses = [address.rsplit(":", 1) for address in config["cluster"]["worker"]]
    index = config["task"]["index"]
    if config["task"]["type"] != "worker" or index not in range(len(addresses)):
        raise ValueError("the task is none of the workers")
    _, own_port = addresses[index]
    with socket.create_server(("", int(own_port))):  # for the others to find this worker
        for host, port in addresses:
            while not is_listening(host, port):
                time.sleep(0.1)


def connect_workers():
    """Return the strategy for the workers of TF_CONFIG, once all of them are running."""
    print("workers  waiting for all workers of TF_CONFIG", flush=True)
    try:
        wait_for_workers()
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"cluster": {"worker": ["HOST:PORT", …]}, "task": {"type": "worker", "index": 0}}'
        raise SettingsError(f"TF_CONFIG must have the form {form} ({error!r})") from error
    except (OSError, tf.errors.OpError) as error:
        raise RunError(f"the workers cannot connect: {error}") from error
    # TensorFlow's C++ code has replaced the handler without Python noticing: install it again.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return strategy


def configure_tensorflow(settings):
    """Set threads and GPU memory; this must come before TensorFlow creates its devices."""
    tf.get_logger().setLevel("ERROR")  # no warnings about retracing
    keras.utils.clear_session()  # automatic names, which checkpoints contain, start over
    keras.config.set_floatx("float32")  # whatever ~/.keras/keras.json says
    keras.config.set_image_data_format("channels_last")
    # The last digits of sums depend on the threads. One thread is fastest for one small image.
    threads = 1 if settings.batch_size == 1 else os.cpu_count()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.experimental.enable_op_determinism()  # CPUs are deterministic anyway
    with contextlib.suppress(RuntimeError):  # TensorFlow has already been used in this process
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(2)
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)


def make_strategy(settings):
    """Return the strategy for the workers of TF_CONFIG, the GPUs here, or a single device.

    Raises SettingsError if the batch size is not a multiple of the number of replicas.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if has_workers():
        strategy = connect_workers()
    elif len(gpus) > 1 and settings.batch_size > 1:  # one image cannot be split
        strategy = tf.distribute.MirroredStrategy()
    else:
        strategy = tf.distribute.OneDeviceStrategy("GPU:0" if gpus else "CPU:0")
    replicas = strategy.num_replicas_in_sync
    if settings.batch_size % replicas:
        raise SettingsError(
            f"--batch-size {settings.batch_size} cannot be divided among {replicas} devices: use a"
            f" multiple of {replicas}"
        )
    return strategy


# --------------------------------------------------------------------------------------------------
# Training


@contextlib.contextmanager
def postpone_signals():
    """Postpone Ctrl-C and SIGTERM to the end of a `with` block; yield a list of those received."""
    received = []

    def receive(number, _frame):
        received.append(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # Python handles signals only there
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:  # after the last stop_if_asked()
        signal.raise_signal(received[0])


def stop_if_asked(run, signals):
    """Save the run and end the process if it, or another worker, has received a signal."""
    number = signals[0] if signals else 0
    if has_workers():  # all workers must stop after the same step
        number = int(gather_from_workers([number]).max())
    if number:
        run.save()
        tqdm.write(
            f"stopped  after step {run.steps_done():,}; to resume, repeat the command with"
            f" --run-name {run.settings.run_name}"
        )
        sys.exit(128 + number)


def report_and_preview(phase, run, bar):
    """Show the mean of the last 50 losses; in training, also write a preview and show its loss."""
    losses = run.losses[phase.name]
    step = len(losses)
    text = f"loss {losses[-50:].mean():.4f}  " if step else ""
    if phase.name == "train":
        preview_loss = run.log_preview(step)
        text += f"preview loss {preview_loss:.4f}"
    else:
        text += phase.name
    bar.set_postfix_str(text, refresh=False)
    if bar.disable:
        print(f"step {step:6,}  {text}", flush=True)


def fit_phase(phase, images, run, bar, signals):
    """Train a phase to its last step, from wherever it stands."""
    settings = run.settings
    train_steps = make_train_steps(phase, images, settings, run.writers[phase.name])
    # Fewer steps per call for large batches, since signals are handled between calls.
    values_per_step = settings.batch_size * math.prod(images.shape[1:])
    steps_per_call = max(1, min(50, 2_000_000 // values_per_step))
    intervals = (steps_per_call, settings.sample_every, settings.checkpoint_every)
    step = len(run.losses[phase.name])  # restored, if the run resumes
    while step < phase.steps:
        stop_if_asked(run, signals)
        if step % settings.sample_every == 0:
            report_and_preview(phase, run, bar)
        # Run to the next multiple of any interval, or to the last step.
        next_multiples = [(step // interval + 1) * interval for interval in intervals]
        stop = min(phase.steps, *next_multiples)
        losses = train_steps(step, stop).numpy()
        run.losses[phase.name] = np.append(run.losses[phase.name], losses)
        run.check_finite(losses)
        bar.update(stop - step)
        step = stop
        if step % settings.checkpoint_every == 0 and step < phase.steps:
            run.save()
    report_and_preview(phase, run, bar)
    run.save()


def fit(run, bar):
    """Train all phases. A signal saves the run and ends the process."""
    with tf.device("CPU:0"):  # otherwise the images would go to the first GPU
        images = tf.constant(run.data.train)
    with postpone_signals() as signals:
        for phase in run.phases:
            if len(run.losses[phase.name]) < phase.steps:  # else finished before a resume
                fit_phase(phase, images, run, bar, signals)
        stop_if_asked(run, signals)  # for a signal during the last report


def print_overview(run, done, total):
    """Print what a run uses, and where its results are."""
    settings = run.settings
    train = run.data.train
    test = run.data.test
    _, height, width, channels = train.shape
    print("device  ", ", ".join(list_devices()))
    print(
        f"data     {settings.dataset}: {len(train):,} images to train on, {len(test):,} to test on,"
        f" {height}x{width}x{channels}"
    )
    print(f"weights  {settings.initializer} initial weights")
    epochs = settings.steps * settings.batch_size / len(train)
    print(f"steps    {settings.steps:,} x {settings.batch_size:,} images = {epochs:.3g} epochs")
    if done:
        print(f"resumes  after step {done:,} of {total:,}")
    print(f"writes   {run.log_folder} and {run.sample_folder}")
    folder = shlex.quote(str(settings.log_dir))
    print(f"view     tensorboard --logdir {folder} --samples_per_plugin images=1000", flush=True)


def print_results(run, metrics):
    """Print how good the result is, and where it is."""
    print(
        f"done     test loss {metrics['test_loss']:.4f}, PSNR {metrics['psnr']:.1f} dB, on"
        f" {len(run.data.test):,} test images"
    )
    print(f"pictures {run.sample_folder}: training.gif, summary.png, step_….png")
    print(f"model    {run.log_folder / 'autoencoder.keras'}", flush=True)


def train(settings: Settings) -> dict[str, Any]:
    """Train an autoencoder, or resume its run; return the contents of metrics.json.

    The first run of a process fixes its number of threads. Raises SettingsError, or RunError,
    OSError or TensorFlow's OpError if the run fails, and SystemExit after a signal.
    """
    started = time.perf_counter()
    configure_tensorflow(settings)
    with make_strategy(settings).scope():
        data = load_data(settings)
        config = make_config(settings, data)
        compare_workers(config)  # before the model: workers that build different ones hang
        run = Run(settings, data)
        with open_run(run, config):
            done = run.steps_done()
            total = sum(phase.steps for phase in run.phases)
            # Workers that do not share --log-dir would resume from different steps.
            compare_workers({"the last checkpoint in --log-dir": done})
            print_overview(run, done, total)
            with tqdm(total=total, initial=done, disable=None, file=sys.stdout) as bar:
                fit(run, bar)
            metrics = run.finish()
            metrics |= {"steps": settings.steps, "seconds": time.perf_counter() - started}
            write_json(run.log_folder / "metrics.json", metrics)
    print_results(run, metrics)
    return metrics


def fail(error, status=1):
    """Print one line about a failure; return the exit status."""
    message = str(error) or repr(error)
    print(f"train_ae.py: {message.splitlines()[0]}", file=sys.stderr)
    return status


def main(settings: Settings) -> int:
    """Train; return the exit status: 0, 1 for a failed run, 2 for unusable settings."""
    try:
        train(settings)
        return 0
    except SettingsError as error:
        return fail(error, status=2)
    except (RunError, OSError) as error:
        return fail(error)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        return fail("out of memory: use a smaller --batch-size or --image-size")
    except (tf.errors.UnavailableError, tf.errors.AbortedError):
        return fail("another worker has ended: run the same commands again to resume")
    except tf.errors.OpError as error:
        if "tfevents" not in str(error):
            raise
        return fail(f"{settings.log_dir} cannot be written: is the disk full?")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    status = main(command_line_settings)
    if has_workers():
        sys.exit(status)  # an orderly exit lets workers disconnect
    with contextlib.suppress(OSError):  # the reader of a pipe may be gone
        sys.stdout.flush()
    os._exit(status)  # an orderly exit would take 0.2 seconds more
