"""Outputs: a run's files and pictures, TensorBoard as its own server shows it, and the terminal."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import helpers
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_ae

TITLE = 28  # pixels above the images


@pytest.fixture(scope="module")
def grown(tiny, tmp_path_factory):
    """A run with pretraining and noise that has ended after 60 steps, and then resumed."""
    folder = tmp_path_factory.mktemp("grown")
    options = "--run-name x --pretrain-steps 30 --noise 0.4 --sample-every 20"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for steps in (60, 90):
            assert helpers.here(*tiny, *options.split(), "--steps", steps) == 0
    return helpers.Finished(folder)


# --------------------------------------------------------------------------------------------------
# Files


def test_run_writes_the_documented_files_and_no_other(default_run):
    pictures = [f"step_{step:05}.png" for step in range(0, 3001, 50)]
    names = {path.name for path in default_run.samples.iterdir()}
    assert names == {*pictures, "training.gif", "summary.png"}
    found = [path for path in default_run.logs.rglob("[!.]*") if path.is_file()]
    places = [path.relative_to(default_run.logs).as_posix() for path in found]
    assert sorted(re.sub(r"step_0*|tfevents.*", "", place) for place in places) == [
        "autoencoder.keras",
        "checkpoints/2000.npz",
        "checkpoints/2500.npz",
        "checkpoints/3000.npz",
        "config.json",
        "latents.npz",
        "metrics.json",
        "preview/events.out.",
        "train/events.out.",
    ]
    assert {path.name for path in default_run.cwd.iterdir()} == {"logs", "samples"}


def test_file_is_written_whole_or_not_at_all(tmp_path):
    """By the function itself, since nothing outside can fail in the midst of a write."""
    path = tmp_path / "file.txt"
    train_ae.write_atomically(path, lambda part: part.write_text("whole"))

    def fail(part):
        part.write_text("ha")
        assert path.read_text() == "whole"
        raise OSError(28, "No space left on device")

    with pytest.raises(train_ae.RunError, match=r"file\.txt cannot be written: No space left"):
        train_ae.write_atomically(path, fail)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------
# Pictures


def paste(rows, zoom):
    """Return the grid of rows of images, without its title: enlarged, on a grey background."""
    pixels = np.clip(rows, 0, 1) * 255
    count, images, height, width, channels = pixels.shape
    grid = np.full((count, height + 2, images, width + 2, channels), 32.0)
    grid[:, :height, :, 1:-1] = np.moveaxis(pixels, 1, 2)
    grid = grid.repeat(zoom, axis=1)
    grid = grid.repeat(zoom, axis=3)
    return grid.reshape(count * zoom * (height + 2), -1, channels)


@pytest.mark.parametrize(
    ("shape", "noise", "shown", "zoom"),
    [
        ((28, 28, 1), 0, 10, 3),
        ((8, 4, 3), 0.4, 10, 12),
        ((5, 140, 1), 0, 10, 1),
        ((5, 1500, 1), 0, 1, 1),
    ],
    ids=str,
)
def test_grid_pixel_by_pixel(shape, noise, shown, zoom, tmp_path, run_here):
    """Test images, with noise if there is any, above reconstructions; one of each class first."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, *shape), np.uint8)
    labels = np.array([1] * 3 + [0] * 9)
    np.savez(
        tmp_path / "images.npz",
        x_train=images,
        y_train=labels,
        x_test=images,
        y_test=labels,
    )
    options = f"--dataset images.npz --depth 1 --steps 1 --noise {noise}"
    run = run_here(*options.split())

    order = [3, 0, 1, 2, *range(4, 12)]
    inputs = images[order[:shown]] / np.float32(255)
    rows = [inputs]
    if noise:
        added = tf.random.stateless_normal(inputs.shape, [0, -1], stddev=noise)
        inputs = np.clip(inputs + added, 0, 1)
        rows.append(inputs)
    rows.append(run.model()(inputs))
    grid = paste(rows, zoom)
    picture = run.picture("step_00001.png")
    picture = picture.reshape(TITLE + len(grid), -1, shape[2])
    np.testing.assert_allclose(picture[TITLE:], grid, atol=0.6)
    title = picture[:TITLE]
    assert title.max() > 200
    assert np.median(title) == 32


def test_first_picture_has_the_first_of_each_digit(short_run, digits):
    picture = short_run.picture("step_00000.png")[TITLE:]
    originals = picture.reshape(2, 90, 10, 90)[0, :84:3, :, 3:-3:3]
    for digit in range(10):
        first = digits["x_test"][digits["y_test"] == digit][0, ..., 0]
        np.testing.assert_array_equal(originals[:, digit], first)


def test_each_picture_is_of_the_step_in_its_name(tiny, run_here):
    """By the weights of the checkpoint of the same step."""
    run = run_here(*tiny, "--steps", 35, "--sample-every", 10, "--checkpoint-every", 10)
    names = sorted(path.stem for path in run.samples.glob("step_*.png"))
    assert names == [f"step_{step:05}" for step in (0, 10, 20, 30, 35)]
    model = run.model()
    with np.load(*run.logs.glob("checkpoints/step_*20.npz")) as arrays:
        for variable in model.variables:
            variable.assign(arrays[variable.path])
    grid = run.picture("step_00020.png")[TITLE:]
    tiles = grid.reshape(2, 120, 6, 72, 3)[:, :96:12, :, 12:-12:12]
    originals, shown = np.moveaxis(tiles, 2, 1) / np.float32(255)
    outputs = model(originals).numpy()
    np.testing.assert_allclose(shown, np.clip(outputs, 0, 1), atol=0.003)
    step, loss = run.checkpoint()["previews"][2]
    assert step == 20
    errors = np.square(outputs - originals)
    assert loss == pytest.approx(errors.sum(axis=-1).mean(), rel=1e-5)


def test_animation_runs_from_the_first_picture_to_the_last(default_run):
    """In some twenty frames, between which there are ever more steps."""
    paths = sorted(default_run.samples.glob("step_*.png"))
    levels = [np.asarray(Image.open(path)) // 16 * 17 for path in paths]
    found = []
    times = []
    with Image.open(default_run.samples / "training.gif") as animation:
        assert animation.info["loop"] == 0  # without end
        for frame in ImageSequence.Iterator(animation):
            times.append(frame.info["duration"])
            pixels = np.asarray(frame.convert("L"))
            for place, level in enumerate(levels):
                if np.array_equal(pixels, level):
                    found.append(place)
    assert len(times) == len(found)
    assert 15 <= len(found) <= 30
    assert found[0] == 0
    assert found[-1] == 60
    gaps = np.diff(found)
    assert gaps[0] == 1
    assert (np.diff(gaps) >= -1).all()
    assert gaps[-1] > 4
    assert times[-1] > max(times[:-1])  # the result stays for a while


def test_animation_is_made_without_a_damaged_picture(short_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(short_run.cwd, tmp_path, dirs_exist_ok=True)
    damaged = Path("samples", "x", "step_00050.png")
    damaged.write_bytes(damaged.read_bytes()[:300])
    assert helpers.here("--run-name", "x", "--steps", 120) == 0
    warnings = re.findall("warning.*", capsys.readouterr().out)
    assert len(warnings) == 1
    assert str(damaged) in warnings[0]
    with Image.open("samples/x/training.gif") as animation:
        assert animation.n_frames == 3  # of steps 0, 100 and 120


def find_columns(run, color):
    """Return the first column of summary.png with a colour, and in how many pixels it is."""
    wanted = np.array(matplotlib.colors.to_rgb(color)) * 255
    pixels = run.picture("summary.png")[..., :3]
    _, columns = np.nonzero(abs(pixels - wanted).max(axis=-1) < 4)
    return columns.min(initial=900), len(columns)


@pytest.mark.parametrize(("name", "count"), [("default_run", 2), ("grown", 3)])
def test_summary_has_a_curve_for_each_phase_and_the_preview(name, count, request):
    run = request.getfixturevalue(name)
    places = []
    sizes = []
    for index in range(4):
        place, size = find_columns(run, f"C{index}")
        places.append(place)
        sizes.append(size)
    assert min(sizes[:count]) > 100
    assert max(sizes[count:]) == 0
    if count == 3:  # pretraining comes before the rest
        assert places[0] + 50 < places[1]


def test_summary_is_the_same_whatever_a_matplotlibrc_says(tiny, run_here):
    plain = run_here(*tiny, "--steps", 3)
    strange = {"text.usetex": True, "axes.facecolor": "red", "savefig.dpi": 30}
    with matplotlib.rc_context(strange):
        other = run_here(*tiny, "--steps", 3, name="y")
    paths = [run.samples / "summary.png" for run in (plain, other)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


# --------------------------------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_shows_every_loss_and_every_picture(default_run):
    """Both losses in one chart, since they have one tag."""
    charts = helpers.shown(default_run.logs)
    pictures = charts.pop(("preview", "reconstructions"))
    assert charts.keys() == {("train", "loss"), ("preview", "loss")}
    steps, losses = np.transpose(charts["train", "loss"])
    np.testing.assert_array_equal(steps, np.arange(3000))
    np.testing.assert_array_equal(losses, default_run.losses())
    previews = default_run.checkpoint()["previews"]
    np.testing.assert_array_equal(charts["preview", "loss"], previews)
    np.testing.assert_array_equal(previews[:, 0], np.arange(0, 3001, 50))
    assert [step for step, _ in pictures] == [*range(0, 3001, 50)]
    for step, (width, height, png) in pictures:
        path = default_run.samples / f"step_{step:05}.png"
        assert png == path.read_bytes()
        assert Image.open(path).size == (int(width), int(height))


def test_resumed_run_shows_each_step_once(grown):
    charts = helpers.shown(grown.logs)
    pictured = [0, 20, 40, 60, 80, 90]
    expected = {
        ("pretrain/conv1", "loss/pretraining"): [*range(30)],
        ("train", "loss"): [*range(90)],
        ("preview", "loss"): pictured,
        ("preview", "reconstructions"): pictured,
    }
    assert charts.keys() == expected.keys()
    for key, points in charts.items():
        steps, values = zip(*points, strict=True)
        assert list(steps) == expected[key]
        if key[0] != "preview":
            np.testing.assert_array_equal(values, grown.losses(key[0]))
    names = sorted(path.stem for path in grown.samples.glob("step_*"))
    assert names == [f"step_{step:05}" for step in pictured]
    with Image.open(grown.samples / "training.gif") as animation:
        assert animation.n_frames == len(pictured)


def test_graph_has_the_names_of_the_layers(default_run):
    events = EventAccumulator(str(default_run.logs / "preview")).Reload()
    names = " ".join(node.name for node in events.Graph().node)
    for number in range(1, 5):
        assert f"/conv{number}" in names
        assert f"/deconv{number}" in names


# --------------------------------------------------------------------------------------------------
# The terminal


def test_a_pipe_gets_plain_lines(default_run):
    device, *first = default_run.output.splitlines()[:6]
    assert device.startswith("device ")
    assert device.endswith("PU:0")
    assert first == [
        "data     mnist_5k: 4,000 images to train on, 1,000 to test on, 28x28x1",
        "weights  article initial weights",
        "steps    3,000 x 1 images = 0.75 epochs",
        f"writes   {Path('logs/x')} and {Path('samples/x')}",
        "view     tensorboard --logdir logs --samples_per_plugin images=1000",
    ]
    expected = []
    losses = default_run.losses().reshape(60, 50).mean(axis=1)
    for step, preview in default_run.checkpoint()["previews"]:
        loss = f"loss {losses[int(step) // 50 - 1]:.4f}  " if step else ""
        expected.append(f"step {step:6,.0f}  {loss}preview loss {preview:.4f}")
    assert default_run.output.splitlines()[6:-3] == expected


def test_last_lines_say_how_good_it_is_and_where(default_run):
    metrics = default_run.json("metrics")
    loss = metrics["test_loss"]
    psnr = metrics["psnr"]
    assert default_run.output.splitlines()[-3:] == [
        f"done     test loss {loss:.4f}, PSNR {psnr:.1f} dB, on 1,000 test images",
        f"pictures {Path('samples/x')}: training.gif, summary.png, step_….png",
        f"model    {Path('logs/x/autoencoder.keras')}",
    ]


def test_command_for_tensorboard_quotes_its_folder(tiny, run_here, capsys):
    run_here(*tiny, "--steps", 1, "--log-dir", "my logs")
    assert "tensorboard --logdir 'my logs' --samples" in capsys.readouterr().out


def test_a_terminal_gets_one_bar(tiny, tmp_path):
    termios = pytest.importorskip("termios", reason="Windows has no pseudo-terminals")
    leader, follower = os.openpty()
    termios.tcsetwinsize(leader, (24, 100))
    words = helpers.command(*tiny, "--steps", 60)
    output = b""
    with subprocess.Popen(words, cwd=tmp_path, env=helpers.ENVIRONMENT, stdout=follower) as process:
        os.close(follower)
        with contextlib.suppress(OSError):  # at its end
            for chunk in iter(lambda: os.read(leader, 10_000), b""):
                output += chunk
    os.close(leader)
    assert process.returncode == 0
    lines = output.decode().split("\r\n")
    (bar,) = [line for line in lines if "%|" in line]
    assert "60/60" in bar
    assert "preview loss" in bar
    assert re.search("preview loss [0-9.]+]$", bar.rstrip())
    assert not [line for line in lines if line.startswith("step ")]
