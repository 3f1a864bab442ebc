"""What a run writes, and that its numbers are what they say."""

import json
import re
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from events import read, scalars
from PIL import Image
from runs import Finished, call_here, environment, said
from test_theory import smallest_shifted_error

import train_ae

LAYERS = [f"{kind}{index}" for kind in ("conv", "deconv") for index in range(1, 5)]
FIGURES = ["test_loss", "squared_error", "shift_tolerant_error", "psnr", "ssim", "pca_squared_error", "latent_size"]


def saved_figures(run, images):
    """Return figures of the saved model over uint8 images, from their definitions."""
    model = keras.models.load_model(run.logs / "autoencoder.keras")
    images = images.astype(np.float32) / 255
    drawn = model.predict(images, verbose=0)
    square = np.square(drawn.astype(float) - images)
    clipped = np.square(np.clip(drawn, 0, 1).astype(float) - images).mean(axis=(1, 2, 3))
    return {
        "test_loss": square.sum(axis=3).mean(),
        "squared_error": square.sum(axis=(1, 2, 3)).mean(),
        "shift_tolerant_error": smallest_shifted_error(images, drawn.astype(float)).mean(),
        "psnr": (-10 * np.log10(clipped)).mean(),
        "ssim": tf.image.ssim(images[:64], np.clip(drawn[:64], 0, 1), 1).numpy().mean(),  # it is slow
    }


def shown_digits(digits):
    """Return the test images of the pictures: the first one of each digit."""
    labels = list(digits["test_labels"])
    return digits["test_images"][[labels.index(digit) for digit in range(10)]]


def test_default_run_ends_in_the_known_range(default_run):
    metrics = default_run.json("metrics.json")
    assert 0.013 <= metrics["test_loss"] <= 0.0165
    assert list(metrics) == [*FIGURES, "steps", "seconds"]
    assert (metrics["steps"], metrics["latent_size"]) == (3000, 512)
    assert metrics["seconds"] > 0


def test_final_figures_are_those_of_the_saved_model(default_run, digits):
    metrics = default_run.json("metrics.json")
    for name, value in saved_figures(default_run, digits["test_images"]).items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name


def test_default_run_writes_every_file_and_no_other(default_run):
    pictures = [f"step_{step:05}.png" for step in range(0, 3001, 50)]
    files = {*pictures, "latents.png", "summary.png", "training.gif"}
    assert {path.name for path in default_run.samples.iterdir()} == files
    files = {"autoencoder.keras", "checkpoints", "config.json", "metrics.json", "metrics", "test", "train"}
    assert {path.name for path in default_run.logs.iterdir()} == files
    last = {f"step_{step:08}.npz" for step in (2000, 2500, 3000)}
    assert {path.name for path in default_run.logs.glob("checkpoints/[!.]*")} == last
    for kind in ("metrics", "test", "train"):
        (path,) = (default_run.logs / kind).iterdir()
        assert "tfevents" in path.name
    assert {path.name for path in default_run.cwd.iterdir()} == {"logs", "samples"}
    for path in default_run.samples.iterdir():
        Image.open(path).verify()


def test_animation_runs_from_the_first_picture_to_the_last(default_run):
    animation = Image.open(default_run.samples / "training.gif")
    assert 15 <= animation.n_frames <= 30
    for frame, name in ((0, "step_00000.png"), (animation.n_frames - 1, "step_03000.png")):
        animation.seek(frame)
        drawn = np.asarray(Image.open(default_run.samples / name).convert("L"), float)
        frames = np.asarray(animation.convert("L"), float)
        assert frames.shape == drawn.shape and np.abs(frames - drawn).mean() < 6  # it has few colors
    assert animation.info["duration"] > 1000  # the last one stays


def test_config_holds_every_setting_what_was_read_and_the_versions(short_run, digits):
    expected = {field.name: field.default for field in train_ae.dataclasses.fields(train_ae.Settings)}
    expected |= {"steps": 120, "run_name": "x", "training_images": 4000, "replicas": 1}
    expected |= {"checksum": f"{zlib.crc32(digits['train_images'].tobytes()):08x}"}
    expected |= {"tensorflow": tf.__version__, "keras": keras.__version__}
    expected |= {"onednn": environment({}).get("TF_ENABLE_ONEDNN_OPTS", "0")}
    config = short_run.json("config.json")
    assert "mnist_5k.npz" in config.pop("data")
    assert config == expected


def test_losses_are_logged_at_every_step_and_tests_at_every_picture(short_run, default_run):
    weights = {f"weights/{name}" for name in LAYERS}
    for run, steps, pictured in ((short_run, 120, [0, 50, 100, 120]), (default_run, 3000, [*range(0, 3001, 50)])):
        train, test = read(run.logs / "train"), read(run.logs / "test")
        assert train.Tags()["tensors"] == ["loss"]
        assert [event.step for event in train.Tensors("loss")] == [*range(steps)]
        assert np.isfinite(scalars(run.logs / "train")[1]).all()
        assert set(test.Tags()["tensors"]) == {"loss", "reconstructions"} | weights
        for tag in ("loss", "reconstructions"):
            assert [event.step for event in test.Tensors(tag)] == pictured
        for tag in weights:
            assert [event.step for event in test.Tensors(tag)] == [*range(0, steps + 1, 500)]


def test_training_loss_is_that_before_the_update(short_run, digits):
    keras.utils.set_random_seed(0)
    model = train_ae.build_autoencoder((28, 28, 1))
    first = int(train_ae.batch_indices(tf.constant(0, tf.int64), 1, 4000, 0)[0])
    image = digits["train_images"][first : first + 1].astype(np.float32) / 255
    expected = np.square(model(image) - image).mean()
    assert scalars(short_run.logs / "train")[1][0] == pytest.approx(expected, rel=1e-6)


def test_test_losses_are_made_after_as_many_updates_as_they_say(short_run, digits):
    images = shown_digits(digits)
    keras.utils.set_random_seed(0)
    untrained = np.square(train_ae.build_autoencoder((28, 28, 1))(images / np.float32(255)) - images / 255).mean()
    _, losses = scalars(short_run.logs / "test")
    assert losses[0] == pytest.approx(untrained, rel=1e-5)
    assert losses[-1] == pytest.approx(saved_figures(short_run, images)["test_loss"], rel=1e-5)


def test_last_picture_shows_the_saved_models_reconstructions(short_run, digits):
    picked = shown_digits(digits)[:10]
    drawn = keras.models.load_model(short_run.logs / "autoencoder.keras")(picked / np.float32(255)).numpy()
    picture = np.asarray(Image.open(short_run.samples / "step_00120.png"))
    size = 28 * 3 + train_ae.GAP
    for row, images in enumerate((picked, np.rint(np.clip(drawn, 0, 1) * 255))):
        for column in range(10):
            top, left = train_ae.TITLE + size * row, train_ae.GAP // 2 + size * column
            shown = picture[top:, left:][: 28 * 3 : 3, : 28 * 3 : 3]
            np.testing.assert_allclose(shown, images[column, ..., 0], atol=1)


def test_output_says_what_is_used_how_to_look_and_how_it_goes(default_run):
    assert said(default_run.process) == []
    lines = default_run.process.stdout.splitlines()
    assert lines[0].split() == ["device", f"/device:{'GPU' if tf.config.list_physical_devices('GPU') else 'CPU'}:0"]
    assert lines[1].startswith("data     4,000 and (1000, 28, 28, 1) images: MNIST")
    assert "logs/default" in lines[2] and "samples/default" in lines[2]
    assert lines[3].endswith("tensorboard --logdir logs --samples_per_plugin images=1000")
    progress = [re.fullmatch(r"step +([\d,]+)  (?:loss (\S+)  )?test loss (\S+)", line) for line in lines[4:65]]
    assert [int(line[1].replace(",", "")) for line in progress] == [*range(0, 3001, 50)]
    _, losses = scalars(default_run.logs / "train")
    means = [f"{mean:.4f}" for mean in losses.reshape(60, 50).mean(axis=1, dtype=np.float32)]
    assert [line[2] for line in progress] == [None, *means]
    assert [line[3] for line in progress] == [f"{loss:.4f}" for loss in scalars(default_run.logs / "test")[1]]
    metrics = default_run.json("metrics.json")
    table = dict(line.split(maxsplit=1) for line in lines[65:])
    assert list(table) == list(metrics)
    for name, value in metrics.items():
        assert float(table[name]) == pytest.approx(value, rel=1e-5)


def test_another_seed_gives_other_weights_and_another_order(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        assert call_here(*tiny, "--steps", 3, "--seed", seed, "--run-name", f"seed{seed}") == 0
    one, other = (Finished(tmp_path, f"seed{seed}") for seed in (0, 1))
    assert not np.array_equal(one.weights()[0], other.weights()[0])
    orders = [train_ae.batch_indices(tf.constant(0, tf.int64), 54, 54, seed).numpy() for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == [*range(54)] and not np.array_equal(*orders)


def test_train_can_be_imported_and_returns_the_metrics(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"dataset": pictures, "depth": 1, "run_name": "imported", "sample_dir": "a/b", "log_dir": tmp_path / "l"}
    settings = train_ae.Settings(steps=7, batch_size=3, sample_every=5, **options)
    metrics = train_ae.train(settings)
    assert metrics == json.loads((tmp_path / "l/imported/metrics.json").read_text())
    assert metrics["steps"] == 7
    assert sorted(path.name for path in (tmp_path / "a/b/imported").glob("step_*")) == [
        f"step_{step:05}.png" for step in (0, 5, 7)
    ]
    assert "step      7" in capsys.readouterr().out
    assert train_ae.train(settings) == metrics
