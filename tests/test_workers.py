"""Several devices, and several machines: processes that talk to each other over loopback."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from events import scalars
from runs import ROOT, call_here, environment, start

OPTIONS = ["--tied", "--latent-dim", "6", "--pretrain-steps", "20", "--schedule", "cosine"]
# what the processes have besides: CPUs alone, and no more threads for NumPy than there are cores for all of them
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_addresses(count):
    """Return addresses on this machine where nobody listens, with ports that are not given to clients either."""
    found = []
    while len(found) < count:
        with socket.socket() as attempt:
            address = ("127.0.0.1", random.SystemRandom().randrange(15000, 32000))
            if attempt.connect_ex(address) and (name := "{}:{}".format(*address)) not in found:
                found.append(name)
    return found


def tf_config(addresses, index):
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


class Job:
    """A run of one or several workers, in one folder or in `folders`: what it is, and then what came of it."""

    def __init__(self, folder, *arguments, workers=1, devices=1, dies=(), folders=None, env=()):
        self.folders, addresses = folders or [folder] * workers, free_addresses(workers)
        self.arguments = ["--run-name", "run", "--dataset", "mnist_5k", "--batch-size", "12", *map(str, arguments)]
        self.processes, dies = [], dict([dies] if dies else [])
        for index, place in enumerate(self.folders):
            Path(place).mkdir(exist_ok=True)
            config = {"TF_CONFIG": tf_config(addresses, index)} if workers > 1 else dict(env)
            self.processes.append((str(place), index, self.arguments, config, devices, dies.get(index)))
        self.logs, self.samples = Path(folder, "logs", "run"), Path(folder, "samples", "run")

    def ended(self, ends):
        """Take in the status of each process, when it ended and what it printed."""
        self.status, self.times = zip(*ends, strict=True)
        texts = [[Path(place, f"{kind}_{i}") for i, place in enumerate(self.folders)] for kind in ("out", "err")]
        self.out, self.err = ([path.read_text() for path in paths] for paths in texts)

    def losses(self):
        """Return the losses of all phases, one after the other."""
        phases = [*sorted(self.logs.glob("pretrain/*")), self.logs / "train"]
        return np.concatenate([scalars(phase)[1] for phase in phases])

    def weights(self, replica=0):
        """Return the weights, moments and counts of steps that a replica ended with."""
        with np.load(Path(self.folders[0], f"worker_{replica}.npz")) as file:
            return [file[name] for name in file.files]


@pytest.fixture(scope="module")
def run():
    """A function that runs jobs all at once, to their end or for 240 seconds."""
    command = [sys.executable, str(ROOT / "tests" / "nursery.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, env=environment(ENVIRONMENT), start_new_session=True, **pipes)

    def run(*jobs):
        print(json.dumps([[each for job in jobs for each in job.processes], 240]), file=process.stdin, flush=True)
        ends = iter(json.loads(process.stdout.readline()))
        for job in jobs:
            job.ended([next(ends) for _ in job.processes])

    yield run
    os.killpg(process.pid, signal.SIGKILL)  # with all that it has started, whatever became of the test
    process.wait()


def assert_equal_weights(job, other, replica):
    for one, another in zip(job.weights(), other.weights(replica), strict=True):
        np.testing.assert_array_equal(one, another)


def written(job):
    """Return what a run left in its folder, temporary files too; TensorBoard's files go by their folders."""
    paths = (path.relative_to(job.folders[0]) for path in Path(job.folders[0]).rglob("*"))
    paths = (path.with_name("events") if "tfevents" in path.name else path for path in paths)
    return {str(path) for path in paths if not re.match(r"(out|err|worker)_\d", path.name)}


def assert_trained_as_one(ways, jobs, steps):
    """Assert that all processes of each job ended well and alike, and that the jobs' losses are those of "one"."""
    expected = jobs["one"].losses()
    assert len(expected) == steps
    for name, job in jobs.items():
        assert set(job.status) == {0}, job.err
        np.testing.assert_allclose(job.losses(), expected, rtol=1e-5, err_msg=name)
        for replica in range(1, max(ways[name].values(), default=1)):
            assert_equal_weights(job, job, replica)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot hold a process to one core")
def test_same_seed_gives_the_same_bits_whatever_the_threads(run, tmp_path):
    many = {"OMP_NUM_THREADS": "7", "TF_NUM_INTRAOP_THREADS": "7", "TF_NUM_INTEROP_THREADS": "5", "ONE_CORE": "1"}
    pairs = []
    for steps, batch in ((120, 1), (10, 32)):
        words = ("--steps", steps, "--batch-size", batch)
        pairs.append([Job(tmp_path / f"{batch}_{len(env)}", *words, env=env) for env in ({}, many)])
    run(*(job for pair in pairs for job in pair))
    for one, other in pairs:
        assert one.status == other.status == (0,), (one.err, other.err)
        assert_equal_weights(one, other, 0)
        np.testing.assert_array_equal(one.losses(), other.losses())
        for path in one.samples.glob("step_*.png"):
            assert path.read_bytes() == (other.samples / path.name).read_bytes()


def test_devices_and_workers_train_as_one_process_does(run, tmp_path):
    ways = {"one": {}, "2 devices": {"devices": 2}, "3 workers": {"workers": 3}}
    jobs = {name: Job(tmp_path / name, "--steps", 30, **way) for name, way in ways.items()}
    run(*jobs.values())
    assert_trained_as_one(ways, jobs, 30)
    three = jobs["3 workers"]
    assert "writes   logs/run and samples/run" in three.out[0]
    assert all("writes   nothing: the first worker does" in out for out in three.out[1:])
    assert written(three) == written(jobs["one"])
    assert "CPU:0, /device:CPU:1" in jobs["2 devices"].out[0]


def test_workers_train_on_a_folder_of_pictures_with_every_option(run, tiny, tmp_path):
    ways = {"one": {}, "2 workers": {"workers": 2}}
    jobs = {name: Job(tmp_path / name, *tiny, *OPTIONS, "--steps", 50, **way) for name, way in ways.items()}
    run(*jobs.values())
    assert_trained_as_one(ways, jobs, 2 * 20 + 50)
    for job in jobs.values():
        assert "data     54 and (6, 8, 8, 3) images: pictures in" in job.out[0]
        kernels = job.weights()[:8:2]  # of two layers, and of their twins
        for kernel, twin in zip(kernels[:2], reversed(kernels[2:]), strict=True):
            np.testing.assert_array_equal(kernel.T if kernel.ndim == 2 else kernel, twin)


def test_a_run_whose_first_or_second_worker_is_killed_goes_on_to_the_same_weights(run, tiny, tmp_path):
    steps = (*tiny, "--steps", 200, "--sample-every", 30, "--checkpoint-every", 80)
    whole = Job(tmp_path / "whole", *steps, workers=2)
    killed = [Job(tmp_path / f"killed_{index}", *steps, workers=2, dies=(index, 90)) for index in (0, 1)]
    run(whole, *killed)
    assert whole.status == (0, 0)
    for index, job in enumerate(killed):
        other = 1 - index
        assert job.status[index] == -signal.SIGKILL
        assert job.status[other] == 1, job.err[other]
        assert (
            job.err[other]
            == "train_ae.py: another worker has ended, or a port is taken: run the same commands again to resume\n"
        )
        assert job.times[other] - job.times[index] < 30
        assert [path.name for path in job.logs.glob("checkpoints/step*")] == ["step_00000080.npz"]
    again = [Job(job.folders[0], *steps, workers=2) for job in killed]
    run(*again)
    for index, job in enumerate(again):
        assert job.status == (0, 0), job.err
        for replica in (0, 1):
            assert_equal_weights(whole, job, replica)
        np.testing.assert_array_equal(job.losses(), whole.losses())
        left = {path for path in written(job) if index == 0 or not path.startswith("tmp")}
        assert left == written(whole)  # but for the second worker's temporary folder, if that was killed


def test_a_run_can_be_resumed_by_another_number_of_workers(run, tiny, tmp_path):
    whole, part = Job(tmp_path / "whole", *tiny, "--steps", 40), Job(tmp_path / "part", *tiny, "--steps", 20)
    run(whole, part)
    rest = Job(tmp_path / "part", *tiny, "--steps", 40, workers=2)
    run(rest)
    assert rest.status == (0, 0), rest.err
    for out in rest.out:
        warning = (
            "warning  logs/run was begun with replicas 1, and now it is 2: the last bits of its numbers will differ"
        )
        assert out.count(warning) == 1
    np.testing.assert_allclose(rest.losses(), whole.losses(), rtol=1e-5)


def test_what_workers_cannot_do_is_refused_in_a_line(run, tiny, tmp_path):
    batches = [  # sizes, among how many replicas they are to be divided, and the sizes that are named instead
        (7, 2, {"6", "8"}, Job(tmp_path / "7", "--batch-size", 7, devices=2)),
        (1, 2, {"2", "4"}, Job(tmp_path / "1", "--batch-size", 1, workers=2)),
        (10, 3, {"9", "12"}, Job(tmp_path / "10", "--batch-size", 10, workers=3)),
    ]
    done = Job(tmp_path / "here", *tiny, "--steps", 5)
    run(done, *(job for *_, job in batches))
    for size, replicas, others, job in batches:
        assert set(job.status) == {2}
        for text in job.err:
            line, use = text.split(": use ")
            assert line == f"train_ae.py: --batch-size {size} cannot be divided among {replicas} replicas"
            assert set(use.rstrip("\n").split(" or ")) == others
        assert not written(job)
    apart = Job(tmp_path / "here", *tiny, "--steps", 10, workers=2, folders=[tmp_path / "here", tmp_path / "there"])
    run(apart)
    assert apart.status == (2, 2)
    text = "train_ae.py: the workers have different checkpoints in logs/run: let them share its folder\n"
    assert set(apart.err) == {text}
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"out_1", "err_1"}
    assert apart.logs.joinpath("checkpoints", "step_00000005.npz").exists()


def test_a_worker_says_whom_it_waits_for_until_ctrl_c(tmp_path):
    here, *others = free_addresses(3)
    env = ENVIRONMENT | {"TF_CONFIG": tf_config([here, *others], 0)}
    with start("--batch-size", 12, cwd=tmp_path, env=env) as process:
        assert process.stdout.readline() == f"worker   {here} waits for {', '.join(others)}\n"
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
    assert not list(tmp_path.iterdir())


TWO = ["127.0.0.1:15000", "127.0.0.1:15001"]


@pytest.mark.parametrize(
    "text",
    [
        "worker 0 of 2",
        "[]",
        "{}",
        json.dumps({"cluster": {"worker": TWO}}),
        tf_config(TWO, 2),
        tf_config(TWO, -1),
        tf_config(TWO, None),
        tf_config([], 0),
        tf_config(TWO[0], 0),
        json.dumps({"cluster": {"worker": TWO[:1], "ps": TWO[1:]}, "task": {"type": "ps", "index": 0}}),
    ],
    ids=[
        "no JSON",
        "a list",
        "no cluster",
        "no task",
        "index too high",
        "index too low",
        "no index",
        "no workers",
        "no list of workers",
        "parameter server",
    ],
)
def test_a_tf_config_that_cannot_be_used_is_refused_in_a_line(monkeypatch, capfd, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TF_CONFIG", text)
    assert call_here("--run-name", "run", "--batch-size", 12) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "TF_CONFIG must have the form" in line
    assert not list(tmp_path.iterdir())
