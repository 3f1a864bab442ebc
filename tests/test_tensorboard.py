"""A run as the TensorBoard server shows it, over HTTP."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from urllib.parse import parse_qsl, urlencode

import keras
import numpy as np
import pytest
import tensorflow as tf
from events import scalars
from PIL import Image


@pytest.fixture(scope="module")
def get(default_run):
    """A function that fetches a path from a server started with the command that the run printed."""
    words = re.search(r"tensorboard (--logdir .+)", default_run.process.stdout).group(1).split()
    command = [sys.executable, "-m", "tensorboard.main", *words, "--port", "0", "--host", "127.0.0.1"]
    server = subprocess.Popen(command, cwd=default_run.cwd, stderr=subprocess.PIPE, text=True)
    address = next(m.group(0) for line in server.stderr if (m := re.search(r"http://127\.0\.0\.1:\d+/", line)))

    def fetch(path, **query):
        with urllib.request.urlopen(f"{address}data/{path}?{urlencode(query)}", timeout=60) as answer:
            return answer.read()

    deadline = time.monotonic() + 60
    while len(json.loads(fetch("plugin/images/tags")).get("default/test", {}).get("reconstructions", {})) == 0:
        assert time.monotonic() < deadline, "the server has not read the run"
        time.sleep(0.5)
    yield fetch
    server.terminate()
    server.wait()


def test_both_losses_share_a_chart(get, default_run):
    tags = json.loads(get("plugin/scalars/tags"))
    assert len(tags.pop("default")) == 7  # the final figures
    assert {run: sorted(found) for run, found in tags.items()} == {
        "default/train": ["loss"],
        "default/test": ["loss", "psnr", "shift_tolerant_error", "squared_error", "ssim"],
    }
    for run in ("train", "test"):
        points = np.array(json.loads(get("plugin/scalars/scalars", tag="loss", run=f"default/{run}")))
        steps, values = scalars(default_run.logs / run, "loss")
        # The server samples long curves; it keeps the last point, and each one that it keeps is as written.
        assert len(points) >= min(1000, len(steps)) and points[-1, 1] == steps[-1]
        np.testing.assert_allclose(points[:, 2], values[np.searchsorted(steps, points[:, 1])])


def test_all_61_grids_are_on_the_slider(get, default_run):
    listed = json.loads(get("plugin/images/images", tag="reconstructions", run="default/test", sample=0))
    assert [image["step"] for image in listed] == list(range(0, 3001, 50))
    shown = tf.io.decode_png(get("plugin/images/individualImage", **dict(parse_qsl(listed[-1]["query"]))))[..., 0]
    np.testing.assert_array_equal(shown, np.asarray(Image.open(default_run.samples / "step_03000.png")))


def test_graph_and_settings_are_served(get):
    graph = get("plugin/graphs/graph", run="default/train").decode()
    assert all(name in graph for name in ("encoder", "decoder", "conv4", "deconv4"))
    assert "learning_rate" in get("plugin/text/text", run="default/train", tag="settings").decode()


def test_graph_is_a_box_for_each_half(get):
    nodes = re.findall(r'^  name: "([^"]+)"', get("plugin/graphs/graph", run="default/train").decode(), re.MULTILINE)
    assert {name.split("/")[0] for name in nodes} <= {"values", "encoder", "decoder", "Identity", "NoOp"}


def test_table_of_runs_has_settings_and_final_figures(get, default_run):
    request = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN"], "colParams": [], "sliceSize": 10}
    address = get("plugin/hparams/session_groups", request=json.dumps(request))
    (group,) = json.loads(address)["sessionGroups"]
    assert group["name"] == "default"
    settings = group["hparams"]
    assert (settings["steps"], settings["learning_rate"], settings["tied"], settings["depth"]) == (
        3000,
        0.001,
        False,
        4,
    )
    figures = {value["name"]["tag"]: value["value"] for value in group["metricValues"] if not value["name"]["group"]}
    metrics = default_run.json("metrics.json")
    assert len(figures) == 7
    for tag, value in figures.items():
        assert value == pytest.approx(metrics[tag.removeprefix("test_set/")], rel=1e-6)


def test_projector_serves_codes_digits_and_classes(get, default_run, digits):
    assert json.loads(get("plugin/projector/runs")) == ["default"]
    (shown,) = json.loads(get("plugin/projector/info", run="default"))["embeddings"]
    assert shown["tensorShape"] == [1000, 512]
    codes = np.frombuffer(get("plugin/projector/tensor", run="default", name="codes"), np.float32).reshape(1000, 512)
    encoder = keras.models.load_model(default_run.logs / "autoencoder.keras").get_layer("encoder")
    images = digits["test_images"] / np.float32(255)
    np.testing.assert_allclose(codes, encoder(images).numpy().reshape(1000, 512), rtol=1e-4, atol=1e-5)
    classes = get("plugin/projector/metadata", run="default", name="codes").decode().split()
    assert classes == [str(label) for label in digits["test_labels"]]
    sprite = tf.io.decode_png(get("plugin/projector/sprite_image", run="default", name="codes"))[..., 0].numpy()
    for index in (0, 31, 32, 999):
        row, column = divmod(index, 32)
        tile = sprite[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        np.testing.assert_array_equal(tile, digits["test_images"][index, ..., 0])
