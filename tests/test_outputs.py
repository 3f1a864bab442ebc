"""Outputs: a run's files and pictures, TensorBoard as its own server shows it, and the terminal."""

import io
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageDraw, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_ae

# --------------------------------------------------------------------------------------------------
# Files


def test_run_writes_the_documented_files_and_no_other(default_run):
    names = {re.sub("tfevents.*", "", path.name) for path in default_run.cwd.rglob("*")}
    pictures = {f"step_{step:05}.png" for step in range(0, 3001, 50)}
    checkpoints = {f"step_{step:012}.npz" for step in (2000, 2500, 3000)}
    others = (
        "logs samples x train preview checkpoints config.json events.out. train_ae.py"
        " autoencoder.keras metrics.json latents.npz training.gif summary.png worst.png .lock-0"
    )
    names.add(".lock-0")  # which Windows has removed
    assert names == pictures | checkpoints | {*others.split()}
    assert {path.name for path in default_run.cwd.iterdir()} == {"logs", "samples"}
    assert (default_run.logs / "train_ae.py").read_bytes() == helpers.SCRIPT.read_bytes()


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    def save(part):
        part.write_text("half")
        raise OSError(28, "disk full")

    (tmp_path / "x").write_text("old")
    with pytest.raises(train_ae.RunError, match="disk full"):
        train_ae.write_atomically(tmp_path / "x", save)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# --------------------------------------------------------------------------------------------------
# Pictures


def check(picture, title, rows, zoom):
    """Assert that a picture has a title above rows of images: enlarged, on a grey background."""
    gaps = [
        (0, 0),
        (0, 0),
        (0, 2),  # below each image
        (1, 1),  # left and right
        (0, 0),
    ]
    shades = 255 * np.clip(rows, 0, 1)
    tiles = np.pad(shades, gaps, constant_values=32)
    grid = np.vstack([np.hstack(row) for row in tiles])
    grid = np.kron(grid, np.ones((zoom, zoom, 1)))
    _, width, channels = grid.shape
    more = max(0, 300 - width)
    grid = np.pad(grid, [(0, 0), (0, more), (0, 0)], constant_values=32)
    head = Image.new("L", (width + more, 28), 32)
    ImageDraw.Draw(head).text((6, 14), title, "white", font_size=16, anchor="lm")
    head = np.dstack([head] * channels)
    expected = np.vstack([head, grid])
    found = picture.reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=0.6)


@pytest.mark.parametrize(
    ("shape", "noise", "shown", "zoom"),
    [
        ((6, 4, 3), 0.4, 10, 16),
        ((5, 140, 1), 0, 10, 1),
        ((140, 5, 1), 0, 10, 1),
        ((5, 1500, 1), 0, 1, 1),
    ],
    ids=str,
)
def test_pictures_pixel_by_pixel(shape, noise, shown, zoom, run_here):
    """Test images, with noise if there is any, above reconstructions; one of each class first.

    The worst come without noise.
    """
    images = np.random.default_rng(0).integers(0, 256, (12, *shape), np.uint8)
    labels = [1] * 3 + [0] * 9
    np.savez("x.npz", x_train=images, x_test=images, y_test=labels)
    run = run_here(
        "--dataset=x.npz",
        "--depth=1",
        "--steps=2",
        "--learning-rate=0.01",
        f"--noise={noise}",
    )

    images = images / np.float32(255)
    order = [3, 0, 1, 2, *range(4, 12)]
    targets = images[order[:shown]]
    draws = tf.random.stateless_normal(targets.shape, [0, -1])
    inputs = np.clip(targets + noise * draws, 0, 1)
    originals = [targets, inputs] if noise else [targets]
    model = run.model()
    outputs = model(inputs).numpy()
    loss = run.checkpoint()["previews"][-1, 1]
    expected = np.square(outputs - targets).sum(axis=-1).mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    title = f"step 2   preview loss {loss:.4f}"
    check(run.picture("step_00002.png"), title, [*originals, outputs], zoom)

    outputs = model(images).numpy()
    errors = np.square(outputs.clip(0, 1) - images).sum(axis=(1, 2, 3))
    worst = np.argsort(-errors)[:shown]
    *_, least = errors[worst]
    title = f"squared errors from {errors.max():.4g} to {least:.4g}"
    check(run.picture("worst.png"), title, [images[worst], outputs[worst]], zoom)


def test_animation_runs_from_the_first_picture_to_the_last(default_run):
    """In some twenty frames, between which there are ever more steps."""
    names = [f"step_{step:05}.png" for step in range(0, 3001, 50)]
    pictures = [(default_run.picture(name) // 16 * 17).tobytes() for name in names]
    with Image.open(default_run.samples / "training.gif") as animation:
        assert animation.info["loop"] == 0  # without end
        frames = [frame.convert("L") for frame in ImageSequence.Iterator(animation)]
    found = [pictures.index(frame.tobytes()) for frame in frames]
    assert 15 <= len(found) <= 30
    assert found[0] == 0
    assert found[-1] == 60
    gaps = np.diff(found)
    assert gaps[0] == 1
    assert min(np.diff(gaps)) >= -1
    assert gaps[-1] > 4
    *times, last = [frame.info["duration"] for frame in frames]
    assert last > max(times)  # the result stays for a while


def test_summary_has_two_curves(default_run):
    """In matplotlib's first colours."""
    pixels = default_run.picture("summary.png")
    colors = 255 * matplotlib.colors.to_rgba_array(["C0", "C1", "C2"])
    distances = abs(pixels[..., np.newaxis, :] - colors).max(axis=-1)
    first, second, third = np.sum(distances < 4, axis=(0, 1))
    assert min(first, second) > 100
    assert third == 0


# --------------------------------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_shows_every_loss_and_every_picture(default_run):
    """Both losses in one chart, since they have one tag."""
    charts = helpers.shown(default_run.logs)
    pictures = dict(charts.pop(("preview", "reconstructions")))
    assert charts == {
        ("train", "loss"): list(enumerate(default_run.losses())),
        ("preview", "loss"): [*map(tuple, default_run.checkpoint()["previews"])],
    }
    for step in range(0, 3001, 50):
        _, _, png = pictures[step]
        picture = default_run.picture(f"step_{step:05}.png")
        unscaled = picture[28::3, ::3]  # below the title, 3x3 pixels for each
        np.testing.assert_array_equal(Image.open(io.BytesIO(png)), unscaled)


def test_resumed_run_shows_each_picture_once(tiny, run_here):
    for steps in (50, 90):
        run = run_here(*tiny, "--sample-every", 20, "--steps", steps)
    charts = helpers.shown(run.logs)
    pictured = [0, 20, 40, 50, 60, 80, 90]
    for tag in ("loss", "reconstructions"):
        assert [step for step, _ in charts["preview", tag]] == pictured
    with Image.open(run.samples / "training.gif") as animation:
        assert animation.n_frames == len(pictured)


def test_graph_has_the_layers_and_hparams_has_the_settings(default_run):
    events = EventAccumulator(str(default_run.logs / "preview")).Reload()
    names = " ".join(node.name for node in events.Graph().node)
    assert re.search("/conv1.*/conv4.*/deconv1.*/deconv4", names)
    (settings,) = events.PluginTagToContent("hparams").values()
    assert b"learning_rate" in settings


# --------------------------------------------------------------------------------------------------
# The terminal


def test_a_pipe_gets_a_line_for_each_preview(default_run):
    expected = []
    losses = default_run.losses().reshape(60, 50).mean(axis=1)
    for step, preview in default_run.checkpoint()["previews"]:
        loss = f"loss {losses[int(step) // 50 - 1]:.4f}  " if step else ""
        expected.append(f"step {step:6,.0f}  {loss}preview loss {preview:.4f}")
    assert default_run.output.splitlines()[8:-3] == expected


def test_first_lines_and_a_warning_of_no_success(run_here, capsys):
    images = np.random.default_rng(0).integers(0, 256, (24, 6, 5), np.uint8)
    np.savez("x.npz", x_train=images, y_train=[*"abcdefghijkl"] * 2)
    run_here(
        "--dataset=x.npz", "--steps=9", "--learning-rate=1", "--noise=0.1", "--log-dir=my logs"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(1).startswith("device   ")
    assert lines[:8] == [
        "test     a random tenth of the images, drawn with --seed 0",
        "data     x.npz: 21 images to train on, 3 to test on, 6x5x1",
        "classes  12: a, b, c, d, e, f, g, h, i, j, …",
        "weights  glorot initial weights",
        "steps    9 x 1 images = 0.429 epochs",
        f"writes   {Path('my logs/x')} and {Path('samples/x')}",
        "resume   with the same command and --run-name x",
        'view     tensorboard --logdir "my logs" --samples_per_plugin images=1000',
    ]
    assert "warning  the model is no better than one constant picture: train" in lines[-3]
    assert re.match(r"noisy    PSNR \d+\.\d dB", lines[-4])


def seem_a_terminal():
    sys.stdout.isatty = lambda: True


def seem_a_notebook():
    sys.modules["ipykernel"] = sys


@pytest.mark.parametrize("before", [seem_a_terminal, seem_a_notebook])
def test_a_terminal_or_a_notebook_gets_one_bar(before, tiny, tmp_path):
    job = helpers.Job(
        tmp_path,
        *tiny,
        "--steps=60",
        before=before,
    )
    assert job.end()[:2] == (0, [])
    output = (tmp_path / "out.txt").read_bytes().decode()  # with carriage returns
    (bar,) = re.findall(r".*%\|.*", output)
    assert re.search(r"100%\|.* 60/60 .*preview loss [0-9.]+]$", bar.rstrip())
    assert "\nstep " not in output


def replace_streams(stream):
    os.close(1)
    sys.stdout = stream
    sys.stderr = stream


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=len)])
def test_stdout_may_be_closed_or_replaced(stream, tiny, tmp_path):
    before = partial(replace_streams, stream)
    assert helpers.Job(tmp_path, *tiny, "--steps=1", before=before).end()[0] == 0
