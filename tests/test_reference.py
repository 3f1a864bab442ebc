"""The reference run that comes with the repository is the one that the default command makes."""

import json
import subprocess

import numpy as np
import pytest
from events import read, scalars
from PIL import Image
from runs import ROOT

LOGS, SAMPLES = ROOT / "logs" / "reference", ROOT / "samples" / "reference"


def test_default_run_makes_the_reference_run_again(default_run):
    (ours, losses), (steps, reference) = (scalars(logs / "train") for logs in (default_run.logs, LOGS))
    np.testing.assert_array_equal(ours, steps)
    np.testing.assert_allclose(losses[:10], reference[:10], rtol=1e-4)
    means = [values.reshape(-1, 500).mean(axis=1) for values in (losses, reference)]
    np.testing.assert_allclose(*means, rtol=0.05)
    (ours, losses), (steps, reference) = (scalars(logs / "test") for logs in (default_run.logs, LOGS))
    np.testing.assert_array_equal(ours, steps)
    assert losses[0] == pytest.approx(reference[0], rel=1e-4)
    assert losses[-1] == pytest.approx(reference[-1], rel=0.1)


def test_figures_of_the_reference_run_are_those_of_the_default_run(default_run):
    ours, reference = (json.loads((logs / "metrics.json").read_text()) for logs in (default_run.logs, LOGS))
    assert list(ours) == list(reference)
    for name in ("test_loss", "squared_error", "shift_tolerant_error", "psnr", "ssim"):
        assert ours[name] == pytest.approx(reference[name], rel=0.1), name
    assert ours["pca_squared_error"] == pytest.approx(reference["pca_squared_error"], rel=1e-3)
    for name in ("steps", "latent_size"):
        assert ours[name] == reference[name]
    (_, logged), (_, steps) = (scalars(LOGS / "metrics", f"test_metrics/{name}") for name in ("loss", "steps"))
    assert logged[-1] == pytest.approx(reference["test_loss"], rel=1e-6) and steps[-1] == 3000


def test_reference_run_has_what_tensorboard_shows(default_run):
    for kind in ("metrics", "train", "test"):
        ours, reference = (read(logs / kind) for logs in (default_run.logs, LOGS))
        assert ours.Tags() == reference.Tags()
        for tag in ours.Tags()["tensors"]:
            if "hparams" not in tag:
                steps = [[event.step for event in found.Tensors(tag)] for found in (ours, reference)]
                assert steps[0] == steps[1], (kind, tag)
    for logs in (default_run.logs, LOGS):
        folders = {path.parent.relative_to(logs).as_posix() for path in logs.rglob("*tfevents*")}
        assert folders == {"metrics", "train", "test"}


def test_reference_run_has_the_settings_and_the_images_of_the_default_run(default_run):
    configs = [json.loads((logs / "config.json").read_text()) for logs in (default_run.logs, LOGS)]
    for config in configs:
        for name in ("run_name", "tensorflow", "keras", "onednn", "replicas"):
            del config[name]
    assert configs[0] == configs[1]


def test_pictures_of_the_reference_run_are_those_of_its_steps(default_run):
    steps = [f"step_{step:05}.png" for step in range(0, 3001, 500)]
    assert sorted(path.name for path in SAMPLES.iterdir()) == ["latents.png", *steps, "summary.png", "training.gif"]
    for name in steps:
        kept, drawn = (np.asarray(Image.open(folder / name), float) for folder in (SAMPLES, default_run.samples))
        assert kept.shape == drawn.shape and np.abs(kept - drawn).mean() < 5, name
    for name in ("latents.png", "summary.png", "training.gif"):
        kept, drawn = (Image.open(folder / name) for folder in (SAMPLES, default_run.samples))
        assert kept.size == drawn.size and kept.format == drawn.format, name
        assert getattr(kept, "n_frames", 1) == getattr(drawn, "n_frames", 1), name


def test_reference_run_is_small():
    assert (SAMPLES / "training.gif").stat().st_size <= 400_000
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", str(LOGS), str(SAMPLES)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is no clone")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    assert sum(path.stat().st_size for path in paths if path.exists()) <= 2_000_000
    assert not [path for path in paths if path.suffix in (".npz", ".keras") or path.name == ".lock"]
