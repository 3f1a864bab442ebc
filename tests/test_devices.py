"""Several devices, and workers, which are processes that talk over loopback."""

import json
import os
import shlex
import shutil
import signal
import socket
import time
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import Finished, Job, assert_same_run, at_line, free_addresses, send

pytestmark = pytest.mark.skipif(os.name == "nt", reason="not tried on Windows")

CPU = {"CUDA_VISIBLE_DEVICES": "-1"}
EVERYTHING = shlex.split(
    "--run-name x --steps 60 --batch-size 6 --sample-every 20 --checkpoint-every 30 --tied"
    " --latent-dim 5 --noise 0.2 --pretrain-steps 20 --schedule cosine"
)


@pytest.fixture(scope="module")
def arguments(tiny):
    return [*tiny, *EVERYTHING]


def tf_config(addresses, index):
    """Return what TF_CONFIG says to a worker."""
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


def start_workers(folder, *arguments, count=2, last=(), before=()):
    """Start the workers of a run; the last one gets more arguments, and some do things before."""
    addresses = free_addresses(count)
    before = dict(before)
    jobs = []
    for index in range(count):
        words = [*arguments, *last] if index == count - 1 else arguments
        options = {"name": index, "before": before.get(index, int)}
        jobs.append(Job(folder, *words, **options, TF_CONFIG=tf_config(addresses, index), **CPU))
    return jobs


def end(jobs):
    """Return the statuses of workers, and the lines of their standard errors."""
    statuses, errors, _ = zip(*[job.end() for job in jobs], strict=True)
    return list(statuses), list(errors)


def keep_weights():
    """Have all replicas' weights kept at the end, since a run saves those of one."""
    save = keras.Model.save

    def keep(model):
        copies = {}
        for variable in model.variables:
            copies[variable.path] = getattr(variable.value, "values", [variable.value])
        for replica in range(len(copies["conv1/kernel"])):
            weights = {path: copies[path][replica].numpy() for path in copies}
            np.savez(f"weights_{os.getpid()}_{replica}.npz", **weights)
        return partial(save, model)

    keras.Model.save = property(keep)


@pytest.fixture(scope="module")
def one(arguments, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert Job(folder, *arguments, **CPU).end()[:2] == (0, [])
    return Finished(folder)


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    """The run of two workers."""
    folder = tmp_path_factory.mktemp("two")
    workers = start_workers(folder, *arguments, before=dict.fromkeys(range(2), keep_weights))
    assert end(workers) == ([0, 0], [[], []])
    return Finished(folder)


# --------------------------------------------------------------------------------------------------
# The numbers


def assert_trained_as_one(run, one, replicas):
    """Assert that losses are those of one process, and all replicas' weights equal to the bit."""
    ours = run.checkpoint()
    for name, steps in (("pretrain/conv1", 20), ("pretrain/latent", 20), ("train", 60)):
        assert len(ours[name]) == steps
        np.testing.assert_allclose(ours[name], one.losses(name), rtol=1e-5)
    files = list(run.cwd.glob("weights_*.npz"))
    assert len(files) == replicas
    for path in files:
        with np.load(path) as weights:
            assert len(weights) == 8
            for name in weights:
                np.testing.assert_array_equal(weights[name], ours[name], f"{path} {name}")
    np.testing.assert_array_equal(ours["conv1/kernel"], ours["deconv1/kernel"])
    np.testing.assert_array_equal(ours["latent/kernel"], ours["expand/kernel"].T)


def test_two_workers_train_as_one_process(one, two):
    assert_trained_as_one(two, one, 2)
    for run in (one, two):
        assert len(list(run.logs.rglob("events.*"))) == 4  # of three phases, and of previews


def use_two_devices():
    """Have the script use two devices where it finds one, since this machine may not have them."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [device, device])
    tf.distribute.OneDeviceStrategy = lambda _: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    keep_weights()


def test_two_devices_train_as_one(arguments, one, tmp_path):
    status, errors, output = Job(tmp_path, *arguments, before=use_two_devices, **CPU).end()
    assert (status, errors) == (0, [])
    assert "CPU:0, CPU:1" in output
    assert_trained_as_one(Finished(tmp_path), one, 2)


@pytest.mark.stress
def test_three_workers_train_as_one_process(arguments, one, tmp_path):
    keep = dict.fromkeys(range(3), keep_weights)
    workers = start_workers(tmp_path, *arguments, count=3, before=keep)
    assert end(workers) == ([0] * 3, [[]] * 3)
    assert_trained_as_one(Finished(tmp_path), one, 3)


@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="there is no GPU")
def test_a_gpu_trains_as_the_cpu_does_and_repeats_its_bits(arguments, one, tmp_path):
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        status, _, output = Job(tmp_path / name, *arguments).end()
        assert (status, "GPU:0" in output) == (0, True)
        runs.append(Finished(tmp_path / name))
    assert_same_run(*runs)
    np.testing.assert_allclose(runs[0].losses(), one.losses(), rtol=0.01)


def test_another_number_of_workers_resumes(arguments, one, two, tmp_path):
    shutil.copytree(two.cwd, tmp_path, dirs_exist_ok=True)
    run = Finished(tmp_path)
    *_, last = sorted(run.logs.glob("checkpoints/*"))
    last.unlink()
    status, _, output = Job(tmp_path, *arguments, **CPU).end()
    (line,) = [line for line in output.splitlines() if line.startswith("warning ")]
    assert (status, " replicas " in line, " 2, " in line) == (0, True, True)
    np.testing.assert_allclose(run.losses(), one.losses(), rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Workers that end, and workers that disagree

# A line, which workers get which signals once it is printed, and the statuses: one after the other
# in one run.
STOPS = [
    ("pretrain/latent", [0], "KILL", [-9, 1]),
    ("step +0 .*preview", [0, 1], "INT TERM INT", [130, 130]),
    ("step +40 .*preview", [1], "KILL", [1, -9]),
    ("step +40 .*preview", [1], "TERM", [143, 143]),
]
SAID = {-9: [], 1: ["another worker has ended"], 130: [], 143: []}


def test_one_that_is_stopped_stops_all_and_they_resume(arguments, two, tmp_path):
    for line, indices, names, statuses in STOPS:
        event = partial(at_line, line, partial(send, names))
        workers = start_workers(tmp_path, *arguments, before=dict.fromkeys(indices, event))
        workers[indices[0]].process.join(100)
        stopped = time.monotonic()
        found, errors = end(workers)
        assert time.monotonic() - stopped < 30
        assert (line, found) == (line, statuses)
        for status, lines in zip(found, errors, strict=True):
            assert len(lines) == len(SAID[status])
            assert all(words in lines[0] for words in SAID[status])
    assert end(start_workers(tmp_path, *arguments)) == ([0, 0], [[], []])
    assert_same_run(Finished(tmp_path), two)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_stops_a_worker_that_waits_for_others(name, arguments, tmp_path):
    job = Job(tmp_path, *arguments, TF_CONFIG=tf_config(free_addresses(2), 0), **CPU)
    job.process.join(5)
    os.kill(job.process.pid, signal.Signals[name])
    status, errors, output = job.end()
    assert (status, errors) == (-signal.Signals[name], [])
    assert "waiting for all workers" in output
    assert not (tmp_path / "logs").exists()


OTHER = [
    ("--seed 1", " seed "),
    ("--learning-rate 0.1", " learning_rate "),
    ("--dataset mnist_5k", "checksum"),
    ("--sample-every 7", " sample_every "),
    ("--depth 2", " depth "),
    ("--run-name y", " run"),
]


@pytest.mark.parametrize(("words", "named"), OTHER)
def test_workers_with_different_settings_end(words, named, arguments, tmp_path):
    workers = start_workers(tmp_path, *arguments, last=words.split())
    statuses, errors = end(workers)
    assert statuses == [2, 2]
    assert [named in line for (line,) in errors] == [True, True]
    assert not (tmp_path / "logs").exists()


def test_workers_with_different_checkpoints_end(arguments, two, tmp_path):
    shutil.copytree(two.logs, tmp_path / "logs" / "x")
    workers = start_workers(tmp_path, *arguments, last=["--log-dir", "elsewhere"])
    statuses, errors = end(workers)
    assert (statuses, list(map(len, errors))) == ([2, 2], [1, 1])


def test_batch_that_cannot_be_divided_is_refused(arguments, tmp_path):
    statuses, errors = end(start_workers(tmp_path, *arguments, "--batch-size", "7"))
    assert statuses == [2, 2]
    for (line,) in errors:
        assert "--batch-size 7" in line
        assert "multiple of 2" in line
    assert not (tmp_path / "logs").exists()


TWO = ["127.0.0.1:15000", "127.0.0.1:15001"]
BAD = ["", "worker 0", "[]", "{}", json.dumps({"cluster": {"worker": TWO}})]
BAD += [tf_config(TWO, index) for index in (2, -1, None)]
BAD += [tf_config([], 0), tf_config(TWO, 0).replace('"type": "worker"', '"type": "chief"')]


def test_tf_config_of_another_form_is_refused(arguments, tmp_path):
    jobs = []
    for number, text in enumerate(BAD):
        jobs.append(Job(tmp_path, *arguments, name=number, TF_CONFIG=text, **CPU))
    for text, job in zip(BAD, jobs, strict=True):
        status, (line,), _ = job.end()
        assert (text, status) == (text, 2)
        assert "TF_CONFIG must have the form" in line
    assert not (tmp_path / "logs").exists()


def test_port_that_is_taken_is_one_line(arguments, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = tf_config([f"127.0.0.1:{port}", *free_addresses(1)], 0)
        status, (line,), _ = Job(tmp_path, *arguments, TF_CONFIG=config, **CPU).end()
    assert status == 1
    assert "the workers cannot connect" in line
    assert not (tmp_path / "logs").exists()
