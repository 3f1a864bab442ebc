"""What several tests share: runs of the script, made once, and the full MNIST where it is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train_ae

ROOT = Path(train_ae.__file__).resolve().parent


def words(*arguments):
    """Return the words of a call of the script."""
    return [sys.executable, str(ROOT / "train_ae.py"), *map(str, arguments)]


def call(*arguments, cwd, env=(), prefix=()):
    """Run the script as a user does; return the finished process."""
    command = [*prefix, *words(*arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | dict(env), capture_output=True, text=True, timeout=300)


class Run:
    """A finished run: its folders and what it printed."""

    def __init__(self, cwd, name, *arguments, **options):
        self.process = call("--run-name", name, *arguments, cwd=cwd, **options)
        assert self.process.returncode == 0, self.process.stderr
        self.cwd, self.logs, self.samples = Path(cwd), Path(cwd, "logs", name), Path(cwd, "samples", name)

    def json(self, name):
        return json.loads((self.logs / name).read_text())

    def weights(self):
        import keras

        return keras.models.load_model(self.logs / "autoencoder.keras").get_weights()


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """The run that `python train_ae.py` makes."""
    return Run(tmp_path_factory.mktemp("default"), "default")


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """A run whose last stretch is shorter than the others."""
    return Run(tmp_path_factory.mktemp("short"), "short", "--steps", 120)


@pytest.fixture(scope="session")
def digits():
    with np.load(train_ae.SHIPPED_DIGITS) as file:
        return dict(file)


@pytest.fixture(scope="session")
def full_mnist():
    """The folder of data sets that holds the full MNIST."""
    folder = os.environ.get("TFDS_DATA_DIR", "")
    if not Path(folder, "mnist", "3.0.1", "dataset_info.json").is_file():
        pytest.skip("TFDS_DATA_DIR names no folder that holds mnist 3.0.1")
    return folder
