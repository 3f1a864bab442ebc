"""Resuming: kills, signals, faults and damage, and what a resumed run refuses or says."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    Finished,
    Job,
    assert_same_run,
    at,
    bytes_in,
    call,
    edited_copy,
    here,
    said,
    send,
)

from train_ae import PROCESS_LOCK, Settings

SHORT = "--run-name x --steps 100 --checkpoint-every 30"
LONGER = "--run-name x --steps 150 --checkpoint-every 30"
LONG = "--run-name x --steps 600 --checkpoint-every 200 --sample-every 600"
LATENT = "--run-name x --steps 100 --latent-dim 5"
# All that makes a part of a run's state, or of its beginning.
EVERYTHING = (
    "--run-name x --steps 200 --checkpoint-every 60 --batch-size 7 --tied --latent-dim 5"
    " --noise 0.2 --schedule cosine"
)
REPLACE = "pathlib.Path.replace"  # gives a file its name, once it is written

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals, and no limits")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full and /proc")


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """A function that returns the run of a command, made once and left alone."""

    @cache
    def make(words):
        job = Job(tmp_path_factory.mktemp("alone"), *tiny, *words.split())
        assert job.end()[:2] == (0, [])
        return Finished(job.folder)

    return make


@pytest.fixture(scope="module")
def weights(alone):
    """The path of another run's weights."""
    return alone(LATENT).logs / "autoencoder.keras"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder of a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(alone, folder):
    """A copy of the short run, in the working folder."""
    shutil.copytree(alone(SHORT).cwd, folder, dirs_exist_ok=True)
    return Finished(folder)


@pytest.fixture
def job(tiny, folder):
    """A function that runs the script to its end, and returns its output, or the only line of
    standard error if the status says that it failed.
    """

    def job(words, status=0, **options):
        found, errors, output = Job(folder, *tiny, *words.split(), **options).end()
        assert (found, len(errors)) == (status, status > 0), errors
        return errors[0] if errors else output

    return job


@pytest.fixture
def finish(job, alone, folder):
    """A function that asserts that a run ends as if left alone; returns the output."""

    def finish(words):
        output = job(words)
        assert_same_run(Finished(folder), alone(words))
        return output

    return finish


@pytest.fixture
def refuse(tiny, folder, capsys):
    """A function that asserts that a run ends in a line with a text, and changes nothing."""

    def refuse(text, words, status=2):
        before = bytes_in(folder)
        assert here(*tiny, *words.split()) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(f"train_ae.py: .*{text}", line)
        assert bytes_in(folder) == before

    return refuse


# --------------------------------------------------------------------------------------------------
# Kills and signals


# A function, its arguments, and the signals that come before its call: one after the other in one
# run.
STOPS = """
    PIL.Image.open pictures INT
    pathlib.Path.replace config.json TERM
    pathlib.Path.replace step_0*60.npz KILL
    tensorflow.GradientTape $ TERM TERM TERM TERM TERM
    pathlib.Path.replace step_00050.png INT INT INT INT INT
    numpy.savez step_0*120.npz TERM
    pathlib.Path.replace step_0*120.npz INT INT INT INT INT
    pathlib.Path.replace step_0*180.npz INT
    pathlib.Path.replace autoencoder.keras TERM
    numpy.savez latents.npz INT INT INT INT INT
    pathlib.Path.replace metrics.json KILL
    pathlib.Path.replace training.gif TERM TERM TERM TERM TERM
"""


@posix
def test_stopped_at_every_moment_a_run_ends_as_if_left_alone(job, finish, weights):
    command = f"{EVERYTHING} --weights {weights}"
    for line in STOPS.strip().splitlines():
        function, words, *names = line.split()
        before = partial(at, function, words, partial(send, names))
        job(command, -signal.Signals[f"SIG{names[0]}"], before=before)
    assert Path("logs/x/metrics.json").exists()  # before the last pictures
    job(f"{command} --steps 300", 2)  # since the rate falls
    assert "resumes  after step 200 of 200" in finish(command)


@posix
@pytest.mark.stress
@pytest.mark.parametrize("turn", range(3))
def test_stopped_at_random_moments_too(turn, tiny, weights, folder, finish):
    command = f"{EVERYTHING} --weights {weights}"
    for limit in range(1, 7):
        job = Job(folder, *tiny, *command.split())
        job.process.join(random.uniform(0.2, limit))
        random.choice([job.process.kill, job.process.terminate])()
        status, errors, _ = job.end()
        assert (status in (0, -9, -15), errors) == (True, [])
    finish(command)


IMPORT = """
import os, signal, time
for _ in range(5):
    os.kill(os.getpid(), signal.{})
    time.sleep(0.02)
time.sleep(60)
"""


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_during_the_imports_end_the_process_at_once(name, folder):
    Path("pydantic.py").write_text(IMPORT.format(name))  # found before the real one
    process = call(cwd=folder, PYTHONPATH=str(folder))
    assert (process.returncode, said(process.stderr)) == (-signal.Signals[name], [])


def let_time_pass():
    """Have eleven seconds pass between two looks at the clock."""
    time.monotonic = itertools.count(step=11).__next__


def test_checkpoints_of_slow_runs_change_no_bit(job, finish, folder):
    command = "--run-name x --steps 150"
    job(command, before=let_time_pass)
    paths = Finished(folder).checkpoints()
    assert [*paths] == [50, 100, 150]
    paths[150].unlink()
    assert "resumes  after step 100 of 150" in finish(command)


@posix
def test_a_process_that_trains_keeps_others_off(tiny, refuse, finish, folder):
    trains = Job(folder, *tiny, *LONG.split())
    trains.wait_for("step      0")
    os.kill(trains.process.pid, signal.SIGSTOP)
    refuse("another process .*logs/x", LONG)
    trains.process.kill()
    refuse("the run has seed 0, but here it is 1", f"{LONG} --seed 1")
    finish(LONG)


def test_a_process_trains_one_run_at_a_time(refuse, finish):
    with PROCESS_LOCK:
        refuse("this process is training another run", SHORT)
    finish(SHORT)


# --------------------------------------------------------------------------------------------------
# The same command, and others


def test_what_may_change_changes_no_weight(run, job, alone, tiny):
    shutil.copytree(tiny[1], "elsewhere")
    run.logs.rename("logs/y")
    run.samples.rename("samples/y")
    output = job(
        "--run-name y --steps 150 --dataset elsewhere --checkpoint-every 70 --sample-every 75"
    )
    assert "resumes  after step 100 of 150" in output
    assert "warning" not in output
    assert (Finished(run.cwd, "y").losses() == alone(LONGER).losses()).all()


OTHER = (
    "steps=99 batch_size=2 learning_rate=0.002 schedule=cosine depth=2 latent_dim=3 tied noise=0.1"
    " initializer=article seed=1 image_size=8"
)
FREE = "run_name log_dir sample_dir data_dir dataset weights sample_every checkpoint_every"


def test_other_settings_are_refused(run, refuse):
    others = {word.partition("=")[0]: word for word in OTHER.split()}
    assert {*others, *FREE.split()} == Settings.model_fields.keys()
    for name, word in others.items():
        refuse(rf"\b{name} ", f"{SHORT} --{word.replace('_', '-')}")


def test_weights_count_by_their_content(job, weights, refuse, finish):
    shutil.copy(weights, "copy.keras")
    copy = f"{LATENT} --weights copy.keras"
    refuse("--weights has other layers ", f"{SHORT} --weights copy.keras")
    job(f"{copy} --steps 50")
    refuse("weights are not those", f"{LATENT} --weights logs/x/autoencoder.keras")
    Path("copy.keras").unlink()
    job(copy)
    finish(f"{LATENT} --weights {weights}")


def test_other_images_or_labels_are_refused(job, refuse):
    images = np.arange(480, dtype=np.uint8).reshape(30, 4, 4)
    labels = np.arange(30) % 2
    np.savez("a.npz", x_train=images, y_train=labels)
    command = "--run-name x --steps 1 --dataset a.npz"
    job(command)
    others = [
        ("images", {"x_train": images[::-1]}),
        ("images", {"x_train": images.reshape(30, 2, 8)}),
        ("images", {"x_train": images / 400}),
        ("labels", {"x_train": images, "y_train": labels[::-1]}),
        ("test images", {"x_train": images[:15], "x_test": images[15:]}),
    ]
    for name, arrays in others:
        np.savez("a.npz", **arrays)
        refuse(f"the {name} are not those of the run", command)


def test_other_versions_are_said(run, finish):
    config = run.json("config")
    names = ["tensorflow", "keras", "onednn", "devices", "threads", "replicas"]
    other = json.dumps(config | {"machine": dict.fromkeys(names, "other")})
    np.savez(run.checkpoints()[100], **run.checkpoint() | {"config": other})
    (run.logs / "config.json").unlink()  # only other programs read it
    output = finish(LONGER)
    for name in names:
        value = config["machine"][name]
        assert f"\nwarning  the run has {name} other, but here it is {value}: " in output
    assert output.count("warning") == len(names)
    config["settings"]["steps"] = 150
    assert run.json("config") == config


NEW = '    new: int = 1\n    """new"""\n    tied: bool'
EDITS = [
    ("tf.square(outputs - images)", "tf.abs(outputs - images)", 0, r"\n\+ .*tf.abs"),
    ("    tied: bool", NEW, 0, r"\n\+ .*new"),  # its default stands in
    ("= (16, 32,", "= (8, 32,", 2, " filters .16., .* .8.:"),
    ('"kernel_size": 3', '"kernel_size": 5', 2, "the layers or the optimizer in train_ae.py"),
    ('"strides": 2', '"strides": 2, "use_bias": False', 2, "conv1/bias is .*, and here missing"),
]


@pytest.mark.parametrize(("old", "new", "status", "text"), EDITS)
def test_an_edited_script_says_what_differs(old, new, status, text, run, job):
    script = edited_copy(run.cwd / "edited", old, new)
    before = bytes_in(run.logs)
    assert re.search(text, job(SHORT, status, script=script))
    assert (bytes_in(run.logs) == before) == (status == 2)


# --------------------------------------------------------------------------------------------------
# Damage


DAMAGE = [
    lambda content: content[:999] + b"damage" + content[1005:],
    np.zeros(100),  # losses
    np.zeros(99, np.float32),
    np.full(100, np.inf, np.float32),
    np.float32(0),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_gives_way_to_the_one_before(damage, run, finish):
    path = run.checkpoints()[100]
    if callable(damage):
        path.write_bytes(damage(path.read_bytes()))
    else:
        np.savez(path, **run.checkpoint() | {"losses": damage})
    output = finish(LONGER)
    assert "logs/x/checkpoints/step_000000000100.npz is damaged, and skipped: " in output
    assert "resumes  after step 90 of 150" in output
    assert output.count("warning") == 1


def test_checkpoint_of_another_run_is_refused(run, alone, refuse):
    other = alone(f"{SHORT} --seed 1").checkpoints()[100]
    shutil.copy(other, run.logs / "checkpoints")
    refuse("the run has seed 1, but here it is 0", LONGER)


def test_a_run_without_a_usable_checkpoint_is_one_line(run, refuse):
    for path in run.checkpoints().values():
        path.write_bytes(path.read_bytes()[:999])
    refuse("logs/x.*another --run-name", SHORT, 1)


# Files whose names are like those of a run's own.
STRAYS = [
    "samples/x/step_99999.png",
    "logs/x/train/notes",
    "logs/x/checkpoints/step_000000000060 (copy).npz",
    "logs/x/checkpoints/step_99999999.npz",
]


def test_files_that_are_not_the_runs_own_are_left_alone(run, job):
    for name in STRAYS:
        Path(name).write_text("mine")
    (run.logs / ".part-config.json").symlink_to("train/notes")
    output = job(LONGER)
    assert "resumes  after step 100 of 150" in output
    assert "warning" not in output
    assert {Path(name).read_text() for name in STRAYS} == {"mine"}


@pytest.mark.parametrize("rate", ["1e18", "1e25", "1e39"])  # after some steps, two, and one
def test_what_is_not_finite_leaves_the_last_good_checkpoint(rate, job, folder):
    line = job(f"{SHORT} --learning-rate {rate} --checkpoint-every 1", 1)
    last = int(re.search(r"not finite by step (\d+): .*--learning-rate", line)[1])
    paths = Finished(folder).checkpoints()
    # The loss of a preview can overflow before the weights do: then the last step has been saved.
    assert max(paths, default=0) in (last - 1, last)
    for path in paths.values():
        assert all(np.isfinite(array).all() for array in np.load(path).values() if array.ndim)


# --------------------------------------------------------------------------------------------------
# Disks, folders, memory


def fill_disk(name):
    """Have no room for a file."""
    unlink = Path.unlink

    def unlink_and_link(path, **options):
        unlink(path, **options)
        if path.name == f".part-{name}":
            path.symlink_to("/dev/full")

    Path.unlink = unlink_and_link


def limit_files():
    """Leave no room for the files of TensorBoard: no other is as large."""
    import resource  # which Windows has not

    resource.setrlimit(resource.RLIMIT_FSIZE, (22_000, 22_000))


@linux
def test_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(job, finish):
    before = partial(at, REPLACE, "step_00000.png", limit_files)
    assert "logs cannot be written: is the disk full" in job(LONG, 1, before=before)
    for name in ("config.json", "step_000000000400.npz", "step_00600.png", "autoencoder.keras"):
        line = job(LONG, 1, before=partial(fill_disk, name))
        assert f"{name} cannot be written: No space" in line
    finish(LONG)


def take_away(folder):
    """Put a file where a folder was."""
    Path(folder).mkdir(exist_ok=True)
    Path(folder).rename("away")
    Path(folder).touch()


def test_folder_that_goes_away_is_one_line(job, finish):
    moments = {"logs/x/train": "config.json", "samples": "step_0*200.npz", "logs": "step_00600.png"}
    for name, moment in moments.items():
        before = partial(at, REPLACE, moment, partial(take_away, name))
        assert name in job(LONG, 1, before=before)
        Path(name).unlink()
        Path("away").rename(name)
    finish(LONG)


def test_picture_that_cannot_be_drawn_is_said(job):
    np.save("tall.npy", np.eye(20, 33000)[..., np.newaxis])  # too tall for a GIF
    for folder in ("samples", "elsewhere"):  # where there are no previews
        output = job(f"--run-name x --dataset tall.npy --steps 1 --sample-dir {folder}")
        assert "training.gif cannot be drawn: " in output
        assert Path(folder, "x", "worst.png").exists()
        assert not [*Path(folder, "x").glob(".part-*")]


def note_memory():
    """Print the largest memory that this process has held, in KiB."""
    print(re.search("VmHWM.*", Path("/proc/self/status").read_text())[0])


@linux
@pytest.mark.stress
def test_memory_does_not_grow_with_the_steps(job):
    before = partial(at, REPLACE, "step_.*png", note_memory)
    output = job("--sample-every 20000 --checkpoint-every 1000 --steps 100000", before=before)
    found = [int(number) for number in re.findall(r"VmHWM:\s+(\d+)", output)]
    assert found[-1] - found[1] < 4000, found  # 50 bytes a step: a loss in a list takes 32
