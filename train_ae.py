"""Train a convolutional autoencoder on MNIST, one digit at a time.

    python train_ae.py                  # 3,000 steps; pictures in samples/, curves in logs/
    tensorboard --logdir logs --samples_per_plugin images=1000
    python train_ae.py --resume RUN     # goes on with a run that was stopped
    python train_ae.py --latent-dim 2   # a digit in two numbers, and PCA's error beside it
    python train_ae.py --help           # every setting

Four stride-2 convolutions squeeze a digit of 28x28 pixels to a latent tensor of 2x2x128, four transposed
convolutions draw it again, and Adam lowers the squared error between the two. The default run takes about
5 seconds on two cores of an AMD EPYC (Zen 4), and reaches a test loss of 0.0144 +- 0.0003 (5 seeds, 1,000 digits).
"""

import faulthandler
import gc
import os
import signal
import sys

QUIET = __name__ == "__main__" and "--verbose" not in sys.argv
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run just ends the process
if QUIET:  # TensorFlow complains of absent GPU drivers before it can be asked not to; what Python says still shows
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    faulthandler.enable(sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

# These have to be set before TensorFlow is imported. On a batch of one, oneDNN makes a step four times slower.
# TensorFlow's own log says little here that does not reach Python as an exception too. The garbage collector would
# only go again and again through what the imports build, and nothing of that is garbage.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if "--verbose" in sys.argv else "3")
gc.disable()
# Keras imports these where they are installed, without need: a second and a half for all of them.
UNNEEDED = ("jax", "matplotlib.pyplot", "pandas", "sklearn", "torch") if __name__ == "__main__" else ()
sys.modules.update(dict.fromkeys(UNNEEDED))  # None stands for "not there"

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import filelock
import keras
import numpy as np
import requests
import tensorboard
import tensorflow as tf
from keras import layers
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins import projector
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.hparams.api import hparams
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.scalar import metadata as scalar_plugin
from tensorboard.util.tensor_util import make_tensor_proto
from tqdm import tqdm

for name in UNNEEDED:
    del sys.modules[name]
gc.freeze()
gc.enable()
if QUIET:
    os.dup2(sys.stderr.fileno(), 2)

SHIPPED_DIGITS = Path(__file__).resolve().parent / "samples" / "mnist_5k.npz"
SIZES = (28, 14, 7, 4, 2)  # height and width of the image and of the output of each encoder layer
CHANNELS = (1, 16, 32, 64, 128)
LAYERS = len(SIZES) - 1
IMAGE_SHAPE = (SIZES[0], SIZES[0], CHANNELS[0])
PIXELS = SIZES[0] ** 2


# --- settings ---
class SettingsError(ValueError):
    """A setting that cannot be used, with what to do about it."""


def setting(default: Any, help: str, least: float | None = None, most: float = 2**31 - 1) -> Any:
    """Return a dataclass field that carries its help line and, for a number, the least and the most it can be."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most})


def value_type(field: dataclasses.Field) -> Any:
    """Return the type of a setting's values, without the None that stands for an open default."""
    kinds = get_args(field.type)
    return kinds[0] if type(None) in kinds else field.type


def flag(name: str) -> str:
    """Return a setting's name on the command line: `--batch-size` for batch_size."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. Raises SettingsError for a value out of its range."""

    steps: int = setting(3000, "updates of the weights", 1)
    epochs: int | None = setting(None, "passes over the training images (default: as --steps says)", 1)
    batch_size: int = setting(1, "images in each step", 1)
    learning_rate: float = setting(0.001, "learning rate of Adam", 1e-9)
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate over the run; cosine falls to 0")
    depth: int = setting(LAYERS, "layers of the encoder, and of the decoder", 1, LAYERS)
    latent_dim: int | None = setting(
        None, "numbers in the code of an image (default: all that the last convolution puts out)", 1, PIXELS
    )
    tied: bool = setting(False, "have each decoder layer use the kernel of its twin in the encoder")
    pretrain_steps: int = setting(0, "steps for which each pair of layers is trained alone before the whole is", 0)
    sample_every: int = setting(50, "steps from one picture and test figure to the next", 1)
    checkpoint_every: int = setting(500, "steps from one checkpoint to the next", 1)
    seed: int = setting(0, "seed of the initial weights and of the order of the images", 0)
    dataset: str = setting("mnist", "TFDS set of 28x28x1 images, or mnist_5k for the digits shipped with this script")
    data_dir: str | None = setting(None, "folder of TFDS's data sets (default: TFDS_DATA_DIR, else TFDS's own)")
    device: Literal["auto", "cpu", "gpu"] = setting("auto", "where to train; auto takes a GPU where there is one")
    run_name: str | None = setting(None, "name of the run and of its folders (default: the date and time)")
    log_dir: str = setting("logs", "folder for TensorBoard events, the trained model and the figures")
    sample_dir: str = setting("samples", "folder for pictures")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), value_type(field)
            least, most = field.metadata["least"], field.metadata["most"]
            if least is not None and value is not field.default:
                if not (isinstance(value, (int, kind)) and least <= value <= most):
                    name = "whole number" if kind is int else "number"
                    raise SettingsError(f"{flag(field.name)} must be a {name} from {least} to {most}, not {value}")
            elif (choices := get_args(kind)) and value not in choices:
                raise SettingsError(f"{flag(field.name)} must be one of {', '.join(choices)}, not {value}")
        if self.pretrain_steps and self.depth == 1 and not self.latent_dim:
            raise SettingsError("--pretrain-steps trains pairs of layers one by one: take --depth 2 or a --latent-dim")
        if self.run_name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", self.run_name, re.ASCII):
            raise SettingsError(f"the run name must be 1 to 100 letters, digits, '_', '-', '.', not {self.run_name!r}")


# --- data ---
class Data(NamedTuple):
    """Images to train and to test on, (n, 28, 28, 1) uint8; the test images' classes, (n,); where they are from."""

    train: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    source: str


def load_data(settings: Settings, needed: int | None = None) -> Data:
    """Return the images of a run: those shipped with the script where they are as many as needed, else TFDS's.

    `needed` counts training images; by default they are as many as the steps take, or all for epochs. Raises
    SettingsError for a data set that cannot be used, ConnectionError for one that cannot be downloaded.
    """
    needed = needed or (sys.maxsize if settings.epochs else settings.steps * settings.batch_size)
    data = None
    if settings.dataset in ("mnist", "mnist_5k"):
        with np.load(SHIPPED_DIGITS) as file:
            arrays = [file[name] for name in ("train_images", "test_images", "test_labels")]
        data = Data(*arrays, f"MNIST, as shipped in {SHIPPED_DIGITS.name}")
    if settings.dataset != "mnist_5k" and (data is None or needed > len(data.train)):
        try:
            data = load_tfds(settings.dataset, settings.data_dir, needed)
        except ConnectionError as error:
            if data is None:
                raise
            print(f"{error}; the {len(data.train):,} digits shipped with this script are used again and again instead")
    if settings.batch_size > len(data.train):
        raise SettingsError(f"a batch of {settings.batch_size} is more than the {len(data.train):,} training images")
    return data


def load_tfds(name: str, data_dir: str | None, needed: int) -> Data:
    """Return all test images and the first `needed` training images of a TFDS data set, downloaded if need be."""
    import tensorflow_datasets as tfds  # here, since it takes 0.6 s that the default run does not need
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # TFDS warns of each folder in which it finds no data set yet
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        image = dict(builder.info.features).get("image")
    except Exception as error:  # TFDS raises a kind of its own for each way in which a name can be wrong
        raise SettingsError(f"data set {name}: {first_line(error)}") from error
    if image is None or image.shape != IMAGE_SHAPE or image.np_dtype != np.uint8:
        what = "no image" if image is None else f"images of {image.shape} {np.dtype(image.np_dtype)}"
        raise SettingsError(f"data set {name} has {what}; the autoencoder takes 28x28x1 of uint8")
    if not builder.is_prepared():
        url = next(iter(builder.url_infos or ["https://storage.googleapis.com"]))
        if not answers(url):
            raise ConnectionError(f"{name} is not in {builder.data_dir}, nor to be had from {url}")
        try:
            builder.download_and_prepare()
        except Exception as error:  # whatever broke the download, the data set is not to be had
            raise ConnectionError(f"{name} could not be downloaded ({first_line(error)})") from error
    if builder.info.name != re.split("[/:]", name)[0]:
        raise SettingsError(f"{builder.data_dir} holds {builder.info.full_name} instead of {name}; remove it")
    splits = builder.info.splits
    if not {"train", "test"} <= set(splits):
        raise SettingsError(f"data set {name} has no splits train and test, but {', '.join(splits)}")
    try:
        count = min(needed, splits["train"].num_examples)
        train = builder.as_dataset(split=f"train[:{count}]", batch_size=-1)["image"].numpy()
        test = builder.as_dataset(split="test", batch_size=-1)
        labels = test["label"].numpy() if "label" in test else np.zeros(len(test["image"]), int)
    except Exception as error:  # a file of the prepared set is missing or damaged
        raise OSError(f"{builder.data_dir} is damaged; remove it to get it anew ({first_line(error)})") from error
    return Data(train, test["image"].numpy(), labels, f"{builder.info.full_name} from {builder.data_dir}")


def answers(url: str, seconds: float = 3) -> bool:
    """Return whether a server answers at `url` within `seconds`."""
    answered = []

    def ask() -> None:
        with contextlib.suppress(requests.RequestException):
            answered.append(requests.head(url, timeout=seconds))

    thread = threading.Thread(target=ask, daemon=True)  # since looking up a name has no time limit of its own
    thread.start()
    thread.join(seconds)
    return len(answered) > 0


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, for errors that go on for pages."""
    text = re.sub(r"\{\{.*?\}\} | \[Op:\w+\]", "", str(error)).strip()  # without TensorFlow's names of operations
    return (text or type(error).__name__).splitlines()[0]


def pick_test_images(labels: np.ndarray) -> np.ndarray:
    """Return the indices of the fixed test images: at least 100, and at least 10 of each class, first ones first.

    The first images show each class once, the next ones each class once more, and so on.
    """
    classes = np.unique(labels)
    count = max(10, -(-100 // len(classes)))
    ranks = itertools.zip_longest(*(np.flatnonzero(labels == label)[:count] for label in classes))
    return np.array([index for rank in ranks for index in rank if index is not None])


# --- model ---
@keras.saving.register_keras_serializable("train_ae")
class TiedAutoencoder(keras.Sequential):
    """An autoencoder of tied layers, which Keras cannot save one by one: it is saved as its options and its weights."""

    def __init__(self, parts: Sequence[layers.Layer], **options: Any) -> None:
        super().__init__(parts, name="autoencoder")
        self.options = options

    def get_config(self) -> dict[str, Any]:
        """Return the options of build_autoencoder."""
        return dict(self.options)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.Model:
        """Return the autoencoder that was saved."""
        return build_autoencoder(**config, tied=True)


def tied_to(twin: layers.Layer, kind: type[layers.Layer]) -> type[layers.Layer]:
    """Return a kind of layer that uses the kernel of its twin instead of one of its own."""

    class Tied(kind):
        def add_weight(self, *args: Any, name: str | None = None, **options: Any) -> keras.Variable:
            return twin.kernel if name == "kernel" else super().add_weight(*args, name=name, **options)

    return Tied


def build_autoencoder(depth: int = LAYERS, latent_dim: int | None = None, tied: bool = False) -> keras.Model:
    """Return the autoencoder, (batch, 28, 28, 1) float32 in [0, 1] to the same shape in (-1, 1), 194,177 parameters.

    Its layers "encoder", to latents (batch, 2, 2, 128), and "decoder", back from them, are models of their own.
    The article describes what the options change: `depth` is the number of layers in each half; with `latent_dim`,
    two fully connected layers make latents (batch, latent_dim); `tied` layers of the decoder share the kernels of
    the encoder.
    """

    def make(kind: type[layers.Layer], name: str, twin: layers.Layer | None = None, **options: Any) -> layers.Layer:
        # Keras's leaky ReLU has the article's slope, 0.2. Its initial weights let almost nothing through a code of
        # few numbers; Glorot and Bengio's (2010) keep the variance from layer to layer. The initialiser is one a
        # layer, since one that is shared draws the same numbers again.
        initial = keras.initializers.GlorotUniform() if latent_dim else keras.initializers.TruncatedNormal(stddev=0.02)
        options = {"name": name, "activation": "leaky_relu", "kernel_initializer": initial} | options
        return (tied_to(twin, kind) if tied and twin else kind)(**options)

    conv = {"kernel_size": 3, "strides": 2, "padding": "same"}
    encoder = [make(layers.Conv2D, f"conv{i}", filters=CHANNELS[i], **conv) for i in range(1, depth + 1)]
    decoder = []
    for i in reversed(range(depth)):
        # a transposed convolution can draw 2n or 2n - 1 pixels from n: the padding says which
        options = {"filters": CHANNELS[i], "output_padding": 1 - SIZES[i] % 2} | conv
        decoder.append(make(layers.Conv2DTranspose, f"deconv{LAYERS - i}", encoder[i], **options))
    latent = (SIZES[depth], SIZES[depth], CHANNELS[depth])
    if latent_dim:
        encoder += [layers.Flatten(), make(layers.Dense, "code", units=latent_dim, activation=None)]
        # a Dense layer whose kernel has the shape of its twin's: (values, latent_dim)
        options = {"equation": "bn,vn->bv", "output_shape": math.prod(latent), "bias_axes": "v"}
        decoder = [make(layers.EinsumDense, "decode", encoder[-1], **options), layers.Reshape(latent), *decoder]
        latent = (latent_dim,)
    parts = [
        keras.Sequential([keras.Input(IMAGE_SHAPE), *encoder], name="encoder"),
        keras.Sequential([keras.Input(latent), *decoder, layers.Activation("tanh", name="output")], name="decoder"),
    ]
    if tied:
        return TiedAutoencoder([keras.Input(IMAGE_SHAPE), *parts], depth=depth, latent_dim=latent_dim)
    return keras.Sequential([keras.Input(IMAGE_SHAPE), *parts], name="autoencoder")


# --- objective ---
def reconstruction_loss(images: tf.Tensor, reconstructions: tf.Tensor) -> tf.Tensor:
    """Return the squared error of (batch, height, width, channels): summed over channels, then the mean."""
    return tf.reduce_mean(tf.reduce_sum(tf.square(reconstructions - images), axis=-1))


class Adam(tf.Module):
    """Adam (Kingma & Ba 2015, end of section 2) in TensorFlow's fused operation, as the article's optimizer ran it.

    That is one operation a variable instead of a dozen, and a quarter off the time of a step on one image. Epsilon
    is the article's as well: Keras's 1e-7 is of the size of the first gradients here and leads to other weights.
    """

    def __init__(self, weights: Sequence[tf.Variable]) -> None:
        super().__init__()
        self.weights = list(weights)
        self.means, self.squares = ([tf.Variable(tf.zeros_like(w)) for w in weights] for _ in range(2))

    def reset(self) -> None:
        """Forget all gradients."""
        for variable in (*self.means, *self.squares):
            variable.assign(tf.zeros_like(variable))

    def apply(self, gradients: Sequence[tf.Tensor | None], step: tf.Tensor, learning_rate: tf.Tensor | float) -> None:
        """Update the weights that have a gradient with those of `step`, counted from 0."""
        rates = {"lr": learning_rate, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
        for name in ("beta1", "beta2"):
            rates[f"{name}_power"] = rates[name] ** tf.cast(step + 1, tf.float32)
        for w, m, v, gradient in zip(self.weights, self.means, self.squares, gradients, strict=True):
            if gradient is not None:
                tf.raw_ops.ResourceApplyAdam(var=w.handle, m=m.handle, v=v.handle, grad=gradient, **rates)


class Stage(NamedTuple):
    """A part of a run: layers that stand still, layers that learn to reconstruct what those put out, and the steps."""

    name: str
    still: Sequence[layers.Layer]
    learning: Sequence[layers.Layer]
    first: int
    steps: int


def plan_stages(autoencoder: keras.Model, settings: Settings) -> list[Stage]:
    """Return the stages of a run: one for each pair of layers, from the outside in, if asked for; then the whole."""
    encoder, decoder = (autoencoder.get_layer(half).layers for half in ("encoder", "decoder"))
    # Layers without weights belong to the pair on their outer side: they reshape what goes in or what comes out.
    ends = [0, *(i + 1 for i, layer in enumerate(encoder) if layer.weights)]
    begins = [len(decoder), *(i for i, layer in reversed(list(enumerate(decoder))) if layer.weights)]
    stages, steps = [], settings.pretrain_steps
    for k in range(len(ends) - 1 if steps else 0):
        pair = encoder[ends[k] : ends[k + 1]] + decoder[begins[k + 1] : begins[k]]
        stages.append(Stage(f"pretrain/{encoder[ends[k + 1] - 1].name}", encoder[: ends[k]], pair, k * steps, steps))
    return [*stages, Stage("loss", [], [*encoder, *decoder], len(stages) * steps, settings.steps)]


# --- the compiled loop ---
def batch_indices(step: tf.Tensor, batch_size: int, count: int, seed: int) -> tf.Tensor:
    """Return which of `count` images make the batch of a step, (batch_size,) int64.

    Steps take the images one after the other, and each pass over them has a fresh order: a pure function of the
    seed and the step, so that a run can go on from any step.
    """
    position = step * batch_size + tf.range(batch_size, dtype=tf.int64)
    zero = tf.zeros_like(position)
    return tf.raw_ops.RandomIndexShuffle(
        index=position % count,
        seed=tf.stack([zero + seed, position // count, zero], axis=1),
        max_index=tf.constant(count - 1, tf.int64),
    )


def to_float(images: tf.Tensor) -> tf.Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return tf.cast(images, tf.float32) / 255


def pass_through(parts: Sequence[layers.Layer], values: tf.Tensor) -> tf.Tensor:
    """Return what the last of some layers puts out, to the bit what Keras would compute.

    Keras reshapes the bias of a convolution back and forth, which makes a step on one image a tenth longer.
    """
    for layer in parts:
        if isinstance(layer, layers.Conv2D):
            values = tf.nn.conv2d(values, layer.kernel, layer.strides, layer.padding.upper())
        elif isinstance(layer, layers.Conv2DTranspose):
            shape = layer.compute_output_shape(values.shape)
            values = tf.nn.conv2d_transpose(values, layer.kernel, shape, layer.strides, layer.padding.upper())
        else:
            values = layer(values)
            continue
        # as Keras does: another operation for one channel
        values = layer.activation(tf.nn.bias_add(values, layer.bias) if layer.filters > 1 else values + layer.bias)
    return values


def make_train_steps(
    stage: Stage, optimizer: Adam, images: np.ndarray, settings: Settings, writer: tf.summary.SummaryWriter
) -> Callable[[int, int], tf.Tensor]:
    """Return the compiled function that trains from step `first` to before step `last` of a stage: its losses.

    Each loss is that of the step's batch before its update, and goes to TensorBoard as it is computed.
    """
    count, images = len(images), tf.constant(images)  # uint8, on the device as a whole: no input pipeline to wait for

    def train_step(step: tf.Tensor) -> tf.Tensor:
        batch = to_float(tf.gather(images, batch_indices(step, settings.batch_size, count, settings.seed)))
        target = pass_through(stage.still, batch)
        with tf.GradientTape() as tape:
            loss = reconstruction_loss(target, pass_through(stage.learning, tf.stop_gradient(target)))
        learning_rate = settings.learning_rate
        if settings.schedule == "cosine":  # from the whole to nothing (Loshchilov & Hutter 2017, without restarts)
            learning_rate *= (1 + tf.cos(math.pi * tf.cast(step, tf.float32) / stage.steps)) / 2
        optimizer.apply(tape.gradient(loss, optimizer.weights), step, learning_rate)
        with tf.name_scope("/"):  # else the loop is part of the tag: map/while/loss
            tf.summary.scalar(stage.name, loss, step)
        return loss

    @tf.function(input_signature=[tf.TensorSpec((), tf.int64)] * 2, autograph=False)
    def train_steps(first: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        with writer.as_default():
            return tf.map_fn(train_step, tf.range(first, last), parallel_iterations=1, fn_output_signature=tf.float32)

    return train_steps


# --- figures ---
def squared_error(images: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """Return the squared error of each image, summed over its pixels: (batch,)."""
    return tf.reduce_sum(tf.square(others - images), axis=[1, 2, 3])


def shift_tolerant_error(images: tf.Tensor, others: tf.Tensor, most: int = 2) -> tf.Tensor:
    """Return the smallest squared error of each image against the other shifted by up to `most` pixels: (batch,).

    A digit drawn a little to one side is right to the eye, and far off by the pixel; a stray dot is wrong to both.
    """
    height, width = images.shape[1:3]
    padded = tf.pad(others, [[0, 0], [most, most], [most, most], [0, 0]])
    shifts = itertools.product(range(2 * most + 1), repeat=2)
    return tf.reduce_min([squared_error(images, padded[:, y : y + height, x : x + width]) for y, x in shifts], axis=0)


def ssim(images: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """Return the structural similarity of images of 28x28 pixels in [0, 1] (Wang et al. 2004, section III.B): (batch,).

    The same as tf.image.ssim, and many times as fast: to blur is to multiply by a band matrix from both sides.
    """
    window = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    places = SIZES[0] - len(window) + 1
    band = np.stack([np.pad(window / window.sum(), (i, places - 1 - i)) for i in range(places)], axis=1)
    x, y = images[..., 0], others[..., 0]
    blurred = tf.stack([x, y, x * x + y * y, x * y])
    for _ in range(2):  # along the height, then along the width
        blurred = tf.tensordot(blurred, band.astype(np.float32), [[2], [0]])
    mean_x, mean_y, squares, product = tf.unstack(blurred)
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    contrast_structure = 2 * (product - mean_x * mean_y) + 0.03**2
    contrast_structure /= squares - mean_x**2 - mean_y**2 + 0.03**2
    return tf.reduce_mean(luminance * contrast_structure, axis=[1, 2])


def make_evaluate(autoencoder: keras.Model) -> Callable[..., tuple[tf.Tensor, dict[str, tf.Tensor]]]:
    """Return the compiled function from weights and uint8 images to reconstructions and figures of each, (batch,).

    The weights are not the autoencoder's own, since those may be trained meanwhile. PSNR is in dB.
    """
    shapes = [tf.TensorSpec(variable.shape) for variable in autoencoder.trainable_variables]

    @tf.function(input_signature=[shapes, tf.TensorSpec((None, *IMAGE_SHAPE), tf.uint8)], autograph=False)
    def evaluate(weights: list[tf.Tensor], images: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        images = to_float(images)
        reconstructions, _ = autoencoder.stateless_call(weights, [], images)
        shown = tf.clip_by_value(reconstructions, 0, 1)
        return reconstructions, {
            "squared_error": squared_error(images, reconstructions),
            "shift_tolerant_error": shift_tolerant_error(images, reconstructions),
            "psnr": tf.image.psnr(images, shown, max_val=1),
            "ssim": ssim(images, shown),
        }

    return evaluate


def final_figures(evaluate: Callable, weights: list[tf.Tensor], data: Data, code_size: int) -> dict[str, float]:
    """Return the means of the figures over all test images, beside the error of PCA with a code of the same size."""
    figures = [evaluate(weights, batch)[1] for batch in np.array_split(data.test, -(-len(data.test) // 500))]
    mean = {name: float(np.mean(np.concatenate([f[name] for f in figures]), dtype=float)) for name in figures[0]}
    error, pca = mean.pop("squared_error"), pca_squared_error(data.train, data.test, min(code_size, PIXELS))
    errors = {"test_squared_error_per_image": error, "pca_squared_error_per_image": pca}
    return {"test_loss": error / PIXELS, **errors, **mean, "code_size": code_size}


def pca_squared_error(train: np.ndarray, test: np.ndarray, components: int) -> float:
    """Return the squared error of an image, the mean over uint8 test images, after PCA fitted on training images."""
    train, test = (images.reshape(len(images), -1) / np.float32(255) for images in (train, test))
    mean = train.mean(axis=0)
    train -= mean
    _, axes = tf.linalg.eigh(tf.matmul(train, train, transpose_a=True))  # from the least eigenvalue to the largest
    lost = tf.matmul(test - mean, axes[:, : PIXELS - components])
    return float(tf.reduce_mean(tf.reduce_sum(tf.square(lost), axis=1)))


# --- what is written ---

SCALE, GAP, MARGIN, COLUMNS = 3, 6, 120, 10  # of a grid: pixels a pixel, between images, for words; images a row
TILE = SIZES[0] * SCALE + GAP
PAPER, INK = 32, 224  # its grey levels: dark enough for a light page and light enough for a dark one


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Have `save` write a file that takes the name `path` once it is whole; an error leaves none behind."""
    part = path.with_name(f".part-{path.name}")
    try:
        save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of indented JSON."""
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2, default=str) + "\n"))


def grid_row(row: int) -> tuple[int, int, int, int]:
    """Return the box of a row of a grid: left, top, right and bottom, in pixels."""
    top = TILE // 2 + row * TILE
    return MARGIN, top, MARGIN + COLUMNS * TILE, top + TILE


def draw_grid(originals: np.ndarray, reconstructions: np.ndarray, title: str) -> Image.Image:
    """Return a picture of images, (n, 28, 28, 1) in [0, 1]: rows of originals, each above its reconstructions."""
    rows = 2 * -(-len(originals) // COLUMNS)
    picture = Image.new("L", (grid_row(rows)[2] + GAP, grid_row(rows)[1] + GAP), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    draw.text((MARGIN, TILE // 4), title, INK, font, anchor="lm")
    for kind, (name, images) in enumerate({"original": originals, "reconstructed": reconstructions}.items()):
        pixels = np.rint(np.clip(images[..., 0], 0, 1) * 255).astype(np.uint8)
        for index, image in enumerate(pixels.repeat(SCALE, axis=1).repeat(SCALE, axis=2)):
            left, top, _, bottom = grid_row(2 * (index // COLUMNS) + kind)
            picture.paste(Image.fromarray(image), (left + index % COLUMNS * TILE, top))
            if index % COLUMNS == 0:
                draw.text((left - 2 * GAP, (top + bottom - GAP) // 2), name, INK, font, anchor="rm")
    return picture


def draw_summary(record: "Record", path: Path) -> None:
    """Draw the losses on a log scale, beside the first row of test images as drawn along the run."""
    from matplotlib.figure import Figure  # here, since it takes 0.15 s, and this is drawn beside other work

    losses = np.array(list(record.losses.values()), np.float32)
    figure = Figure(figsize=(13, 5))
    curves, digits = figure.subplots(1, 2, width_ratios=(1, 1.1))
    figure.subplots_adjust(0.08, 0.1, 0.99, 0.93, wspace=0.18)
    window = min(50, len(losses) // 10 + 1)
    thin = len(losses) // 4000 + 1  # a long curve takes memory, and shows no more
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    steps = np.arange(len(losses))
    curves.semilogy(steps[::thin], losses[::thin], "tab:blue", alpha=0.25, linewidth=0.5, label="training, each step")
    curves.semilogy(steps[window - 1 :: thin], smooth[::thin], "tab:blue", label=f"training, mean of {window} steps")
    curves.semilogy(list(record.tests), list(record.tests.values()), color="tab:orange", label="test")
    curves.set(xlabel="step", ylabel="loss", title="Squared error")
    curves.grid(alpha=0.3)
    curves.legend()
    steps = np.array([step for step in record.tests if record.grid(step).exists()])  # somebody may have removed some
    steps = steps[np.unique(np.geomspace(1, len(steps), 8).astype(int) - 1)]
    pictures = [Image.open(record.grid(step)) for step in steps]
    strips = [pictures[0].crop(grid_row(0)), *(picture.crop(grid_row(1)) for picture in pictures)]
    digits.imshow(np.concatenate(strips), cmap="gray", vmin=0, vmax=255)
    digits.set_yticks((np.arange(len(strips)) + 0.5) * TILE, ["original", *(f"step {step:,}" for step in steps)])
    digits.set(xticks=[], title="Test images along the run")
    figure.savefig(path, dpi=100)


# --- a run ---
def set_up_tensorflow(settings: Settings) -> str:
    """Seed everything, choose threads and device, and return the device's name.

    Raises SettingsError where a GPU is asked for and there is none.
    """
    gpus = tf.config.list_physical_devices("GPU") if settings.device != "cpu" else []
    if settings.device == "gpu" and not gpus:
        raise SettingsError("--device gpu: TensorFlow finds no GPU here; use --device cpu, or see the README on GPUs")
    keras.utils.set_random_seed(settings.seed)
    tf.get_logger().setLevel("ERROR")
    with contextlib.suppress(RuntimeError):  # a program that has used TensorFlow before has settled these
        # A sum depends on how many threads share it: so their number is fixed, whatever the processor has. One image
        # is too little to share.
        tf.config.threading.set_intra_op_parallelism_threads(1 if settings.batch_size == 1 else 4)
        tf.config.threading.set_inter_op_parallelism_threads(2)
        tf.config.set_visible_devices(gpus, "GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
    if gpus:
        tf.config.experimental.enable_op_determinism()  # a CPU needs no more than the fixed threads
    return "/GPU:0" if gpus else "/CPU:0"


def make_run(logs: Path, samples: Path, config: dict[str, Any]) -> None:
    """Make the folders of a new run; the one of logs appears with its config.json, so that the run can be resumed.

    Raises SettingsError for a name that is taken and for a folder that cannot be written.
    """
    part = logs.with_name(f".part-{logs.name}-{os.getpid()}")
    absent = [path for folder in (logs, samples) for path in folder.parents if not path.exists()]
    if logs.exists() or samples.exists():
        raise SettingsError(f"there is a run named {logs.name} in {logs} or {samples}; name another, or --resume it")
    try:
        part.mkdir(parents=True)
        write_json(part / "config.json", config)
        samples.mkdir(parents=True)
        part.replace(logs)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        for path in absent:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise SettingsError(f"{logs} and {samples} cannot be made: {error.strerror}") from error


def read_config(run: str) -> tuple[Settings, int]:
    """Return the settings of a run and its number of training images; `run` is its name in logs/ or its folder of logs.

    Raises SettingsError where there is no such run, OSError for a config.json that is damaged.
    """
    folder = Path(run) if Path(run, "config.json").exists() else Path(Settings.log_dir, run)
    if folder.name != folder.resolve().name:  # as in "."
        folder = folder.resolve()
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        settings = Settings(**{field.name: config[field.name] for field in dataclasses.fields(Settings)})
        images = int(config["training_images"])
    except FileNotFoundError:
        raise SettingsError(f"there is no run to resume in {folder}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged ({first_line(error)}); the run cannot be resumed without it") from error
    return dataclasses.replace(settings, log_dir=str(folder.parent), run_name=folder.name), images


def only_process(logs: Path) -> contextlib.AbstractContextManager:
    """Keep other processes from a run; raises SettingsError where one has it. The lock ends with the process."""
    try:
        return filelock.FileLock(logs / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise SettingsError("another process is training this run") from None


def restore(checkpoint: tf.train.Checkpoint, folder: Path) -> None:
    """Restore the newest checkpoint that is whole, if one was ever finished; raises OSError where all are damaged."""
    found = {int(match[1]) for path in folder.glob("ckpt-*") if (match := re.match(r"ckpt-(\d+)\.", path.name))}
    paths = [str(folder / f"ckpt-{step}") for step in sorted(found)]
    while paths:
        try:
            checkpoint.restore(paths[-1]).assert_consumed()
            break
        except Exception as error:  # TensorFlow has many for a file that is missing, cut short or full of zeros
            print(f"{paths.pop()} is damaged ({first_line(error)}); the one before is used", flush=True)
    if paths:
        tf.compat.v1.train.update_checkpoint_state(str(folder), paths[-1], paths)  # what the manager goes by
    elif (folder / "checkpoint").exists():  # written once a checkpoint is finished
        raise OSError(f"{folder} holds no checkpoint that can be read")


def cut_events(folder: Path, end: int) -> dict[int, float]:
    """Remove TensorBoard's events of step `end` and after it; return the losses of the steps that stay."""
    losses = {}

    def copy(part: Path) -> None:
        records = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
        with tf.io.TFRecordWriter(str(part)) as writer, contextlib.suppress(tf.errors.DataLossError):  # a torn end
            for record in records:
                event = tf.compat.v1.Event.FromString(record)
                if event.step < end:
                    writer.write(record)
                    found = (value.tensor for value in event.summary.value if value.tag == "loss")
                    losses.update((event.step, tf.make_ndarray(tensor)) for tensor in found)

    for path in sorted(folder.glob("events.*")):
        write_whole(path, copy)
    return losses


class Record:
    """What a run writes as it goes: checkpoints, losses and figures for TensorBoard, pictures, lines on the terminal.

    Has `losses`, of training, and `tests`, both from a step to its value. What takes time and can be done beside the
    training is done by a thread, one thing at a time.
    """

    def __init__(
        self, logs: Path, samples: Path, data: Data, model: keras.Model, state: tf.train.Checkpoint, stages: list[Stage]
    ) -> None:
        """Go on at a state: what was written after it is removed, and before the first step, all is."""
        self.model, self.evaluate = model, make_evaluate(model)
        self.logs, self.samples, self.images = logs, samples, data.test[pick_test_images(data.test_labels)]
        self.originals = self.images[: max(COLUMNS, len(np.unique(data.test_labels)))] / np.float32(255)
        self.state, self.manager = state, tf.train.CheckpointManager(state, str(logs / "checkpoints"), max_to_keep=3)
        step, total = int(state.step) - stages[-1].first, stages[-1].first + stages[-1].steps
        ends = {"train": step, "test": step + 1 if step > 0 else 0}
        ends |= {stage.name: int(state.step) - stage.first for stage in stages[:-1]}
        events = {kind: cut_events(logs / kind, end) for kind, end in ends.items()}
        self.losses, self.tests = events["train"], events["test"]
        self.writers = {kind: tf.summary.create_file_writer(str(logs / kind)) for kind in ends}
        self.thread, self.given = ThreadPoolExecutor(1), []
        layout = {"bar_format": "{n}/{total} |{bar}|{postfix}, {remaining} left", "file": sys.stdout}
        if "NO_COLOR" not in os.environ:
            layout["colour"] = "green"
        self.bar = tqdm(total=total, initial=int(state.step), disable=not sys.stdout.isatty(), **layout)

    def grid(self, step: int) -> Path:
        """Return the path of a step's picture."""
        return self.samples / f"step_{step:05}.png"

    def describe(self, config: dict[str, Any]) -> None:
        """Write the model's graph and the settings."""

        @tf.function(autograph=False)
        def forward(values: tf.Tensor) -> tf.Tensor:
            for half in ("encoder", "decoder"):
                with tf.name_scope(half):  # a box in the picture of the graph
                    for layer in self.model.get_layer(half).layers:
                        values = layer(values)
            return values

        with self.writers["train"].as_default(step=0):
            tf.summary.graph(forward.get_concrete_function(tf.TensorSpec((None, *IMAGE_SHAPE))).graph)
            rows = [f"| {key} | {value} |" for key, value in config.items()]
            tf.summary.text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def weights(self) -> list[tf.Tensor]:
        """Return the weights as they are now; later steps leave these alone."""
        return [variable.value.read_value() for variable in self.model.trainable_variables]

    def beside(self, work: Callable, *arguments: Any) -> None:
        """Have the thread do some work, once it has done what it was given before."""
        self.wait(but=1)  # it may fall behind a little, and no more: each of its works holds weights
        self.given.append(self.thread.submit(work, *arguments))

    def wait(self, but: int = 0) -> None:
        """Wait until the thread has done its work but for so many; raises what that raised."""
        while len(self.given) > but:
            self.given.pop(0).result()

    def look(self, step: int, weights: list[tf.Tensor], text: str) -> None:
        """Write the test figures, the picture and the kernels after `step` updates; report the test loss in a text."""
        reconstructions, figures = self.evaluate(weights, self.images)
        means = {name: values.numpy().mean() for name, values in figures.items()}
        self.tests[step] = means["loss"] = means["squared_error"] / PIXELS
        words = f"test loss {self.tests[step]:.4f}"
        drawn = reconstructions[: len(self.originals)].numpy()
        grid = draw_grid(self.originals, drawn, f"step {step:,}    {words}")
        write_whole(self.grid(step), grid.save)
        summary = Summary()  # one for all: tf.summary's own functions would take longer than the test figures

        def add(tag: str, value: Any, plugin: ModuleType) -> None:
            about = plugin.create_summary_metadata(display_name=None, description=None)
            summary.value.add(tag=tag, tensor=make_tensor_proto(value), metadata=about)

        for name, value in means.items():
            add(name, value, scalar_plugin)
        width, height = (str(size).encode() for size in grid.size)
        add("reconstructions", [width, height, self.grid(step).read_bytes()], image_plugin)
        for variable, value in zip(self.model.trainable_variables, weights, strict=True):
            _, layer, kind = variable.path.split("/")
            if kind == "kernel":
                counts, edges = np.histogram(value.numpy(), bins=30)
                add(f"weights/{layer}", np.stack([edges[:-1], edges[1:], counts], axis=1), histogram_plugin)
        with self.writers["test"].as_default(step=step):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString())
        self.report(step, text.format(words))

    def compare(self, settings: Settings, metrics: dict[str, float]) -> None:
        """Write what TensorBoard's table of runs shows: settings and final figures."""
        for path in self.logs.glob("events.*"):  # those of a shorter run that goes on
            path.unlink()
        apart = {"run_name", "log_dir", "sample_dir", "data_dir", "device"}
        chosen = {name: value for name, value in vars(settings).items() if value is not None and name not in apart}
        with tf.summary.create_file_writer(str(self.logs)).as_default(step=settings.steps):
            hparams(chosen, trial_id=settings.run_name)
            for name, value in metrics.items():
                tf.summary.scalar(f"test_set/{name}", value)

    def project(self, data: Data, most: int = 1000) -> None:
        """Write the codes of the first test images for TensorBoard's projector, with the images and their classes."""
        folder, images = self.logs / "projector", data.test[:most]
        folder.mkdir(exist_ok=True)
        codes = np.reshape(self.model.get_layer("encoder")(to_float(images)), (len(images), -1))
        codes = np.pad(codes, [(0, 0), (0, max(0, 3 - codes.shape[1]))])  # the projector shows no fewer than three
        side = math.isqrt(len(images) - 1) + 1  # the digits make one square picture
        tiles = np.pad(images[..., 0], [(0, side**2 - len(images)), (0, 0), (0, 0)])
        tiles = tiles.reshape(side, side, *images.shape[1:3]).swapaxes(1, 2).reshape(side * images.shape[1], -1)
        write_whole(folder / "codes.bytes", codes.tofile)
        write_whole(folder / "digits.png", Image.fromarray(tiles).save)
        write_whole(folder / "classes.tsv", lambda part: np.savetxt(part, data.test_labels[:most], fmt="%d"))
        config = projector.ProjectorConfig()
        shown = config.embeddings.add(tensor_name="codes", tensor_path="projector/codes.bytes")
        shown.tensor_shape.extend(codes.shape)
        shown.metadata_path, shown.sprite.image_path = "projector/classes.tsv", "projector/digits.png"
        shown.sprite.single_image_dim.extend(images.shape[1:3])
        projector.visualize_embeddings(str(self.logs), config)

    def report(self, step: int, text: str) -> None:
        """Let TensorBoard and the terminal show how far the run is."""
        self.flush()
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable:
            print(f"step {step:6,}  {text}", flush=True)

    def flush(self) -> None:
        """Have TensorBoard see all that has been written."""
        for writer in self.writers.values():
            writer.flush()

    def save(self, seconds: float) -> None:
        """Write a checkpoint; `seconds` is the time that the run has taken."""
        self.wait()
        self.flush()  # what is before a checkpoint must not be lost with what is after it
        self.state.in_all.assign(seconds)
        self.manager.save(checkpoint_number=self.state.step)


def train_stage(stage: Stage, images: np.ndarray, settings: Settings, record: Record) -> Iterator[int]:
    """Train a stage from where the record's state stands, and stop to give the step wherever something may be due.

    Raises FloatingPointError for a loss that is not finite.
    """
    state, whole = record.state, stage.name == "loss"
    step, recent, pace = int(state.step) - stage.first, [], 0.0
    if step == 0:
        state.optimizer.reset()
    writer = record.writers["train" if whole else stage.name]
    train_steps = make_train_steps(stage, state.optimizer, images, settings, writer)
    while True:
        yield step
        if (step % settings.sample_every == 0 or step == stage.steps) and not (whole and step in record.tests):
            text = "{}" if whole else stage.name
            if recent:
                text = f"loss {np.mean(recent):.4f}  {text}  {pace:.2f} ms a step"
            if whole:
                record.beside(record.look, step, record.weights(), text)
            else:
                record.report(step, text)
            recent = []
        if step == stage.steps:
            return
        following = (step - step % every + every for every in (settings.sample_every, settings.checkpoint_every))
        last, called = min(stage.steps, *following), time.perf_counter()
        losses = train_steps(step, last).numpy()
        seconds = time.perf_counter() - called
        state.in_steps.assign_add(seconds)
        pace = 1e3 * seconds / (last - step)
        if not np.isfinite(losses).all():
            wrong = step + int(np.argmin(np.isfinite(losses)))
            raise FloatingPointError(f"the loss at step {wrong} is not finite; try a lower --learning-rate")
        if whole:
            record.losses.update(zip(range(step, last), losses, strict=True))
        recent.extend(losses)
        state.step.assign_add(last - step)
        record.bar.update(last - step)
        step = last


def train(settings: Settings, resume: int | None = None, stop: Sequence[int] = ()) -> dict[str, Any]:
    """Train an autoencoder, write all that a run writes (see the README), and return what metrics.json holds.

    Args:
        settings: what to train; of a run that is to go on from its last checkpoint, those that read_config gives.
        resume: the number of training images of that run, as read_config gives it; None begins a new run.
        stop: once this is not empty, training saves a checkpoint and stops.

    Raises SettingsError, ConnectionError for data that cannot be downloaded, OSError for a file that cannot be
    written, FloatingPointError for a loss that is not finite, KeyboardInterrupt for `stop`.
    """
    started = time.perf_counter()
    device = set_up_tensorflow(settings)
    settings = dataclasses.replace(settings, run_name=settings.run_name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    logs, samples = Path(settings.log_dir, settings.run_name), Path(settings.sample_dir, settings.run_name)
    data = load_data(settings, resume)
    if resume and len(data.train) != resume:
        raise SettingsError(f"{logs} has trained on {resume:,} images, and {len(data.train):,} are to be had now")
    if settings.epochs:
        settings = dataclasses.replace(settings, steps=-(-settings.epochs * len(data.train) // settings.batch_size))
    used = f"{len(data.train):,} training and {len(data.test):,} test images: {data.source}"
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    config = dataclasses.asdict(settings) | {"data": used, "training_images": len(data.train)} | versions
    if not resume:
        make_run(logs, samples, config)
    with only_process(logs), tf.device(device):
        autoencoder = build_autoencoder(settings.depth, settings.latent_dim, settings.tied)
        optimizer = Adam([variable.value for variable in autoencoder.trainable_variables])
        stages = plan_stages(autoencoder, settings)
        # what a checkpoint holds: beside weights and Adam's state, the steps of all stages and the time in seconds
        times = {name: tf.Variable(0, dtype=tf.float64) for name in ("in_steps", "in_all")}
        state = tf.train.Checkpoint(optimizer=optimizer, step=tf.Variable(0, dtype=tf.int64), **times)
        if resume:
            restore(state, logs / "checkpoints")
        started -= float(state.in_all)
        step = int(state.step) - stages[-1].first
        if resume:
            if step > settings.steps:
                raise SettingsError(f"{logs} has {step} steps behind it; --steps must be more")
            if not samples.is_dir() or (step > 0 and not any(samples.glob("step_*.png"))):
                raise SettingsError(f"{samples} does not hold the run's pictures; resume it where it began")
            with contextlib.suppress(FileNotFoundError):
                metrics = json.loads((logs / "metrics.json").read_text())
                if metrics["steps"] == settings.steps:
                    print(f"{logs} has its {settings.steps:,} steps behind it: nothing is left to do")
                    return metrics
            write_json(logs / "config.json", config)
            print(f"resumes  {logs} {f'at step {step:,}' if step >= 0 else 'while its pairs of layers are trained'}")
        print(f"device   {device[1:4]}\ndata     {used}\nwrites   {logs} and {samples}")
        print(f"to see   tensorboard --logdir {settings.log_dir} --samples_per_plugin images=1000", flush=True)
        record = Record(logs, samples, data, autoencoder, state, stages)
        if step <= 0:
            record.describe(config)
        with record.bar, record.thread:
            for stage in stages:
                if state.step >= stage.first + stage.steps and stage is not stages[-1]:
                    continue  # a run that goes on has done with it
                for step in train_stage(stage, data.train, settings, record):
                    if step and (stop or step == stage.steps or step % settings.checkpoint_every == 0):
                        record.save(time.perf_counter() - started)
                    if stop:
                        run = logs.name if settings.log_dir == Settings.log_dir else logs
                        go_on = f"python train_ae.py --resume {run}"
                        raise KeyboardInterrupt(f"stopped at step {step:,}; to go on: {go_on}")
            record.beside(write_whole, samples / "summary.png", functools.partial(draw_summary, record))
            write_whole(logs / "autoencoder.keras", autoencoder.save)
            size = math.prod(autoencoder.get_layer("encoder").output_shape[1:])
            metrics = final_figures(record.evaluate, record.weights(), data, size)
            record.compare(settings, metrics)
            record.project(data)
            record.wait()
    timing = {"ms_per_step": 1e3 * float(state.in_steps) / int(state.step), "seconds": time.perf_counter() - started}
    metrics |= {"steps": settings.steps, **timing, "data": used}
    write_json(logs / "metrics.json", metrics)
    for key, value in metrics.items():
        print(f"{key:<30} {f'{value:.6g}' if isinstance(value, float) else value}")
    return metrics


# --- the command line ---
def watch_signals() -> list[int]:
    """Return a list that is empty until Ctrl-C or SIGTERM, and then holds the signal; a second one ends the process."""
    caught: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # written to at once, while a handler has to wait for the compiled call
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        caught.extend(os.read(reader, 1))
        os._exit(128 + os.read(reader, 1)[0])

    threading.Thread(target=watch, daemon=True).start()
    return caught


def main(arguments: Sequence[str] | None = None, stop: Sequence[int] = ()) -> int:
    """Train as a command line says; return the exit status: 0, 1 for a failed run, 2 for a bad call, 128 + a signal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # without the usage above it
    for field in dataclasses.fields(Settings):
        kind, text = value_type(field), field.metadata["help"]
        if field.default is not None and kind is not bool:
            text += f" (default: {field.default})"
        options = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            options["action"] = "store_true"
        elif choices := get_args(kind):
            options["choices"] = choices
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(flag(field.name), **options)
    text = "name of a run to go on with; only --steps and --device may be given too"
    parser.add_argument("--resume", metavar="RUN", help=text)
    parser.add_argument("--verbose", action="store_true", help="show what TensorFlow logs, too")
    about = f"Python {platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}"
    about += f", NumPy {np.__version__}, TensorBoard {tensorboard.__version__}, {platform.platform()}"
    parser.add_argument("--version", action="version", version=about, help="show the versions that a bug report needs")
    given = vars(parser.parse_args(arguments))
    run, images, _ = given.pop("resume"), None, given.pop("verbose")
    try:
        if {"steps", "epochs"} <= given.keys():
            raise SettingsError("--steps and --epochs both say how long to train; leave out one")
        if run is None:
            settings = Settings(**given)
        elif other := given.keys() - {"steps", "device"}:
            raise SettingsError(f"--resume keeps the settings of the run; leave out {flag(min(other))}")
        else:
            settings, images = read_config(run)
            if settings.schedule == "cosine" and given.get("steps", settings.steps) != settings.steps:
                raise SettingsError(f"the learning rate of this run ends at step {settings.steps:,}; leave out --steps")
            settings = dataclasses.replace(settings, **given, **({"epochs": None} if "steps" in given else {}))
        train(settings, resume=images, stop=stop)
        sys.stdout.flush()
    except (SettingsError, KeyboardInterrupt, FloatingPointError, OSError, tf.errors.OpError) as error:
        with contextlib.suppress(OSError):  # where that is the error
            sys.stdout.flush()
        print(f"{parser.prog}: {first_line(error)}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + (stop[0] if stop else signal.SIGINT)
        return 2 if isinstance(error, SettingsError) else 1
    return 0


if __name__ == "__main__":
    os._exit(main(stop=watch_signals()))  # at once: to take TensorFlow apart would take Python 0.1 s
