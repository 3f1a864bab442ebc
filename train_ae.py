"""Train a convolutional autoencoder on MNIST, on your own images, or on any TFDS image dataset.

    python train_ae.py                                        # 3,000 steps on digits of MNIST
    python train_ae.py --dataset my-pictures --image-size 64 --batch-size 32
    tensorboard --logdir logs --samples_per_plugin images=1000

Four stride-2 convolutions encode an image, four transposed convolutions decode it, and Adam
minimizes the squared error, one image per step. The default run takes about ten seconds on two
EPYC cores and reaches a test loss of 0.0144. Model and training follow a Chinese-language article
for TensorFlow 1, "Rebuilding images with autoencoders, and an implementation in Python".

From top to bottom: settings, stop signals, model, objective, optimizer, training step, pretraining,
data, metrics, what a run writes, resuming, devices, training.
"""

import argparse
import gc
import os
import re
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback on Ctrl-C during the imports

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

FILTERS = (16, 32, 64, 128)  # of the encoder's convolutions; the decoder mirrors them


class SettingsError(ValueError):
    """An unusable setting or input; the message says what to do. Exit status 2."""


class RunError(Exception):
    """A run that failed; the message says what to do. Exit status 1."""


def default_initializer(values: dict[str, Any]) -> str:
    """Return "article" for the article's own model on MNIST, else "glorot"."""
    name, *_ = re.split("[.:]", Path(values["dataset"]).name)  # mnist.npz, mnist:3.0.1
    is_mnist = name in ("mnist", "mnist_5k")
    return "article" if is_mnist and values["latent_dim"] == 0 else "glorot"


def refuse_url(folder: str | Path) -> str | Path:
    """Return the folder. Raises ValueError for a URL, which Path would make a local folder."""
    if re.match("[a-z]{2,}:/", str(folder)):
        raise ValueError("must be a local folder, not a URL")
    return folder


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Folder = Annotated[Path, BeforeValidator(refuse_url)]


class Settings(BaseModel):
    """Every setting of a run. Raises pydantic's ValidationError, a ValueError, for a bad value."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    steps: Count = 3000
    """updates of the weights"""
    batch_size: Count = 1
    """images in each step"""
    learning_rate: PositiveFloat = 0.001
    """learning rate of Adam"""
    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate over the run: constant, or cosine, which falls to 0"""
    depth: int = Field(default=len(FILTERS), ge=1, le=len(FILTERS))
    """layers of the encoder, and of the decoder"""
    latent_dim: CountOrZero = 0
    """size of the latent, or 0 for the output of the last convolution"""
    tied: bool = False
    """give each layer of the decoder the kernel of its mirrored layer in the encoder"""
    pretrain_steps: CountOrZero = 0
    """steps of layer-wise pretraining for each pair of mirrored layers"""
    noise: NonNegativeFloat = 0
    """denoising: standard deviation of Gaussian noise added to the inputs, which are in [0, 1]"""
    dataset: Annotated[str, BeforeValidator(str)] = Field(default="mnist_5k", min_length=1)
    """mnist_5k (bundled digits), a folder of pictures, a .npz or .npy file, or a TFDS dataset"""
    image_size: CountOrZero = 0
    """height and width that images are cropped and scaled to, or 0 to keep their size"""
    initializer: Literal["article", "glorot"] = Field(default_factory=default_initializer)
    """initial weights, article or glorot (default: article for MNIST without --latent-dim)"""
    seed: CountOrZero = 0
    """seed of the initial weights, the order of the images, and the noise"""
    sample_every: Count = 50
    """steps between preview pictures"""
    checkpoint_every: Count = 500
    """steps between checkpoints"""
    data_dir: Folder | None = None
    """folder of TFDS datasets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)"""
    run_name: str = Field(
        default_factory=lambda: f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$",
    )
    """1 to 100 letters, digits, _, - and ., not starting with - or . (default: date and time)"""
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


# --------------------------------------------------------------------------------------------------
# Stop signals: Ctrl-C and SIGTERM can come at any moment, and more than once.


class StopRequest:
    """The signal that asked this process to stop, or 0, and how the process ends."""

    signal = 0
    training = False  # if so, there are steps to save: fit() saves, then ends the process
    resume_command = ""
    ending = threading.Lock()

    def watch(self, resume_command: str) -> None:
        """Let the first SIGINT or SIGTERM end the process; ignore later ones."""
        self.resume_command = resume_command
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)

        def wait():
            self.signal = self.receiver.recv(1)[0]
            if not self.training:
                self.end(self.signal)

        # A thread, since Python's own handlers wait while TensorFlow runs in the main thread.
        threading.Thread(target=wait, daemon=True).start()

    def end(self, number: int) -> None:
        """Print the command that resumes the run; end the process with the status of a signal."""
        self.ending.acquire()  # never released: only one thread gets here
        os.write(2, f"train_ae.py: stopped; to resume: {self.resume_command}\n".encode())
        os._exit(128 + number)  # safe at any moment: files are replaced atomically


stop_request = StopRequest()

if __name__ == "__main__":
    # Before the imports below, which take seconds: help and errors come at once.
    command_line_settings = parse_arguments()
    command = ["python", *sys.argv]
    if not any(word.startswith("--run-name") for word in command):
        command += ["--run-name", command_line_settings.run_name]
    stop_request.watch(shlex.join(command))
    os.environ["MPLBACKEND"] = "agg"  # whatever a user has set for other programs

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # four times faster on one small image
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
gc.disable()  # garbage collection would add a second to the imports

import contextlib
import io
import json
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tensorboard.plugins.image.metadata import create_summary_metadata
from tqdm import tqdm

gc.freeze()
gc.enable()


# --------------------------------------------------------------------------------------------------
# Model


CONVOLUTION = {  # what all convolutions, and transposed convolutions, have in common
    "kernel_size": 3,
    "strides": 2,
    "padding": "same",
    "activation": "leaky_relu",  # Keras's slope is the article's, 0.2
}


def make_initializer(name):
    """Return an initializer for one layer: layers of equal shape that share one start equal."""
    if name == "article":
        return keras.initializers.TruncatedNormal(stddev=0.02)
    return keras.initializers.GlorotUniform()  # Glorot & Bengio 2010


def build_encoder(image_shape, initializers, latent_dim):
    """Return the encoder's input and the output of each of its layers."""
    encoded = [keras.Input(image_shape)]
    for number, initializer in enumerate(initializers, start=1):
        layer = layers.Conv2D(
            filters=FILTERS[number - 1],
            kernel_initializer=initializer,
            name=f"conv{number}",
            **CONVOLUTION,
        )
        encoded.append(layer(encoded[-1]))
    if latent_dim:
        flat = layers.Flatten()(encoded[-1])
        encoded.append(layers.Dense(latent_dim, name="latent")(flat))
    return encoded


def build_decoder(encoded, initializers, latent_dim):
    """Return the decoder's input and the output of each layer, shaped like `encoded` reversed."""
    restored = [keras.Input(encoded[-1].shape[1:])]
    conv_inputs = encoded[: len(initializers)]  # of the encoder
    if latent_dim:
        shape = encoded[-2].shape[1:]
        expand = layers.Dense(int(np.prod(shape)), activation="leaky_relu", name="expand")
        restored.append(layers.Reshape(shape)(expand(restored[-1])))
    for number, initializer in enumerate(initializers, start=1):
        _, height, width, channels = conv_inputs[-number].shape
        layer = layers.Conv2DTranspose(
            filters=channels,
            # 2n and 2n - 1 both halve to n: the padding tells which one to restore.
            output_padding=(1 - height % 2, 1 - width % 2),
            kernel_initializer=initializer,
            name=f"deconv{number}",
            **CONVOLUTION,
        )
        restored.append(layer(restored[-1]))
    # Tanh after a leaky ReLU, for images in [0, 1]: kept from the article.
    restored[-1] = layers.Activation("tanh", name="output")(restored[-1])
    return restored


def build_autoencoder(
    image_shape: Sequence[int],
    depth: int = len(FILTERS),
    latent_dim: int = 0,
    initializer: str = "article",
) -> tuple[keras.Model, list]:
    """Return the autoencoder and, for each layer, a pair: a tensor and its reconstruction.

    The autoencoder maps (batch, *image_shape) float32 in [0, 1] to the same shape in (-1, 1), and
    consists of two models, "encoder" and "decoder". Each convolution halves height and width,
    rounding up; `latent_dim` adds a fully connected layer. The pairs, outermost first, are tensors
    of the encoder and those of the decoder that restore them. Raises SettingsError if `depth`
    exceeds FILTERS.
    """
    if depth > len(FILTERS):
        raise SettingsError(f"depth {depth} needs as many FILTERS, but there are {len(FILTERS)}")
    initializers = [make_initializer(initializer) for _ in range(2 * depth)]
    encoded = build_encoder(image_shape, initializers[:depth], latent_dim)
    restored = build_decoder(encoded, initializers[depth:], latent_dim)
    encoder = keras.Model(encoded[0], encoded[-1], name="encoder")
    decoder = keras.Model(restored[0], restored[-1], name="decoder")
    autoencoder = keras.Sequential([encoded[0], encoder, decoder], name="autoencoder")
    return autoencoder, list(zip(encoded, reversed(restored), strict=True))


# --------------------------------------------------------------------------------------------------
# Objective


def squared_error(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Return the squared error, summed over the last axis (channels), averaged over the rest."""
    return tf.reduce_mean(tf.reduce_sum(tf.square(outputs - targets), axis=-1))


def reconstruction_loss(images: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Return the scalar to minimize, for (batch, height, width, channels). Change it here."""
    return squared_error(images, outputs)


def draw_noise(shape, deviation, seed, step):
    """Return Gaussian noise, a pure function of the arguments."""
    return tf.random.stateless_normal(shape, [seed, step], stddev=deviation)


# --------------------------------------------------------------------------------------------------
# Optimizer


class FusedAdam(keras.optimizers.Adam):
    """Adam (Kingma & Ba 2015) as TensorFlow's fused operation: 25 % less time per step.

    Overrides an undocumented method, as of Keras 3.15.
    """

    def update_step(self, gradient, variable, learning_rate):
        """Update a variable and its first and second moments."""
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations.value + 1, tf.float32)
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
# Training step


class Phase(NamedTuple):
    """A stage of a run: `model` learns to reconstruct the output of `frozen` for the images."""

    name: str  # "train", or "pretrain/" and a layer
    frozen: keras.Model  # in "train", the identity
    model: keras.Model
    loss: Callable
    steps: int
    optimizer: keras.optimizers.Optimizer


def batch_indices(step, batch_size, count, seed):
    """Return the indices, among `count` images, of the batch of a step: (batch_size,) int64.

    Each image comes once per epoch, and each epoch is reshuffled. The batch depends on the step
    alone, unlike that of a stateful data pipeline: this is what makes resuming exact.
    """
    position = step * batch_size + tf.range(batch_size, dtype=tf.int64)
    epoch = position // count
    # Three numbers for each index: the operation wants as many.
    seeds = tf.stack([seed * tf.ones_like(epoch), epoch, tf.zeros_like(epoch)], axis=1)
    options = {
        "max_index": tf.constant(count - 1, tf.int64),
        "rounds": 4 if count >= 4000 else 8,  # 4, the default, hardly shuffle a small set
    }
    return tf.raw_ops.RandomIndexShuffle(index=position % count, seed=seeds, **options)


def mirror(kernel):
    """Return a kernel in the layout of the mirrored layer: transposed if fully connected."""
    return tf.transpose(kernel) if len(kernel.shape) == 2 else kernel


def tie_kernels(variables):
    """Copy the encoder's kernels to the decoder; return (index, mirrored index) of every kernel."""
    kernels = [index for index, variable in enumerate(variables) if variable.name == "kernel"]
    pairs = list(zip(kernels, reversed(kernels), strict=True))
    for index, mirrored in pairs[len(pairs) // 2 :]:
        variables[index].assign(mirror(variables[mirrored].value))
    return pairs


def update_weights(phase, inputs, targets, tied, replicas):
    """Update the weights with a replica's share of a batch; return its share of the loss."""
    variables = phase.model.trainable_variables
    with tf.GradientTape() as tape:
        loss = phase.loss(targets, phase.model(inputs, training=True)) / replicas
    own = tape.gradient(loss, [variable.value for variable in variables])
    gradients = list(own)
    for index, mirrored in tied:
        # Equal kernels with equal gradients have equal moments, and so stay equal.
        gradients[index] = own[index] + mirror(own[mirrored])
    phase.optimizer.apply(gradients, variables)  # sums the gradients of all replicas
    return loss


def make_train_steps(phase, images, settings, writer):
    """Return a compiled function: run steps `first` to `last` - 1 of a phase, return their losses.

    `images` is the whole training set, uint8. Keras's fit(), or one call per step, would take
    several times as long for one small image; so even the summaries are written inside.
    """
    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    tied = tie_kernels(phase.model.trainable_variables) if settings.tied else []

    def replica_step(step):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        share = slice(replica, None, replicas)  # of the rows of a batch
        with tf.device("CPU:0"):  # the training set stays there: only a share goes to a GPU
            indices = batch_indices(step, settings.batch_size, len(images), settings.seed)
            batch = tf.gather(images, indices[share])
        inputs = targets = phase.frozen(tf.cast(batch, tf.float32) / 255, training=False)
        if settings.noise and phase.name == "train":
            shape = (settings.batch_size, *images.shape[1:])  # equal for any number of replicas
            noise = draw_noise(shape, settings.noise, settings.seed, step)[share]
            inputs = tf.clip_by_value(targets + noise, 0, 1)
        return update_weights(phase, inputs, targets, tied, replicas)

    def train_step(step):
        loss = strategy.reduce("SUM", strategy.run(replica_step, [step]), axis=None)
        if tied and replicas > 2:
            # The order of sums over so many replicas makes equal gradients differ in the last bits.
            tie_kernels(phase.model.trainable_variables)
        with tf.name_scope("/"):  # otherwise the loop would be part of the tag: while/loss
            tag = "loss" if phase.name == "train" else "loss/pretraining"
            tf.summary.scalar(tag, loss, step)
        return loss

    # AutoGraph would take a second, and find nothing to convert.
    @tf.function(input_signature=[tf.TensorSpec((), tf.int64)] * 2, autograph=False)
    def train_steps(first, last):
        steps = tf.range(first, last)
        with writer.as_default():
            # Sequential: each step needs the weights of the one before.
            options = {"parallel_iterations": 1, "fn_output_signature": tf.float32}
            return tf.map_fn(train_step, steps, **options)

    return train_steps


# --------------------------------------------------------------------------------------------------
# Pretraining


def plan_phases(autoencoder, pairs, settings):
    """Return the phases of a run: the pretraining of each layer, if any, then "train".

    In pretraining, a layer of the encoder and the mirrored one of the decoder learn to reconstruct
    the output of the frozen layers before them.
    """
    images, _ = pairs[0]

    def make_phase(name, target, model, loss, steps):
        rate = settings.learning_rate
        if settings.schedule == "cosine":  # Loshchilov & Hutter 2017
            rate = keras.optimizers.schedules.CosineDecay(rate, steps)
        # The article's epsilon: TensorFlow 1's default, where Keras has 1e-7.
        optimizer = FusedAdam(rate, epsilon=1e-8, name=name.replace("/", "_"))
        optimizer.build(model.trainable_variables)
        return Phase(name, keras.Model(images, target), model, loss, steps, optimizer)

    phases = []
    if settings.pretrain_steps:
        for (hidden, restored), (deeper, reconstructed) in pairwise(pairs):
            encode = keras.Model(hidden, deeper)
            decode = keras.Model(reconstructed, restored)
            name = f"pretrain/{encode.layers[-1].name}"
            model = keras.Sequential([encode, decode])
            # Hidden activations are no images: squared error, whatever the objective.
            phases.append(make_phase(name, hidden, model, squared_error, settings.pretrain_steps))
    phases.append(make_phase("train", images, autoencoder, reconstruction_loss, settings.steps))
    return phases


# --------------------------------------------------------------------------------------------------
# Data: three readers, which differ only in how they load. They yield each image, (height, width,
# channels), whether it is a test image, its label, and its file name.

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
    names = ("test", "val", "valid", "validation")
    return next((name for name in names if name in splits and "train" in splits), "")


def find_files(folder, excluded):
    """Yield all files below a folder, in order, following links, skipping excluded folders."""
    excluded = excluded | {folder.resolve()}  # a link back to it would recurse forever
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
    except Exception:  # Pillow raises many kinds for broken files
        return None


def read_folder(folder, settings):
    """Read the pictures in a folder. Its subfolders are classes, or splits that contain classes.

    Raises SettingsError if there are no pictures.
    """
    own = [settings.log_dir, settings.sample_dir]
    own += [path / settings.run_name for path in own]  # in case the folder is one of these
    excluded = {path.resolve() for path in own}
    splits = {folder: False}  # to whether they are for the test
    test_split = find_test_split([path.name for path in folder.iterdir() if path.is_dir()])
    if test_split:
        splits = {folder / "train": False, folder / test_split: True}
        others = sorted(path.name for path in set(folder.iterdir()) - splits.keys())
        print(f"splits   train and {test_split}; not used: {', '.join(others) or 'nothing'}")
    found = 0
    skipped = []
    for split, is_test in splits.items():
        for path in find_files(split, excluded):
            image = open_picture(path) if path.is_file() else None  # opening a pipe would block
            if image is None:
                skipped.append(path)
                continue
            found += 1
            *classes, _ = path.relative_to(split).parts
            label = classes[0] if classes else ""
            yield image, is_test, label, path.relative_to(folder).as_posix()
    if skipped:
        print(f"skipped  {len(skipped):,} files that are no pictures, such as {skipped[0]}")
    if not found:
        raise SettingsError(
            f"no pictures in {folder}: {len(skipped):,} files were skipped (to read a TFDS"
            " dataset, give its name, and its folder as --data-dir)"
        )


def read_arrays(path):
    """Read a NumPy file of one array, or of x_train, y_train, x_test, y_test as in Keras."""
    try:
        arrays = np.load(path)
        arrays = {"x_train": arrays} if isinstance(arrays, np.ndarray) else dict(arrays)
    except Exception as error:  # NumPy raises many kinds for damaged files
        raise SettingsError(f"{path} is missing or damaged: {error}") from error
    for split in ("train", "test"):
        images = arrays.get(f"x_{split}", np.zeros((0, 1, 1)))
        labels = arrays.get(f"y_{split}", np.full(images.shape[:1], "")).flatten()
        is_numeric = images.dtype.kind in "buif" and 0 not in images.shape[1:]
        if not is_numeric or images.ndim not in (3, 4) or len(labels) != len(images):
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

    absl.logging.set_verbosity("error")  # TFDS warns of its own calls
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        features = dict(builder.info.features)
        is_one_size = None not in features["image"].shape
    except Exception as error:  # TFDS raises many kinds for a wrong name
        raise SettingsError(
            f"{name!r} is no folder, no .npz or .npy file, and no TFDS image dataset: {error}"
        ) from error
    if not builder.is_prepared():
        try:
            # Without a network, TFDS itself would try for minutes.
            requests.head("https://storage.googleapis.com", timeout=3)
            builder.download_and_prepare()
        except Exception as error:  # whatever broke the download
            raise RunError(
                f"{name} is not in {builder.data_dir}, and cannot be downloaded: see README.md on"
                f" offline use ({error})"
            ) from error
    splits = builder.info.splits
    if "train" not in splits:
        raise SettingsError(f"--dataset {name} has no 'train' split, only {', '.join(splits)}")
    to_name = getattr(features.get("label"), "int2str", str)
    wanted = {key: True for key in ("image", "label") if key in features}
    decoders = tfds.decode.PartialDecoding(wanted)
    batch_size = 1000 if is_one_size else 1  # batches are three times faster
    test_split = find_test_split(splits)
    try:
        for split in filter(None, ["train", test_split]):
            batches = builder.as_dataset(split=split, decoders=decoders, batch_size=batch_size)
            for batch in tfds.as_numpy(batches):
                labels = batch.get("label", repeat(""))
                for image, label in zip(batch["image"], labels, strict=False):
                    yield image, split == test_split, to_name(label), ""
    except tf.errors.OpError as error:
        raise RunError(f"{builder.data_dir} is damaged: get it again ({error.message})") from error


def choose_reader(settings):
    """Return the reader for `dataset`."""
    path = BUNDLED if settings.dataset == "mnist_5k" else Path(settings.dataset).expanduser()
    if path.suffix in (".npz", ".npy"):
        return read_arrays(path)
    if path.is_dir() and settings.dataset != "mnist":  # always the TFDS dataset
        return read_folder(path, settings)
    return read_tfds(settings.dataset, settings.data_dir)


def resize(image, size):
    """Crop an image to a square and scale it: (size, size, channels)."""
    if image.dtype != np.uint8:
        image = image.astype(np.float32)  # Pillow scales only these two types
    channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0)]
    return np.stack([ImageOps.fit(channel, (size, size)) for channel in channels], axis=-1)


def to_eight_bits(images, low, high):
    """Return images as uint8, scaled from their range, `low` to `high`, unless they are 8-bit."""
    if not np.isfinite([low, high]).all() or low == high:
        raise SettingsError(f"all pixels are between {low:g} and {high:g}: nothing to learn")
    if images.dtype == np.uint8 and high > 1:
        return images
    print(f"values   from {low:g} to {high:g}, scaled to 0 to 255")
    return np.rint(np.interp(images, [low, high], [0, 255])).astype(np.uint8)


def read_images(settings):
    """Return all images as (n, height, width, channels) uint8, and the reader's other values."""
    images, facts = [], []
    low, high, dtypes = np.inf, -np.inf, set()  # of all images, before resizing
    for image, *known in tqdm(choose_reader(settings), "reading", delay=2, disable=None):
        low = np.minimum(low, image.min())
        high = np.maximum(high, image.max())
        dtypes.add(image.dtype)
        if settings.image_size:
            image = resize(image, settings.image_size)
        images.append(image)
        facts.append(known)
        if image.shape != images[0].shape or len(dtypes) > 1:
            raise SettingsError(
                f"images are {images[0].shape} and {image.shape}, of {', '.join(map(str, dtypes))}:"
                " add --image-size, such as 64, or convert them to one type"
            )
    if not images or images[0].shape[2] not in (1, 3):
        raise SettingsError(f"{settings.dataset} must have images, with 1 or 3 channels")
    images = to_eight_bits(np.stack(images), low, high)
    is_grey = (images == images[..., :1]).all()
    return images[..., :1] if is_grey else images, facts


def load_data(settings: Settings) -> Data:
    """Return the images of a run. Raises SettingsError, and RunError for a download that fails."""
    images, facts = read_images(settings)
    is_test, labels, files = map(np.array, zip(*facts, strict=True))
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if len(test) == 0:
        order = np.random.default_rng(settings.seed).permutation(len(images))
        train, test = np.split(order, [len(images) * 9 // 10])
    if settings.batch_size > len(train):
        raise SettingsError(
            f"{settings.dataset} has {len(train):,} training images, too few for --batch-size"
            f" {settings.batch_size}"
        )
    classes, labels = np.unique(labels, return_inverse=True)
    return Data(images[train], images[test], labels[test], classes.astype(str), files[test])


# --------------------------------------------------------------------------------------------------
# Metrics


METRICS = ("test_loss", "squared_error", "psnr")


def make_evaluate(autoencoder, seed):
    """Return a compiled function of uint8 images, and of the standard deviation of their noise.

    It returns inputs, outputs, latents and METRICS. These are means over the images: the loss; the
    squared error, summed over an image; and the PSNR of outputs clipped to [0, 1], in dB, at most
    100.
    """
    encoder = autoencoder.get_layer("encoder")
    decoder = autoencoder.get_layer("decoder")
    _, height, width, _ = shape = autoencoder.input_shape
    signature = [tf.TensorSpec(shape, tf.uint8), tf.TensorSpec((), tf.float32)]

    @tf.function(input_signature=signature, autograph=False)
    def evaluate(images, deviation):
        targets = tf.cast(images, tf.float32) / 255
        noise = draw_noise(tf.shape(images), deviation, seed, step=-1)  # the same every time
        inputs = tf.clip_by_value(targets + noise, 0, 1)
        latents = encoder(inputs, training=False)
        outputs = decoder(latents, training=False)
        loss = reconstruction_loss(targets, outputs)
        error = squared_error(targets, outputs) * height * width
        psnr = tf.image.psnr(targets, tf.clip_by_value(outputs, 0, 1), max_val=1)
        return inputs, outputs, latents, (loss, error, tf.reduce_mean(tf.minimum(psnr, 100)))

    return evaluate


def compute_metrics(evaluate, images, deviation=0):
    """Return METRICS of all images, by name, and their latents."""
    batches = np.array_split(images, min(len(images), -(-images.size // 100_000)))
    results = [evaluate(batch, deviation) for batch in batches]
    _, _, latents, metrics = zip(*results, strict=True)
    means = np.average(metrics, axis=0, weights=[len(batch) for batch in batches])
    return dict(zip(METRICS, means.tolist(), strict=True)), np.concatenate(latents)


def choose_samples(data):
    """Return up to ten test images to show: one of each class, then others."""
    _, chosen = np.unique(data.labels, return_index=True)
    others = np.setdiff1d(np.arange(len(data.test)), chosen)
    count = max(1, min(10, 1400 // (data.test.shape[2] + 2)))  # 1,400 pixels, with gaps of 2
    return data.test[np.concatenate([chosen, others])[:count]]


# --------------------------------------------------------------------------------------------------
# Files and pictures


BACKGROUND = 32  # of pictures: a grey that suits any page


def is_chief():
    """Return whether this process writes the files: among several workers, the first one does."""
    return tf.distribute.get_strategy().extended.should_checkpoint


def write_atomically(path, save):
    """Let `save` write a temporary file, then rename it to `path`. Raises RunError."""
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


def draw_grid(rows, title):
    """Return a picture of rows of images, each (n, height, width, channels) in [0, 1]."""
    pixels = np.rint(np.clip(rows, 0, 1) * 255).astype(np.uint8)
    _, count, height, width, _ = pixels.shape
    # Small images are enlarged to about 100 pixels, and all of them to at most 1,400.
    zoom = max(1, min(100 // max(height, width), 1400 // (count * (width + 2))))
    gaps = [(0, 0), (0, 0), (0, 2), (1, 1), (0, 0)]
    tiles = np.pad(pixels, gaps, constant_values=BACKGROUND)
    grid = Image.fromarray(np.vstack([np.hstack(row) for row in tiles]).squeeze())
    grid = ImageOps.scale(grid, zoom, Image.Resampling.NEAREST)
    color = (BACKGROUND,) * len(grid.getbands())
    grid = ImageOps.expand(grid, (0, 28, 0, 0), color)
    font = ImageFont.load_default(size=16)
    ImageDraw.Draw(grid).text((6, 14), title, "white", font, anchor="lm")
    return grid


def draw_animation(paths, path):
    """Write a GIF of about twenty of the pictures, most of them from the beginning."""
    frames = []
    for index in np.unique(np.geomspace(1, len(paths), 28).astype(int)) - 1:
        try:
            # 16 grey levels make the file three times smaller.
            frames.append(Image.open(paths[index]).point(lambda value: value // 16 * 17))
        except (OSError, SyntaxError) as error:
            print(f"warning  {path} is made without {paths[index]}: {error}")
    times = [300] * (len(frames) - 1) + [3000]  # ms
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    write_atomically(path, lambda part: frames[0].save(part, **options))


@matplotlib.style.context("default")  # whatever a matplotlibrc says
def draw_summary(losses, previews, path):
    """Plot the losses of each phase, averaged over 1 % of its steps, and the preview losses."""
    axes = Figure(figsize=(9, 5), layout="tight").subplots()
    first = len(losses["train"]) - sum(map(len, losses.values()))  # pretraining ends at step 0
    for name, values in losses.items():
        parts = np.array_split(values, min(len(values), 100))
        ends = first + np.cumsum([len(part) for part in parts])
        axes.semilogy(ends, [part.mean() for part in parts], label=name)
        first += len(values)
    axes.semilogy(*zip(*sorted(previews.items()), strict=True), label="preview")
    axes.set(xlabel="step", title="reconstruction loss")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    write_atomically(path, axes.figure.savefig)


# --------------------------------------------------------------------------------------------------
# A run: its state, and what it writes on the way


class Run:
    """A run: its folders, the state that checkpoints hold, and what it writes on the way."""

    def __init__(self, settings, data, autoencoder, phases):
        self.settings = settings
        self.data = data
        self.autoencoder = autoencoder
        self.logs = settings.log_dir / settings.run_name
        self.samples = settings.sample_dir / settings.run_name
        self.shown = choose_samples(data)
        self.evaluate = make_evaluate(autoencoder, settings.seed)
        variables = chain(autoencoder.variables, *(phase.optimizer.variables for phase in phases))
        self.variables = {variable.path: variable for variable in variables}
        # The loss of each step. Their number is the number of steps trained so far.
        self.losses = {phase.name: np.zeros(0, np.float32) for phase in phases}
        self.previews = {}  # step to loss

    def steps_done(self):
        """Return the number of steps trained so far, in all phases."""
        return sum(map(len, self.losses.values()))

    def list_checkpoints(self):
        """Return the paths of the checkpoints in order; other files are left alone."""
        return sorted(self.logs.glob(f"checkpoints/step_{'[0-9]' * 12}.npz"))

    def restore(self):
        """Load the newest usable checkpoint. Raises RunError if there are only unusable ones."""
        checkpoints = self.list_checkpoints()
        for path in reversed(checkpoints):
            try:
                with np.load(path) as arrays:
                    for name, variable in self.variables.items():
                        variable.assign(arrays[name])
                    self.losses = {name: arrays[name] for name in self.losses}
                    self.previews = {int(step): loss for step, loss in arrays["previews"]}
                if path.stem != f"step_{self.steps_done():012}":
                    raise ValueError(f"it holds step {self.steps_done()}")
                return
            except Exception as error:  # NumPy raises many kinds for damaged files
                print(
                    f"warning  {path} is skipped, since it is damaged or of another run: {error!r}"
                )
        if checkpoints:
            raise RunError(f"no checkpoint of {self.logs} can be used: use another --run-name")

    def open_writers(self):
        """Open TensorBoard's event files, and write the model's graph."""
        self.writers = {name: tf.summary.create_noop_writer() for name in [*self.losses, "preview"]}
        if is_chief():
            for name in self.writers:
                # Flushed by train_steps() and save() alone, not whenever some time has passed.
                options = {"max_queue": 10**6, "flush_millis": 10**9}
                path = str(self.logs / name)
                self.writers[name] = tf.summary.create_file_writer(path, **options)
        with self.writers["preview"].as_default():
            tf.summary.graph(self.evaluate.get_concrete_function().graph)

    def check_finite(self, values):
        """Raise RunError if a value is infinite or not a number."""
        if not np.isfinite(values).all():
            raise RunError(
                f"loss or weights not finite after step {self.steps_done():,}: use a lower"
                " --learning-rate"
            )

    def save(self):
        """Flush the events, then write a checkpoint; keep the last three."""
        arrays = {path: variable.numpy() for path, variable in self.variables.items()}
        for array in arrays.values():
            self.check_finite(array)
        for writer in self.writers.values():
            writer.flush()
        arrays |= self.losses | {"previews": np.array(list(self.previews.items()))}
        path = self.logs / "checkpoints" / f"step_{self.steps_done():012}.npz"
        write_atomically(path, lambda part: np.savez(part, **arrays))
        older = [other for other in self.list_checkpoints() if other < path]
        for other in older[:-2]:
            other.unlink(missing_ok=True)

    def log_preview(self, step):
        """Write the picture after `step` updates; return the preview loss, that of its images."""
        noise = self.settings.noise
        inputs, outputs, _, (loss, *_) = self.evaluate(self.shown, noise)
        self.check_finite(loss)
        rows = [self.shown / 255, inputs, outputs] if noise else [inputs, outputs]
        grid = draw_grid(rows, f"step {step:,}   preview loss {loss:.4f}")
        png = io.BytesIO()
        grid.save(png, "png", compress_level=1)  # the default takes twice the time
        path = self.samples / f"step_{step:05}.png"
        write_atomically(path, lambda part: part.write_bytes(png.getvalue()))
        with self.writers["preview"].as_default(step=step):
            tf.summary.scalar("loss", loss)
            # The encoded file: tf.summary.image would take half a second more per run.
            image = [str(grid.width), str(grid.height), png.getvalue()]
            metadata = create_summary_metadata(display_name=None, description=None)
            tf.summary.write("reconstructions", tf.constant(image), metadata=metadata)
        self.previews[step] = float(loss)
        return self.previews[step]

    def finish(self, bar):
        """Write the model, the latents of the test images, and the figures; return the metrics."""
        bar.set_postfix_str("metrics of the test images")
        write_atomically(self.logs / "autoencoder.keras", self.autoencoder.save)
        metrics, latents = compute_metrics(self.evaluate, self.data.test)
        if self.settings.noise:
            noisy, _ = compute_metrics(self.evaluate, self.data.test, self.settings.noise)
            metrics |= {f"noisy_{name}": value for name, value in noisy.items()}
        known = {name: getattr(self.data, name) for name in ("labels", "classes", "files")}
        path = self.logs / "latents.npz"
        write_atomically(path, lambda part: np.savez(part, latents=latents, **known))
        bar.set_postfix_str("training.gif and summary.png")
        pictures = [self.samples / f"step_{step:05}.png" for step in sorted(self.previews)]
        draw_animation(pictures, self.samples / "training.gif")
        draw_summary(self.losses, self.previews, self.samples / "summary.png")
        return metrics


# --------------------------------------------------------------------------------------------------
# Resuming

# What does not affect a run's numbers, and what affects only their last digits.
IGNORED = {"run_name", "log_dir", "sample_dir", "data_dir", "dataset"}
WARNED = {"script", "tensorflow", "keras", "onednn", "threads", "replicas"}


def describe_run(settings, data):
    """Return everything that determines a run's numbers, but for the shapes of its weights."""
    facts = {
        "checksum of training images": zlib.crc32(data.train),
        "checksum of test images": zlib.crc32(data.test),
        "checksum of labels": zlib.crc32(data.labels),
        "script": zlib.crc32(Path(__file__).read_bytes()),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "onednn": os.environ["TF_ENABLE_ONEDNN_OPTS"],
        "threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "replicas": tf.distribute.get_strategy().num_replicas_in_sync,
    }
    return settings.model_dump(mode="json") | facts


def find_differences(before, now):
    """Yield the name and both values of each difference between two configs."""
    for name in before | now:  # in order: settings first
        if name not in IGNORED and before.get(name) != now.get(name):
            yield name, before.get(name), now.get(name)


def check_config(path, config):
    """Raise SettingsError if a run was started with another config than the current one.

    More steps are allowed at a constant learning rate. Differences that affect only the last
    digits are printed.
    """
    try:
        before = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SettingsError(
            f"{path}, with the settings of the run, is lost or damaged: use another --run-name"
            f" ({error})"
        ) from error
    defaults = Settings().model_dump(mode="json")  # for settings that older scripts lack
    for name, old, new in find_differences(defaults | before, config):
        text = f"{path.parent} was started with {name} {old}, and now it is {new}"
        is_extended = name == "steps" and config["schedule"] == "constant" and old < new
        if name in WARNED:
            print(f"warning  {text}: its numbers may differ")
        elif not is_extended:
            raise SettingsError(f"{text}: use the former to resume, or another --run-name")


@contextlib.contextmanager
def open_run(run, config):
    """Lock a run, restore its last checkpoint, and open the files that it writes."""
    (run.logs / "checkpoints").mkdir(parents=True, exist_ok=True)
    run.samples.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run.logs / ".lock", blocking=False)
    try:
        with lock if is_chief() else contextlib.nullcontext():
            if (run.logs / "config.json").exists() or run.list_checkpoints():
                check_config(run.logs / "config.json", config)
            run.restore()
            write_json(run.logs / "config.json", config)
            run.open_writers()
            yield
    except filelock.Timeout:
        raise SettingsError(f"another process is training the run of {run.logs}") from None


# --------------------------------------------------------------------------------------------------
# Devices, and several machines


def gather_from_workers(numbers):
    """Return the numbers of all replicas, (replicas, n) int32; wait for all workers."""
    strategy = tf.distribute.get_strategy()
    row = tf.constant([numbers], tf.int32)
    rows = strategy.experimental_distribute_values_from_function(lambda _: row)
    return strategy.gather(rows, axis=0).numpy()


def compare_workers(config):
    """Raise SettingsError if the workers, if any, have different configs, but for threads."""
    if "TF_CONFIG" not in os.environ:
        return
    text = json.dumps(config).encode().ljust(2**18)  # gathering needs equal lengths
    for number, row in enumerate(gather_from_workers(list(text))):
        for name, here, there in find_differences(config, json.loads(bytes(row.tolist()))):
            if name != "threads":
                raise SettingsError(
                    f"{name} is {here} for this worker and {there} for worker {number}: give all"
                    " workers the same"
                )


def wait_for_workers():
    """Return once all workers of TF_CONFIG listen: TensorFlow would wait deaf to signals."""
    config = json.loads(os.environ["TF_CONFIG"])
    workers = [address.rsplit(":", 1) for address in config["cluster"]["worker"]]
    index = range(len(workers)).index(config["task"]["index"])
    _, own_port = workers.pop(index)
    with socket.create_server(("", int(own_port))):
        while workers:
            try:
                socket.create_connection(workers[-1], timeout=1).close()
                workers.pop()
            except (ConnectionError, TimeoutError):
                time.sleep(0.1)


def connect_workers():
    """Return the strategy for the workers of TF_CONFIG, once all of them are there."""
    print("workers  waiting for all workers of TF_CONFIG", flush=True)
    try:
        wait_for_workers()
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"cluster": {"worker": ["HOST:PORT", …]}, "task": {"type": "worker", "index": 0}}'
        raise SettingsError(f"TF_CONFIG must have the form {form} ({error!r})") from error
    except (OSError, tf.errors.OpError) as error:
        raise RunError(f"the workers cannot connect: {error}") from error
    if stop_request.resume_command:
        # TensorFlow has installed a handler of its own.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return strategy


def make_strategy(settings):
    """Return the strategy for the workers of TF_CONFIG, the GPUs here, or a single device.

    Configures threads and GPU memory, and so has to precede any other call of TensorFlow. Raises
    SettingsError if the batch size is not a multiple of the number of replicas.
    """
    tf.get_logger().setLevel("ERROR")  # no warnings of retracing
    keras.utils.clear_session()  # automatic names of layers start over, as in a new process
    keras.config.set_floatx("float32")  # whatever ~/.keras/keras.json says
    keras.config.set_image_data_format("channels_last")
    # The last digits of sums depend on the threads. One thread is fastest for one small image.
    threads = 1 if settings.batch_size == 1 else os.cpu_count()
    gpus = tf.config.list_physical_devices("GPU")
    with contextlib.suppress(RuntimeError):  # the importing program has used TensorFlow
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(2)
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if gpus:
            tf.config.experimental.enable_op_determinism()  # CPUs are deterministic anyway
    found = tf.config.threading.get_intra_op_parallelism_threads()
    if found != threads:
        print(
            f"warning  this process has {found} threads, and a new one would have {threads}: the"
            " last digits will differ"
        )
    if "TF_CONFIG" in os.environ:
        strategy = connect_workers()
    elif len(gpus) > 1 and settings.batch_size > 1:  # one image cannot be divided
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

ONE_AT_A_TIME = threading.Lock()  # Keras and TensorFlow have process-wide state


def stop_if_asked(run):
    """Save and end the process if it, or another worker, has received a signal."""
    number = stop_request.signal
    if "TF_CONFIG" in os.environ:  # all of them stop after the same step
        number = gather_from_workers([number]).max()
    if number:
        run.save()
        stop_request.end(number)


def fit_phase(phase, images, run, bar):
    """Train a phase to its last step, from where it stands."""
    settings = run.settings
    train_steps = make_train_steps(phase, images, settings, run.writers[phase.name])
    # Steps per call: fewer for large batches, since signals are handled between calls.
    at_once = max(1, min(50, 2_000_000 // (settings.batch_size * run.data.train[0].size)))
    while True:
        losses = run.losses[phase.name]
        step = len(losses)
        is_last = step == phase.steps
        if step % settings.sample_every == 0 or is_last:
            text = f"loss {losses[-at_once:].mean():.4f}  " if step else ""
            if phase.name == "train":
                text += f"preview loss {run.log_preview(step):.4f}"
            else:
                text += phase.name
            bar.set_postfix_str(text, refresh=False)
            if bar.disable:
                print(f"step {step:6,}  {text}", flush=True)
        if is_last or (step and step % settings.checkpoint_every == 0):
            run.save()
        if is_last:
            return
        intervals = (at_once, settings.sample_every, settings.checkpoint_every)
        last = min(phase.steps, *(step - step % every + every for every in intervals))
        new_losses = train_steps(step, last).numpy()
        run.losses[phase.name] = np.append(losses, new_losses)
        run.check_finite(new_losses)
        bar.update(last - step)
        stop_if_asked(run)


def fit(phases, run, bar):
    """Train all phases. A signal saves the run and ends the process."""
    with tf.device("CPU:0"):  # otherwise they would go to the first GPU
        images = tf.constant(run.data.train)
    stop_request.training = True
    try:
        for phase in phases:
            fit_phase(phase, images, run, bar)
    finally:
        stop_request.training = False
        if stop_request.signal:
            stop_request.end(stop_request.signal)


def prepare(settings):
    """Return the run of these settings, its phases, and its config."""
    keras.utils.set_random_seed(settings.seed)
    data = load_data(settings)
    config = describe_run(settings, data)
    # Before the model: workers that build different ones hang.
    compare_workers(config | {"run name": settings.run_name})
    autoencoder, pairs = build_autoencoder(
        data.train.shape[1:], settings.depth, settings.latent_dim, settings.initializer
    )
    phases = plan_phases(autoencoder, pairs, settings)
    config |= {variable.path: list(variable.shape) for variable in autoencoder.variables}
    return Run(settings, data, autoencoder, phases), phases, config


def introduce(run, total):
    """Print what a run uses, and where its results are."""
    settings, data = run.settings, run.data
    _, height, width, channels = data.train.shape
    devices = tf.distribute.get_strategy().extended.worker_devices
    epochs = settings.steps * settings.batch_size / len(data.train)
    resumes = f"resumes  after step {run.steps_done():,} of {total:,}\n" if run.steps_done() else ""
    print(
        f"device   {', '.join(name.split('device:')[-1] for name in devices)}\n"
        f"data     {settings.dataset}: {len(data.train):,} images to train on,"
        f" {len(data.test):,} to test on, {height}x{width}x{channels}\n"
        f"weights  {settings.initializer} initial weights\n"
        f"steps    {settings.steps:,} x {settings.batch_size:,} images = {epochs:.3g} epochs\n"
        f"{resumes}"
        f"writes   {run.logs} and {run.samples}\n"
        f"view     tensorboard --logdir {shlex.quote(str(settings.log_dir))}"
        " --samples_per_plugin images=1000",
        flush=True,
    )


def train(settings: Settings) -> dict[str, Any]:
    """Train an autoencoder, or resume its run; return the contents of metrics.json.

    A process trains one run at a time, with the threads of its first run. Raises SettingsError,
    and RunError or OSError if the run fails.
    """
    started = time.perf_counter()
    if ONE_AT_A_TIME.locked():
        raise SettingsError("another run trains in this process: start a process for this one")
    with ONE_AT_A_TIME, make_strategy(settings).scope():
        run, phases, config = prepare(settings)
        with open_run(run, config):
            compare_workers({"the step to resume from": run.steps_done()})
            total = sum(phase.steps for phase in phases)
            introduce(run, total)
            options = {"initial": run.steps_done(), "disable": None, "file": sys.stdout}
            with tqdm(total=total, **options) as bar:
                fit(phases, run, bar)
                metrics = run.finish(bar)
            metrics |= {"steps": settings.steps, "seconds": time.perf_counter() - started}
            write_json(run.logs / "metrics.json", metrics)
    print(
        f"done     test loss {metrics['test_loss']:.4f}, PSNR {metrics['psnr']:.1f} dB, on"
        f" {len(run.data.test):,} test images\n"
        f"pictures {run.samples}: training.gif, summary.png, step_….png\n"
        f"model    {run.logs / 'autoencoder.keras'}"
    )
    return metrics


def main(settings: Settings) -> int:
    """Train; return the exit status: 0, 1 for a failed run, 2 for unusable settings."""
    try:
        train(settings)
        return 0
    except SettingsError as error:
        status, text = 2, str(error)
    except (RunError, OSError) as error:
        status, text = 1, str(error) or repr(error)
    except (MemoryError, tf.errors.OpError) as error:
        status = 1
        if "tfevents" in str(error):
            text = f"{settings.log_dir / settings.run_name} cannot be written: is the disk full?"
        elif isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError)):
            text = "out of memory: use a smaller --batch-size or --image-size"
        elif isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError)):
            text = "another worker has ended: run the same commands again to resume"
        else:
            raise
    print(f"train_ae.py: {text.splitlines()[0]}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    status = main(command_line_settings)
    sys.stdout.flush()
    if "TF_CONFIG" not in os.environ:
        os._exit(status)  # at once: a signal would be lost while Python shuts down
    sys.exit(status)
