"""Fixtures of several test files, and what a plain `python -m pytest` leaves out."""

import os
import pickle
from pathlib import Path

import filelock
import pytest

# As the script sets it. Test files import TensorFlow before the script, which would be too late on
# processors where oneDNN is on by default.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"


def pytest_configure(config):
    config.addinivalue_line("markers", "stress: random moments, mounts or long runs")
    config.option.markexpr = config.option.markexpr or "not stress"


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "not stress":
        terminalreporter.line(
            "Random moments and long runs are left out: python -m pytest -m stress"
        )


def once(factory, name, make):
    """Return what `make(folder)` returns, made by the first of pytest's processes to come here."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / name, base / f"{name}.pickle"
    with filelock.FileLock(base / f"{name}.lock"):
        if not made.exists():
            folder.mkdir()
            made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """The run of `python train_ae.py`, by the name of x, and what it printed as `output`."""
    import helpers

    def make(folder):
        process = helpers.call("--run-name", "x", cwd=folder)
        assert process.returncode == 0, process.stderr
        run = helpers.Finished(folder)
        run.output = process.stdout
        return run

    return once(tmp_path_factory, "default", make)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """A run of 120 steps, whose last stretch is shorter than the others, by the name of x."""
    import helpers

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert helpers.here("--run-name", "x", "--steps", 120) == 0
        return helpers.Finished(folder)

    return once(tmp_path_factory, "short", make)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 60 small colour pictures of two classes."""
    import helpers

    return once(tmp_path_factory, "pictures", helpers.draw_pictures)


@pytest.fixture(scope="session")
def tiny(pictures):
    """The options of a run that takes a second: small pictures, and one layer."""
    return ["--dataset", str(pictures), "--depth", "1"]


@pytest.fixture(scope="session")
def digits():
    """The bundled digits: x_train, y_train, x_test and y_test."""
    import numpy as np

    import train_ae

    with np.load(train_ae.BUNDLED) as file:
        return dict(file)


@pytest.fixture(scope="session")
def full_mnist():
    """The folder of TFDS's sets that holds all of MNIST."""
    folder = os.environ.get("TFDS_DATA_DIR", "")
    if not Path(folder, "mnist", "3.0.1", "dataset_info.json").is_file():
        pytest.skip("TFDS_DATA_DIR names no folder that holds mnist 3.0.1")
    return folder


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """A function that runs the script in this process, in a new folder; returns the run."""
    import helpers

    monkeypatch.chdir(tmp_path)

    def run(*arguments, name="x"):
        assert helpers.here("--run-name", name, *arguments) == 0
        return helpers.Finished(tmp_path, name)

    return run
