"""What several tests share: runs of the script, made once for all workers of pytest-xdist, and how to compare them."""

# ruff: noqa: E402

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else the threads of several runs get in each other's way
BEFORE = dict(os.environ)  # what a user has set; the imports below set more

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import filelock
import keras
import numpy as np
import pytest
import tensorflow as tf
from events import shown
from PIL import Image

import train_ae

ROOT = Path(train_ae.__file__).resolve().parent
IMPORTED = {name: value for name, value in os.environ.items() if BEFORE.get(name) != value}

# As the script sets them for a batch of one, so that a run within this process has the bits of one by the script.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(2)
for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_op_determinism()
tf.config.list_logical_devices()  # from here on, nothing changes the settings above, whichever test comes first


def words(*arguments):
    """Return the words of a call of the script."""
    return [sys.executable, str(ROOT / "train_ae.py"), *map(str, arguments)]


def environment(changes):
    """Return what a process gets from a user: without what the imports above have set in this one."""
    kept = {name: value for name, value in os.environ.items() if IMPORTED.get(name) != value}
    return kept | dict(changes)


def call(*arguments, cwd, env=(), prefix=()):
    """Run the script as a user does; return the finished process."""
    command = [*prefix, *words(*arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=300)


def said(process_or_text):
    """Return the lines on stderr, or in a text, but for those that TensorFlow prints when it is imported."""
    text = getattr(process_or_text, "stderr", process_or_text)
    return [line for line in text.splitlines() if "absl::InitializeLog" not in line and "cudart_stub" not in line]


def start(*arguments, cwd, env=()):
    """Start the script; return the process, its output a pipe. Used in `with`, it is killed at the end."""
    return Process(words(*arguments), cwd=cwd, env=environment(env), stdout=-1, stderr=-1, text=True)


class Process(subprocess.Popen):
    """A process that does not outlive its test."""

    def __exit__(self, *error):
        if self.poll() is None:
            self.kill()
        super().__exit__(*error)


def call_here(*arguments):
    """Run the script's main() in this process and folder; return its exit status.

    TensorBoard reads a run's event files in the order of the seconds in their names, so a second call in a folder waits
    for the next one. Two processes cannot meet: the imports take longer.
    """
    seconds = [int(path.name.split(".")[3]) for path in Path.cwd().rglob("events.out.tfevents.*")]
    while seconds and int(time.time()) <= max(seconds):
        time.sleep(0.02)
    try:
        return train_ae.main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code


def wait_for(process, begin):
    """Read a process's lines until one begins so."""
    assert any(line.startswith(begin) for line in process.stdout), process.stderr.read()


class Finished:
    """A finished run's folders, whichever processes made it."""

    def __init__(self, cwd, name):
        self.cwd, self.logs, self.samples = Path(cwd), Path(cwd, "logs", name), Path(cwd, "samples", name)

    def json(self, name):
        return json.loads((self.logs / name).read_text())

    def weights(self):
        return keras.models.load_model(self.logs / "autoencoder.keras").get_weights()


class Run(Finished):
    """A finished run by the script: its folders and what it printed."""

    def __init__(self, cwd, name, *arguments, **options):
        super().__init__(cwd, name)
        self.process = call("--run-name", name, *arguments, cwd=cwd, **options)
        assert self.process.returncode == 0, self.process.stderr


def assert_same_weights(one, other):
    """Assert that two runs have the same weights, to the bit."""
    for ours, theirs in zip(one.weights(), other.weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def assert_same_run(one, other):
    """Assert that two runs have the same weights, figures, pictures and curves, to the bit."""
    assert_same_weights(one, other)
    configs, metrics = ([run.json(name) for run in (one, other)] for name in ("config.json", "metrics.json"))
    for found in metrics:
        assert found.pop("seconds") > 0  # times differ
    assert metrics[0] == metrics[1]
    assert configs[0] | {"run_name": ""} == configs[1] | {"run_name": ""}
    names = sorted(path.name for path in one.samples.iterdir())
    assert names == sorted(path.name for path in other.samples.iterdir())
    for name in names:
        assert (one.samples / name).read_bytes() == (other.samples / name).read_bytes(), name
    ours, theirs = shown(one.logs), shown(other.logs)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key] == theirs[key], key
    assert [step for step, _ in ours["train", "loss"]] == [*range(metrics[0]["steps"])]


def once(factory, name, make):
    """Return what `make(folder)` returns, made in the first of pytest-xdist's workers that comes here."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / name, base / f"{name}.pickle"
    with filelock.FileLock(base / f"{name}.lock"):
        if not made.exists():
            folder.mkdir()
            made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())


def made(factory, name, arguments):
    """Return a run by the name of x, made within this process."""

    def make(folder):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.chdir(folder)
            assert call_here(*arguments) == 0
        return Finished(folder, "x")

    return once(factory, name, make)


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """The run that `python train_ae.py` makes."""
    return once(tmp_path_factory, "default", lambda folder: Run(folder, "default"))


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """A run whose last stretch is shorter than the others."""
    return made(tmp_path_factory, "short", ["--run-name", "x", "--steps", 120])


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 60 small pictures of two kinds: with one layer, a run on them takes a second."""
    return once(tmp_path_factory, "pictures", draw_pictures)


@pytest.fixture(scope="session")
def tiny(pictures):
    """The options of a run that takes a second."""
    return ["--dataset", str(pictures), "--depth", "1"]


def draw_pictures(folder):
    random = np.random.default_rng(0)
    for index in range(60):
        corner = random.integers(0, 256, (1, 1, 3)) * np.array([[[1]], [[0.5]]])  # a color that fades to one side
        image = corner.repeat(4, axis=0).repeat(8, axis=1)
        path = folder / ("fades", "brightens")[index % 2] / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((image[::-1] if index % 2 else image).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def digits():
    with np.load(train_ae.BUNDLED) as file:
        return dict(file)


@pytest.fixture(scope="session")
def full_mnist():
    """The folder of data sets that holds the full MNIST."""
    folder = os.environ.get("TFDS_DATA_DIR", "")
    if not Path(folder, "mnist", "3.0.1", "dataset_info.json").is_file():
        pytest.skip("TFDS_DATA_DIR names no folder that holds mnist 3.0.1")
    return folder
