"""What test files share: running the script, reading what a run leaves, comparing runs."""

import inspect
import json
import multiprocessing
import os
import pkgutil
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import takewhile
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the threads of several runs would slow one another
ENVIRONMENT = dict(os.environ)  # a user's; the import below sets more
ENVIRONMENT.pop("TF_ENABLE_ONEDNN_OPTS", None)  # conftest.py has set it
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # too late once TensorFlow is imported, as it is here

import grpc
import keras
import numpy as np
import tensorboard_data_server
import tensorflow as tf
from PIL import Image
from tensorboard.data import grpc_provider

import train_ae

# As a run of one image a step sets them, before anything else here uses TensorFlow.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(2)

ROOT = Path(train_ae.__file__).resolve().parent
SCRIPT = ROOT / "train_ae.py"

# --------------------------------------------------------------------------------------------------
# Running the script


def call(*arguments, cwd, script=SCRIPT, **environment):
    """Run the script as a user does, to its end; return the process."""
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        errors="backslashreplace",
        timeout=300,
    )


def free_addresses(count):
    """Return addresses on this machine where nobody listens."""
    ports = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)):
                ports.add(port)
    return [f"127.0.0.1:{port}" for port in ports]


def here(*arguments):
    """Run the script's main() in this process and folder, which is quicker; return its status.

    TensorBoard reads a run's files in the order of the seconds in their names: a second call in a
    folder waits for the next one.
    """
    written = [path.stat().st_mtime for path in Path.cwd().rglob("events.*")]
    time.sleep(max(0, max(written, default=0) + 1 - time.time()))
    try:
        return train_ae.main(train_ae.parse_arguments([*map(str, arguments)]))
    except SystemExit as stop:
        return stop.code


def said(errors):
    """Return the lines of standard error, but for those that TensorFlow prints at its import."""
    ignored = "absl::InitializeLog|cudart_stub"
    return [line for line in errors.splitlines() if not re.search(ignored, line)]


def edited_copy(folder, old, new):
    """Copy the script and its digits into a folder, with an edit; return its path."""
    text = SCRIPT.read_text()
    assert text.count(old) == 1, old
    (folder / "samples").mkdir(parents=True)
    shutil.copy(train_ae.BUNDLED, folder / "samples")
    path = folder / "train_ae.py"
    path.write_text(text.replace(old, new))
    return path


# --------------------------------------------------------------------------------------------------
# The script in processes forked from one that has TensorFlow: a second each, not five


@cache
def forks():
    """Return what starts processes; where TensorFlow cannot be forked, it starts them anew."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the server
    found = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    found.set_forkserver_preload(["helpers", "pytest"])
    return found


class Job:
    """The script in a folder, once `before` is done; `name` tells apart several in one folder."""

    def __init__(self, folder, *words, name="", script=SCRIPT, before=int, **environment):
        self.folder = Path(folder)
        self.files = [f"{kind}{name}.txt" for kind in ("out", "err")]
        words = [str(script), *map(str, words)]
        arguments = (folder, self.files, words, before, environment)
        self.process = forks().Process(target=work, args=arguments)
        self.process.start()

    def wait_for(self, text):
        """Wait until it prints this text."""
        path = self.folder / self.files[0]
        while not path.exists() or text not in path.read_text():
            assert self.process.is_alive()
            time.sleep(0.02)

    def end(self):
        """Wait for the end; return the status, the lines of standard error, and the output."""
        self.process.join(100)
        self.process.kill()
        output, errors = [(self.folder / name).read_text() for name in self.files]
        return self.process.exitcode, said(errors), output


def work(folder, files, words, before, environment):
    """Do what `python` does with these words."""
    os.chdir(folder)
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    before()
    # The script is to be the only module of its file, where pydantic reads the docstrings.
    sys.modules.pop("train_ae", None)
    inspect.modulesbyfile.clear()
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def send(names):
    """Send signals to this process."""
    for name in names:
        os.kill(os.getpid(), signal.Signals["SIG" + name])
        time.sleep(0.05)


def at(name, pattern, event):
    """Have an event before a function is called with such words. No outside can choose these
    moments.
    """
    owner, _, name = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    function = getattr(owner, name)

    def call_later(*values, **options):
        if re.search(pattern, " ".join(map(str, values))):
            event()
        return function(*values, **options)

    setattr(owner, name, call_later)


# --------------------------------------------------------------------------------------------------
# What a run leaves


class Finished:
    """A run's folders, and what is in them."""

    def __init__(self, cwd, name="x"):
        self.cwd = Path(cwd)
        self.logs = self.cwd / "logs" / name
        self.samples = self.cwd / "samples" / name

    def json(self, name):
        return json.loads((self.logs / f"{name}.json").read_text())

    def model(self):
        return keras.models.load_model(self.logs / "autoencoder.keras")

    def latents(self):
        with np.load(self.logs / "latents.npz") as file:
            return dict(file)

    def checkpoints(self):
        """Return the paths of the checkpoints by their steps."""
        paths = sorted(self.logs.glob("checkpoints/step_*.npz"))
        return {int(path.stem.removeprefix("step_")): path for path in paths}

    def checkpoint(self):
        """Return the arrays of the newest checkpoint."""
        *_, newest = self.checkpoints().values()
        with np.load(newest) as file:
            return dict(file)

    def losses(self):
        """Return the loss of each step."""
        return self.checkpoint()["losses"]

    def picture(self, name):
        with Image.open(self.samples / name) as picture:
            return np.asarray(picture)


SERVER = (
    "--reload once --samples-per-plugin scalars=all,images=all --port 0 --port-file port"
    " --die-after-stdin --verbose"
)


def shown(logs):
    """Return what TensorBoard's own server shows of a run: {(folder, tag): [(step, value), …]}."""
    words = [tensorboard_data_server.server_binary(), "--logdir", logs, *SERVER.split()]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(words, cwd=folder, **pipes) as server,
    ):
        lines = list(takewhile(lambda line: "Finished load cycle" not in line, server.stderr))
        assert not re.search("WARN|ERROR", "".join(lines)), lines
        port = Path(folder, "port").read_text().strip()
        return ask(f"localhost:{port}")


def ask(address):
    """Return all scalars and pictures that a data server has."""
    stub = grpc_provider.make_stub(grpc.insecure_channel(address))
    provider = grpc_provider.GrpcDataProvider(address, stub)
    options = {"experiment_id": "", "downsample": 10**6}
    scalars = provider.read_scalars(None, plugin_name="scalars", **options)
    pictures = provider.read_blob_sequences(None, plugin_name="images", **options)

    def read(point):
        """Return the number, or the pictures, of a point."""
        if hasattr(point, "value"):
            return point.value
        return [provider.read_blob(None, blob_key=blob.blob_key) for blob in point.values]

    found = {}
    for folder, tags in [*scalars.items(), *pictures.items()]:
        for tag, points in tags.items():
            found[folder, tag] = [(point.step, read(point)) for point in points]
    return found


def bytes_in(folder):
    """Return the content of each file below a folder, but for hidden ones."""
    paths = filter(Path.is_file, folder.rglob("[!.]*"))
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def assert_same_run(one, other):
    """Assert that two runs have the same checkpoint, metrics, pictures and curves, to the bit."""
    runs = (one, other)
    arrays = [run.checkpoint() | {"config": ""} for run in runs]  # it has paths
    np.testing.assert_equal(*arrays)
    metrics = [run.json("metrics") | {"seconds": 0} for run in runs]
    assert metrics[0] == metrics[1]
    assert bytes_in(one.samples) == bytes_in(other.samples)
    curves = shown(one.logs)
    assert curves == shown(other.logs)
    assert [step for step, _ in curves["train", "loss"]] == [*range(metrics[0]["steps"])]


# --------------------------------------------------------------------------------------------------
# Pictures to train on


def draw_pictures(folder):
    """Draw 60 small colour pictures of two classes, "brightens" and "fades"; return the folder."""
    draws = np.random.default_rng(0)
    shades = {"fades": np.linspace(1, 0.5, 8), "brightens": np.linspace(0.5, 1, 8)}
    for index, name in enumerate([*shades] * 30):
        rows = np.outer(shades[name], draws.integers(0, 256, 3))
        image = rows[:, np.newaxis].repeat(4, axis=1)
        path = folder / name / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(path)
    return folder
