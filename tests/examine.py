"""Examine a finished run: its own test images, or any others.

    python tests/examine.py logs/RUN                    # on its test images, beside PCA
    python tests/examine.py logs/RUN SET                # on all images of another set
    python tests/examine.py logs/RUN SET --pictures     # and save each reconstruction

RUN is the name of a run; call this from the folder in which it was trained. The first prints a
table, and draws samples/RUN/latents.png.

SET is what --dataset takes: a folder, an array file or the name of a TFDS dataset. Its images are
prepared as those of the run were. Written are logs/RUN/examined/SET.npz, with latents and errors,
samples/RUN/examined/SET-worst.png, and with --pictures the folder samples/RUN/examined/SET, with
the reconstructions under the names of the pictures.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def read_config(run):
    """Return the contents of a run's config.json. Raises OSError and ValueError."""
    return json.loads((run / "config.json").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path)
    parser.add_argument("set", nargs="?")
    parser.add_argument("--pictures", action="store_true")
    arguments = parser.parse_args()
    try:  # last digits depend on it, and TensorFlow reads it when it is imported
        onednn = read_config(arguments.run)["machine"]["onednn"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{arguments.run} is no folder of a run: {error}")
    if onednn != "default":
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = onednn

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
    padded = keras.layers.ZeroPadding2D(2)(outputs).numpy()
    errors = []
    for y, x in np.ndindex(5, 5):
        shifted = padded[:, y : y + height, x : x + width]
        errors.append(squared_error(targets, shifted))
    return np.min(errors, axis=0)


def psnr(targets, outputs):
    """Return PSNRs in dB, at most 100."""
    return np.minimum(tf.image.psnr(targets, outputs, max_val=1), 100)


def compare(targets, outputs):
    """Return all metrics by name, of outputs in [0, 1]; SSIM is that of Wang et al. 2004."""
    window = min(11, *targets.shape[1:3])
    return {
        "squared error": squared_error(targets, outputs),
        "shift-tolerant error": shift_tolerant_error(targets, outputs),
        "PSNR (dB)": psnr(targets, outputs),
        "SSIM": tf.image.ssim(targets, outputs, max_val=1, filter_size=window),
    }


def measure(model, settings, data):
    """Return the mean of each metric over all test images."""
    evaluate = train_ae.compile_evaluation(model)
    means = Counter()
    batches = train_ae.batch_rows(data.test_rows, data.images)
    for number, rows in enumerate(batches, start=1):
        images = data.prepare(rows)
        result = evaluate(images, images)
        metrics = {"test loss": len(rows) * result.loss.numpy()}
        metrics |= compare(images.numpy(), np.clip(result.outputs, 0, 1))
        if settings.noise:  # as in the metrics of the run
            noisy = train_ae.add_noise(images, settings.noise, settings.seed, -number)
            metrics["PSNR (dB) of noisy inputs"] = psnr(images, noisy)
            metrics["PSNR (dB) from noisy inputs"] = evaluate(images, noisy).psnr
        for name, values in metrics.items():
            means[name] += np.sum(values) / len(data.test_rows)
    return means


# --------------------------------------------------------------------------------------------------
# Principal components, (n, size), the largest first


def image_components(train, test):
    """Return all components of test images, by PCA of training images."""
    train, test = [np.reshape(images, (len(images), -1)) for images in (train, test)]
    mean = train.mean(axis=0)
    centered = train - mean
    _, axes = tf.linalg.eigh(centered.T @ centered)
    return (test - mean) @ axes[:, ::-1]


def latent_components(latents):
    """Return components of latents, by their own PCA."""
    centered = latents - latents.mean(axis=0)
    _, _, axes = tf.linalg.svd(centered)  # where they are wide, eigh would take minutes
    return centered @ axes


# --------------------------------------------------------------------------------------------------
# A run


def open_run(run, dataset=None):
    """Return the settings, data and model of a run: its own data, or another set prepared like it.

    Raises OSError, SettingsError and RunError.
    """
    config = read_config(run)
    model = keras.models.load_model(run / "autoencoder.keras")
    values = config["settings"] | {"run_name": run.resolve().name, "log_dir": run.resolve().parent}
    settings = train_ae.Settings(**values | ({"dataset": dataset} if dataset else {}))
    train_ae.configure_tensorflow(settings)
    data = train_ae.load_data(settings)
    if dataset:
        data = prepare_as(config["model"]["preparation"], data)
    if not dataset and data.checksum != config["checksums"]["images"]:
        raise train_ae.SettingsError(f"{run} was tested on other images than {settings.dataset}")
    found = "x".join(map(str, data.image_shape))
    needed = "x".join(map(str, model.input_shape[1:]))
    if found != needed:
        raise train_ae.SettingsError(
            f"{settings.dataset} has images of {found}, and the model takes {needed}: a run with"
            " --image-size takes any size"
        )
    return settings, data, model


def prepare_as(values, data):
    """Return data, all to be tested on, with the preparation of a run. Raises SettingsError."""
    preparation = train_ae.Preparation(*values)
    if data.preparation.channels > preparation.channels:
        raise train_ae.SettingsError("the set has colours, and the images of the run have none")
    if data.preparation[:2] != preparation[:2]:
        print("values   {:.9g} to {:.9g} become 0 to 1, as in the run".format(*values))
    print(f"test     on all {len(data.images):,} images instead")
    return data._replace(preparation=preparation, test_rows=np.arange(len(data.images)))


@matplotlib.style.context(["default", {"text.parse_math": False}])  # class names are plain text
def draw_latents(panels, labels, classes, path):
    """Draw {title: points} side by side: the first two numbers of each, in its class's colour."""
    figure = Figure(figsize=(11, 5.3), layout="tight")
    for number, (title, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number, title=title, xticks=[], yticks=[])
        points = np.pad(points, [(0, 0), (0, 1)])  # for those of one number
        for index in range(len(classes)):
            axes.plot(*points[labels == index, :2].T, ".", markersize=3)
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


def examine_run(run):
    """Print the metrics of a run, and draw its first 1,000 test images and their latents."""
    if not (run / "latents.npz").exists():
        raise train_ae.SettingsError(f"{run} has no latents.npz, as finished runs have")
    saved = np.load(run / "latents.npz")
    settings, data, model = open_run(run)
    table = measure(model, settings, data)
    latents = saved["latents"].reshape(len(data.test_rows), -1)
    size = latents.shape[1]
    panels = {}
    if math.prod(data.image_shape) <= 4096:  # more would take minutes
        components = image_components(data.prepare(data.train_rows), data.prepare(data.test_rows))
        rest = np.square(components[:, size:])
        table[f"squared error of PCA with {size} numbers"] = rest.sum(axis=1).mean()
        panels["images: the first two principal components"] = components[:1000]
    else:
        print("no PCA, as the images have more than 4,096 values")
    if size == 2:
        panels["latents"] = latents[:1000]
    else:
        panels["latents: the first two principal components"] = latent_components(latents[:1000])
    print_table(table)
    path = settings.sample_folder / "latents.png"
    draw_latents(panels, saved["labels"][:1000], saved["classes"], path)
    print(path)


def examine_set(run, dataset, with_pictures=False):
    """Print and write what a run's model makes of all images of a set."""
    settings, data, model = open_run(run, dataset)
    evaluate = train_ae.compile_evaluation(model)
    metrics, arrays = train_ae.compute_metrics(settings, evaluate, data)
    print_table(metrics)
    errors = arrays["errors"]
    for index, name in enumerate(data.classes):
        is_here = data.labels == index
        print_table({f"mean error of {name or 'all'} ({is_here.sum():,})": errors[is_here].mean()})
        if len(data.classes) > 1:
            print_table({"  area under ROC curve, others above": area(errors, ~is_here)})
    for index in np.argsort(-errors, kind="stable")[:5]:
        print(f"{errors[index]:9.4f} {data.files[index]}")
    place = Path(dataset).resolve()
    name = place.stem if place.is_file() else place.name.replace(":", "_")
    path = run / "examined" / f"{name}.npz"
    train_ae.write_arrays(path, arrays)
    folder = settings.sample_folder / "examined" / name
    train_ae.draw_worst(folder.with_name(f"{name}-worst.png"), evaluate, data, errors)
    if with_pictures:
        save_pictures(folder, evaluate, data)
    print(f"{path} and {folder}")


def area(errors, is_anomaly):
    """Return the probability that an anomaly has a larger error than another image."""
    others = np.sort(errors[~is_anomaly])
    ranks = np.searchsorted(others, errors[is_anomaly])
    return ranks.mean() / len(others)


def save_pictures(folder, evaluate, data):
    """Write each reconstruction under the name of its picture, as .png."""
    names = [Path(file).with_suffix(".png") for file in data.files]
    counts = Counter(names)
    for row, (file, name) in enumerate(zip(data.files, names, strict=True)):
        image = data.prepare([row])
        (output,) = evaluate(image, image).outputs.numpy()
        pixels = np.rint(255 * np.clip(output, 0, 1))
        picture = keras.utils.array_to_img(pixels, scale=False)
        if counts[name] > 1:  # a.jpg beside a.png
            name = f"{file}_{row}.png"
        train_ae.write_atomically(folder / name, picture.save)


def print_table(table):
    """Print names and values."""
    for name, value in table.items():
        print(f"{name:40} {value:9.4f}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    try:
        if arguments.set:
            examine_set(arguments.run, arguments.set, arguments.pictures)
        else:
            examine_run(arguments.run)
    except (OSError, train_ae.SettingsError, train_ae.RunError) as error:
        parser.error(str(error).splitlines()[0])
