"""Train a convolutional autoencoder on MNIST, on any TFDS image set, or on pictures of your own.

    python train_ae.py                       # 3,000 steps on MNIST; Ctrl-C prints the command that resumes
    python train_ae.py --dataset FOLDER --image-size 64 --batch-size 32 --pretrain-steps 300
    tensorboard --logdir logs --samples_per_plugin images=1000

Four stride-2 convolutions encode an image, four transposed ones decode it, and Adam minimizes the squared error, as in
the article of tests/README.md. The default run reaches a test loss of 0.0144 in 7 to 12 seconds on two EPYC cores.
"""

import gc
import os
import signal

# These act at import. oneDNN makes a step on one image take four times as long; collecting garbage slows the imports.
os.environ |= {"TF_ENABLE_ONEDNN_OPTS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"} | os.environ
os.environ |= {"KERAS_BACKEND": "tensorflow", "MPLBACKEND": "agg"}
gc.disable()
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import sys
import time
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import chain, product, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import filelock
import keras
import matplotlib.style
import numpy as np
import psutil
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.histogram import metadata as histogram_plugin  # tf.summary.histogram is ten times slower
from tensorboard.plugins.hparams.api import hparams
from tensorboard.plugins.image import metadata as image_plugin
from tqdm import tqdm

gc.freeze()
gc.enable()

FILTERS = (16, 32, 64, 128)  # of the encoder's layers; the decoder mirrors them


def build_autoencoder(image_shape: Sequence[int], depth: int = len(FILTERS), latent_dim: int = 0) -> keras.Model:
    """Return the autoencoder, (batch, *image_shape) float32 in [0, 1] to the same in (-1, 1), made of two named halves.

    Each layer of the encoder halves height and width, rounded up. A `latent_dim` adds a linear fully connected layer.
    """
    sizes = [tuple(-(-size // 2**i) for size in image_shape[:2]) for i in range(depth + 1)]
    filters = [image_shape[2], *FILTERS[:depth]]

    def layer(kind: type[layers.Layer], name: str, filters: int, **options: Any) -> layers.Layer:
        # The article's initial weights let almost nothing through a small latent; Glorot & Bengio's (2010) do.
        initial = keras.initializers.GlorotUniform() if latent_dim else keras.initializers.TruncatedNormal(stddev=0.02)
        shared = {"kernel_size": 3, "strides": 2, "padding": "same", "activation": "leaky_relu"}  # slope 0.2
        return kind(filters, name=name, **shared | {"kernel_initializer": initial} | options)

    encoder = [layer(layers.Conv2D, f"conv{i}", filters[i]) for i in range(1, depth + 1)]
    decoder = []
    for i in reversed(range(depth)):
        padding = tuple(1 - size % 2 for size in sizes[i])  # 2n and 2n - 1 both halve to n: this tells them apart
        decoder.append(layer(layers.Conv2DTranspose, f"deconv{depth - i}", filters[i], output_padding=padding))
    latent_shape = (*sizes[depth], filters[depth])
    if latent_dim:
        encoder += [layers.Flatten(), layers.Dense(latent_dim, name="latent")]
        expand = layers.Dense(int(np.prod(latent_shape)), activation="leaky_relu", name="expand")
        decoder, latent_shape = [expand, layers.Reshape(latent_shape), *decoder], (latent_dim,)
    decoder.append(layers.Activation("tanh", name="output"))
    halves = {"encoder": [keras.Input(image_shape), *encoder], "decoder": [keras.Input(latent_shape), *decoder]}
    parts = [keras.Sequential(half, name=name) for name, half in halves.items()]
    return keras.Sequential([keras.Input(image_shape), *parts], name="autoencoder")


def reconstruction_loss(images: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Return the loss: the squared error of (batch, height, width, channels), summed over channels, then the mean."""
    return tf.reduce_mean(tf.reduce_sum(tf.square(outputs - images), axis=-1))


class FusedAdam(keras.optimizers.Adam):
    """Adam (Kingma & Ba 2015, end of section 2) in TensorFlow's fused operation, which takes a quarter off a step."""

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """Update one variable, and its first and second moments."""
        index = self._get_variable_index(variable)
        if index == 0:  # once a step, for all variables
            step, beta1, beta2 = tf.cast(self.iterations.value + 1, tf.float32), self.beta_1, self.beta_2
            rates = {"lr": learning_rate, "beta1": beta1, "beta2": beta2, "epsilon": self.epsilon}
            rates |= {"beta1_power": beta1**step, "beta2_power": beta2**step}
            self.rates = {name: tf.convert_to_tensor(rate) for name, rate in rates.items()}
        moments = {"m": self._momentums[index].value.handle, "v": self._velocities[index].value.handle}
        tf.raw_ops.ResourceApplyAdam(var=variable.handle, grad=gradient, **moments, **self.rates)


Phase = namedtuple("Phase", "name frozen model optimizer steps")  # model reconstructs the output of frozen, if given


def plan_phases(autoencoder: keras.Model, settings: "Settings") -> list[Phase]:
    """Return the phases of a run: pretraining of each pair of layers, from the outside in, then "train"."""
    encoder, decoder = (autoencoder.get_layer(half).layers for half in ("encoder", "decoder"))
    parts, weighted = [], [[layer for layer in half if layer.weights] for half in (encoder, decoder[::-1])]
    for inner, outer in zip(*weighted, strict=True) if settings.pretrain_steps else ():
        before = encoder[: encoder.index(inner)]
        frozen = keras.Sequential([keras.Input(autoencoder.input_shape[1:]), *before]) if before else None
        pair = [keras.Input(inner.input.shape[1:]), inner, outer, *decoder[-1:] * (not before)]  # the last one: tanh
        parts.append((f"pretrain/{inner.name}", frozen, keras.Sequential(pair), settings.pretrain_steps))
    phases = []
    for name, frozen, model, steps in [*parts, ("train", None, autoencoder, settings.steps)]:
        cosine = keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps)  # Loshchilov & Hutter 2017
        rate = cosine if settings.schedule == "cosine" else settings.learning_rate
        phases.append(Phase(name, frozen, model, FusedAdam(rate, epsilon=1e-8), steps))  # the article's epsilon
        phases[-1].optimizer.build(model.trainable_variables)
    return phases


def batch_indices(step: tf.Tensor, batch_size: int, count: int, seed: int) -> tf.Tensor:
    """Return which of `count` images make the batch of a step, (batch_size,) int64: each once an epoch, reshuffled."""
    position = step * batch_size + tf.range(batch_size, dtype=tf.int64)
    seeds = tf.stack([tf.fill([batch_size], tf.cast(seed, tf.int64)), position // count, 0 * position], axis=1)
    return tf.raw_ops.RandomIndexShuffle(index=position % count, seed=seeds, max_index=tf.constant(count - 1, tf.int64))


def make_train_steps(phase: Phase, images: tf.Tensor, settings: "Settings", writer: Any) -> Callable:
    """Return a compiled function that trains on uint8 images from step `first` to before `last`, and returns losses."""
    strategy, variables = tf.distribute.get_strategy(), phase.model.trainable_variables
    replicas, tag = strategy.num_replicas_in_sync, "loss" if phase.name == "train" else "loss/pretraining"
    transpose = {2: tf.transpose, 4: tf.identity}  # of the kernels of dense layers, and of convolutions
    kernels = [variable for variable in variables if variable.name == "kernel"]
    twins = list(zip(kernels, kernels[::-1], strict=True))[: len(kernels) // 2 * settings.tied]
    for kernel, twin in twins:
        twin.assign(transpose[len(kernel.shape)](kernel.value))

    def replica_step(indices: tf.Tensor) -> tf.Tensor:
        replica = tf.distribute.get_replica_context()
        share = tf.reshape(indices, (-1, replicas))[:, replica.replica_id_in_sync_group]
        batch = tf.cast(tf.gather(images, share), tf.float32) / 255
        target = phase.frozen(batch) if phase.frozen else batch
        with tf.GradientTape() as tape:
            loss = reconstruction_loss(target, phase.model(target)) / replicas
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        gradients = dict(zip((variable.path for variable in variables), gradients, strict=True))
        for kernel, twin in twins:  # used twice, it has the sum of both gradients
            gradients[kernel.path] += transpose[len(kernel.shape)](gradients.pop(twin.path))
        updated = [variable for variable in variables if variable.path in gradients]
        phase.optimizer.apply(list(gradients.values()), updated)  # sums the gradients of all replicas
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, loss)

    def train_step(step: tf.Tensor) -> tf.Tensor:
        indices = batch_indices(step, settings.batch_size, len(images), settings.seed)
        loss = strategy.experimental_local_results(strategy.run(replica_step, [indices]))[0]
        for kernel, twin in twins:  # a tied kernel of the decoder is the encoder's, transposed where it is dense
            twin.assign(transpose[len(kernel.shape)](kernel.value))
        with tf.name_scope("/"):  # else the loop is part of the tag: while/loss
            tf.summary.scalar(tag, loss, step)
        return loss

    @tf.function(input_signature=[tf.TensorSpec((), tf.int64)] * 2, autograph=False)
    def train_steps(first: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        with writer.as_default():
            return tf.map_fn(train_step, tf.range(first, last), parallel_iterations=1, fn_output_signature=tf.float32)

    return train_steps


class SettingsError(Exception):
    """A setting, or what it names, that cannot be used, and what to do about it."""


def setting(default: Any, help: str, minimum: float | None = None, maximum: float = 2**31 - 1) -> Any:
    """Return a dataclass field that carries its help line and, for a number, its range."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (minimum, maximum)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. Raises SettingsError for a value out of range or of another type."""

    steps: int = setting(3000, "updates of the weights", 1)
    batch_size: int = setting(1, "images in each step", 1)
    learning_rate: float = setting(0.001, "learning rate of Adam", 1e-9)
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate over the run; cosine falls to 0")
    depth: int = setting(len(FILTERS), "layers of the encoder, and of the decoder", 1, len(FILTERS))
    latent_dim: int = setting(0, "size of the latent, or 0 for the output of the last convolution", 0, 4096)
    tied: bool = setting(False, "give each layer of the decoder the kernel of its mirrored layer in the encoder")
    pretrain_steps: int = setting(0, "steps for which each pair of layers is trained by itself before the whole", 0)
    sample_every: int = setting(50, "steps from one picture and test loss to the next", 1)
    checkpoint_every: int = setting(500, "steps from one checkpoint to the next", 1)
    seed: int = setting(0, "seed of the initial weights and of the order of the images", 0)
    dataset: str = setting("mnist", "TFDS image set, a folder of pictures, or mnist_5k: bundled digits")
    image_size: int = setting(0, "height and width that images are cropped and scaled to, or 0 to leave them", 0, 4096)
    data_dir: str = setting("", "folder of TFDS's data sets (default: TFDS_DATA_DIR, else TFDS's own)")
    run_name: str = setting("", "name of the run and of its folders (default: date and time)")
    log_dir: str = setting("logs", "folder for TensorBoard, checkpoints, the model and metrics")
    sample_dir: str = setting("samples", "folder for pictures")

    def __post_init__(self) -> None:
        types = {int: (int, np.integer), float: (int, float, np.number), str: (str, os.PathLike), bool: bool}
        for field in dataclasses.fields(self):
            value, kind, (low, high) = getattr(self, field.name), type(field.default), field.metadata["range"]
            choices = get_args(field.type)
            valid = isinstance(value, types[kind]) and isinstance(value, bool) == (kind is bool)
            if not valid or (low is not None and not low <= value <= high) or (choices and value not in choices):
                allowed = " or ".join(choices) or kind.__name__ + f" from {low} to {high}" * (low is not None)
                raise SettingsError(f"--{field.name.replace('_', '-')} must be {allowed}, not {value!r}")
            object.__setattr__(self, field.name, kind(value))
        object.__setattr__(self, "run_name", self.run_name or f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")
        if not re.fullmatch(r"\w[\w.-]{0,99}", self.run_name, re.ASCII):
            raise SettingsError(f"--run-name must be 1 to 100 letters, digits, '_', '-', '.', not {self.run_name!r}")


BUNDLED = Path(__file__).resolve().parent / "samples" / "mnist_5k.npz"
Data = namedtuple("Data", "train test labels classes source")  # images are (n, height, width, channels) uint8


def load_data(settings: Settings, needed: int) -> Data:
    """Return the images of a run: of MNIST, the bundled digits where they are enough. Raises SettingsError, OSError."""
    name, folder, size, images, labels = settings.dataset, Path(settings.dataset), settings.image_size, np.array([]), []
    if name == "mnist_5k" or (name == "mnist" and needed <= 4000):
        parts = ([np.load(BUNDLED)[f"{part}_{kind}"] for kind in ("images", "labels")] for part in ("train", "test"))
        rows, source = (row for part in parts for row in zip(*part, strict=True)), f"MNIST, bundled in {BUNDLED.name}"
        counts, classes = [4000, 1000], "0123456789"
    elif name != "mnist" and folder.is_dir() and not any(folder.rglob("dataset_info.json")):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        rows, counts, classes, source = read_folder(folder, files), [len(files)], [], f"pictures in {folder}"
    else:
        rows, counts, classes, source = read_tfds(name, settings)
    try:
        for image, label in rows:
            if size:
                picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
                image = np.asarray(ImageOps.fit(picture, (size, size))).reshape(size, size, -1)
            if not labels:
                need = (8 if image.size <= 4096 else 3) * sum(counts) * image.size / 1e9  # GB; PCA makes floats of them
                free = psutil.virtual_memory().available / 1e9
                if need > free:
                    text = f"{sum(counts):,} images of {image.shape} need {need:,.1f} GB of memory"
                    raise SettingsError(f"{text}, and {free:,.1f} GB are free: use a smaller --image-size")
                images = np.empty((sum(counts), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise SettingsError(f"images are of {images.shape[1:]} and {image.shape}: add --image-size, such as 64")
            images[len(labels)] = image
            labels.append(label)
    except (tf.errors.OpError, zipfile.BadZipFile, zlib.error, OSError, ValueError, LookupError, EOFError) as error:
        raise OSError(f"{source} is missing or damaged: get it again ({error})") from error
    images, labels, count = images[: len(labels)], np.array(labels), counts[0]
    if not classes:  # a folder: a tenth is for testing
        order, count = np.random.default_rng(settings.seed).permutation(len(images)), len(images) * 9 // 10
        images, (classes, labels) = images[order], np.unique(labels[order], return_inverse=True)
        images = images if (images != images[..., :1]).any() else np.ascontiguousarray(images[..., :1])
    if settings.batch_size > count:
        raise SettingsError(f"--batch-size {settings.batch_size} is more than the {count:,} training images: {source}")
    images = images * 255 if images.max() == 1 else images  # binary
    return Data(images[:count], images[count:], labels[count:], list(classes), source)


def read_folder(folder: Path, files: Sequence[Path]) -> Iterable:
    """Yield the pictures among the files in a folder, (height, width, 3) uint8, and the names of their subfolders."""
    skipped = []
    for path in tqdm(files, f"reading {folder}", delay=2, leave=False, disable=None):
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            yield np.asarray(picture.convert("RGB")), path.relative_to(folder).parent.as_posix().split("/")[0]
        except Exception:  # Pillow has many for a file that is broken or no picture
            skipped.append(path)
    if skipped:
        print(f"skipped  {len(skipped):,} files, broken or not pictures, the first of them {skipped[0]}")


def read_tfds(name: str, settings: Settings) -> tuple[Iterable, Sequence[int], Sequence[str], str]:
    """Return pairs of image and label, how many are to train and to test on, names of the classes, a description."""
    import absl.logging  # these are here, since the default run does not need the second that they take
    import requests
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity("error")  # TFDS warns of its own calls
    try:
        builder = tfds.builder(name, data_dir=settings.data_dir or None)
        image, label = (dict(builder.info.features).get(key) for key in ("image", "label"))
    except Exception as error:  # TFDS has one for each way in which a name can be wrong
        raise SettingsError(f"--dataset {name!r} is no folder, and not in TFDS {settings.data_dir}: {error}") from error
    if not isinstance(image, tfds.features.Image) or image.shape[2] not in (1, 3) or image.np_dtype != np.uint8:
        raise SettingsError(f"--dataset {name} must have an `image` of uint8 with 1 or 3 channels, not {image}")
    if not builder.is_prepared():
        try:
            requests.head(url := next(iter(builder.url_infos or ["https://storage.googleapis.com"])), timeout=3)
            builder.download_and_prepare()  # without the line before, it would try for minutes
        except Exception as error:  # whatever broke the download
            text = f"{name} is not in {builder.data_dir}, and {url} does not send it: prepare it elsewhere (see README)"
            raise ConnectionError(text + ", or use --dataset mnist_5k" * (name == "mnist") + f" ({error})") from error
    if "train" not in builder.info.splits:
        raise SettingsError(f"--dataset {name} has no split named train, but {', '.join(builder.info.splits)}")
    splits, labelled = builder.info.splits, isinstance(label, tfds.features.ClassLabel)
    held_out = next((part for part in ("test", "validation") if part in splits), "train[90%:]")
    parts, fixed = ("train" if held_out in splits else "train[:90%]", held_out), None not in image.shape
    decoders = tfds.decode.PartialDecoding({"image": True} | ({"label": True} if labelled else {}))
    options = {"decoders": decoders, "batch_size": 1000 if fixed and not settings.image_size else 1}
    batches = (batch for part in parts for batch in tfds.as_numpy(builder.as_dataset(split=part, **options)))
    pairs = (zip(batch["image"], batch.get("label", repeat(0)), strict=False) for batch in batches)
    counts, classes = [splits[part].num_examples for part in parts], label.names if labelled else [""]
    source = f"{builder.info.full_name} in {builder.data_dir} (tested on {held_out})"
    return chain.from_iterable(pairs), counts, classes, source


def squared_error(images: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return the squared error of each image, summed over pixels and channels: (batch,)."""
    return np.square(outputs - images).sum(axis=(1, 2, 3))


def shift_tolerant_error(images: np.ndarray, outputs: np.ndarray, maximum: int = 2) -> np.ndarray:
    """Return each image's smallest squared error against its output shifted by up to `maximum` pixels: (batch,)."""
    height, width = images.shape[1:3]
    padded = np.pad(outputs, [(0, 0), (maximum, maximum), (maximum, maximum), (0, 0)])
    shifts = product(range(2 * maximum + 1), repeat=2)
    return np.min([squared_error(images, padded[:, y : y + height, x : x + width]) for y, x in shifts], axis=0)


def fit_pca(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of images in [0, 1], (values,), and their principal axes, (values, values), the largest first."""
    values = images.reshape(len(images), -1) / np.float32(255)
    values -= (mean := values.mean(axis=0, dtype=np.float64).astype(np.float32))
    return mean, np.linalg.eigh(values.T @ values)[1][:, ::-1]


def compute_metrics(evaluate: Callable, data: Data) -> tuple[dict[str, float | None], np.ndarray, np.ndarray | None]:
    """Return metrics of the test images (SSIM of the first ones), latents (n, latent size), components (n, values)."""
    rows, latents, components = [], [], []
    pca = fit_pca(data.train) if data.train[0].size <= 4096 else None  # more would take minutes
    for batch in np.array_split(data.test, min(len(data.test), -(-data.test.size // 100_000))):
        images, codes, outputs, loss = (part.numpy() for part in evaluate(batch))
        shown, latents = outputs.clip(0, 1), [*latents, codes.reshape(len(batch), -1)]
        row = {metric.__name__: metric(images, outputs) for metric in (squared_error, shift_tolerant_error)}
        row["psnr"] = -10 * np.log10(np.maximum(squared_error(images, shown) / images[0].size, 1e-10))  # 100 at most
        rows.append({"test_loss": [loss] * len(batch)} | row)
        if len(rows) == 1:  # of the first 64: it is slow
            rows[0]["ssim"] = tf.image.ssim(images[:64], shown[:64], 1, filter_size=min(11, *images.shape[1:3]))
        if pca:
            components.append((images.reshape(len(batch), -1) - pca[0]) @ pca[1])
    metrics = {name: float(np.mean(np.concatenate([row[name] for row in rows if name in row]))) for name in rows[0]}
    latents, components = np.concatenate(latents), np.concatenate(components) if pca else None
    error = float(np.square(components[:, latents.shape[1] :]).sum(axis=1).mean()) if pca else None
    return metrics | {"pca_squared_error": error, "latent_size": latents.shape[1]}, latents, components


GAP, TITLE, BACKGROUND = 6, 28, 32  # of a grid: pixels, and a grey that suits any page
IMAGE, HISTOGRAM = (plugin.create_summary_metadata(None, None) for plugin in (image_plugin, histogram_plugin))


def write_atomically(path: Path, save: Callable[[Path], Any]) -> None:
    """Have `save` write a file that takes the name `path` once it is whole. Raises OSError that names it."""
    part = path.with_name(f".part-{path.name}")
    try:
        save(part)
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def draw_grid(originals: np.ndarray, outputs: np.ndarray, title: str) -> Image.Image:
    """Return a picture, up to 1,400 pixels wide: up to ten originals, (n, height, width, channels), above outputs."""
    pixels = np.rint(np.clip(np.stack([originals, outputs]), 0, 1) * 255).astype(np.uint8)
    zoom, shrink = max(1, 100 // max(pixels.shape[2:4])), -(-pixels.shape[3] // 1300)
    pixels = pixels[:, :, ::shrink, ::shrink].repeat(zoom, axis=2).repeat(zoom, axis=3)
    pixels = pixels[:, : min(10, 1400 // (pixels.shape[3] + GAP))]
    border = [(0, 0), (0, 0), (0, GAP), (GAP // 2, GAP // 2), (0, 0)]
    tiles = np.pad(pixels, border, constant_values=BACKGROUND).swapaxes(1, 2)
    rows = tiles.reshape(2 * tiles.shape[1], -1, tiles.shape[4])
    picture = Image.fromarray(np.pad(rows, [(TITLE, 0), (0, 0), (0, 0)], constant_values=BACKGROUND).squeeze())
    ImageDraw.Draw(picture).text((GAP, TITLE // 2), title, "white", ImageFont.load_default(size=16), anchor="lm")
    return picture


class Record:
    """A run's folders and what it writes there: events, pictures and checkpoints as it goes, and figures at its end."""

    def __init__(self, logs: Path, samples: Path, settings: Settings, data: Data, phases: Sequence[Phase]) -> None:
        self.logs, self.samples, self.settings, self.data, self.phases = logs, samples, settings, data, phases
        self.autoencoder = autoencoder = phases[-1].model
        firsts = np.unique(data.labels, return_index=True)[1]  # one of each class, then the first ones
        self.images = data.test[[*dict.fromkeys([*firsts, *range(min(10, len(data.test)))])][:10]]
        names = [*(phase.name for phase in phases), "test", "metrics"]
        self.writers = {name: tf.summary.create_file_writer(str(logs / name)) for name in names}
        self.evaluate = tf.function(self.run_model, [tf.TensorSpec(autoencoder.input_shape, tf.uint8)], autograph=False)

    def run_model(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return uint8 images as float32 in [0, 1], their latents and reconstructions, and the loss."""
        latents = self.autoencoder.get_layer("encoder")(inputs := tf.cast(images, tf.float32) / 255)
        outputs = self.autoencoder.get_layer("decoder")(latents)
        return inputs, latents, outputs, reconstruction_loss(inputs, outputs)

    def log_test(self, step: int) -> float:
        """Write the picture and the test loss after `step` updates; return the loss."""
        originals, _, outputs, loss = (part.numpy() for part in self.evaluate(self.images))
        if not np.isfinite(loss):
            raise FloatingPointError(f"the test loss after step {step:,} is not finite: use a lower --learning-rate")
        grid = draw_grid(originals, outputs, f"step {step:,}   test loss {loss:.4f}")
        path = self.samples / f"step_{step:05}.png"
        write_atomically(path, lambda part: grid.save(part, compress_level=1))  # the default takes twice the time
        with self.writers["test"].as_default(step=step):
            tf.summary.scalar("loss", loss)
            tf.summary.write("reconstructions", tf.constant([*map(str, grid.size), path.read_bytes()]), metadata=IMAGE)
            for variable in self.autoencoder.variables:
                if variable.name == "kernel" and step % self.settings.checkpoint_every == 0:
                    (counts, edges), name = np.histogram(variable.numpy(), 30), variable.path.split("/")[-2]
                    tf.summary.write(f"weights/{name}", np.c_[edges[:-1], edges[1:], counts], metadata=HISTOGRAM)
        return float(loss)

    def save(self, folder: Path, variables: Sequence[keras.Variable], step: int) -> None:
        """Write a checkpoint; keep the last three. Raises FloatingPointError for weights that are not finite."""
        for writer in self.writers.values():
            writer.flush()  # a run that resumes here does not write these events again
        arrays = [variable.numpy() for variable in variables]
        if not all(np.isfinite(array).all() for array in arrays):
            raise FloatingPointError(f"the weights after step {step:,} are not finite: use a lower --learning-rate")
        write_atomically(folder / f"step_{step:08}.npz", lambda part: np.savez(part, *arrays))
        for path in sorted(folder.glob("step_*.npz"))[:-3]:
            path.unlink()

    def log_hparams(self, metrics: dict[str, Any]) -> None:
        """Write a row of TensorBoard's table of runs: learning rate, settings that are not the default, and metrics."""
        values, hidden = vars(self.settings), IGNORED_ON_RESUME | {"steps"}  # steps may grow when a run is resumed
        chosen = {key: values[key] for key in sorted(values.keys() - hidden) if values[key] != getattr(Settings, key)}
        with self.writers["metrics"].as_default(step=self.settings.steps):
            hparams({"learning_rate": self.settings.learning_rate} | chosen, trial_id=self.settings.run_name)
            for name, value in metrics.items():
                tf.summary.scalar(f"test_metrics/{name.removeprefix('test_')}", np.nan if value is None else value)
        self.writers["metrics"].flush()

    def read_losses(self, name: str) -> np.ndarray:
        """Return steps and losses of a phase, or of the test images, (2, n), from TensorBoard's events."""
        events = EventAccumulator(str(self.logs / name), size_guidance={"tensors": 0}).Reload()
        found = [event for tag in events.Tags()["tensors"] if tag.startswith("loss") for event in events.Tensors(tag)]
        losses = {event.step: tf.make_ndarray(event.tensor_proto).item() for event in found}  # the last one of a step
        return np.array(sorted(losses.items())).reshape(-1, 2).T

    @matplotlib.style.context("default")  # whatever a matplotlibrc says
    def draw(self, latents: np.ndarray, components: np.ndarray | None) -> None:
        """Write training.gif, summary.png, and latents.png: test images as points, as Hinton & Salakhutdinov (2006)."""
        paths = sorted(self.samples.glob("step_*.png"), key=lambda path: int(path.stem.removeprefix("step_")))
        chosen = dict.fromkeys(paths[place - 1] for place in np.geomspace(1, len(paths), 28).astype(int))
        first, *others = (Image.open(path).point(lambda value: value // 16 * 17) for path in chosen)  # a small file
        options = {"save_all": True, "append_images": others, "duration": [300] * len(others) + [3000], "loop": 0}
        write_atomically(self.samples / "training.gif", lambda part: first.save(part, **options))
        axes, start = (figure := Figure(figsize=(9, 5))).add_axes((0.07, 0.1, 0.91, 0.83)), 0
        for phase in reversed(self.phases):  # pretraining stands left of step 0
            (steps, losses), pretraining = self.read_losses(phase.name), phase.name != "train"
            if missing := phase.steps - len(steps):
                print(f"{self.logs / phase.name} lacks {missing:,} losses: summary.png is drawn without them")
            start -= phase.steps * pretraining
            color, label = ("tab:green", "pretraining") if pretraining else ("tab:blue", "training")
            size = 2 * min(25, len(losses) // 20) + 1  # of the window, which is centered
            labels = (f"{label}, each step", f"{label}, mean of {size}") if start >= -phase.steps else (None, None)
            smooth = np.convolve(losses, np.ones(size) / size, "valid") if missing < phase.steps else losses
            axes.semilogy(start + steps, losses, color, alpha=0.35, linewidth=1, label=labels[0])
            axes.semilogy(start + steps[size // 2 :][: len(smooth)], smooth, color, linewidth=2, label=labels[1])
        axes.semilogy(*self.read_losses("test"), "tab:orange", label=f"{len(self.images)} test images")
        axes.set(xlabel="step", title=reconstruction_loss.__name__.replace("_", " "))
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
        write_atomically(self.samples / "summary.png", figure.savefig)
        latents, labels = latents[:1000], self.data.labels[:1000]
        panels = {} if components is None else {"images: the first two principal components": components[:1000]}
        if latents.shape[1] == 2:
            panels["latents"] = latents
        else:
            centered = latents - latents.mean(axis=0)
            wide = latents.shape[1] > len(latents)  # else eigenvectors are found four times faster
            basis = np.linalg.svd(centered, False)[2].T if wide else np.linalg.eigh(centered.T @ centered)[1][:, ::-1]
            panels["latents: the first two principal components"] = np.pad(centered @ basis[:, :2], [(0, 0), (0, 1)])
        figure = Figure(figsize=(11, 5.3), layout="tight")
        for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for index, name in enumerate(self.data.classes):
                axes.plot(*panels[title][labels == index, :2].T, ".", markersize=3, label=name)
            axes.set(title=title, xticks=[], yticks=[])
        if 1 < len(self.data.classes) <= 30:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4, frameon=False)
        write_atomically(self.samples / "latents.png", figure.savefig)


IGNORED_ON_RESUME = {"run_name", "log_dir", "sample_dir", "data_dir", "data"}  # without effect on numbers
WARNED_ON_RESUME = {"replicas", "tensorflow", "keras", "onednn"}  # these change their last bits


def check_resume(logs: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json, {} if none; warn of other versions. Raises SettingsError for other settings or images."""
    if not (logs / "config.json").exists() and not any(logs.glob("checkpoints/step_*.npz")):
        return {}
    try:
        before = json.loads((logs / "config.json").read_bytes())
        Settings(**{name: before[name] for name in vars(Settings()) if before["training_images"] > 0})
    except (OSError, ValueError, TypeError, KeyError, SettingsError) as error:
        raise SettingsError(f"{logs}/config.json is lost or damaged: remove {logs} to start over ({error})") from error
    longer = config["schedule"] == "constant" and before.get("steps", 0) < config["steps"]
    for name in sorted(config.keys() & before.keys() - IGNORED_ON_RESUME):
        text = f"{logs} was begun with {name} {before[name]}, and now it is {config[name]}"
        if before[name] != config[name] and name in WARNED_ON_RESUME:
            print(f"warning  {text}: the last bits of its numbers will differ")
        elif before[name] != config[name] and not (name == "steps" and longer):
            raise SettingsError(f"{text}: use the original value to resume, or another --run-name")
    return before


def open_run(*folders: Path) -> contextlib.AbstractContextManager:
    """Make a run's folders; return its lock, which ends with the process. Leaves none behind a SettingsError."""
    absent = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(folders[0] / ".lock").acquire(blocking=False)
    except filelock.Timeout:
        raise SettingsError(f"another process is training the run of {folders[0]}") from None
    except OSError as error:
        for path in absent:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise SettingsError(f"{' or '.join(map(str, folders))} cannot be made: {error.strerror}") from error


def restore(folder: Path, variables: Sequence[keras.Variable]) -> None:
    """Restore the newest checkpoint that is whole, if there is any; raises OSError where all are damaged."""
    paths = sorted(folder.glob("step_*.npz"), reverse=True)
    for path in paths:
        try:
            with np.load(path) as file:
                arrays = [file[name] for name in file.files]
            for variable, array in zip(variables, arrays, strict=True):
                variable.assign(array)
            return
        except Exception as error:  # NumPy has many for a file that is cut short or full of zeros
            print(f"damaged  {path}: the checkpoint before is used ({type(error).__name__})")
    if paths:
        raise OSError(f"{folder} holds no checkpoint that can be read: remove {folder.parent} to start over")


def make_strategy(settings: Settings) -> tuple[tf.distribute.Strategy, str, bool]:
    """Return the strategy for TF_CONFIG's workers, this machine's GPUs, or one device; its name; whether to write."""
    tf.get_logger().setLevel("ERROR")
    with contextlib.suppress(RuntimeError):  # a program that has used TensorFlow before has settled these
        tf.config.threading.set_intra_op_parallelism_threads(1 if settings.batch_size == 1 else 4)  # sums depend on it
        tf.config.threading.set_inter_op_parallelism_threads(2)
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
            tf.config.experimental.enable_op_determinism()  # a CPU needs no more than the fixed threads
    if "TF_CONFIG" in os.environ:
        try:
            config = json.loads(os.environ["TF_CONFIG"])
            workers = [w for task in ("chief", "worker") for w in config["cluster"].get(task, []) if w.rindex(":")]
            name = dict(enumerate(config["cluster"][config["task"]["type"]]))[int(config["task"]["index"])]
            device, chief = f"{name} of {len(workers)} workers", workers.index(name) == 0
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            form = '{"cluster": {"worker": ["HOST:PORT", …]}, "task": {"type": "worker", "index": 0}}'
            raise SettingsError(f"TF_CONFIG must have the form {form} ({error!r})") from error
        print(f"worker   {name} waits for {', '.join(other for other in workers if other != name)}", flush=True)
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        devices = [d.name for d in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]
        used, chief = devices if settings.batch_size > 1 else devices[:1], True  # one image cannot be divided
        strategy = tf.distribute.MirroredStrategy(used) if used[1:] else tf.distribute.OneDeviceStrategy(used[0])
        device = ", ".join(used)
    size, replicas = settings.batch_size, strategy.num_replicas_in_sync
    if rest := size % replicas:
        near = f"{size - rest or 2 * replicas} or {size - rest + replicas}"
        raise SettingsError(f"--batch-size {size} cannot be divided among {replicas} replicas: use {near}")
    keras.config.set_floatx("float32")  # whatever ~/.keras/keras.json says
    keras.config.set_image_data_format("channels_last")
    keras.utils.set_random_seed(settings.seed)
    return strategy, device, chief


def train(settings: Settings) -> dict[str, Any]:
    """Train an autoencoder, or resume its run; return what metrics.json holds. Raises what main() tells users."""
    started, metrics, logs = time.perf_counter(), {}, Path(settings.log_dir, settings.run_name)
    samples, checkpoints = Path(settings.sample_dir, settings.run_name), logs / "checkpoints"
    before = check_resume(logs, vars(settings))
    with contextlib.suppress(OSError, ValueError, TypeError):  # a damaged metrics.json is made anew
        metrics = dict(json.loads((logs / "metrics.json").read_bytes()))
    if before and metrics.get("steps") == settings.steps and "seconds" in metrics:
        print(f"{logs} is complete: all of its {settings.steps:,} steps are done")
        return metrics
    strategy, device, chief = make_strategy(settings)
    data = load_data(settings, before.get("training_images", settings.steps * settings.batch_size))
    config = vars(settings) | {"data": data.source, "training_images": len(data.train)}
    config |= {"checksum": f"{zlib.crc32(data.train):08x}", "replicas": strategy.num_replicas_in_sync}
    config |= {"tensorflow": tf.__version__, "keras": keras.__version__, "onednn": os.environ["TF_ENABLE_ONEDNN_OPTS"]}
    check_resume(logs, config)
    with contextlib.ExitStack() as stack, strategy.scope():
        phases = plan_phases(build_autoencoder(data.train.shape[1:], settings.depth, settings.latent_dim), settings)
        autoencoder, total = phases[-1].model, sum(phase.steps for phase in phases)
        variables = [*autoencoder.variables, *chain(*(phase.optimizer.variables for phase in phases))]
        restore(checkpoints, variables)
        done = sum(int(phase.optimizer.iterations.numpy()) for phase in phases)
        count = tf.constant(done, tf.float64)
        mean = strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("MEAN", count))
        if strategy.experimental_local_results(mean)[0] != done:
            raise SettingsError(f"the workers have different checkpoints in {logs}: let them share its folder")
        print(f"device   {device}\ndata     {len(data.train):,} and {data.test.shape} images: {data.source}")
        print(f"writes   {logs} and {samples}" if chief else "writes   nothing: the first worker does")
        print(f"view     tensorboard --logdir {settings.log_dir} --samples_per_plugin images=1000", flush=True)
        if chief:
            stack.enter_context(open_run(checkpoints, samples))
            write_atomically(logs / "config.json", lambda part: part.write_text(json.dumps(config, indent=2)))
        else:
            logs = samples = checkpoints = Path(stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True)))
        record, images = Record(logs, samples, settings, data, phases), tf.constant(data.train)
        width = (shutil.get_terminal_size().columns or 80) - 1  # some terminals have none
        bar = stack.enter_context(tqdm(total=total, initial=done, disable=None, file=sys.stdout, ncols=width, nrows=24))
        at_once = max(1, min(50, 2_000_000 // (settings.batch_size * data.train[0].size)))  # a signal waits for it

        def interrupt(number: int, _: Any) -> None:
            raise KeyboardInterrupt(number)

        for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signal.SIGINT) == signal.SIG_DFL else ():
            signal.signal(number, interrupt)  # from here on; until here, a signal just ends the command
        try:
            for phase in phases:
                step, losses = int(phase.optimizer.iterations.numpy()), []
                train_steps = make_train_steps(phase, images, settings, record.writers[phase.name])
                while True:
                    if step % settings.sample_every == 0 or step == phase.steps:
                        text = f"loss {np.mean(losses):.4f}  " if len(losses) else ""
                        text += f"test loss {record.log_test(step):.4f}" if phase.name == "train" else phase.name
                        bar.set_postfix_str(text, refresh=False)
                        if bar.disable:
                            print(f"step {step:6,}  {text}", flush=True)
                    if step and (step % settings.checkpoint_every == 0 or step == phase.steps):
                        record.save(checkpoints, variables, done)
                    if step == phase.steps:
                        break
                    stops = (step - step % each + each for each in (settings.sample_every, settings.checkpoint_every))
                    last = min(phase.steps, step + at_once, *stops)
                    losses = train_steps(step, last).numpy()
                    if not np.isfinite(losses).all():
                        raise FloatingPointError(f"loss not finite before step {last:,}: use a lower --learning-rate")
                    bar.update(last - step)
                    done, step = done + last - step, last
            write_atomically(logs / "autoencoder.keras", autoencoder.save)
            metrics, latents, components = compute_metrics(record.evaluate, data)
            metrics["steps"] = settings.steps
            write_atomically(logs / "metrics.json", lambda part: part.write_text(json.dumps(metrics, indent=2)))
            record.log_hparams(metrics)
            record.draw(latents, components)
        except KeyboardInterrupt:  # which may come after some steps and before they count as done
            record.save(checkpoints, variables, sum(int(phase.optimizer.iterations.numpy()) for phase in phases))
            raise
        metrics["seconds"] = time.perf_counter() - started  # the last line of a run that is complete
        write_atomically(logs / "metrics.json", lambda part: part.write_text(json.dumps(metrics, indent=2)))
    print(*(f"{name:<20} {value:.6g}" for name, value in metrics.items() if value is not None), sep="\n")
    return metrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as a command line says; return the exit status: 0, 1 for a failed run, 2 for a bad call, 128 + a signal."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message.splitlines()[0]}\n")
    for field in dataclasses.fields(Settings):
        kind, text = type(field.default), field.metadata["help"]
        text += f" (default: {field.default})" * (field.default != "" and kind is not bool)
        options = {"action": "store_true"} if kind is bool else {"type": kind, "choices": get_args(field.type) or None}
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, **options)
    try:
        train(settings := Settings(**vars(parser.parse_args(arguments))))
        return 0
    except KeyboardInterrupt as stop:
        again = [*sys.argv, *([] if "--run-name" in " ".join(sys.argv) else ["--run-name", settings.run_name])]
        status, text = 128 + (stop.args or [signal.SIGINT])[0], f"stopped; to resume: {shlex.join(['python', *again])}"
    except (SettingsError, OSError, FloatingPointError, MemoryError, tf.errors.OpError) as error:
        status, text = 1 + isinstance(error, SettingsError), str(error) or repr(error)
        if "No space left on device" in text:
            text = f"no space left on device for {settings.log_dir} or {settings.sample_dir}"
        elif isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError)):
            text = "out of memory: use a smaller --batch-size or --image-size"
        elif isinstance(error, tf.errors.OpError) and "TF_CONFIG" in os.environ:
            text = "another worker has ended, or a port is taken: run the same commands again to resume"
    print(f"{parser.prog}: {text.splitlines()[0]}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
