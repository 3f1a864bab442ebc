"""Runs as the TensorBoard server shows them, over HTTP."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from urllib.parse import parse_qsl, urlencode

import keras
import numpy as np
import pytest
from events import loss_tag, scalars, shown
from PIL import Image
from runs import call_here, environment
from test_run import LAYERS

GROWN = ["--run-name", "grown", "--depth", "2", "--tied", "--pretrain-steps", "30", "--batch-size", "5"]
GROWN += ["--checkpoint-every", "20", "--sample-every", "20"]


@pytest.fixture(scope="module")
def logs(default_run, pictures, tmp_path_factory):
    """A folder of logs: the default run's, and those of a run with pretraining that was resumed with more steps."""
    folder = tmp_path_factory.mktemp("tensorboard")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for steps in (60, 90):
            assert call_here("--dataset", pictures, *GROWN, "--steps", steps) == 0
    shutil.copytree(default_run.logs, folder / "logs" / "default")
    return folder / "logs"


@pytest.fixture(scope="module")
def get(logs, default_run):
    """A function that fetches a path from a server started with the command that the run printed."""
    words = re.search(r"tensorboard (--logdir .+)", default_run.process.stdout).group(1).split()
    command = [sys.executable, "-m", "tensorboard.main", *words, "--port", "0", "--host", "127.0.0.1"]
    server = subprocess.Popen(command, cwd=logs.parent, env=environment({}), stderr=subprocess.PIPE, text=True)
    try:
        address = next(m.group(0) for line in server.stderr if (m := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def fetch(path, **query):
            with opener.open(f"{address}data/{path}?{urlencode(query)}", timeout=60) as answer:
                return answer.read()

        deadline = time.monotonic() + 300
        while not loaded(fetch):
            assert time.monotonic() < deadline, "the server has not read the runs"
            time.sleep(0.3)
        yield fetch
    finally:
        server.terminate()
        server.communicate()


def loaded(fetch):
    """Return whether the server has read the last that each run wrote."""
    tags = json.loads(fetch("plugin/scalars/tags"))
    for run, step in (("default", 3000), ("grown", 90)):
        if "test_metrics/steps" not in tags.get(f"{run}/metrics", {}) or "loss" not in tags.get(f"{run}/test", {}):
            return False
        for folder, tag in ((f"{run}/metrics", "test_metrics/steps"), (f"{run}/test", "loss")):
            points = json.loads(fetch("plugin/scalars/scalars", tag=tag, run=folder))
            if not points or points[-1][1] != step:
                return False
    return True


def test_both_losses_share_a_chart(get, default_run):
    tags = {run: sorted(found) for run, found in json.loads(get("plugin/scalars/tags")).items()}
    figures = ["latent_size", "loss", "pca_squared_error", "psnr", "shift_tolerant_error", "squared_error", "ssim"]
    figures = [f"test_metrics/{name}" for name in [*figures, "steps"]]
    assert tags == {
        "default/train": ["loss"],
        "default/test": ["loss"],
        "default/metrics": figures,
        "grown/pretrain/conv1": ["loss/pretraining"],
        "grown/pretrain/conv2": ["loss/pretraining"],
        "grown/train": ["loss"],
        "grown/test": ["loss"],
        "grown/metrics": figures,
    }
    for run in ("train", "test"):
        points = np.array(json.loads(get("plugin/scalars/scalars", tag="loss", run=f"default/{run}")))
        steps, values = scalars(default_run.logs / run)
        # The server samples long curves; it keeps the last point, and each one that it keeps is as written.
        assert len(points) >= min(1000, len(steps)) and points[-1, 1] == steps[-1]
        np.testing.assert_allclose(points[:, 2], values[np.searchsorted(steps, points[:, 1])])


def test_resumed_run_shows_each_step_once(get, logs):
    for folder, steps in {
        "pretrain/conv1": range(30),
        "pretrain/conv2": range(30),
        "train": range(90),
        "test": [*range(0, 81, 20), 90],
    }.items():
        points = json.loads(get("plugin/scalars/scalars", tag=loss_tag(folder), run=f"grown/{folder}"))
        assert [step for _, step, _ in points] == [*steps], folder
        _, values = scalars(logs / "grown" / folder)
        np.testing.assert_allclose([value for _, _, value in points], values)


def test_all_61_pictures_are_on_the_slider(get, default_run):
    listed = json.loads(get("plugin/images/images", tag="reconstructions", run="default/test", sample=0))
    assert [image["step"] for image in listed] == list(range(0, 3001, 50))
    for image in (listed[0], listed[-1]):
        png = get("plugin/images/individualImage", **dict(parse_qsl(image["query"])))
        assert png == (default_run.samples / f"step_{image['step']:05}.png").read_bytes()


def test_each_logged_picture_is_the_file_and_has_its_size(logs):
    points = shown(logs / "grown")["test", "reconstructions"]
    assert [step for step, _ in points] == [0, 20, 40, 60, 80, 90]
    for step, (width, height, png) in points:
        path = logs.parent / "samples" / "grown" / f"step_{step:05}.png"
        assert png == path.read_bytes()
        assert Image.open(path).size == (int(width), int(height))


def test_histograms_count_the_kernels_at_each_checkpoint(get, default_run):
    model = keras.models.load_model(default_run.logs / "autoencoder.keras")
    layers = [layer for half in ("encoder", "decoder") for layer in model.get_layer(half).layers if layer.weights]
    assert [layer.name for layer in layers] == LAYERS
    for layer in layers:
        address = get("plugin/histograms/histograms", run="default/test", tag=f"weights/{layer.name}")
        points = json.loads(address)
        assert [step for _, step, _ in points] == list(range(0, 3001, 500))
        kernel, buckets = layer.kernel.numpy(), np.array(points[-1][2])
        assert buckets[:, 2].sum() == kernel.size
        np.testing.assert_allclose(buckets[1:, 0], buckets[:-1, 1], rtol=1e-6)
        assert buckets[0, 0] == pytest.approx(kernel.min()) and buckets[-1, 1] == pytest.approx(kernel.max())
        for left, right, count in buckets[1:-1]:
            assert count == pytest.approx(((left <= kernel) & (kernel < right)).sum(), abs=2)


def test_table_of_runs_has_settings_and_final_figures_that_are_true(get, default_run, logs):
    request = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN"], "colParams": [], "sliceSize": 10}
    groups = json.loads(get("plugin/hparams/session_groups", request=json.dumps(request)))["sessionGroups"]
    assert len(groups) == 2  # a resumed run is one row
    rows = {group["sessions"][0]["name"].split("/")[0]: group for group in groups}
    assert rows.keys() == {"default", "grown"}
    assert rows["default"]["hparams"] == {"learning_rate": 0.001}
    chosen = rows["grown"]["hparams"]
    assert chosen.items() >= {"learning_rate": 0.001, "depth": 2, "tied": True, "pretrain_steps": 30}.items()
    assert "steps" not in chosen and "run_name" not in chosen  # the first may grow
    for run, folder in (("default", default_run.logs), ("grown", logs / "grown")):
        metrics = json.loads((folder / "metrics.json").read_text())
        values = [value for value in rows[run]["metricValues"] if value["name"]["tag"].startswith("test_metrics/")]
        figures = {value["name"]["tag"].removeprefix("test_metrics/"): value["value"] for value in values}
        del metrics["seconds"]
        assert figures.keys() == {name.removeprefix("test_") for name in metrics}
        for name, value in metrics.items():
            assert figures[name.removeprefix("test_")] == pytest.approx(value, rel=1e-6, abs=1e-12), (run, name)
        assert figures["steps"] == {"default": 3000, "grown": 90}[run]


def test_pictures_and_histograms_are_shown_as_what_they_are(get):
    """Each with the plugin that draws it: none of them is a mere tensor."""
    images = json.loads(get("plugin/images/tags"))
    assert {run: list(tags) for run, tags in images.items() if tags} == {
        "default/test": ["reconstructions"],
        "grown/test": ["reconstructions"],
    }
    histograms = json.loads(get("plugin/histograms/tags"))
    assert {run: sorted(tags) for run, tags in histograms.items() if tags} == {
        "default/test": sorted(f"weights/{name}" for name in LAYERS),
        "grown/test": [f"weights/{name}" for name in ("conv1", "conv2", "deconv1", "deconv2")],
    }
