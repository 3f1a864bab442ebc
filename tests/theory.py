"""What a finished run has learned, measured beside PCA: python tests/theory.py RUN

RUN is a run's log folder, such as logs/reference, given in the folder in which it was trained. The
saved model reconstructs all test images: a table is printed, and latents.png is written to the
pictures of the run. So this is also an example of how to use what a run leaves.
"""

import argparse
import json
import sys
import zlib
from collections import Counter
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_ae  # before TensorFlow, whose environment it sets

# isort: split
import keras
import matplotlib.style
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

# --------------------------------------------------------------------------------------------------
# Metrics of each image, (n,), for (n, height, width, channels) float32, targets in [0, 1]


def squared_error(targets, outputs):
    """Return squared errors, summed over an image."""
    return np.square(outputs - targets).sum(axis=(1, 2, 3))


def shift_tolerant_error(targets, outputs):
    """Return the smallest squared errors of outputs shifted by up to 2 pixels, black coming in."""
    _, height, width, _ = targets.shape
    padded = np.pad(outputs, [(0, 0), (2, 2), (2, 2), (0, 0)])
    errors = []
    for y, x in product(range(5), repeat=2):
        shifted = padded[:, y : y + height, x : x + width]
        errors.append(squared_error(targets, shifted))
    return np.min(errors, axis=0)


def psnr(targets, outputs):
    """Return PSNRs in dB of outputs clipped to [0, 1], at most 100."""
    return np.minimum(tf.image.psnr(targets, np.clip(outputs, 0, 1), max_val=1), 100)


def compare(targets, outputs):
    """Return all metrics by name; SSIM (Wang et al. 2004), too, is of clipped outputs."""
    window = min(11, *targets.shape[1:3])
    shown = np.clip(outputs, 0, 1)
    return {
        "squared error": squared_error(targets, outputs),
        "shift-tolerant error": shift_tolerant_error(targets, outputs),
        "PSNR (dB)": psnr(targets, outputs),
        "SSIM": tf.image.ssim(targets, shown, max_val=1, filter_size=window),
    }


def examine(model, settings, images):
    """Return the mean of each metric over all images, (n, height, width, channels) uint8."""
    means = Counter()
    for number, batch in enumerate(train_ae.split_batches(images), start=1):
        targets = batch / np.float32(255)
        outputs = model.predict_on_batch(targets)
        loss = train_ae.reconstruction_loss(targets, outputs)
        metrics = {"test loss": len(batch) * loss} | compare(targets, outputs)
        if settings.noise:
            # As in the metrics of the run.
            inputs = train_ae.add_noise(targets, settings.noise, settings.seed, -number)
            metrics["PSNR (dB) of noisy inputs"] = psnr(targets, inputs)
            metrics["PSNR (dB) from noisy inputs"] = psnr(targets, model.predict_on_batch(inputs))
        for name, values in metrics.items():
            means[name] += np.sum(values) / len(images)
    return means


# --------------------------------------------------------------------------------------------------
# Principal components, (n, size), the largest first


def image_components(train, test):
    """Return all components of uint8 test images, by PCA of training images."""
    train = train.reshape(len(train), -1) / np.float32(255)
    test = test.reshape(len(test), -1) / np.float32(255)
    mean = train.mean(axis=0)
    train -= mean
    _, axes = tf.linalg.eigh(train.T @ train)
    return (test - mean) @ axes[:, ::-1]


def latent_components(latents):
    """Return components of latents, by their own PCA."""
    centered = latents - latents.mean(axis=0)
    _, _, axes = tf.linalg.svd(centered)  # where they are wide, eigh would take minutes
    return centered @ axes


# --------------------------------------------------------------------------------------------------
# A run


def open_run(folder):
    """Return the settings, data, model and latents of a run. Raises OSError and SettingsError."""
    config = json.loads((folder / "config.json").read_text())
    saved = dict(np.load(folder / "latents.npz"))  # first: a run that goes on has none yet
    model = keras.models.load_model(folder / "autoencoder.keras")
    fields = train_ae.Settings.model_fields
    settings = train_ae.Settings(**{name: config[name] for name in fields if name in config})
    data = train_ae.load_data(settings)
    if zlib.crc32(data.test) != config["checksum of test images"]:
        raise train_ae.SettingsError(f"{folder} was tested on other images than {settings.dataset}")
    return settings, data, model, saved


@matplotlib.style.context(["default", {"text.parse_math": False}])  # class names are plain text
def draw_latents(panels, labels, classes, path):
    """Draw {title: points} side by side: the first two numbers of each, in its class's colour."""
    figure = Figure(figsize=(11, 5.3), layout="tight")
    for number, (title, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number, title=title, xticks=[], yticks=[])
        points = np.pad(points, [(0, 0), (0, 1)])  # for those of one number
        for index in range(len(classes)):
            x, y = points[labels == index, :2].T
            axes.plot(x, y, ".", markersize=3)
    if 2 <= len(classes) <= 30:
        names = [name.encode(errors="backslashreplace").decode() for name in classes]
        axes.legend(
            axes.lines,
            names,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            markerscale=4,
            frameon=False,
        )
    train_ae.write_atomically(path, figure.savefig)


def main(folder):
    """Print the metrics of a run, and draw its first 1,000 test images and their latents."""
    settings, data, model, saved = open_run(folder)
    table = examine(model, settings, data.test)
    latents = saved["latents"].reshape(len(data.test), -1)
    size = latents.shape[1]
    panels = {}
    if data.train[0].size <= 4096:  # more would take minutes
        components = image_components(data.train, data.test)
        rest = np.square(components[:, size:])
        table["squared error of PCA of that size"] = rest.sum(axis=1).mean()
        panels["images: the first two principal components"] = components[:1000]
    else:
        print("no PCA, as the images have more than 4,096 values")
    if size == 2:
        panels["latents"] = latents[:1000]
    else:
        panels["latents: the first two principal components"] = latent_components(latents[:1000])
    for name, value in table.items():
        print(f"{name:40} {value:9.4f}")
    path = settings.sample_dir / settings.run_name / "latents.png"
    path.parent.mkdir(parents=True, exist_ok=True)  # if called from another folder
    draw_latents(panels, saved["labels"][:1000], saved["classes"], path)
    print(path)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("run", type=Path)
    try:
        main(parser.parse_args().run)
    except (OSError, train_ae.SettingsError, train_ae.RunError) as error:
        parser.error(str(error).splitlines()[0])
