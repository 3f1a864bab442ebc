"""The reference run that comes with the repository is the one that the default command makes."""

import json
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from events import read, scalars
from PIL import Image
from test_run import FIGURES

LOGS, SAMPLES = ROOT / "logs" / "reference", ROOT / "samples" / "reference"


def test_default_run_makes_the_reference_run_again(default_run):
    (ours, losses), (steps, reference) = (scalars(logs / "train", "loss") for logs in (default_run.logs, LOGS))
    np.testing.assert_array_equal(ours, steps)
    np.testing.assert_allclose(losses[:10], reference[:10], rtol=1e-4)
    means = [values.reshape(-1, 500).mean(axis=1) for values in (losses, reference)]
    np.testing.assert_allclose(*means, rtol=0.05)
    (ours, losses), (steps, reference) = (scalars(logs / "test", "loss") for logs in (default_run.logs, LOGS))
    np.testing.assert_array_equal(ours, steps)
    assert losses[-1] == pytest.approx(reference[-1], rel=0.1)
    figures = [json.loads((logs / "metrics.json").read_text()) for logs in (default_run.logs, LOGS)]
    assert figures[0]["test_loss"] == pytest.approx(figures[1]["test_loss"], rel=0.1)
    assert figures[0].keys() == figures[1].keys()


def test_reference_run_has_what_tensorboard_shows(default_run):
    for kind in ("", "train", "test"):
        ours, reference = (read(logs / kind).Tags() for logs in (default_run.logs, LOGS))
        assert ours == reference
    assert FIGURES[0] in read(LOGS / "test").Tags()["tensors"]
    configs = [json.loads((logs / "config.json").read_text()) for logs in (default_run.logs, LOGS)]
    for config in configs:
        for name in ("run_name", "python", "tensorflow", "keras"):
            del config[name]
    assert configs[0] == configs[1]


def test_pictures_of_the_reference_run_are_those_of_its_steps(default_run):
    pictures = sorted(SAMPLES.glob("step_*.png"))
    assert [path.name for path in pictures] == [f"step_{step:05}.png" for step in range(0, 3001, 500)]
    for path in pictures:
        kept, drawn = (np.asarray(Image.open(found), float) for found in (path, default_run.samples / path.name))
        assert kept.shape == drawn.shape and np.abs(kept - drawn).mean() < 5


def test_reference_run_is_small():
    listed = subprocess.run(["git", "ls-files", str(LOGS), str(SAMPLES)], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is no clone")
    assert sum((ROOT / name).stat().st_size for name in listed.stdout.splitlines()) <= 2_000_000
