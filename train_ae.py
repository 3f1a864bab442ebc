"""Train a convolutional autoencoder on MNIST, on your own images, or on any TFDS image dataset.

    python train_ae.py                                        # 3,000 steps on MNIST digits
    python train_ae.py --dataset my-pictures --image-size 64 --batch-size 32
    tensorboard --logdir logs --samples_per_plugin images=1000

Four stride-2 convolutions encode an image, four transposed convolutions decode it, and Adam
minimizes the squared error. The default run takes about ten seconds on two EPYC cores and reaches a
test loss of 0.0142 ± 0.0006 (n = 5 seeds). The model and its training follow a Chinese article for
TensorFlow 1, "Rebuilding images with autoencoders, and an implementation in Python".

A run may end in any way, even by kill -9: the same command with --run-name and the name of its
folder in logs resumes it, with the same results to the bit on the same machine.

The method: settings, a whole run, model, objective, optimizer, training step, tied kernels.
The machinery: data, readers, resuming, results, pictures, files, devices, main. Functions with type
hints are for other code, too.
"""

import argparse
import contextlib
import difflib
import gc
import gzip
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__" and "IPython" not in sys.modules:  # a %run must not end a session
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the script without a traceback
    os.environ["MPLBACKEND"] = "agg"  # importing matplotlib fails if a user's is unknown

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

# --------------------------------------------------------------------------------------------------
# Settings: each one is a command-line option, and its docstring is the help text.

# Channels of the encoder's convolutions, of which --depth uses the first; the decoder mirrors them.
FILTERS = (16, 32, 64, 128)


def to_local_path(value):
    """Expand the ~ of a path. Raises ValueError for a URL, such as gs://bucket."""
    if not isinstance(value, (str, os.PathLike)):
        return value  # pydantic refuses it
    if re.match(r"\w\w+:/", os.fspath(value)):
        raise ValueError("must be on this machine, not a URL")
    return os.path.expanduser(value)  # noqa: PTH111, as Path's method fails for unknown users


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
LocalPath = Annotated[Path, BeforeValidator(to_local_path)]


class Settings(BaseModel):
    """Every setting of a run. Raises pydantic's ValidationError, a ValueError, for a bad value."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    steps: Count = 3000
    """updates of the weights"""
    batch_size: Count = 1
    """images in each step"""
    learning_rate: float = Field(0.001, gt=0)
    """learning rate of Adam"""
    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate: constant, or cosine, which falls to 0 by the end of the run"""
    depth: int = Field(default=len(FILTERS), ge=1, le=len(FILTERS))
    """convolutions of the encoder, and of the decoder"""
    latent_dim: CountOrZero = 0
    """size of the latent vector, or 0 to use the output of the last convolution as the latent"""
    tied: bool = False
    """give each layer of the decoder the kernel of its mirrored layer in the encoder"""
    weights: LocalPath | None = None
    """saved model (.keras), such as another run's, whose weights the run starts from"""
    noise: float = Field(0.0, ge=0)
    """denoising: standard deviation of Gaussian noise added to the inputs, which are in [0, 1]"""
    dataset: Annotated[str, BeforeValidator(to_local_path)] = Field("mnist_5k", min_length=1)
    """mnist_5k (bundled digits), folder of pictures or IDX files, .npz, .npy, or a TFDS dataset"""
    image_size: CountOrZero = 0
    """height and width that images are cropped and scaled to, or 0 to keep their size"""
    initializer: Literal["article", "glorot"] | None = None
    """initial weights (default: article for 28x28x1 images without --latent-dim, else glorot)"""
    seed: CountOrZero = 0
    """seed of initial weights, order, noise, and of the test images where there is no test split"""
    sample_every: Count = 50
    """steps between previews: pictures of test images and their reconstructions"""
    checkpoint_every: Count = 500
    """steps between checkpoints; slow runs have one about every ten seconds, too"""
    data_dir: LocalPath | None = None
    """folder of TFDS datasets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)"""
    run_name: str = Field(
        default_factory=lambda: f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$",
    )
    """new or old name: letters, digits, _, - and ., not starting with - or . (default: the time)"""
    log_dir: LocalPath = Path("logs")
    """folder for TensorBoard's files, checkpoints, the model and metrics"""
    sample_dir: LocalPath = Path("samples")
    """folder for pictures"""

    @property
    def log_folder(self) -> Path:
        """Where the run's numbers and its model are."""
        return self.log_dir / self.run_name

    @property
    def sample_folder(self) -> Path:
        """Where the run's pictures are."""
        return self.sample_dir / self.run_name


def parse_arguments(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line; exit with one line and status 2 for a bad one."""
    parser = argparse.ArgumentParser(
        description="Train a convolutional autoencoder on MNIST, or on images of your own.",
        argument_default=argparse.SUPPRESS,  # Settings has the defaults
        usage="python train_ae.py [options]",
        allow_abbrev=False,
    )
    parser.error = lambda text: parser.exit(2, f"train_ae.py: {' '.join(text.split())}\n")
    for name, field in Settings.model_fields.items():
        option = "--" + name.replace("_", "-")
        action = "store_true" if field.annotation is bool else "store"
        text = field.description or ""  # missing under cProfile
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


def is_large_step(settings):
    """Return whether a step is so large that oneDNN, Intel's kernels, is faster than TensorFlow's
    own: on one small image, it is four times slower.
    """
    is_mnist = settings.dataset in ("mnist_5k", "mnist")
    size = settings.image_size or (28 if is_mnist else 64)  # the images are not read yet
    return settings.batch_size * size**2 > 40_000  # pixels; measured on two EPYC cores


# --------------------------------------------------------------------------------------------------
# Imports that take seconds: a command line is read before them, and chooses oneDNN

command_line_settings = parse_arguments() if __name__ == "__main__" else None
if "tensorflow" not in sys.modules:  # TensorFlow reads these when it is imported
    is_large = command_line_settings and is_large_step(command_line_settings)
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1" if is_large else "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever ~/.keras/keras.json says
gc.disable()  # garbage collection would add a second to the imports

import filelock
import keras
import matplotlib.style
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image, ImageDraw, ImageOps
from tensorboard.plugins.hparams import api as hparams_api
from tqdm import tqdm

gc.freeze()  # later collections skip what the imports made
gc.enable()


# --------------------------------------------------------------------------------------------------
# A whole run


class SettingsError(ValueError):
    """An unusable setting or input; the message says what to do. Exit status 2."""


class RunError(Exception):
    """A run that failed; the message says what to do. Exit status 1."""


def train(settings: Settings) -> dict[str, Any]:
    """Train an autoencoder, or resume its run; return the contents of metrics.json.

    Raises SettingsError, or RunError, OSError or TensorFlow's OpError if the run fails.
    """
    started = time.perf_counter()
    folder = settings.log_folder
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_process())
        configure_tensorflow(settings)
        strategy = make_strategy(settings)
        data = load_data(settings)
        weights = read_weights(settings)

        stack.enter_context(strategy.scope())  # get_strategy() finds it anywhere below
        config = make_config(settings, data, weights)
        compare_workers(folder, config)  # models of other shapes would never connect
        autoencoder = build_autoencoder(data.image_shape, settings)
        assign_weights(autoencoder, weights)
        if settings.tied:
            tie_kernels(autoencoder.trainable_variables)
        optimizer = make_optimizer(autoencoder, settings)

        stack.enter_context(lock_folder(folder))  # nothing has been written yet
        state = State(folder, config, [*autoencoder.variables, *optimizer.variables])
        state.load_checkpoint()
        write_json(folder / "config.json", state.config)
        keep_script(folder / "train_ae.py", is_new=state.step == 0)
        print_overview(settings, data, state)

        images, rows = data.to_tensors()
        training = Training(autoencoder, optimizer, images, rows, data.preparation, settings)
        evaluate = compile_evaluation(autoencoder)
        preview_images = data.prepare(choose_preview_rows(data))
        fit(training, state, preview_images, evaluate)

        write_atomically(folder / "autoencoder.keras", autoencoder.save)
        metrics, arrays = compute_metrics(settings, evaluate, data)
        metrics |= {"steps": settings.steps, "seconds": time.perf_counter() - started}
        write_arrays(folder / "latents.npz", arrays)
        write_json(folder / "metrics.json", metrics)
        draw_pictures(settings, state, evaluate, data, arrays["errors"])
    print_results(settings, data, metrics)
    return metrics


def fit(training, state, preview_images, evaluate):
    """Train to the last step. One call of the compiled function runs up to 50 steps."""
    settings = training.settings
    compiled_steps = tf.function(train_steps)
    writer = open_writer(settings.log_folder / "train")
    preview_writer = open_writer(settings.log_folder / "preview")  # the same chart shows both
    saved_at = time.monotonic()
    with make_bar(total=settings.steps, initial=state.step) as bar:
        if state.step == 0:
            state.save_checkpoint()  # from now on, a run of other settings is refused here
            write_description(settings, evaluate, preview_writer)
            write_preview(state, preview_images, evaluate, settings, preview_writer, bar)
        while state.step < settings.steps:
            stop = choose_stop(training, state.step)
            with writer.as_default():  # leaving this block flushes the summaries
                losses = compiled_steps(training, tf.constant(state.step), tf.constant(stop))
            state.add_losses(losses.numpy())
            bar.update(len(losses))
            is_last = state.step == settings.steps
            if is_last or state.step % settings.sample_every == 0:
                write_preview(state, preview_images, evaluate, settings, preview_writer, bar)
            is_overdue = time.monotonic() - saved_at > 10  # seconds; no result depends on it
            if is_last or is_overdue or state.step % settings.checkpoint_every == 0:
                state.save_checkpoint()
                saved_at = time.monotonic()


def choose_stop(training, step):
    """Return the step to train to in one call: the next that is due for a preview or a checkpoint,
    or sooner, so that the progress bar moves and checkpoints are in time.
    """
    settings = training.settings
    values_per_step = settings.batch_size * math.prod(training.images.shape[1:])
    steps_per_call = max(1, min(50, 2_000_000 // values_per_step))
    intervals = (steps_per_call, settings.sample_every, settings.checkpoint_every)
    next_multiples = [(step // interval + 1) * interval for interval in intervals]
    return min(settings.steps, *next_multiples)


def make_bar(iterable=None, **options):
    """Return a progress bar; it is shown in terminals and notebooks, but not in files and pipes."""
    is_terminal = hasattr(sys.stdout, "isatty") and sys.stdout.isatty()
    is_shown = is_terminal or "ipykernel" in sys.modules
    return tqdm(iterable, file=sys.stdout, disable=not is_shown, **options)


# --------------------------------------------------------------------------------------------------
# Model


CONVOLUTION = {  # shared by all convolutions and transposed convolutions
    "kernel_size": 3,
    "strides": 2,
    "padding": "same",
    "activation": "leaky_relu",  # Keras's default slope is 0.2, as in the article
}


def build_autoencoder(image_shape: Sequence[int], settings: Settings) -> keras.Model:
    """Return the autoencoder, which consists of two models, "encoder" and "decoder".

    It maps (batch, *image_shape) float32 in [0, 1] to the same shape in (-1, 1). At depth 4:

        images  → conv1   → conv2   → conv3   → conv4   → latent    encoder
                    ↕         ↕         ↕         ↕         ↕       a layer, and its mirror
        outputs ← deconv4 ← deconv3 ← deconv2 ← deconv1 ← expand    decoder

    Each convolution halves height and width, rounding up, and its mirror restores them. Without
    `latent_dim`, there are no layers "latent" and "expand".
    """
    keras.utils.set_random_seed(settings.seed)  # for the initial weights
    images = keras.Input(image_shape)
    hidden = images
    shapes = []  # of what goes into each convolution, for its mirror to restore
    for number, filters in enumerate(FILTERS[: settings.depth], start=1):
        shapes.append(hidden.shape)
        layer = layers.Conv2D(
            filters,
            kernel_initializer=make_initializer(image_shape, settings),
            name=f"conv{number}",
            **CONVOLUTION,
        )
        hidden = layer(hidden)
    features_shape = hidden.shape[1:]
    if settings.latent_dim:
        # Not in the article: "latent" and "expand" keep Keras's default initializer, Glorot's.
        hidden = layers.Dense(settings.latent_dim, name="latent")(layers.Flatten()(hidden))
    encoder = keras.Model(images, hidden, name="encoder")

    latents = keras.Input(hidden.shape[1:])
    hidden = latents
    if settings.latent_dim:
        size = math.prod(features_shape)
        hidden = layers.Dense(size, activation="leaky_relu", name="expand")(hidden)
        hidden = layers.Reshape(features_shape)(hidden)
    for number, shape in enumerate(reversed(shapes), start=1):
        _, height, width, channels = shape
        layer = layers.Conv2DTranspose(
            channels,
            # 2n and 2n - 1 both halve to n: the padding tells which one to restore.
            output_padding=(1 - height % 2, 1 - width % 2),
            kernel_initializer=make_initializer(image_shape, settings),
            name=f"deconv{number}",
            **CONVOLUTION,
        )
        hidden = layer(hidden)
    # Tanh after a leaky ReLU is an odd choice for images in [0, 1], kept from the article.
    outputs = layers.Activation("tanh", name="output")(hidden)
    decoder = keras.Model(latents, outputs, name="decoder")
    return keras.Sequential([images, encoder, decoder], name="autoencoder")


def make_initializer(image_shape, settings):
    """Return a new initializer: layers that shared one would start with equal weights."""
    if name_initializer(image_shape, settings) == "article":
        return keras.initializers.TruncatedNormal(stddev=0.02)
    return keras.initializers.GlorotUniform()  # Glorot & Bengio 2010


def name_initializer(image_shape, settings):
    """Return "article" or "glorot": by default, the article's for images like MNIST's.

    With its standard deviation of 0.02, a model learns colours only after many steps.
    """
    is_like_mnist = tuple(image_shape) == (28, 28, 1) and not settings.latent_dim
    return settings.initializer or ("article" if is_like_mnist else "glorot")


# --------------------------------------------------------------------------------------------------
# Objective


def reconstruction_loss(images: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Return the loss to minimize, a scalar: the squared error, summed over the channels, averaged
    over pixels and images. For another objective, change this function.

    Both arguments are (batch, height, width, channels) float32. The loss must be a mean over the
    images, since the losses of several devices, and of batches of test images, are averaged.
    """
    return tf.reduce_mean(tf.reduce_sum(tf.square(outputs - images), axis=-1))


# --------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizer(autoencoder, settings):
    """Return the optimizer of a run; any other one of Keras's would do."""
    rate = settings.learning_rate
    if settings.schedule == "cosine":  # Loshchilov & Hutter 2017
        rate = keras.optimizers.schedules.CosineDecay(rate, settings.steps)
    optimizer = FusedAdam(rate, epsilon=1e-8)  # TensorFlow 1's, as in the article; Keras's is 1e-7
    optimizer.build(autoencoder.trainable_variables)  # makes the moments, for checkpoints to hold
    return optimizer


class FusedAdam(keras.optimizers.Adam):
    """Adam (Kingma & Ba 2015) as TensorFlow's fused operation: 25% less time per step.

    Uses _momentums, _velocities and _get_variable_index(), private names of Keras 3.15.
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
# Training step: train_steps() runs up to 50 of them, replica_step() one, on each device


class Preparation(NamedTuple):
    """How stored images become inputs of the model: see prepare()."""

    low: float  # the value that becomes 0
    high: float  # the value that becomes 1
    channels: int  # 1 or 3, of the inputs


class Training(NamedTuple):
    """What a step needs, beside its number."""

    autoencoder: keras.Model
    optimizer: keras.optimizers.Optimizer
    images: tf.Tensor  # all images of the set, as in Data
    rows: tf.Tensor  # which of them to train on, int64
    preparation: Preparation
    settings: Settings


def train_steps(training, first, stop):
    """Run steps `first` to `stop` - 1, write their summaries, and return their losses.

    To be compiled: one call per step would take twice as long for one small image.
    """
    strategy = tf.distribute.get_strategy()
    losses = tf.TensorArray(tf.float32, size=stop - first)
    for step in tf.range(first, stop, dtype=tf.int64):  # compiled to a loop in TensorFlow
        losses_of_shares = strategy.run(replica_step, [training, step])
        loss = strategy.reduce("SUM", losses_of_shares, axis=None)
        if training.settings.tied:
            tie_kernels(training.autoencoder.trainable_variables)
        with tf.name_scope("/"):  # otherwise the loop would be part of the tag: while/loss
            tf.summary.scalar("loss", loss, step)
        losses = losses.write(tf.cast(step, tf.int32) - first, loss)
    return losses.stack()


@tf.autograph.experimental.do_not_convert  # looking for something to convert would take a second
def replica_step(training, step):
    """Update the weights with a device's share of the batch; return its share of the loss.

    Of two devices, each takes half of the images, and halves the mean loss of these: the sum of
    both is the mean of all. Gradients are summed by the optimizer, losses by the caller.
    """
    replica = tf.distribute.get_replica_context()
    replicas = replica.num_replicas_in_sync
    with tf.device("CPU:0"):  # the images stay there: only a share goes to a GPU
        # Each device draws the noise of the whole batch: its values do not depend on their number.
        clean, noisy = make_batch(training, step)
        targets = clean[replica.replica_id_in_sync_group :: replicas]
        inputs = noisy[replica.replica_id_in_sync_group :: replicas]
    variables = training.autoencoder.trainable_variables
    with tf.GradientTape() as tape:
        outputs = training.autoencoder(inputs, training=True)
        loss = reconstruction_loss(targets, outputs) / replicas
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    if training.settings.tied:
        tie_gradients(gradients, variables)
    training.optimizer.apply(gradients, variables)
    return loss


def make_batch(training, step):
    """Return the clean and the noisy images of a step, (batch, height, width, channels) each."""
    settings = training.settings
    indices = batch_indices(step, settings.batch_size, training.rows.shape[0], settings.seed)
    images = tf.gather(training.images, tf.gather(training.rows, indices))
    clean = prepare(images, training.preparation)
    return clean, add_noise(clean, settings.noise, settings.seed, step)


def batch_indices(step, batch_size, count, seed):
    """Return which of `count` training images are in the batch of a step: (batch_size,) int64.

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


def prepare(images: np.ndarray | tf.Tensor, preparation: Preparation) -> tf.Tensor:
    """Return stored images, (..., height, width, 1 or 3), as float32 in [0, 1]."""
    low, high, channels = preparation
    # Of three equal channels, one is taken. Other code may give grey images to a model of colours.
    if images.shape[-1] != channels:
        images = tf.gather(images, [0] * channels, axis=-1)
    # A quotient would have other last digits in a compiled function.
    scaled = (tf.cast(images, tf.float32) - low) * (1 / (high - low))
    return tf.clip_by_value(scaled, 0, 1)


def add_noise(images, stddev, seed, number):
    """Return images in [0, 1] with Gaussian noise, clipped: a function of the arguments.

    `number` is the step in training. Test images have negative numbers, and so no step's noise.
    """
    if stddev == 0:
        return images
    noise = tf.random.stateless_normal(tf.shape(images), [seed, number], stddev=stddev)
    return tf.clip_by_value(images + noise, 0, 1)


# --------------------------------------------------------------------------------------------------
# Tied kernels: after every step, the decoder's are copies of the encoder's, whatever the optimizer
# has made of them. So saved models and checkpoints are like those of any other run.


def tie_gradients(gradients, variables):
    """Add the gradients of the decoder's kernels to those of the encoder's: the kernel of a pair
    learns from both of its uses.
    """
    for encoder_index, decoder_index in pair_kernels(variables):
        gradients[encoder_index] += mirror(gradients[decoder_index])


def tie_kernels(variables):
    """Give the decoder's kernels the values of the encoder's."""
    for encoder_index, decoder_index in pair_kernels(variables):
        variables[decoder_index].assign(mirror(variables[encoder_index].value))


def pair_kernels(variables):
    """Return (encoder, decoder) indices of mirrored kernels: the first with the last, and so on.

    `variables` are in the order of the layers.
    """
    kernels = [index for index, variable in enumerate(variables) if variable.name == "kernel"]
    half = len(kernels) // 2
    return list(zip(kernels[:half], reversed(kernels[half:]), strict=True))


def mirror(kernel):
    """Return a kernel in the layout of the mirrored layer: transposed if fully connected.

    A transposed convolution stores (height, width, output, input): already its mirror's shape.
    """
    return tf.transpose(kernel) if len(kernel.shape) == 2 else kernel


####################################################################################################
# The method ends here. What follows serves it: data, readers, resuming, results, pictures, files,
# devices, main.
####################################################################################################


# --------------------------------------------------------------------------------------------------
# Data. Examples pass one by one from a reader to store(), which writes their images to a file that
# is mapped into memory: the system reads what is used of it, and drops that when memory is short.
# So a set may be larger than memory. A step scales the values that it uses.

SCRIPT = Path(__file__).resolve()
BUNDLED = SCRIPT.parent / "samples" / "mnist_5k.npz"


class Example(NamedTuple):
    """An image, and the facts known of it."""

    image: np.ndarray  # (height, width, channels) uint8 or float32
    is_test: bool
    label: Any  # text or number
    file: str  # its name; in arrays and TFDS datasets, such as test/7


class Data(NamedTuple):
    """The images of a set, and which of them to train and to test on."""

    images: np.ndarray  # (n, height, width, 1 or 3 channels) uint8 or float32, memory-mapped
    checksum: int  # of the images
    preparation: Preparation
    train_rows: np.ndarray  # int64, indices of images
    test_rows: np.ndarray
    labels: np.ndarray  # of all images: indices of `classes`
    classes: np.ndarray  # names
    files: np.ndarray  # of all images, as in Example

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the model takes."""
        return (*self.images.shape[1:3], self.preparation.channels)

    def prepare(self, rows: np.ndarray) -> tf.Tensor:
        """Return some of the images as float32 in [0, 1]."""
        return prepare(self.images[rows], self.preparation)

    def to_tensors(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Return all images, without a copy, and the rows to train on."""
        with tf.device("CPU:0"):  # otherwise they would go to the first GPU
            images = tf.experimental.dlpack.from_dlpack(self.images.__dlpack__())
            return images, tf.constant(self.train_rows)


def load_data(settings: Settings) -> Data:
    """Return the images of a set. Raises SettingsError, and RunError for a failed download, a
    damaged TFDS dataset or a full disk.
    """
    try:
        total, examples = open_dataset(settings)
    except OSError as error:
        raise SettingsError(f"{settings.dataset} cannot be read: {error}") from error
    images, checksum, facts = store(settings, total, examples)
    is_test, labels, files = zip(*facts, strict=True)
    classes, labels = np.unique(labels, return_inverse=True)
    preparation = choose_preparation(settings, images, files)
    train_rows, test_rows = choose_rows(settings, np.array(is_test))
    classes = classes.astype(str)
    files = np.array(files)
    return Data(images, checksum, preparation, train_rows, test_rows, labels, classes, files)


def store(settings, total, examples):
    """Write the images of all examples to a file. Return them memory-mapped, (n, height, width,
    channels), their checksum, and the facts known of each: (is_test, label, file).

    The file has no name, so that it is gone when the process ends, in any way. It lies where
    --log-dir does: the system's folder for temporary files may be in memory.
    """
    folder = settings.log_dir.absolute()
    while not folder.is_dir():  # --log-dir itself is made once the settings prove usable
        folder = folder.parent
    facts = []
    checksum = 0
    first = None
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=2**20) as file:  # twice as fast as 2**13
            for image, *fact in make_bar(examples, desc="reading", total=total, delay=2):
                first = image if first is None else first
                check_image(image, first)
                image = np.ascontiguousarray(image)
                checksum = zlib.crc32(image, checksum)
                file.write(image)
                facts.append(fact)
            if not facts:
                raise SettingsError(f"{settings.dataset} contains no images")
            file.flush()
            shape = (len(facts), *first.shape)
            # The mapping outlives the file. "r+", as NumPy gives TensorFlow no read-only arrays.
            images = np.asarray(np.memmap(file, first.dtype, "r+", shape=shape))
    except OSError as error:
        size = "the" if first is None else f"{total * first.nbytes / 1e9:.2g} GB of"
        raise RunError(
            f"storing {size} images in {folder}, where --log-dir is, has failed: {error}"
        ) from error
    return images, zlib.crc32(f"{images.dtype} {shape}".encode(), checksum), facts


def check_image(image, first):
    """Refuse an image that is unusable, or differs from the first one in type or shape."""
    if (image.dtype, image.shape) != (first.dtype, first.shape):
        raise SettingsError(
            f"images differ in type or shape: {first.dtype} {first.shape} and {image.dtype}"
            f" {image.shape} (for one shape, add --image-size, such as 64; for one type, convert"
            " them)"
        )
    *_, channels = image.shape
    if channels not in (1, 3):
        raise SettingsError(f"images must have 1 or 3 channels, not {channels}")


def choose_preparation(settings, images, files):
    """Return the preparation of a set: 8-bit values are out of 255, and others are scaled from
    their range. Raises SettingsError for images of no use.
    """
    is_grey = all((image == image[..., :1]).all() for image in images)  # even if saved as RGB
    values = images.reshape(len(images), -1)
    darkest = values.min(axis=1).astype(float)  # of each image
    brightest = values.max(axis=1).astype(float)
    low = float(darkest.min())
    high = float(brightest.max())
    if not math.isfinite(low + high):
        name = files[np.isfinite(darkest + brightest).argmin()]
        raise SettingsError(f"{settings.dataset}: NaN or infinity in image {name}")
    if low == high:
        raise SettingsError(f"all pixels of {settings.dataset} are {low:g}: there is no picture")
    if images.dtype == np.uint8 and high > 1:
        low = 0.0
        high = 255.0
    else:  # floats, or masks of 0 and 1
        print(f"values   {low:.9g} to {high:.9g} become 0 to 1")
        check_precision(settings, images.dtype, low, high)
    check_contrast(images.dtype, low, high, darkest, brightest, files)
    return Preparation(low, high, channels=1 if is_grey else 3)


def check_precision(settings, dtype, low, high):
    """Refuse values that have lost levels of grey: masks of 0 and 1 that were resized as integers,
    and floats far from 0.
    """
    if dtype == np.uint8 and settings.image_size:
        raise SettingsError("--image-size would blur masks of 0 and 1: make them 0 and 255 first")
    if np.spacing(np.float32(max(-low, high))) > (high - low) / 255:
        raise SettingsError(
            f"values from {low:.9g} to {high:.9g} become too coarse as float32: scale them to 0 to"
            " 255 first"
        )


def check_contrast(dtype, low, high, darkest, brightest, files):
    """Warn if a tenth of the images are nearly constant between `low` and `high`; refuse floats if
    hardly any image is not: a placeholder, such as -9999, may have widened the range.
    """
    contrast = (brightest - darkest) / (high - low)
    flat = np.count_nonzero(contrast < 1 / 16)
    message = (
        f"{flat:,} of {len(files):,} images are nearly constant between {low:.9g} and {high:.9g}:"
        f" the darkest pixel of all is in image {files[darkest.argmin()]}, and the brightest in"
        f" image {files[brightest.argmax()]}"
    )
    if dtype == np.float32 and np.mean(contrast < 1 / 255) > 0.9:
        raise SettingsError(message)
    if flat > len(files) / 10:
        print(f"warning  {message}")


def choose_rows(settings, is_test):
    """Return the rows of the images to train and to test on: those of the test split, or without
    any, a random tenth.
    """
    rows = np.arange(len(is_test))
    if is_test.any():
        return rows[~is_test], rows[is_test]
    if len(rows) == 1:
        print("test     on the image that is trained on, the only one")
        return rows, rows
    print(f"test     a random tenth of the images, drawn with --seed {settings.seed}")
    rows = np.random.default_rng(settings.seed).permutation(rows)
    return np.split(rows, [len(rows) * 9 // 10])


# --------------------------------------------------------------------------------------------------
# Readers. For each kind of set, one function opens it and returns the number of its images, or of
# the files in a folder, and an iterator of examples.


def open_dataset(settings):
    """Open `dataset` with the reader for its kind."""
    path = BUNDLED if settings.dataset == "mnist_5k" else Path(settings.dataset)
    if settings.dataset == "mnist":  # whatever is in this folder
        if path.exists():
            print("note     mnist is the TFDS dataset; the folder is ./mnist")
        return open_tfds(settings)
    if path.is_dir() and not list_idx(path):
        return open_folder(settings, path)
    if path.is_dir() or path.suffix.lower() in (".npz", ".npy"):
        return open_arrays(settings, path)
    return open_tfds(settings)


def make_example(settings, image, is_test, label, file):
    """Return an example of an image of any type and size, (height, width, channels)."""
    # Pillow can resize these two types.
    image = image.astype(np.uint8 if image.dtype in (np.uint8, bool) else np.float32, copy=False)
    if settings.image_size:
        size = (settings.image_size, settings.image_size)
        channels = [Image.fromarray(channel) for channel in np.moveaxis(image, -1, 0)]
        scaled = np.stack([ImageOps.fit(channel, size) for channel in channels], axis=-1)
        # Beside edges, values leave the range; Pillow cuts them off only if they have eight bits.
        is_float = image.dtype == np.float32
        image = np.clip(scaled, image.min(), image.max()) if is_float else scaled
    return Example(image, is_test, label, file)


def open_arrays(settings, path):
    """Open a .npz file with x_train, y_train, x_test and y_test, as Keras names them, or MNIST's
    IDX files in a folder; or a .npy file of one array.
    """
    pairs = load_pairs(path)
    total = sum(len(images) for images, _ in pairs.values())
    return total, read_arrays(settings, pairs)


def read_arrays(settings, pairs):
    """Yield the examples in arrays: pairs of images and labels, by split."""
    for name, (images, labels) in pairs.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield make_example(settings, image, name == "test", label, f"{name}/{number}")


def load_pairs(path):
    """Return {"train": (images, labels), "test": ...} of array files; "test" may be missing."""
    try:
        arrays = load_idx(path) if path.is_dir() else np.load(path, mmap_mode="r")
        if isinstance(arrays, np.ndarray):
            arrays = {"x_train": arrays}
        # Of .npz files, which are read whole, no other entry is opened.
        names = {"x_train", "y_train", "x_test", "y_test"}
        arrays = {name: np.asarray(arrays[name]) for name in names.intersection(arrays)}
    except MemoryError:
        raise
    except Exception as error:  # NumPy raises many errors for damaged files
        raise SettingsError(f"{path} cannot be used: {error}") from error
    pairs = {}
    for name in ("train", "test") if "x_test" in arrays else ("train",):
        images = arrays.get(f"x_{name}", np.empty(0))
        labels = arrays.get(f"y_{name}", np.full(images.shape[:1], "")).flatten()
        if labels.dtype.kind == "S":
            labels = np.char.decode(labels, "utf-8", "replace")
        is_image = images.dtype.kind in "buif" and images.ndim in (3, 4) and images.size > 0
        if not is_image or len(labels) != len(images):
            raise SettingsError(
                f"{path} must have numbers as x_{name}, (n, height, width) or (n, height, width,"
                f" channels), and n labels as y_{name}, if any"
            )
        pairs[name] = (images.reshape(*images.shape[:3], -1), labels)
    return pairs


def load_idx(folder):
    """Return the arrays in a folder of MNIST's format, plain or compressed (Yann LeCun's IDX)."""
    arrays = {}
    prefixes = set()
    for match in list_idx(folder):
        prefix, split, kind, is_compressed = match.groups()
        prefixes.add(prefix)
        content = (folder / match.string).read_bytes()
        if is_compressed:
            content = gzip.decompress(content)
        # Two bytes of 0, one for the type, one for the number of axes, and their sizes.
        shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
        array = np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)
        letter = "x" if kind == "images" else "y"
        arrays[f"{letter}_{'train' if split == 'train' else 'test'}"] = array
    if len(prefixes) > 1:
        raise ValueError(f"it has several sets: {', '.join(sorted(prefixes))}")
    return arrays


def list_idx(folder):
    """Return the matches of the names of MNIST's files in a folder."""
    pattern = r"(?!\.)(.*)(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [*filter(None, map(re.compile(pattern).fullmatch, names))]


def open_folder(settings, folder):
    """Open a folder of pictures; subfolders of it, or of its splits, are classes."""
    # What runs write is not data.
    excluded = {settings.log_dir.resolve(), settings.sample_dir.resolve()}
    if folder.resolve() in excluded:
        raise SettingsError(f"runs write into {folder}: use another --log-dir or --sample-dir")
    splits = choose_splits(folder, excluded)
    jobs = []  # for read_picture()
    for split, is_test in splits.items():
        for path in find_files(split, excluded):
            *classes, _ = path.relative_to(split).parts
            label = classes[0] if classes else ""
            jobs.append((path, is_test, label, path.relative_to(folder).as_posix()))
    return len(jobs), read_folder(settings, splits, jobs)


def choose_splits(folder, excluded):
    """Return the folders of a set, and whether each is to test on: {path: is_test}. For example:

        pets/train/cat  pets/test/cat   two splits, whose subfolders are classes
        pets/cat        pets/dog        the folder itself, and two classes
        pets/train      pets/car        the same: beside others, "train" alone may be a class
        pets/data/…     nothing else    as archives unpack: what is in the only subfolder

    Names of splits are those of find_splits().
    """
    paths = list_visible(folder, excluded)
    folders = [path for path in paths if path.is_dir()]
    train, test = find_splits(path.name for path in folders)
    if train and (test or len(folders) == 1):
        splits = {folder / train: False} | ({folder / test: True} if test else {})
        used = " and ".join(path.name for path in splits)
        unused = ", ".join(path.name for path in paths if path not in splits)
        print(f"splits   {used} in {folder}; not used: {unused or 'nothing'}")
        return splits
    if len(paths) == len(folders) == 1:
        return choose_splits(paths[0], excluded | {folder.resolve()})
    return {folder: False}


TRAIN_NAMES = ("train", "training", "trainset", "trainingset")
TEST_NAMES = ("test", "testing", "testset", "val", "valid", "validation", "eval", "dev")


def find_splits(names):
    """Return which of these names are the splits to train and to test on, or None for each.

    The first of TEST_NAMES wins. Case, hyphens, underscores and spaces do not matter.
    """
    plain = {re.sub("[-_ ]", "", name).lower(): name for name in sorted(names)}
    train = [plain[name] for name in TRAIN_NAMES if name in plain]
    test = [plain[name] for name in TEST_NAMES if name in plain]
    return next(iter(train), None), next(iter(test), None)


def find_files(folder, excluded):
    """Yield all visible files below a folder, in order, following links."""
    excluded = excluded | {folder.resolve()}  # following a link back to it would never end
    for path in list_visible(folder, excluded):
        if path.is_dir():
            yield from find_files(path, excluded)
        else:
            yield path


def list_visible(folder, excluded):
    """Return the paths in a folder, in order, but for excluded folders, and what is hidden or made
    by other programs: .git, ._x.png, @eaDir, __MACOSX.
    """
    generated = ("@eaDir", "__MACOSX", "__pycache__")
    paths = [path for path in sorted(folder.iterdir()) if path.name not in generated]
    paths = [path for path in paths if not path.name.startswith(".")]
    return [path for path in paths if not path.is_dir() or path.resolve() not in excluded]


def read_folder(settings, splits, jobs):
    """Yield the examples in picture files; print the remarks, such as why some are skipped."""
    found = set()  # splits, by is_test
    remarks = {}  # files by remark
    for example, remark, path in map_in_order(partial(read_picture, settings), jobs):
        if remark:
            remarks.setdefault(remark, []).append(path)
        if example:
            found.add(example.is_test)
            yield example
    for remark, paths in remarks.items():
        print(f"pictures {len(paths):,} {remark}, such as {paths[0]}")
    for split, is_test in splits.items():
        if is_test not in found:
            raise SettingsError(
                f"no pictures in {split}, of {len(jobs):,} files (to read a TFDS dataset, give its"
                " name, and the folder that has it as --data-dir)"
            )


def map_in_order(function, jobs):
    """Yield the function's results in the order of the jobs, computed on all cores in portions."""
    cores = os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        for start in range(0, len(jobs), 4 * cores):
            yield from pool.map(function, jobs[start : start + 4 * cores])


def read_picture(settings, job):
    """Return the example in a file, or None, with a remark on it or "", and its path."""
    path, is_test, label, file = job
    try:
        picture, remark = open_picture(path)
    except Skip as reason:
        return None, f"skipped, {reason}", path
    return make_example(settings, picture, is_test, label, file), remark, path


class Skip(Exception):
    """The reason why a file is not used."""


# Tags of TIFF and EXIF
THUMBNAIL = 254  # 1 if there is a larger picture in the file
DNG_VERSION = 50706
ORIENTATION = 274


def open_picture(path):
    """Return a picture, (height, width, channels), and a remark on it, or "". Raises Skip."""
    remark = ""
    if path.suffix.lower() in (".heic", ".heif"):
        raise Skip("of the format HEIC: convert them")
    Image.init()
    formats = [name for name in Image.OPEN if name != "EPS"]  # which Ghostscript would run
    try:
        if not path.is_file():  # opening a pipe would block
            raise Skip("not regular files")
        with Image.open(path, formats=formats) as picture:
            tags = getattr(picture, "tag_v2", {})
            if tags.get(THUMBNAIL) == 1 or DNG_VERSION in tags:
                raise Skip("raw files of a camera: convert them")
            if ";16" in str(picture.tile) and not picture.mode.startswith("I"):
                raise Skip("with 16-bit colours, of which Pillow keeps 8: convert them")
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                remark = "of several frames, of which the first is used"
            picture.load()
            try:
                turn_upright(picture)
            except Exception:
                remark = "taken as they lie, since their EXIF data cannot be read"
        if picture.mode.startswith(("I", "F")):  # more than eight bits
            return np.asarray(picture)[..., np.newaxis], remark
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return np.asarray(picture.convert("RGB")), remark
    except (Skip, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Skip("of too many pixels") from None
    except Exception:  # Pillow raises many errors for broken files
        raise Skip("since Pillow cannot read them") from None


def turn_upright(picture):
    """Turn a picture as its EXIF data say. Pillow raises many errors if they are damaged."""
    exif = picture.getexif()
    if not exif and len(picture.info.get("exif", "")) > 6:  # more than a header
        raise ValueError("Pillow found nothing in them")
    for tag in exif.keys() - {ORIENTATION}:  # Pillow would stumble over any that is malformed
        del exif[tag]
    ImageOps.exif_transpose(picture, in_place=True)


def open_tfds(settings):
    """Open a TFDS image dataset; download it if needed."""
    builder = find_builder(settings)
    if not builder.is_prepared():
        download(builder)
    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    train, test = find_splits(sizes)
    if not train:
        raise SettingsError(f"{settings.dataset} has no split to train on: {[*sizes]}")
    splits = {train: False} | ({test: True} if test else {})
    print(f"splits   {' and '.join(splits)} of {', '.join(sizes)}")
    return sum(sizes[split] for split in splits), read_tfds(settings, builder, splits)


def find_builder(settings):
    """Return TFDS's builder of an image dataset."""
    import absl.logging
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity("error")  # TFDS's own calls cause warnings
    try:
        with hide_own_modules():
            builder = tfds.builder(settings.dataset, data_dir=settings.data_dir)
            if "image" not in builder.info.features:
                raise ValueError("it has no images")
    except Exception as error:  # TFDS raises many errors for a wrong name
        reason, *_ = (str(error).strip() or repr(error)).splitlines()  # a list of all may follow
        raise SettingsError(
            f"{settings.dataset!r} is not a folder, a .npz or .npy file, or a TFDS image dataset:"
            f" {reason}"
        ) from None
    return builder


@contextlib.contextmanager
def hide_own_modules():
    """Import nothing from beside the script or the working folder, for a `with` block: the features
    of a TFDS dataset can name modules, and may have come with them.
    """
    search_path = sys.path.copy()
    own = (Path.cwd(), SCRIPT.parent)
    sys.path[:] = [folder for folder in search_path if Path(folder).resolve() not in own]
    try:
        yield
    finally:
        sys.path[:] = search_path


def download(builder):
    """Download a TFDS dataset."""
    import requests

    try:
        # Without a network, TFDS itself would try for minutes.
        requests.head("https://storage.googleapis.com", timeout=3)
        builder.download_and_prepare()
    except Exception as error:  # whatever broke it
        raise RunError(
            f"{builder.name} is not in {builder.data_dir}, and cannot be downloaded: see README.md"
            f" about offline use ({error})"
        ) from error


def read_tfds(settings, builder, splits):
    """Yield the examples of a TFDS dataset."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)
    wanted = {key: True for key in ("image", "label") if key in features}
    decoders = tfds.decode.PartialDecoding(wanted)
    # Labels without names are numbers or texts.
    to_name = getattr(features.get("label"), "int2str", tf.compat.as_str_any)
    # Batches are three times faster; they must be of one size, and small.
    shape = features["image"].shape
    batch_size = 1 if None in shape else max(1, 1_000_000 // math.prod(shape))
    try:
        for split, is_test in splits.items():
            number = 0
            batches = builder.as_dataset(split=split, decoders=decoders, batch_size=batch_size)
            for batch in tfds.as_numpy(batches):
                labels = batch.get("label", [""] * len(batch["image"]))
                for image, label in zip(batch["image"], labels, strict=True):
                    is_unlabelled = np.array_equal(label, -1)  # as in many test splits
                    name = "" if is_unlabelled else to_name(label)
                    yield make_example(settings, image, is_test, name, f"{split}/{number}")
                    number += 1
    except (ValueError, tf.errors.OpError) as error:
        raise RunError(f"{builder.data_dir} is damaged: download it again ({error})") from error


# --------------------------------------------------------------------------------------------------
# State, and resuming
#
# A step depends on the weights, the moments, the images, the settings and its own number, and on
# nothing else (see batch_indices). So a checkpoint of weights, moments, losses and configuration
# resumes a run to the bit. No signal is handled: Ctrl-C ends a run as kill -9 does, and costs the
# steps since the last checkpoint. Their events and pictures are written again, with equal values.


PROCESS_LOCK = threading.Lock()


@contextlib.contextmanager
def lock_process():
    """Keep other threads from training, for a `with` block: they share seed and layers' names."""
    if not PROCESS_LOCK.acquire(blocking=False):
        raise SettingsError("this process is training another run")
    try:
        yield
    finally:
        PROCESS_LOCK.release()


@contextlib.contextmanager
def lock_folder(folder):
    """Make the folder of a run; keep other processes from training it, for a `with` block."""
    _, index = read_workers()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / f".lock-{index}", blocking=False):
            yield
    except filelock.Timeout:
        raise SettingsError(f"another process is training the run of {folder}") from None


def read_weights(settings):
    """Return the weights of --weights by the paths of their variables; nothing without it, or if
    the file is gone and the run has a checkpoint.
    """
    path = settings.weights
    if not path or (not path.exists() and list_checkpoints(settings.log_folder)):
        return {}
    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises many errors for damaged files
        raise SettingsError(f"--weights {path} is missing or damaged: {error}") from error
    return {variable.path: variable.numpy() for variable in model.variables}


def assign_weights(autoencoder, weights):
    """Give a model the weights of --weights, if there are any."""
    if weights:
        problem = "--weights has other layers (see --depth, --latent-dim, FILTERS and the images)"
        assign(autoencoder.variables, weights, problem)


# Settings on which no step depends: names, places, intervals, and how many steps there are. Of
# files, the content is compared.
FREE = {"run_name", "log_dir", "sample_dir", "data_dir", "dataset", "weights"}
FREE |= {"steps", "sample_every", "checkpoint_every"}


def make_config(settings, data, weights):
    """Return all that determines a run's numbers, in four sections. To resume, a run needs

    - settings equal to those of its checkpoint, but for FREE ones,
    - equal checksums and an equal model, and
    - an equal machine, or it is warned of the difference.
    """
    is_constant = settings.schedule == "constant"
    content = b"".join(map(np.ndarray.tobytes, weights.values()))
    config = {
        "settings": settings.model_dump(mode="json"),
        "checksums": {
            "images": data.checksum,
            "test images": zlib.crc32(data.test_rows),  # which of the images they are
            "labels": zlib.crc32(data.labels[data.test_rows]),  # they choose the previews
            "weights": zlib.crc32(content) if weights else None,  # those of --weights
        },
        "model": {
            "filters": list(FILTERS[: settings.depth]),
            "preparation": list(data.preparation),
            "steps of the schedule": None if is_constant else settings.steps,  # for its rates
        },
        "machine": {  # what only last digits depend on
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
            "devices": list_devices(),
            "threads": tf.config.threading.get_intra_op_parallelism_threads(),
            "replicas": tf.distribute.get_strategy().num_replicas_in_sync,
        },
    }
    config["settings"]["initializer"] = name_initializer(data.image_shape, settings)
    return config


class State:
    """What a checkpoint holds: the configuration, weights and moments, the losses of all steps, and
    those of the previews.
    """

    def __init__(self, log_folder, config, variables):
        self.log_folder = log_folder
        self.config = config
        self.variables = variables  # weights and moments
        self.losses = np.zeros(0, np.float32)
        self.previews = {}  # losses by step

    @property
    def step(self):
        """The number of steps done."""
        return len(self.losses)

    def load_checkpoint(self):
        """Take over the newest checkpoint that is usable, if there is any.

        Raises SettingsError if it is of other settings, images or layers.
        """
        paths = list_checkpoints(self.log_folder)
        for path in reversed(paths):
            try:
                before, losses, previews, arrays = read_checkpoint(path)
            except MemoryError:
                raise
            except Exception as error:  # NumPy raises many errors for damaged files
                print(f"warning  {path} is damaged, and skipped: {error!r}")
                continue
            if self.config["checksums"]["weights"] is None:  # as the file may be gone
                self.config["checksums"]["weights"] = before["checksums"].get("weights")
            compare_configs(before, self.config)
            done = len(losses)
            if done > self.config["settings"]["steps"]:
                raise SettingsError(f"the run has {done:,} steps: --steps must not be smaller")
            problem = (
                "the layers or the optimizer in train_ae.py are not those of the run (undo the"
                " edit, or use another --run-name)"
            )
            assign(self.variables, arrays, problem)
            self.losses = losses
            self.previews = previews
            return
        if paths:
            raise RunError(f"no checkpoint in {self.log_folder} is usable: use another --run-name")

    def add_losses(self, losses):
        """Add the losses of steps that have been done."""
        self.losses = np.append(self.losses, losses)
        check_finite(losses, self.step)

    def save_checkpoint(self):
        """Write a checkpoint, and keep only the last three."""
        arrays = {variable.path: variable.numpy() for variable in self.variables}
        for array in arrays.values():
            check_finite(array, self.step)
        arrays |= {
            "config": json.dumps(self.config),
            "losses": self.losses,
            "previews": list(self.previews.items()),
        }
        path = self.log_folder / "checkpoints" / name_checkpoint(self.step)
        write_arrays(path, arrays)
        if is_chief():
            older = [other for other in list_checkpoints(self.log_folder) if other < path]
            for other in older[:-2]:
                other.unlink()


def read_checkpoint(path):
    """Return the configuration, losses, previews and arrays of a checkpoint."""
    with np.load(path) as file:
        arrays = dict(file)
    config = json.loads(str(arrays.pop("config")))
    # The defaults stand in for settings that have been added to the script since.
    config["settings"] = Settings().model_dump(mode="json") | config["settings"]
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("not all numbers are finite")
    losses = arrays.pop("losses")
    if losses.dtype != np.float32 or path.name != name_checkpoint(len(losses)):
        raise ValueError("its losses are not those of the steps")
    previews = {int(step): loss for step, loss in arrays.pop("previews")}
    return config, losses, previews, arrays


def compare_configs(before, now):
    """Refuse to resume a run of another configuration, or warn: see make_config()."""
    for section, values in now.items():
        for name, value in values.items():
            old = before[section].get(name)
            if value == old or (section == "settings" and name in FREE):
                continue
            message = f"the run has {name} {old}, but here it is {value}"
            if section == "machine":
                print(f"warning  {message}: numbers may differ")
                continue
            if section == "checksums":
                message = f"the {name} are not those of the run"
            raise SettingsError(f"{message}: use what it was started with, or another --run-name")


def assign(variables, arrays, problem):
    """Give variables the values of the arrays for their paths. Raises SettingsError if any is
    missing, left over, or of another shape.
    """
    given = {path: array.shape for path, array in arrays.items()}
    needed = {variable.path: tuple(variable.shape) for variable in variables}
    differences = sorted(given.items() ^ needed.items())
    if differences:
        name, _ = differences[0]
        raise SettingsError(
            f"{problem}: {name} is {given.get(name, 'missing')}, and here"
            f" {needed.get(name, 'missing')}"
        )
    for variable in variables:
        variable.assign(arrays[variable.path])


def name_checkpoint(step):
    """Return the name of the checkpoint of a step."""
    return f"step_{step:012}.npz"


def list_checkpoints(log_folder):
    """Return the paths of a run's checkpoints in order; other files are left alone."""
    return sorted(log_folder.glob(f"checkpoints/step_{'[0-9]' * 12}.npz"))


def check_finite(values, step):
    """Raise RunError if a value is infinite or not a number."""
    if not np.isfinite(values).all():
        raise RunError(
            f"loss or weights not finite by step {step:,}: use a lower --learning-rate, and another"
            " --run-name"
        )


def keep_script(path, is_new):
    """Copy this script for a new run; print the first changes since, if the run resumes."""
    now = SCRIPT.read_text("utf-8")
    if is_new:
        write_atomically(path, lambda part: part.write_text(now, "utf-8"))
    elif path.exists():
        before = path.read_text("utf-8", errors="replace").splitlines()
        edits = list(difflib.unified_diff(before, now.splitlines(), n=0, lineterm=""))
        if edits:
            print("warning  train_ae.py has changed since the run began: numbers may differ")
            print(*edits[2:12], sep="\n")  # the first two are names of files


# --------------------------------------------------------------------------------------------------
# Results


class Evaluation(NamedTuple):
    """What a model makes of a batch, and how good that is."""

    outputs: tf.Tensor
    latents: tf.Tensor
    loss: tf.Tensor  # the objective, a scalar
    # Of each image, with outputs clipped to [0, 1]:
    errors: tf.Tensor  # the squared error, summed over the image
    psnr: tf.Tensor  # in dB, at most 100


Evaluate = Callable[[tf.Tensor, tf.Tensor], Evaluation]


def compile_evaluation(autoencoder: keras.Model) -> Evaluate:
    """Return a function of images and inputs, which are the same images, or noisy ones: both
    (batch, height, width, channels) float32 in [0, 1].
    """

    def evaluate(images, inputs):
        latents = autoencoder.get_layer("encoder")(inputs, training=False)
        outputs = autoencoder.get_layer("decoder")(latents, training=False)
        shown = tf.clip_by_value(outputs, 0, 1)
        return Evaluation(
            outputs=outputs,
            latents=latents,
            loss=reconstruction_loss(images, outputs),
            errors=tf.reduce_sum(tf.square(shown - images), axis=[1, 2, 3]),
            psnr=tf.minimum(tf.image.psnr(images, shown, max_val=1), 100),
        )

    signature = [tf.TensorSpec(autoencoder.input_shape, tf.float32)] * 2
    return tf.function(evaluate, input_signature=signature, autograph=False)


def compute_metrics(
    settings: Settings, evaluate: Evaluate, data: Data
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the mean metrics of all test images, and the contents of latents.npz: the latent and
    the error of each, with labels, class names and file names.

    The inputs are clean, but those of "noisy_psnr". The log folder of the run must exist.
    """
    batches = batch_rows(data.test_rows, data.images)
    mean_image = compute_mean_image(data)
    mean_image_losses = []
    results = []
    noisy_psnr = []
    with tempfile.TemporaryFile(dir=settings.log_folder) as file:  # latents may outgrow memory
        for number, rows in enumerate(make_bar(batches, desc="testing", delay=2), start=1):
            images = data.prepare(rows)
            constant = tf.broadcast_to(mean_image, images.shape)
            mean_image_losses.append(reconstruction_loss(images, constant))
            result = evaluate(images, images)
            file.write(result.latents.numpy())
            results.append(result._replace(outputs=None, latents=None))
            if settings.noise:
                noisy = add_noise(images, settings.noise, settings.seed, -number)
                noisy_psnr.append(evaluate(images, noisy).psnr)
        file.flush()
        shape = (len(data.test_rows), *result.latents.shape[1:])
        latents = np.memmap(file, np.float32, "r", shape=shape)
    sizes = [len(rows) for rows in batches]
    losses = [result.loss for result in results]
    errors = np.concatenate([result.errors for result in results])
    psnr = np.concatenate([result.psnr for result in results])
    metrics = {
        "test_loss": float(np.average(losses, weights=sizes)),
        "mean_image_loss": float(np.average(mean_image_losses, weights=sizes)),
        "squared_error": float(errors.mean()),
        "psnr": float(psnr.mean()),
    }
    if settings.noise:
        metrics["noisy_psnr"] = float(np.concatenate(noisy_psnr).mean())
    arrays = {
        "latents": latents,
        "errors": errors,
        "labels": data.labels[data.test_rows],
        "classes": data.classes,
        "files": data.files[data.test_rows],
    }
    return metrics, arrays


def batch_rows(rows, images):
    """Return rows of images in batches of about 100,000 values: larger ones are not faster."""
    values = len(rows) * math.prod(images.shape[1:])
    return np.array_split(rows, min(len(rows), math.ceil(values / 100_000)))


def compute_mean_image(data):
    """Return the mean of the training images, or of evenly chosen ones if they are many: the
    constant picture that a model has to beat.
    """
    size = len(data.train_rows) * data.images[0].nbytes
    used = data.train_rows[:: math.ceil(size / 100_000_000)]  # more would take much memory
    return prepare(data.images[used].mean(axis=0, dtype=float), data.preparation)


# --------------------------------------------------------------------------------------------------
# Pictures and curves


GAP = 2  # between the images of a picture, in pixels
TITLE_HEIGHT = 28  # in pixels
MIN_WIDTH = 300  # of a picture, in pixels: the longest title fits
BACKGROUND = 32  # of pictures: a grey that suits any page


def write_description(settings, evaluate, writer):
    """Write the settings, for TensorBoard's table of runs, and the graph of the model."""
    with writer.as_default(step=0):
        hparams_api.hparams(settings.model_dump(mode="json", exclude_none=True))
        tf.summary.graph(evaluate.get_concrete_function().graph)


def write_preview(state, images, evaluate, settings, writer, bar):
    """Write a picture of test images, with its loss, to a file and to TensorBoard; keep that loss,
    and show it beside the mean of the last 50 training losses.
    """
    step = state.step
    inputs = add_noise(images, settings.noise, settings.seed, number=-1)
    result = evaluate(images, inputs)
    loss = float(result.loss)
    check_finite(loss, step)
    state.previews[step] = loss
    strips = [images, inputs] if settings.noise else [images]
    strips.append(result.outputs)
    grid = draw_grid(strips, f"step {step:,}   preview loss {loss:.4f}")
    save = partial(grid.save, compress_level=1)  # the default takes twice the time
    write_atomically(preview_path(step, settings), save)
    with writer.as_default(step=step):
        tf.summary.scalar("loss", loss)
        tf.summary.image("reconstructions", arrange(strips)[np.newaxis])  # not zoomed
    text = f"preview loss {loss:.4f}"
    if step:
        text = f"loss {state.losses[-50:].mean():.4f}  {text}"
    bar.set_postfix_str(text, refresh=False)
    if bar.disable:
        print(f"step {step:6,}  {text}")


def preview_path(step, settings):
    """Return the path of the preview of a step."""
    return settings.sample_folder / f"step_{step:05}.png"


def choose_preview_rows(data):
    """Return the rows of test images to show: one of each class first."""
    _, chosen = np.unique(data.labels[data.test_rows], return_index=True)
    others = np.setdiff1d(np.arange(len(data.test_rows)), chosen)
    return data.test_rows[np.concatenate([chosen, others])[: count_in_picture(data)]]


def count_in_picture(data):
    """Return how many images a picture shows side by side: ten, or fewer if they are wide."""
    return max(1, min(10, 1400 // data.images.shape[2]))


def draw_grid(strips, title):
    """Return a picture of strips, one below the other, with a title above them."""
    zoom = max(1, 100 // max(strips[0].shape[1:3]))  # small images grow to about 100 pixels
    grid = Image.fromarray(arrange(strips).squeeze())  # Pillow has no axis for a single channel
    grid = ImageOps.scale(grid, zoom, Image.Resampling.NEAREST)
    color = (BACKGROUND,) * len(grid.getbands())
    more = max(0, MIN_WIDTH - grid.width)
    grid = ImageOps.expand(grid, (0, TITLE_HEIGHT, more, 0), color)
    pen = ImageDraw.Draw(grid)
    pen.text((6, TITLE_HEIGHT // 2), title, "white", font_size=16, anchor="lm")
    return grid


def arrange(strips):
    """Return strips of images, each (n, height, width, channels) in [0, 1], with gaps around the
    images, as a single image, (height, width, channels) uint8.
    """
    pixels = np.rint(np.clip(strips, 0, 1) * 255).astype(np.uint8)
    # Before and after each axis: strips, images, height, width, channels.
    gaps = [(0, 0), (0, 0), (0, GAP), (GAP // 2, GAP // 2), (0, 0)]
    tiles = np.pad(pixels, gaps, constant_values=BACKGROUND)
    return np.vstack([np.hstack(strip) for strip in tiles])


def draw_pictures(settings, state, evaluate, data, errors):
    """Draw the pictures of a finished run; say which cannot be drawn, and go on."""
    if not is_chief():
        return
    paths = [preview_path(step, settings) for step in state.previews]
    jobs = {
        "training.gif": partial(draw_animation, paths=paths),
        "summary.png": partial(draw_summary, state=state),
        "worst.png": partial(draw_worst, evaluate=evaluate, data=data, errors=errors),
    }
    for name, draw in jobs.items():
        path = settings.sample_folder / name
        try:
            draw(path)
        except Exception as error:  # Pillow raises many for damaged files, and for large pictures
            print(f"warning  {path} cannot be drawn: {error}")


def draw_worst(path, evaluate, data, errors):
    """Draw the test images with the largest errors above their reconstructions, the worst first."""
    worst = np.argsort(-errors, kind="stable")[: count_in_picture(data)]
    images = data.prepare(data.test_rows[worst])
    title = f"squared errors from {errors[worst[0]]:.4g} to {errors[worst[-1]]:.4g}"
    grid = draw_grid([images, evaluate(images, images).outputs], title)
    write_atomically(path, grid.save)


def draw_animation(path, paths):
    """Write a GIF of about twenty of the previews, most of them from the beginning."""
    # Geometric spacing favours the beginning, and repeats indices there: hence unique().
    indices = np.unique(np.geomspace(1, len(paths), 28).astype(int)) - 1
    pictures = [Image.open(paths[index]) for index in indices]
    # 16 grey levels make the file three times smaller.
    frames = [picture.point(lambda value: value // 16 * 17) for picture in pictures]
    times = [300] * (len(frames) - 1) + [3000]  # ms
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    write_atomically(path, partial(frames[0].save, **options))


@matplotlib.style.context("default")  # whatever a matplotlibrc says
def draw_summary(path, state):
    """Plot the losses of training, averaged over 1% of the steps, and the preview losses."""
    axes = Figure(figsize=(9, 5)).subplots()
    parts = np.array_split(state.losses, min(state.step, 100))
    ends = np.cumsum([len(part) for part in parts])
    axes.semilogy(ends, [part.mean() for part in parts], label="training")
    axes.semilogy(list(state.previews), list(state.previews.values()), label="preview")
    axes.set(xlabel="step", title="reconstruction loss")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    write_atomically(path, axes.figure.savefig)


# --------------------------------------------------------------------------------------------------
# Files


def open_writer(folder):
    """Return a writer of TensorBoard's events.

    It flushes at the end of a `with` block, and only then: more often would take longer.
    """
    if not is_chief():
        return tf.summary.create_noop_writer()
    folder.mkdir(parents=True, exist_ok=True)  # its error names the folder, TensorFlow's does not
    return tf.summary.create_file_writer(str(folder), max_queue=10**6, flush_millis=10**9)


def write_json(path, values):
    """Write a dictionary as JSON."""
    write_atomically(path, lambda part: part.write_text(json.dumps(values, indent=2)))


def write_arrays(path, arrays):
    """Write a dictionary of arrays as .npz."""
    write_atomically(path, lambda part: np.savez(part, **arrays))


def write_atomically(path, save):
    """Have `save` write a temporary file, then rename it to `path`, if this is the chief."""
    if not is_chief():
        return
    part = path.with_name(f".part-{path.name}")  # a prefix: the suffix selects the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # it might be a link
        save(part)
        part.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# --------------------------------------------------------------------------------------------------
# Devices, and several machines: all workers run the same command; only TF_CONFIG differs


def configure_tensorflow(settings):
    """Set threads and GPU memory, before TensorFlow creates its devices: the first run of a process
    fixes them. Forget earlier models.
    """
    tf.get_logger().setLevel("ERROR")  # no warnings about retracing
    keras.utils.clear_session()  # automatic names, which checkpoints contain, start over
    keras.config.set_floatx("float32")  # whatever ~/.keras/keras.json says
    keras.config.set_image_data_format("channels_last")
    # The last digits of sums depend on the threads. One thread is fastest for one small image.
    is_small = settings.batch_size == 1 and not is_large_step(settings)
    threads = 1 if is_small else os.cpu_count()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.experimental.enable_op_determinism()  # CPUs are deterministic anyway
    with contextlib.suppress(RuntimeError):  # TensorFlow has already been used in this process
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(2)
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)


def make_strategy(settings):
    """Return the strategy for the workers of TF_CONFIG, the GPUs here, or a single device."""
    gpus = tf.config.list_physical_devices("GPU")
    workers, _ = read_workers()
    if workers:
        print(f"workers  waiting for {', '.join(workers)}")
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except tf.errors.OpError as error:
            raise RunError(f"the workers cannot connect: {error}") from error
        with contextlib.suppress(ValueError):  # outside of the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # TensorFlow has begun to ignore it
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


def read_workers():
    """Return the addresses of all workers in TF_CONFIG, and which one this is, or none and 0."""
    with contextlib.suppress(ValueError, RecursionError):  # of text that is no JSON
        config = json.loads(os.environ.get("TF_CONFIG") or "{}")
        if config == {}:  # as clouds set it for a single machine
            return [], 0
        match config:
            case {
                "cluster": {"worker": [*addresses], **other_jobs},
                "task": {"type": "worker", "index": int(index)},
            } if index in range(len(addresses)) and not other_jobs:
                return addresses, index
    form = '{"cluster": {"worker": ["HOST:PORT", …]}, "task": {"type": "worker", "index": 0}}'
    raise SettingsError(f"TF_CONFIG must have the form {form}")


def is_chief():
    """Return whether this process writes the files: among several workers, the first one does."""
    _, index = read_workers()
    return index == 0


def compare_workers(folder, config):
    """Refuse workers that differ in settings, images, model or checkpoints (one would resume, one
    not), once all of them have called this. TensorFlow raises an OpError if one has ended.
    """
    facts = config["settings"] | config["checksums"] | config["model"]
    facts["checkpoints"] = list_checkpoints(folder)
    strategy = tf.distribute.get_strategy()
    checksums = [zlib.crc32(str(value).encode()) for value in facts.values()]
    own = strategy.run(lambda: tf.constant([checksums], tf.int64))
    gathered = strategy.gather(own, axis=0).numpy()  # (devices, facts), once all have come here
    is_different = (gathered != gathered[0]).any(axis=0)
    if is_different.any():
        names = ", ".join(np.array(list(facts))[is_different])
        raise SettingsError(
            f"the workers differ in {names}: they must run one command, with --run-name, on the"
            " same images, and share --log-dir"
        )


def list_devices():
    """Return the names of the devices that this process trains on, such as GPU:0."""
    devices = tf.distribute.get_strategy().extended.worker_devices
    return [name.split("device:")[-1] for name in devices]


# --------------------------------------------------------------------------------------------------
# Main


def main(settings: Settings) -> int:
    """Train; return the exit status: 0, 1 for a failure, 2 for unusable settings."""
    try:
        train(settings)
        return 0
    except SettingsError as error:
        return fail(error, status=2)
    except (RunError, OSError) as error:
        return fail(error)
    except (tf.errors.UnavailableError, tf.errors.AbortedError):
        name = settings.run_name
        return fail(f"another worker has ended: to resume, start all with --run-name {name} again")
    except (MemoryError, tf.errors.OpError) as error:
        if "tfevents" in str(error):
            return fail(f"{settings.log_dir} cannot be written: is the disk full?")
        if isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError)):
            return fail(
                "out of memory: use a smaller --batch-size or --image-size, or .npy for .npz"
            )
        raise


def fail(error, status=1):
    """Print one line about a failure; return the exit status."""
    message = str(error) or repr(error)
    print(f"train_ae.py: {message.splitlines()[0]}", file=sys.stderr)
    return status


def print_overview(settings, data, state):
    """Print what a run uses, where its results are, and how to resume it."""
    height, width, channels = data.image_shape
    train_count = len(data.train_rows)
    names = ", ".join(data.classes[:10]) + (", …" if len(data.classes) > 10 else "")
    classes = f"{len(data.classes):,}: {names}" if names else "no labels"
    initial = f"{name_initializer(data.image_shape, settings)} initial weights"
    epochs = settings.steps * settings.batch_size / train_count
    print("device  ", ", ".join(list_devices()))
    print(
        f"data     {settings.dataset}: {train_count:,} images to train on,"
        f" {len(data.test_rows):,} to test on, {height}x{width}x{channels}"
    )
    print(f"classes  {classes}")
    tying = ", the decoder's kernels replaced by the encoder's" if settings.tied else ""
    if not state.step:
        print(f"weights  {settings.weights or initial}{tying}")
    print(f"steps    {settings.steps:,} x {settings.batch_size:,} images = {epochs:.3g} epochs")
    if state.step:
        print(f"resumes  after step {state.step:,} of {settings.steps:,}")
    print(f"writes   {settings.log_folder} and {settings.sample_folder}")
    print(f"resume   with the same command and --run-name {settings.run_name}")
    print(f'view     tensorboard --logdir "{settings.log_dir}" --samples_per_plugin images=1000')


def print_results(settings, data, metrics):
    """Print how good the result is, and where it is."""
    loss = metrics["test_loss"]
    mean_image_loss = metrics["mean_image_loss"]
    print(
        f"done     test loss {loss:.4f} ({mean_image_loss:.4f} for the mean training image),"
        f" PSNR {metrics['psnr']:.1f} dB, on {len(data.test_rows):,} test images"
    )
    if settings.noise:
        print(f"noisy    PSNR {metrics['noisy_psnr']:.1f} dB, from the same images with noise")
    if loss >= mean_image_loss:
        print("warning  the model is no better than one constant picture: train it longer")
    names = "training.gif, summary.png, worst.png, step_….png"
    print(f"pictures {settings.sample_folder}: {names}")
    print(f"model    {settings.log_folder / 'autoencoder.keras'}")


if __name__ == "__main__":
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or io.StringIO()  # pythonw has none
        if hasattr(stream, "reconfigure"):
            # Names of files may not be UTF-8; pipes are to get each line at once.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, stream)
    sys.exit(main(command_line_settings))
