"""The same command again resumes a run, to the bit, wherever it was killed or stopped."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path

import filelock
import numpy as np
import pytest
from events import scalars, shown
from PIL import Image
from runs import Finished, assert_same_run, assert_same_weights, call_here, made, said, start, wait_for

import train_ae

SHORT = ["--run-name", "x", "--steps", "400", "--checkpoint-every", "60"]
# whatever makes a part of a run's state: moments of several models, tied kernels, a rate that falls, epochs
EVERYTHING = ["--depth", "2", "--latent-dim", "5", "--tied", "--pretrain-steps", "70", "--schedule", "cosine"]
EVERYTHING += ["--batch-size", "7", "--run-name", "x", "--steps", "130", "--checkpoint-every", "60"]


@pytest.fixture(scope="session")
def left_alone(tiny, tmp_path_factory):
    return made(tmp_path_factory, "left_alone", [*tiny, *SHORT])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own, and the signals as the command line has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_ae.py"])
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in kept.items():
        signal.signal(number, handler)


def state(folder):
    """Return the time and size of all that is in a folder."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


# --- kill ---
def test_killed_at_random_moments_a_run_ends_as_if_left_alone(left_alone, tiny, tmp_path, monkeypatch):
    """Each process is killed after a random number of the lines that it prints, and a moment."""
    seed = random.SystemRandom().randrange(10**9)
    print("seed", seed)
    draw = random.Random(seed)
    for kill in range(3):
        with start(*tiny, *SHORT, cwd=tmp_path) as process:
            wait_for(process, "view" if kill == 0 else "step ")
            for _ in range(draw.randrange(5)):
                process.stdout.readline()
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    assert call_here(*tiny, *SHORT) == 0
    assert_same_run(left_alone, Finished(tmp_path, "x"))


class Killed(BaseException):
    """What ends a process at once: nothing is written after it."""


def test_killed_at_any_file_a_run_ends_as_if_left_alone(tiny, tmp_path, monkeypatch, tmp_path_factory):
    """Copies of the folders, taken each time before and after a file gets its name, are what SIGKILL would leave."""
    short = [*tiny, "--run-name", "x", "--steps", "50", "--sample-every", "20", "--checkpoint-every", "20"]
    kept, left = train_ae.write_atomically, tmp_path / "left_0"
    copies = {}

    def write(path, save):
        def save_and_copy(part):
            save(part)
            copies[f"before {path.name} {len(copies)}"] = tmp_path / f"left_{len(copies) + 1}"
            shutil.copytree(left, tmp_path / f"left_{len(copies)}")

        kept(path, save_and_copy)

    left.mkdir()
    monkeypatch.chdir(left)
    with monkeypatch.context() as patch:
        patch.setattr(train_ae, "write_atomically", write)
        assert call_here(*short) == 0
    names = [re.search(r"before (\S+)", name)[1] for name in copies]
    assert {"config.json", "step_00040.png", "step_00000040.npz", "autoencoder.keras", "summary.png"} <= {*names}
    assert names.count("metrics.json") == 2
    draw = random.Random(random.SystemRandom().randrange(10**9))
    # always the first file and the last, and one of the others
    chosen = [next(iter(copies)), list(copies)[-1], draw.choice(list(copies)[1:-1])]
    for name in chosen:
        print(name)
        monkeypatch.chdir(copies[name])
        assert call_here(*short) == 0
        assert_same_run(Finished(left, "x"), Finished(copies[name], "x"))
        assert not list(copies[name].rglob(".part-*")), name


@pytest.mark.parametrize("number", [2, 4])
def test_kill_between_two_folders_does_not_burn_the_name(number, tiny, here, monkeypatch):
    kept, made = Path.mkdir, set()

    def mkdir(path, *arguments, **options):
        kept(path, *arguments, **options)
        made.add(path)
        if len(made) == number:  # of logs, x in it, checkpoints, samples, x in it
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(Killed):
            call_here(*tiny, "--run-name", "x", "--steps", "2")
    assert len(list(here.rglob("*"))) == number
    assert call_here(*tiny, "--run-name", "x", "--steps", "2") == 0


# --- signals ---
def signal_at(monkeypatch, phase, step, number):
    """Make the next run get a signal where it goes on from a step of a phase."""
    kept = train_ae.make_train_steps

    def make(which, *others):
        steps = kept(which, *others)

        def train(first, last):
            losses = steps(first, last)
            if which.name == phase and first <= step < last:
                signal.raise_signal(number)
            return losses

        return train

    monkeypatch.setattr(train_ae, "make_train_steps", make)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_is_saved_and_the_command_that_it_prints_resumes_it(
    number, status, left_alone, tiny, here, monkeypatch, capsys
):
    folder = here / "it's a folder"  # which a shell would take apart
    shutil.copytree(tiny[1], folder)
    arguments = ["--dataset", folder.name, *tiny[2:], *SHORT[2:]]
    monkeypatch.setattr(sys, "argv", ["train_ae.py", *arguments])
    with monkeypatch.context() as patch:
        signal_at(patch, "train", 250, number)
        assert call_here(*arguments) == status
    text = capsys.readouterr()
    (line,) = text.err.splitlines()
    assert "Traceback" not in text.out
    command = shlex.split(re.search(r": stopped; to resume: (.+)", line)[1])
    (name,) = (path.name for path in (here / "logs").iterdir())
    assert command == ["python", "train_ae.py", *arguments, "--run-name", name]
    newest = max((here / "logs" / name / "checkpoints").iterdir())
    assert 240 < int(re.fullmatch(r"step_(\d{8})\.npz", newest.name)[1]) <= 300
    assert not (here / "logs" / name / "metrics.json").exists()
    assert call_here(*command[2:]) == 0
    said_steps = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert said_steps == [300, 350, 400]
    assert_same_weights(left_alone, Finished(here, name))
    for one in left_alone.samples.iterdir():
        assert one.read_bytes() == (here / "samples" / name / one.name).read_bytes(), one.name
    steps, losses = scalars(here / "logs" / name / "train")
    np.testing.assert_array_equal((steps, losses), scalars(left_alone.logs / "train"))


def test_signals_of_a_terminal_stop_the_script_itself(tiny, tmp_path):
    """The script as a process: a run that would never end is saved, and its name is in the command."""
    with start(*tiny, "--steps", 10**9, cwd=tmp_path) as process:
        wait_for(process, "step      0")
        wait_for(process, "step ")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = said(error)
    (name,) = (path.name for path in (tmp_path / "logs").iterdir())
    assert line.startswith("train_ae.py: stopped; to resume: python ")
    assert line.endswith(f"train_ae.py {shlex.join(tiny)} --steps 1000000000 --run-name {name}")
    saved = max((tmp_path / "logs" / name / "checkpoints").iterdir())
    steps, _ = scalars(tmp_path / "logs" / name / "train")
    np.testing.assert_array_equal(steps, np.arange(int(saved.stem.removeprefix("step_"))))


@pytest.mark.parametrize(("phase", "step"), [("pretrain/conv2", 60), ("train", 77)])
def test_run_with_everything_resumes_to_the_bit(phase, step, pictures, here, monkeypatch, tmp_path_factory):
    arguments = ["--dataset", str(pictures), *EVERYTHING]
    alone = made(tmp_path_factory, "everything", arguments)
    with monkeypatch.context() as patch:
        signal_at(patch, phase, step, signal.SIGINT)
        assert call_here(*arguments) == 130
    assert call_here(*arguments) == 0
    assert_same_run(alone, Finished(here, "x"))
    curves = shown(here / "logs" / "x")
    pretrained = [key for key in curves if key[0].startswith("pretrain/")]
    assert len(pretrained) == 3 and all([at for at, _ in curves[key]] == [*range(70)] for key in pretrained)


def test_stop_while_the_end_is_written_resumes_too(left_alone, tiny, here, monkeypatch):
    def stop(*_):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        signal_at(patch, "", 0, signal.SIGTERM)
        patch.setattr(train_ae.Record, "draw", stop)
        assert call_here(*tiny, *SHORT) == 143
    assert not (here / "samples" / "x" / "summary.png").exists()
    assert call_here(*tiny, *SHORT) == 0
    assert_same_run(left_alone, Finished(here, "x"))


# --- the same command, and others ---
@pytest.fixture
def complete(left_alone, tiny, here):
    """A copy of the run that was left alone, in this folder."""
    shutil.copytree(left_alone.cwd, here, dirs_exist_ok=True)
    return Finished(here, "x")


def test_complete_run_says_so_and_touches_no_file(complete, tiny, capsys):
    before = state(complete.cwd)
    assert call_here(*tiny, *SHORT) == 0
    text = capsys.readouterr()
    assert text.out.splitlines() == [f"{Path('logs', 'x')} is complete: all of its 400 steps are done"]
    assert not text.err and state(complete.cwd) == before


OTHER = {
    "steps": ["--steps", "399"],
    "batch_size": ["--batch-size", "2"],
    "learning_rate": ["--learning-rate", "0.002"],
    "schedule": ["--schedule", "cosine"],
    "depth": ["--depth", "2"],
    "latent_dim": ["--latent-dim", "3"],
    "tied": ["--tied"],
    "pretrain_steps": ["--pretrain-steps", "1"],
    "sample_every": ["--sample-every", "51"],
    "checkpoint_every": ["--checkpoint-every", "61"],
    "seed": ["--seed", "1"],
    "dataset": ["--dataset", "mnist"],
    "image_size": ["--image-size", "8"],
}


def test_every_setting_but_the_places_must_be_the_runs_own(complete, tiny, capsys):
    assert OTHER.keys() == vars(train_ae.Settings()).keys() - train_ae.IGNORED_ON_RESUME
    before = state(complete.cwd)
    for name, words in OTHER.items():
        assert call_here(*tiny, *SHORT, *words) == 2, name
        text = capsys.readouterr()
        assert not text.out and len(text.err.splitlines()) == 1
        assert f" {name} " in text.err and str(Path("logs", "x")) in text.err and "--run-name" in text.err
        assert state(complete.cwd) == before


def test_moved_and_renamed_run_resumes(complete, left_alone, tiny, capsys):
    (complete.cwd / "l").mkdir()
    (complete.cwd / "s").mkdir()
    complete.logs.rename(complete.cwd / "l" / "y")
    complete.samples.rename(complete.cwd / "s" / "y")
    moved = ["--run-name", "y", "--log-dir", complete.cwd / "l", "--sample-dir", "s", "--data-dir", "elsewhere"]
    assert call_here(*tiny, *SHORT, *moved) == 0
    assert "is complete" in capsys.readouterr().out
    assert call_here(*tiny, *SHORT, *moved, "--steps", "450") == 0
    assert "step    400" in capsys.readouterr().out
    assert (complete.cwd / "s" / "y" / "step_00450.png").exists()
    config = json.loads((complete.cwd / "l" / "y" / "config.json").read_text())
    assert (config["run_name"], config["steps"], config["sample_dir"]) == ("y", 450, "s")


def test_steps_alone_may_grow_and_the_end_is_that_of_one_run(complete, tiny, tmp_path_factory, capsys):
    longer = [*tiny, *SHORT, "--steps", "500"]
    alone = made(tmp_path_factory, "longer", longer)
    capsys.readouterr()
    old = {path: path.read_bytes() for path in complete.logs.rglob("events.*")}
    assert call_here(*longer) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == [400, 450, 500]
    assert complete.json("metrics.json")["steps"] == complete.json("config.json")["steps"] == 500
    assert all(path.read_bytes() == content for path, content in old.items())  # new events go to files of their own
    ours, theirs = shown(complete.logs), shown(alone.logs)
    for key in theirs.keys() - {key for key in theirs if key[0] == "metrics"}:
        assert ours[key] == theirs[key], key
    for key in (key for key in theirs if key[0] == "metrics"):
        assert [step for step, _ in ours[key]] == [400, 500] and ours[key][-1] == theirs[key][-1]
    assert_same_weights(complete, alone)
    assert [Image.open(complete.samples / name).size for name in ("summary.png", "latents.png")]
    for path in alone.samples.iterdir():
        assert path.read_bytes() == (complete.samples / path.name).read_bytes(), path.name


def test_steps_of_a_rate_that_falls_may_not_grow(tiny, here, capsys):
    arguments = [*tiny, "--run-name", "x", "--schedule", "cosine", "--steps"]
    assert call_here(*arguments, "20") == 0
    before = state(here)
    capsys.readouterr()
    assert call_here(*arguments, "30") == 2
    assert " steps 20" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    assert state(here) == before
    assert call_here(*arguments, "20") == 0


@pytest.fixture
def stopped(complete):
    """The run as it was at a checkpoint, before its end."""
    (complete.logs / "metrics.json").unlink()
    (complete.logs / "autoencoder.keras").unlink()
    (complete.logs / "checkpoints" / "step_00000400.npz").unlink()
    return complete


def test_other_versions_are_a_line_each_and_the_run_goes_on(stopped, left_alone, tiny, capsys):
    now = stopped.json("config.json")
    other = {name: f"other {name}" for name in ("tensorflow", "keras", "onednn", "replicas")}
    (stopped.logs / "config.json").write_text(json.dumps(now | other))
    assert call_here(*tiny, *SHORT) == 0
    text = capsys.readouterr()
    lines = [line for line in text.out.splitlines() if line.startswith("warning")]
    assert len(lines) == 4 and not text.err
    for name, value in other.items():
        (line,) = (line for line in lines if value in line)
        assert f" {name} " in line and str(now[name]) in line
    assert_same_run(left_alone, stopped)  # its config.json too, with the versions of now


@pytest.mark.parametrize("change", ["one picture", "one more picture"])
def test_other_images_than_before_are_refused(change, stopped, tiny, capsys):
    folder = stopped.cwd / "changed"
    shutil.copytree(tiny[1], folder)
    pictures = sorted(folder.rglob("*.png"))
    if change == "one picture":
        for path in pictures[:10]:  # one at least is among those that train
            Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    else:
        for number in range(10):
            shutil.copy(pictures[0], folder / f"more{number}.png")
    config = stopped.json("config.json")
    (stopped.logs / "config.json").write_text(json.dumps(config | {"dataset": "changed"}))
    before = state(stopped.cwd)
    assert call_here(*tiny, *SHORT, "--dataset", "changed") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert " checksum " in error or (" training_images " in error and change == "one more picture")
    assert state(stopped.cwd) == before


# --- one process at a time ---
def test_run_is_refused_to_a_second_process_while_the_first_trains(tiny, here, monkeypatch, capsys):
    kept, statuses = train_ae.Record.log_test, []

    def log_test(record, step):
        if step == 50:
            before = state(here)
            # in a thread, since TensorFlow has one strategy to each
            other = threading.Thread(target=lambda: statuses.append(call_here(*tiny, *SHORT)))
            other.start()
            other.join()
            assert state(here) == before
        return kept(record, step)

    monkeypatch.setattr(train_ae.Record, "log_test", log_test)
    assert call_here(*tiny, *SHORT) == 0
    assert statuses == [2]
    (line,) = capsys.readouterr().err.splitlines()
    assert "another process is training" in line and str(Path("logs", "x")) in line


def test_lock_that_a_killed_process_left_is_no_obstacle(complete, tiny):
    (lock,) = complete.logs.rglob(".lock")
    with filelock.FileLock(lock):
        assert call_here(*tiny, *SHORT, "--steps", "410") == 2
    lock.write_text(str(os.getpid()))
    assert call_here(*tiny, *SHORT, "--steps", "410") == 0
