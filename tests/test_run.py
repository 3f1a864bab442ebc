"""What a run writes, and that its numbers are what they say."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Run, call
from events import read, scalars
from PIL import Image
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.util import tensor_util
from test_model import LAYERS

import train_ae

FIGURES = ["squared_error", "shift_tolerant_error", "psnr", "ssim", "loss"]  # at each picture


def saved_figures(run, images):
    """Return figures of the saved model over uint8 images, from their definitions."""
    model = keras.models.load_model(run.logs / "autoencoder.keras")
    images = images.astype(np.float32) / 255
    drawn = model.predict(images, verbose=0)
    square = np.square(drawn.astype(float) - images)
    clipped = np.square(np.clip(drawn, 0, 1).astype(float) - images).mean(axis=(1, 2, 3))
    return {
        "test_loss": square.sum(axis=3).mean(),
        "test_squared_error_per_image": square.sum(axis=(1, 2, 3)).mean(),
        "shift_tolerant_error": smallest_error(images, drawn),
        "psnr": (-10 * np.log10(clipped)).mean(),
        "ssim": tf.image.ssim(images, np.clip(drawn, 0, 1), 1).numpy().mean(),
    }


def smallest_error(images, drawn):
    """Return the mean over images of the smallest squared error against the drawn one moved by up to 2 pixels."""
    errors = []
    for down in range(-2, 3):
        for right in range(-2, 3):
            moved = np.zeros_like(drawn)
            moved[:, max(0, down) : 28 + min(0, down), max(0, right) : 28 + min(0, right)] = drawn[
                :, max(0, -down) : 28 + min(0, -down), max(0, -right) : 28 + min(0, -right)
            ]
            errors.append(np.square(moved.astype(float) - images).sum(axis=(1, 2, 3)))
    return np.min(errors, axis=0).mean()


def test_default_run_ends_in_the_known_range(default_run):
    metrics = default_run.json("metrics.json")
    assert 0.013 <= metrics["test_loss"] <= 0.0165
    assert metrics["steps"] == 3000
    assert "4,000 training and 1,000 test images" in metrics["data"]
    assert 0 < metrics["ms_per_step"] * 3 < metrics["seconds"]  # 3,000 steps of so many ms are a part of it


def test_final_figures_are_those_of_the_saved_model(default_run, digits):
    metrics = default_run.json("metrics.json")
    for name, value in saved_figures(default_run, digits["test_images"]).items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name


def test_default_run_writes_every_file(default_run):
    names = [f"step_{step:05}.png" for step in range(0, 3001, 50)]
    assert sorted(path.name for path in default_run.samples.iterdir()) == [*names, "summary.png"]
    names = sorted(path.name for path in default_run.logs.iterdir())
    assert [name for name in names if not name.startswith("events.")] == [
        ".lock",
        "autoencoder.keras",
        "checkpoints",
        "config.json",
        "metrics.json",
        "projector",
        "projector_config.pbtxt",
        "test",
        "train",
    ]
    assert len(names) == 10  # and the events of the table of runs
    for path in default_run.samples.iterdir():
        Image.open(path).verify()


def test_config_holds_every_setting_and_the_versions(short_run):
    config = short_run.json("config.json")
    expected = {field.name: field.default for field in train_ae.dataclasses.fields(train_ae.Settings)}
    expected |= {"steps": 120, "run_name": "short", "python": platform.python_version()}
    expected |= {"tensorflow": tf.__version__, "keras": keras.__version__}
    assert config.pop("training_images") == 4000
    assert config.pop("data") == short_run.json("metrics.json")["data"]
    assert config == expected


def test_saved_model_opens_without_the_script(short_run, tmp_path):
    code = "import sys, keras; m = keras.models.load_model(sys.argv[1]); print(m.count_params(), m.output_shape)"
    command = [sys.executable, "-c", code, str(short_run.logs / "autoencoder.keras")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert process.stdout.split("\n")[-2] == "194177 (None, 28, 28, 1)"


def test_losses_are_logged_at_every_step_and_tests_at_every_picture(short_run, default_run):
    for run, steps, pictured in ((short_run, 120, [0, 50, 100, 120]), (default_run, 3000, [*range(0, 3001, 50)])):
        found, losses = scalars(run.logs / "train", "loss")
        np.testing.assert_array_equal(found, np.arange(steps))
        assert np.isfinite(losses).all()
        weights = [f"weights/{name}" for name in LAYERS]
        assert read(run.logs / "test").Tags()["tensors"] == [*FIGURES, "reconstructions", *weights]
        for tag in (*FIGURES, "reconstructions", *weights):
            assert [event.step for event in read(run.logs / "test").Tensors(tag)] == pictured
    assert read(default_run.logs / "train").Tags()["tensors"] == ["settings", "loss"]


def test_training_loss_is_that_before_the_update(short_run, digits):
    keras.utils.set_random_seed(0)
    first = int(train_ae.batch_indices(tf.constant(0, tf.int64), 1, 4000, 0)[0])
    image = digits["train_images"][first : first + 1].astype(np.float32) / 255
    drawn = train_ae.build_autoencoder()(image)
    assert scalars(short_run.logs / "train", "loss")[1][0] == pytest.approx(np.square(drawn - image).mean(), rel=1e-6)


def test_test_figures_are_made_after_as_many_updates_as_they_say(short_run, digits):
    images = digits["test_images"][train_ae.pick_test_images(digits["test_labels"])].astype(np.float32) / 255
    keras.utils.set_random_seed(0)
    untrained = np.square(train_ae.build_autoencoder()(images) - images).mean()
    trained = saved_figures(short_run, digits["test_images"][train_ae.pick_test_images(digits["test_labels"])])
    _, losses = scalars(short_run.logs / "test", "loss")
    assert losses[0] == pytest.approx(untrained, rel=1e-5)
    assert losses[-1] == pytest.approx(trained["test_loss"], rel=1e-5)
    trained["squared_error"] = trained["test_squared_error_per_image"]
    for name in ("squared_error", "shift_tolerant_error", "psnr", "ssim"):
        assert scalars(short_run.logs / "test", name)[1][-1] == pytest.approx(trained[name], rel=1e-5), name


def test_last_grid_shows_the_saved_models_reconstructions(short_run, digits):
    picked = digits["test_images"][train_ae.pick_test_images(digits["test_labels"])][:10]
    drawn = keras.models.load_model(short_run.logs / "autoencoder.keras")(picked.astype(np.float32) / 255).numpy()
    picture = np.asarray(Image.open(short_run.samples / "step_00120.png"))
    for row, images in enumerate((picked, np.rint(np.clip(drawn, 0, 1) * 255))):
        left, top, _, _ = train_ae.grid_row(row)
        for column in range(10):
            shown = picture[top:, left + column * train_ae.TILE :][: 28 * 3 : 3, : 28 * 3 : 3]
            np.testing.assert_allclose(shown, images[column, ..., 0], atol=1)


def test_tensorboards_grid_is_the_picture(short_run):
    for event in read(short_run.logs / "test").Tensors("reconstructions"):
        width, height, png = tensor_util.make_ndarray(event.tensor_proto)
        picture = np.asarray(Image.open(short_run.samples / f"step_{event.step:05}.png"))
        assert picture.shape == (int(height), int(width))
        np.testing.assert_array_equal(tf.io.decode_png(png)[..., 0], picture)


def test_graph_names_encoder_and_decoder_and_their_layers(short_run):
    names = [node.name for node in GraphDef.FromString(read(short_run.logs / "train").Graph().SerializeToString()).node]
    for part, kind in (("encoder", "conv"), ("decoder", "deconv")):
        for index in range(1, 5):
            assert any(f"{part}" in name and f"/{kind}{index}" in name for name in names), (part, kind, index)


def test_histograms_count_the_saved_models_kernels(short_run):
    model = keras.models.load_model(short_run.logs / "autoencoder.keras")
    for layer in (*model.get_layer("encoder").layers, *model.get_layer("decoder").layers[:-1]):
        kernel = layer.kernel.numpy()
        *_, event = read(short_run.logs / "test").Tensors(f"weights/{layer.name}")
        buckets = tensor_util.make_ndarray(event.tensor_proto)
        assert buckets.shape == (30, 3) and buckets[:, 2].sum() == kernel.size
        np.testing.assert_array_equal(buckets[1:, 0], buckets[:-1, 1])
        assert buckets[0, 0] == pytest.approx(kernel.min()) and buckets[-1, 1] == pytest.approx(kernel.max())
        for left, right, count in buckets[1:-1]:
            assert count == pytest.approx(((left <= kernel) & (kernel < right)).sum(), abs=2)


def test_settings_are_a_text_in_tensorboard(short_run):
    (event,) = read(short_run.logs / "train").Tensors("settings")
    text = tensor_util.make_ndarray(event.tensor_proto).item().decode()
    assert "| steps | 120 |" in text and "| learning_rate | 0.001 |" in text


def test_output_says_what_is_used_and_how_to_look(short_run):
    lines = short_run.process.stdout.splitlines()
    assert lines[0].split() == ["device", "GPU" if tf.config.list_physical_devices("GPU") else "CPU"]
    assert "4,000 training and 1,000 test images" in lines[1]
    assert "logs/short" in lines[2] and "samples/short" in lines[2]
    assert "tensorboard --logdir logs --samples_per_plugin images=1000" in lines[3]
    progress = [line.split() for line in lines if line.startswith("step ")]
    assert [int(words[1]) for words in progress] == [0, 50, 100, 120]
    _, losses = scalars(short_run.logs / "train", "loss")
    _, tests = scalars(short_run.logs / "test", "loss")
    for words, loss, test in zip(progress[1:], (losses[:50], losses[50:100], losses[100:]), tests[1:], strict=True):
        assert words[2:7] == ["loss", f"{loss.mean():.4f}", "test", "loss", f"{test:.4f}"]
        assert float(words[7]) > 0 and words[8:] == ["ms", "a", "step"]
    metrics = short_run.json("metrics.json")
    table = dict(line.split(maxsplit=1) for line in lines[-len(metrics) :])
    assert list(table) == list(metrics)
    assert float(table["test_loss"]) == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_same_seed_gives_the_same_bits_whatever_the_threads(short_run, tmp_path):
    many = {"OMP_NUM_THREADS": "7", "TF_NUM_INTRAOP_THREADS": "7", "TF_NUM_INTEROP_THREADS": "5"}
    again = Run(tmp_path, "again", "--steps", 120, env=many, prefix=one_processor())
    batches = [
        Run(tmp_path, f"batches{i}", "--steps", 30, "--batch-size", 32, env=env, prefix=prefix)
        for i, (env, prefix) in enumerate([({}, ()), (many, one_processor())])
    ]
    for one, other in ((short_run, again), batches):
        for ours, theirs in zip(one.weights(), other.weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for kind in ("train", "test"):
            np.testing.assert_array_equal(*(scalars(run.logs / kind, "loss")[1] for run in (one, other)))
        for path in one.samples.glob("step_*.png"):
            assert path.read_bytes() == (other.samples / path.name).read_bytes()


def one_processor():
    """Return the words that hold a command to one processor, where there is a tool for it."""
    return ("taskset", "-c", str(min(os.sched_getaffinity(0)))) if shutil.which("taskset") else ()


def test_another_seed_gives_other_weights(short_run, tmp_path):
    other = Run(tmp_path, "other", "--steps", 10, "--seed", 1)
    assert not np.array_equal(short_run.weights()[0], other.weights()[0])
    assert scalars(short_run.logs / "train", "loss")[1][0] != scalars(other.logs / "train", "loss")[1][0]


def test_train_can_be_imported_and_returns_the_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = train_ae.Settings(steps=7, batch_size=3, sample_every=5, run_name="imported", sample_dir="a/b")
    metrics = train_ae.train(settings)
    assert metrics == json.loads((tmp_path / "logs/imported/metrics.json").read_text())
    assert metrics["steps"] == 7
    assert sorted(path.name for path in (tmp_path / "a/b/imported").glob("step_*")) == [
        f"step_{step:05}.png" for step in (0, 5, 7)
    ]
    assert "7 " in capsys.readouterr().out


def test_runs_without_a_name_take_the_time(tmp_path):
    process = call("--steps", 2, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (name,) = (path.name for path in (tmp_path / "logs").iterdir())
    assert time.strptime(name, "%Y-%m-%d_%H-%M-%S")
    assert (tmp_path / "samples" / name / "summary.png").is_file()
