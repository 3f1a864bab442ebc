"""Workers, which are processes that talk over loopback, and GPUs."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import Finished, Job, assert_same_run, at, free_addresses, here

pytestmark = pytest.mark.skipif(os.name == "nt", reason="not tried on Windows")

CPU = {"CUDA_VISIBLE_DEVICES": "-1"}
EVERYTHING = shlex.split(
    "--run-name x --steps 60 --batch-size 6 --sample-every 20 --checkpoint-every 30 --tied"
    " --latent-dim 5 --noise 0.2 --schedule cosine"
)


@pytest.fixture(scope="module")
def arguments(tiny):
    """The arguments of a run of small images."""
    return [*tiny, *EVERYTHING]


def tf_config(addresses, index):
    """Return what TF_CONFIG says to a worker."""
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


def start_workers(folder, *arguments, last=(), events=(int, int)):
    """Start the workers of a run, each with an event; the second one gets more arguments."""
    addresses = free_addresses(len(events))
    jobs = []
    for index, event in enumerate(events):
        job = Job(
            folder,
            *arguments,
            *(last if index == 1 else ()),
            name=index,
            before=event,
            TF_CONFIG=tf_config(addresses, index),
            **CPU,
        )
        jobs.append(job)
    return jobs


def end(jobs):
    """Return the statuses of workers, and the lines of their standard errors."""
    statuses, errors, _ = zip(*[job.end() for job in jobs], strict=True)
    return list(statuses), list(errors)


def keep_weights():
    """Have the weights of each worker kept at the end, since a run saves those of one."""
    save = keras.Model.save

    def keep(model):
        weights = {each.path: each.numpy() for each in model.variables}
        np.savez(f"weights_{os.getpid()}.npz", **weights)
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
    workers = start_workers(folder, *arguments, events=[keep_weights] * 2)
    assert end(workers) == ([0, 0], [[], []])
    return Finished(folder)


# --------------------------------------------------------------------------------------------------
# The numbers


def assert_trained_as_one(run, one, workers):
    """Assert that losses are those of one process, and all workers' weights equal to the bit."""
    ours = run.checkpoint()
    np.testing.assert_allclose(run.losses(), one.losses(), rtol=1e-5)
    files = list(run.cwd.glob("weights_*.npz"))
    assert len(files) == workers
    for path in files:
        with np.load(path) as weights:
            assert len(weights) == 8
            for name in weights:
                np.testing.assert_array_equal(weights[name], ours[name], f"{path} {name}")
    np.testing.assert_array_equal(ours["conv1/kernel"], ours["deconv1/kernel"])
    np.testing.assert_array_equal(ours["latent/kernel"], ours["expand/kernel"].T)


def test_two_workers_train_as_one_process(one, two):
    assert_trained_as_one(two, one, 2)
    assert len(list(two.logs.rglob("events.*"))) == 2  # of training, and of previews


@pytest.mark.stress
def test_three_workers_train_as_one_process(arguments, one, tmp_path):
    workers = start_workers(tmp_path, *arguments, events=[keep_weights] * 3)
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
    run.checkpoints()[60].unlink()
    status, _, output = Job(tmp_path, *arguments, **CPU).end()
    assert (status, "warning  the run has replicas 2, but here it is 1" in output) == (0, True)
    np.testing.assert_allclose(run.losses(), one.losses(), rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Workers that end, and workers that disagree

# Words that are printed, and the statuses of the workers: minus the signal that some get before
# that. One after the other in one run.
STOPS = [
    ("device", [-9, 1]),
    ("step +20 ", [-2, -2]),
    ("step +40 ", [1, -9]),
    ("step +40 ", [-15, 1]),
]


def assert_says(lines, text):
    """Assert that a worker has ended in one line with a text."""
    (line,) = lines
    assert re.match(f"train_ae.py: .*{text}", line), line


def test_one_that_is_stopped_stops_all_and_they_resume(arguments, two, tmp_path):
    for words, statuses in STOPS:
        stop = partial(signal.raise_signal, -min(statuses))
        event = partial(at, "builtins.print", words, stop)
        events = [event if status < 0 else int for status in statuses]
        found, errors = end(start_workers(tmp_path, *arguments, events=events))
        assert found == statuses, words
        for status, lines in zip(found, errors, strict=True):
            if status == 1:
                assert_says(lines, "another worker has ended")
            else:
                assert lines == []
    assert end(start_workers(tmp_path, *arguments)) == ([0, 0], [[], []])
    assert_same_run(Finished(tmp_path), two)


def test_ctrl_c_ends_a_worker_that_waits_for_others(arguments, tmp_path):
    job = Job(tmp_path, *arguments, TF_CONFIG=tf_config(free_addresses(2), 0), **CPU)
    job.wait_for("waiting for")
    job.process.join(3)  # until TensorFlow has begun to wait
    os.kill(job.process.pid, signal.SIGINT)
    job.process.join(2)
    assert job.process.exitcode == -signal.SIGINT
    assert job.end()[1] == []


OTHER = {
    "--sample-every=7": "sample_every:",
    "--depth=2": "depth, filters:",
    "--run-name=y": "run_name:",
    "--schedule=constant": "schedule, steps of the schedule:",
}


def test_one_that_differs_says_how_and_all_end(arguments, two, tmp_path):
    others = OTHER | {f"--weights={two.logs}/autoencoder.keras": "weights:"}
    pairs = {}
    for word, text in others.items():
        folder = tmp_path / text
        folder.mkdir()
        pairs[text] = start_workers(folder, *arguments, last=[word])
    # Other images under the same name.
    (tmp_path / "set").symlink_to(arguments[1])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "set").symlink_to(f"{arguments[1]}/fades")
    options = [*arguments, "--dataset=set", f"--log-dir={tmp_path / 'logs'}"]
    events = [int, partial(os.chdir, "elsewhere")]
    pairs["images, test images, labels:"] = start_workers(tmp_path, *options, events=events)
    for text, pair in pairs.items():
        statuses, errors = end(pair)
        assert statuses == [2, 2]
        for lines in errors:
            assert_says(lines, f"the workers differ in {text}")


def test_workers_with_different_checkpoints_end(arguments, two, tmp_path):
    shutil.copytree(two.logs, tmp_path / "logs" / "x")
    (tmp_path / "elsewhere").mkdir()
    events = [int, partial(os.chdir, "elsewhere")]
    statuses, errors = end(start_workers(tmp_path, *arguments, events=events))
    assert statuses == [2, 2]
    for lines in errors:
        assert_says(lines, "the workers differ in checkpoints: .* share --log-dir")


def test_batch_that_cannot_be_divided_is_refused(arguments, tmp_path):
    statuses, errors = end(start_workers(tmp_path, *arguments, "--batch-size", "7"))
    assert statuses == [2, 2]
    for lines in errors:
        assert_says(lines, "--batch-size 7 .* multiple of 2")
    assert not (tmp_path / "logs").exists()


TWO = ["127.0.0.1:15000", "127.0.0.1:15001"]
EDITS = [
    ("}", ""),
    ('"task"', '"tasks"'),
    ('"index": 0', '"index": 2'),
    ('"index": 0', '"index": -1'),
    ('"index": 0', '"index": null'),
    ('"type": "worker"', '"type": "chief"'),
    ('{"worker"', '{"chief": ["127.0.0.1:15002"], "worker"'),
]


@pytest.mark.parametrize(("old", "new"), EDITS)
def test_tf_config_of_another_form_is_refused(old, new, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TF_CONFIG", tf_config(TWO, 0).replace(old, new))
    assert here(*arguments) == 2
    assert_says(capsys.readouterr().err.splitlines(), "TF_CONFIG must have the form")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{}"])
def test_tf_config_without_workers_trains_alone(text, arguments, run_here, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    run_here(*arguments, "--steps", 1)


def test_port_that_is_taken_is_one_line(arguments, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = tf_config([f"127.0.0.1:{port}", *free_addresses(1)], 0)
        status, lines, _ = Job(tmp_path, *arguments, TF_CONFIG=config, **CPU).end()
    assert status == 1
    assert_says(lines, "the workers cannot connect")
