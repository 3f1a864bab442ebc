"""Train a convolutional autoencoder on MNIST, one digit at a time.

    python train_ae.py                  # 3,000 steps; pictures in samples/, curves in logs/
    tensorboard --logdir logs --samples_per_plugin images=1000
    python train_ae.py --resume RUN     # goes on with a run that was stopped
    python train_ae.py --help           # every setting

Four stride-2 convolutions squeeze a digit of 28x28 pixels to a latent tensor of 2x2x128, four transposed
convolutions draw it again, and Adam lowers the squared error between the two. The default run takes about
7 seconds on two cores of an AMD EPYC (Zen 4), and reaches a test loss of 0.0144 +- 0.0003 (5 seeds, 1,000 digits).
"""

import gc
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run just ends the process

# These have to be set before TensorFlow is imported. On a batch of one, oneDNN makes a step four times slower.
# TensorFlow's own log says little here that does not reach Python as an exception too. The garbage collector would
# only go again and again through what the imports build, and nothing of that is garbage.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
gc.disable()

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import keras
import numpy as np
import requests
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

gc.freeze()
gc.enable()

SHIPPED_DIGITS = Path(__file__).resolve().parent / "samples" / "mnist_5k.npz"
SIZES = (28, 14, 7, 4, 2)  # height and width of the image and of the output of each encoder layer
CHANNELS = (1, 16, 32, 64, 128)
IMAGE_SHAPE = (SIZES[0], SIZES[0], CHANNELS[0])
PIXELS = SIZES[0] ** 2


# --- settings ---
class SettingsError(ValueError):
    """A setting that cannot be used, with what to do about it."""


def setting(default: Any, help: str, least: float | None = None) -> Any:
    """Return a dataclass field that carries its help line and, for a number, the least that it can be."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


def flag(name: str) -> str:
    """Return a setting's name on the command line: `--batch-size` for batch_size."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. Raises SettingsError for a value out of its range."""

    steps: int = setting(3000, "updates of the weights", 1)
    batch_size: int = setting(1, "images in each step", 1)
    learning_rate: float = setting(0.001, "learning rate of Adam", 1e-9)
    sample_every: int = setting(50, "steps from one picture and test figure to the next", 1)
    checkpoint_every: int = setting(500, "steps from one checkpoint to the next", 1)
    seed: int = setting(0, "seed of the initial weights and of the order of the images", 0)
    dataset: str = setting("mnist", "TFDS set of 28x28x1 images, or mnist_5k for the digits shipped with this script")
    data_dir: str | None = setting(None, "folder of TFDS's data sets (default: TFDS_DATA_DIR, else TFDS's own)")
    device: str = setting("auto", "auto, cpu or gpu; auto takes a GPU where there is one")
    run_name: str | None = setting(None, "name of the run and of its folders (default: the date and time)")
    log_dir: str = setting("logs", "folder for TensorBoard events, the trained model and the figures")
    sample_dir: str = setting("samples", "folder for pictures")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            if least is not None and not (isinstance(value, (int, field.type)) and least <= value < 2**31):
                kind = "whole number" if field.type is int else "number"
                raise SettingsError(f"{flag(field.name)} must be a {kind} from {least} to {2**31 - 1}, not {value}")
        if self.device not in ("auto", "cpu", "gpu"):
            raise SettingsError(f"the device must be auto, cpu or gpu, not {self.device}")
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

    `needed` counts training images; by default they are as many as the steps take. Raises SettingsError for a data
    set that cannot be used, ConnectionError for one that cannot be downloaded.
    """
    needed = needed or settings.steps * settings.batch_size
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
def build_autoencoder() -> keras.Model:
    """Return the autoencoder, (batch, 28, 28, 1) float32 in [0, 1] to the same shape in (-1, 1), 194,177 parameters.

    Its layers "encoder", to latents (batch, 2, 2, 128), and "decoder", back from them, are models of their own.
    """

    def conv(kind: type[layers.Layer], name: str, filters: int, **options: Any) -> layers.Layer:
        # Keras's leaky ReLU has the article's slope, 0.2. The initialiser is one a layer, since one that is shared
        # draws the same numbers again.
        kernel = keras.initializers.TruncatedNormal(stddev=0.02)
        options |= {"strides": 2, "padding": "same", "activation": "leaky_relu", "kernel_initializer": kernel}
        return kind(filters, kernel_size=3, name=name, **options)

    depth = len(SIZES) - 1
    encoder = [conv(layers.Conv2D, f"conv{i}", CHANNELS[i]) for i in range(1, depth + 1)]
    decoder = [  # a transposed convolution can draw 2n or 2n - 1 pixels from n: the padding says which
        conv(layers.Conv2DTranspose, f"deconv{depth - i}", CHANNELS[i], output_padding=1 - SIZES[i] % 2)
        for i in reversed(range(depth))
    ]
    latent = keras.Input((SIZES[-1], SIZES[-1], CHANNELS[-1]))
    parts = [
        keras.Sequential([keras.Input(IMAGE_SHAPE), *encoder], name="encoder"),
        keras.Sequential([latent, *decoder, layers.Activation("tanh", name="output")], name="decoder"),
    ]
    return keras.Sequential([keras.Input(IMAGE_SHAPE), *parts], name="autoencoder")


# --- objective ---
def reconstruction_loss(images: tf.Tensor, reconstructions: tf.Tensor) -> tf.Tensor:
    """Return the squared error of (batch, height, width, channels): summed over channels, then the mean."""
    return tf.reduce_mean(tf.reduce_sum(tf.square(reconstructions - images), axis=-1))


class Adam(tf.Module):
    """Adam (Kingma & Ba 2015, end of section 2) in TensorFlow's fused operation, as the article's optimizer ran it.

    That is one operation a variable instead of a dozen, and a third off the time of a step on one image. Epsilon
    is the article's as well: Keras's 1e-7 is of the size of the first gradients here and leads to other weights.
    """

    def __init__(self, weights: Sequence[tf.Variable], learning_rate: float) -> None:
        super().__init__()
        self.weights, self.learning_rate = list(weights), learning_rate
        self.means, self.squares = ([tf.Variable(tf.zeros_like(w)) for w in weights] for _ in range(2))

    def apply(self, gradients: Sequence[tf.Tensor], step: tf.Tensor) -> None:
        """Update the weights with the gradients of `step`, counted from 0."""
        rates = {"lr": self.learning_rate, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
        for name in ("beta1", "beta2"):
            rates[f"{name}_power"] = rates[name] ** tf.cast(step + 1, tf.float32)
        for w, m, v, gradient in zip(self.weights, self.means, self.squares, gradients, strict=True):
            tf.raw_ops.ResourceApplyAdam(var=w.handle, m=m.handle, v=v.handle, grad=gradient, **rates)


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


def make_train_steps(
    autoencoder: keras.Model, optimizer: Adam, images: np.ndarray, settings: Settings, writer: tf.summary.SummaryWriter
) -> Callable[[int, int], tf.Tensor]:
    """Return the compiled function that trains from step `first` to before step `last`: its losses, (last - first,).

    Each loss is that of the step's batch before its update, and goes to TensorBoard as it is computed.
    """
    count, images = len(images), tf.constant(images)  # uint8, on the device as a whole: no input pipeline to wait for

    def train_step(step: tf.Tensor) -> tf.Tensor:
        batch = to_float(tf.gather(images, batch_indices(step, settings.batch_size, count, settings.seed)))
        with tf.GradientTape() as tape:
            loss = reconstruction_loss(batch, autoencoder(batch, training=True))
        optimizer.apply(tape.gradient(loss, optimizer.weights), step)
        with writer.as_default(), tf.name_scope("/"):  # else the loop is part of the tag: map/while/loss
            tf.summary.scalar("loss", loss, step)
        return loss

    @tf.function(input_signature=[tf.TensorSpec((), tf.int64)] * 2, autograph=False)
    def train_steps(first: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(train_step, tf.range(first, last), parallel_iterations=1, fn_output_signature=tf.float32)

    return train_steps


@tf.function(autograph=False)
def evaluate(autoencoder: keras.Model, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the reconstructions of uint8 images, and the squared error and PSNR (dB) of each: (batch,)."""
    images, half = to_float(images), tf.shape(images)[0] // 2
    halves = images[:half], images[half:]  # two, which run side by side: in a run of batch size 1, one does not share
    reconstructions = tf.concat([autoencoder(part, training=False) for part in halves], axis=0)
    psnr = tf.image.psnr(images, tf.clip_by_value(reconstructions, 0, 1), max_val=1)
    return reconstructions, tf.reduce_sum(tf.square(reconstructions - images), axis=[1, 2, 3]), psnr


def final_figures(autoencoder: keras.Model, images: np.ndarray) -> dict[str, float]:
    """Return the means over uint8 test images of the loss, the squared error, PSNR (dB) and SSIM."""
    figures = []
    for batch in np.array_split(images, -(-len(images) // 500)):
        reconstructions, squared_error, psnr = evaluate(autoencoder, batch)
        ssim = tf.image.ssim(to_float(batch), tf.clip_by_value(reconstructions, 0, 1), max_val=1)
        figures.append(np.stack([squared_error / PIXELS, squared_error, psnr, ssim]))
    names = ("test_loss", "test_squared_error_per_image", "psnr", "ssim")
    return dict(zip(names, np.concatenate(figures, axis=1, dtype=float).mean(axis=1).tolist(), strict=True))


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


def draw_summary(record: "Record") -> Figure:
    """Return a figure: the losses on a log scale, beside the first row of test images as drawn along the run."""
    losses = np.array(list(record.losses.values()), np.float32)
    figure = Figure(figsize=(13, 5))
    curves, digits = figure.subplots(1, 2, width_ratios=(1, 1.1))
    figure.subplots_adjust(0.08, 0.1, 0.99, 0.93, wspace=0.18)
    window, thin = min(50, len(losses)), len(losses) // 4000 + 1  # a long curve takes memory, and shows no more
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
    return figure


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


@contextlib.contextmanager
def only_process(logs: Path) -> Iterator[None]:
    """Keep other processes from a run; raises SettingsError where one has it. The lock ends with the process."""
    lock = filelock.FileLock(logs / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SettingsError("another process is training this run") from None
    try:
        yield
    finally:
        lock.release()


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
    """What a run writes as it goes: the losses and figures for TensorBoard, and the pictures.

    Has `losses`, of training, and `tests`, both from a step to its value.
    """

    def __init__(self, logs: Path, samples: Path, data: Data, step: int) -> None:
        """Go on at a step: what was written after it is removed, and before the first one, all is."""
        self.samples, self.images = samples, data.test[pick_test_images(data.test_labels)]
        self.originals = self.images[: max(COLUMNS, len(np.unique(data.test_labels)))] / np.float32(255)
        self.losses = cut_events(logs / "train", step)
        self.tests = cut_events(logs / "test", step + 1 if step else 0)
        self.train, self.test = (tf.summary.create_file_writer(str(logs / kind)) for kind in ("train", "test"))

    def grid(self, step: int) -> Path:
        """Return the path of a step's picture."""
        return self.samples / f"step_{step:05}.png"

    def describe(self, autoencoder: keras.Model, config: dict[str, Any]) -> None:
        """Write the model's graph and the settings."""
        with self.train.as_default(step=0):
            forward = tf.function(autoencoder, autograph=False)
            tf.summary.graph(forward.get_concrete_function(tf.TensorSpec((None, *IMAGE_SHAPE))).graph)
            rows = [f"| {key} | {value} |" for key, value in config.items()]
            tf.summary.text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def look(self, autoencoder: keras.Model, step: int) -> None:
        """Write the test figures and the picture of the model after `step` updates."""
        reconstructions, squared_error, psnr = (value.numpy() for value in evaluate(autoencoder, self.images))
        self.tests[step] = squared_error.mean() / PIXELS
        title = f"step {step:,}    test loss {self.tests[step]:.4f}"
        grid = draw_grid(self.originals, reconstructions[: len(self.originals)], title)
        write_whole(self.grid(step), grid.save)
        with self.test.as_default(step=step):
            tf.summary.scalar("loss", self.tests[step])
            tf.summary.scalar("psnr", psnr.mean())
            tf.summary.image("reconstructions", np.asarray(grid)[None, ..., None])
        self.flush()

    def flush(self) -> None:
        """Have TensorBoard see all that has been written."""
        self.train.flush()
        self.test.flush()


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
    used = f"{len(data.train):,} training and {len(data.test):,} test images: {data.source}"
    versions = {"python": sys.version.split()[0], "tensorflow": tf.__version__, "keras": keras.__version__}
    config = dataclasses.asdict(settings) | {"data": used, "training_images": len(data.train)} | versions
    if not resume:
        make_run(logs, samples, config)
    with only_process(logs), tf.device(device):
        autoencoder = build_autoencoder()
        optimizer = Adam([variable.value for variable in autoencoder.trainable_variables], settings.learning_rate)
        saved = {"step": tf.Variable(0, dtype=tf.int64), "spent": tf.Variable([0.0, 0.0], dtype=tf.float64)}
        checkpoint = tf.train.Checkpoint(optimizer=optimizer, **saved)
        if resume:
            restore(checkpoint, logs / "checkpoints")
        step, (looped, before) = int(saved["step"]), saved["spent"].numpy().tolist()
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
            print(f"resumes  {logs} at step {step:,}")
        print(f"device   {device[1:4]}\ndata     {used}\nwrites   {logs} and {samples}")
        print(f"to see   tensorboard --logdir {settings.log_dir} --samples_per_plugin images=1000", flush=True)
        record = Record(logs, samples, data, step)
        if step == 0:
            record.describe(autoencoder, config)
        manager = tf.train.CheckpointManager(checkpoint, str(logs / "checkpoints"), max_to_keep=3)
        train_steps = make_train_steps(autoencoder, optimizer, data.train, settings, record.train)
        layout = {"bar_format": "{n}/{total} |{bar}|{postfix}, {remaining} left", "file": sys.stdout}
        bar = tqdm(total=settings.steps, initial=step, disable=not sys.stdout.isatty(), **layout)
        recent = []
        while True:
            if step not in record.tests and (step % settings.sample_every == 0 or step == settings.steps):
                record.look(autoencoder, step)
                report = f"test loss {record.tests[step]:.4f}"
                if recent:
                    report = f"loss {np.mean(recent):.4f}  {report}  {1e3 * looped / step:.2f} ms a step"
                recent = []
                bar.set_postfix_str(report, refresh=False)
                bar.update(step - bar.n)
                if bar.disable:
                    print(f"step {step:6,}  {report}", flush=True)
            ends = len(stop) > 0 or step == settings.steps
            if step and (ends or step % settings.checkpoint_every == 0):
                record.flush()  # what is before a checkpoint must not be lost with what is after it
                saved["step"].assign(step)
                saved["spent"].assign([looped, before + time.perf_counter() - started])
                manager.save(checkpoint_number=step)
            if ends:
                break
            following = (step - step % every + every for every in (settings.sample_every, settings.checkpoint_every))
            last, called = min(settings.steps, *following), time.perf_counter()
            losses = train_steps(step, last).numpy()
            looped += time.perf_counter() - called
            if not np.isfinite(losses).all():
                wrong = step + int(np.argmin(np.isfinite(losses)))
                raise FloatingPointError(f"the loss at step {wrong} is not finite; try a lower --learning-rate")
            record.losses.update(zip(range(step, last), losses, strict=True))
            recent.extend(losses)
            step = last
        bar.close()
        if stop:
            run = logs.name if settings.log_dir == Settings.log_dir else logs
            raise KeyboardInterrupt(f"stopped at step {step:,}; to go on: python train_ae.py --resume {run}")

        write_whole(samples / "summary.png", lambda part: draw_summary(record).savefig(part, dpi=100))
        write_whole(logs / "autoencoder.keras", autoencoder.save)
        metrics = final_figures(autoencoder, data.test)
    timing = {"ms_per_step": 1e3 * looped / step, "seconds": before + time.perf_counter() - started}
    metrics |= {"steps": step, **timing, "data": used}
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
        kind = field.type if field.type in (int, float) else str
        text = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
        options = {"default": argparse.SUPPRESS, "metavar": kind.__name__.upper(), "help": text}
        parser.add_argument(flag(field.name), type=kind, **options)
    text = "name of a run to go on with; only --steps and --device may be given too"
    parser.add_argument("--resume", metavar="RUN", help=text)
    given = vars(parser.parse_args(arguments))
    run, images = given.pop("resume"), None
    try:
        if run is None:
            settings = Settings(**given)
        elif other := given.keys() - {"steps", "device"}:
            raise SettingsError(f"--resume keeps the settings of the run; leave out {flag(min(other))}")
        else:
            settings, images = read_config(run)
            settings = dataclasses.replace(settings, **given)
        train(settings, resume=images, stop=stop)
    except (SettingsError, KeyboardInterrupt, FloatingPointError, OSError, tf.errors.OpError) as error:
        print(f"{parser.prog}: {first_line(error)}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + (stop[0] if stop else signal.SIGINT)
        return 2 if isinstance(error, SettingsError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(stop=watch_signals()))
