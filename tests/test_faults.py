"""Runs that are killed, stopped, starved and damaged: none is lost, and each goes on exactly."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import Run, call, words
from events import read, scalars
from hypothesis import HealthCheck, example, given, settings, strategies
from test_data import prepare

import train_ae
from train_ae import Settings, main

SHORT = ("--steps", 400, "--checkpoint-every", 60)
DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
}


def start(*arguments, cwd):
    """Start the script; return the process, its output a pipe."""
    return subprocess.Popen(words(*arguments), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, step):
    """Read a process's lines until it tells of a step."""
    begin = f"step {step:6}"
    assert any(line.startswith(begin) for line in process.stdout), process.stderr.read()


def assert_same_run(one, other):
    """Assert that two runs have the same weights, figures, pictures and curves, to the bit."""
    for ours, theirs in zip(one.weights(), other.weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    metrics = [run.json("metrics.json") for run in (one, other)]
    for found in metrics:
        del found["seconds"], found["ms_per_step"]  # times differ
    assert metrics[0] == metrics[1]
    names = sorted(path.name for path in one.samples.iterdir())
    assert names == sorted(path.name for path in other.samples.iterdir())
    for name in names:
        assert (one.samples / name).read_bytes() == (other.samples / name).read_bytes(), name
    for kind in ("train", "test"):
        ours, theirs = read(one.logs / kind), read(other.logs / kind)
        assert ours.Tags() == theirs.Tags()
        for tag in set(ours.Tags()["tensors"]) - {"settings"}:
            events = [
                [(e.step, e.tensor_proto.SerializeToString()) for e in run.Tensors(tag)] for run in (ours, theirs)
            ]
            assert events[0] == events[1], (kind, tag)
    np.testing.assert_array_equal(scalars(one.logs / "train", "loss")[0], np.arange(metrics[0]["steps"]))


class Finished(Run):
    """A run whose last process may have been any."""

    def __init__(self, cwd, name):
        self.cwd, self.logs, self.samples = Path(cwd), Path(cwd, "logs", name), Path(cwd, "samples", name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("undisturbed"), "x", *SHORT)


def test_killed_at_random_moments_a_run_ends_as_if_left_alone(undisturbed, tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    random_ = random.Random(seed)
    kills, deadline = 0, time.monotonic() + 240
    while kills < 8 and time.monotonic() < deadline:
        begun = (tmp_path / "logs" / "x" / "config.json").exists()
        process = start(*(("--resume", "x") if begun else ("--run-name", "x", *SHORT)), cwd=tmp_path)
        if begun or kills:  # most moments within the training itself
            for line in process.stdout:
                if line.startswith(("step", "test_loss")):
                    break
            time.sleep(random_.uniform(0, 0.7))
        else:
            time.sleep(random_.uniform(1, 4))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        if (tmp_path / "logs" / "x" / "metrics.json").exists():
            break
    assert kills
    process = call("--resume", "x", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_run(undisturbed, Finished(tmp_path, "x"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_signal_saves_and_says_how_to_go_on(number, status, undisturbed, tmp_path):
    process = start("--run-name", "x", *SHORT, cwd=tmp_path)
    wait_for(process, 50)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == status
    message = re.fullmatch(
        r"train_ae.py: stopped at step (\d+); to go on: python train_ae.py --resume x", error.splitlines()[-1]
    )
    step = int(message[1])
    assert 50 <= step < 400
    assert (tmp_path / "logs" / "x" / "checkpoints" / f"ckpt-{step}.index").exists()
    assert call("--resume", "x", cwd=tmp_path).returncode == 0
    assert_same_run(undisturbed, Finished(tmp_path, "x"))


def test_second_ctrl_c_stops_at_once(tmp_path):
    big = ("--batch-size", 2000, "--steps", 1000, "--dataset", "mnist_5k", "--run-name", "x")  # minutes in each call
    process = start(*big, cwd=tmp_path)
    wait_for(process, 0)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 120 steps with checkpoints at 50, 100 and 120, and what its weights are after 150."""
    folder = tmp_path_factory.mktemp("stopped")
    Run(folder, "x", "--steps", 120, "--checkpoint-every", 50)
    longer = tmp_path_factory.mktemp("longer")
    shutil.copytree(folder, longer, dirs_exist_ok=True)
    assert call("--resume", "x", "--steps", 150, cwd=longer).returncode == 0
    return folder, Finished(longer, "x").weights()


@pytest.fixture
def run(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Finished(tmp_path, "x")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", ["index", "data-00000-of-00001"])
def test_damaged_checkpoint_gives_way_to_the_one_before(damage, part, run, stopped, capsys):
    DAMAGE[damage](run.logs / "checkpoints" / f"ckpt-120.{part}")
    assert main(["--resume", "x", "--steps", "150"]) == 0
    said = capsys.readouterr().out
    assert "ckpt-120 is damaged" in said and "at step 100" in said
    for ours, theirs in zip(run.weights(), stopped[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(scalars(run.logs / "train", "loss")[0], np.arange(150))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_list_of_checkpoints_does_not_matter(damage, run, capsys):
    DAMAGE[damage](run.logs / "checkpoints" / "checkpoint")
    assert main(["--resume", "x", "--steps", "150"]) == 0
    assert "at step 120" in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGE)
def test_all_checkpoints_damaged_is_an_error(damage, run, capsys):
    for path in (run.logs / "checkpoints").glob("ckpt-*"):
        if damage != "missing" or path.suffix == ".index":
            DAMAGE[damage](path)
    assert main(["--resume", "x", "--steps", "150"]) == 1
    assert str(Path("logs", "x", "checkpoints")) in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", bytes(100), b"\xff\xfe", b'{"steps": 0}'])
def test_damaged_config_is_an_error_that_names_it(content, run, capsys):
    (run.logs / "config.json").write_bytes(content)
    assert main(["--resume", "x"]) == 1
    assert str(Path("logs", "x", "config.json")) in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


@pytest.mark.parametrize("key", ["training_images", "seed", "sample_dir"])
def test_config_without_a_key_is_an_error_that_names_both(key, run, capsys):
    config = run.json("config.json")
    del config[key]
    (run.logs / "config.json").write_text(json.dumps(config))
    assert main(["--resume", "x"]) == 1
    error = capsys.readouterr().err
    assert str(Path("logs", "x", "config.json")) in error and key in error and len(error.splitlines()) == 1


def test_finished_run_has_nothing_left_to_do(run, capsys):
    def times():
        return {path: path.stat().st_mtime_ns for path in run.cwd.rglob("*.*") if path.name != ".lock"}

    before = times()
    assert main(["--resume", "x"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert before == times()


def test_resume_takes_steps_and_device_alone(run, capsys):
    for arguments in (["--seed", "1"], ["--batch-size", "1"], ["--log-dir", "logs"], ["--run-name", "y"]):
        assert main(["--resume", "x", *arguments]) == 2
        assert arguments[0] in capsys.readouterr().err
    assert main(["--resume", "x", "--steps", "119"]) == 2
    assert main(["--resume", "none"]) == 2
    assert main(["--resume", "x", "--steps", "130", "--device", "cpu"]) == 0
    assert run.json("metrics.json")["steps"] == run.json("config.json")["steps"] == 130
    assert main(["--resume", "logs/x"]) == 0  # by its folder, too


def test_run_killed_before_its_first_checkpoint_begins_again(undisturbed, tmp_path):
    process = start("--run-name", "x", *SHORT, cwd=tmp_path)
    wait_for(process, 0)
    process.kill()
    process.communicate()
    again = call("--resume", "x", cwd=tmp_path)
    assert again.returncode == 0 and "at step 0" in again.stdout
    assert_same_run(undisturbed, Finished(tmp_path, "x"))


def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--run-name", "x", "--steps", "60", "--checkpoint-every", "50"]) == 0
    config = json.loads((tmp_path / "logs/x/config.json").read_text())
    (tmp_path / "logs/x/config.json").write_text(json.dumps(config | {"learning_rate": 1e9}))
    capsys.readouterr()
    assert main(["--resume", "x", "--steps", "200"]) == 1
    step = int(re.search(r"the loss at step (\d+) is not finite", capsys.readouterr().err)[1])
    assert 60 < step < 100
    assert tf.train.latest_checkpoint(str(tmp_path / "logs/x/checkpoints")).endswith("ckpt-60")


def test_second_process_is_refused_while_the_first_lives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = start("--run-name", "x", "--steps", 10**6, "--dataset", "mnist_5k", cwd=tmp_path)
    wait_for(first, 0)
    assert main(["--resume", "x"]) == 2
    assert "another process" in capsys.readouterr().err
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert main(["--resume", "x", "--steps", "600"]) == 0


@pytest.mark.parametrize("size", ["1m", "3m", "5m", "7m"])
def test_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(size, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        process = call("--run-name", "x", *SHORT, cwd=disk)
        assert process.returncode == 1
        assert "No space left on device" in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        again = call("--resume", "x", cwd=disk)
        assert again.returncode == 0, again.stderr
        assert "damaged" not in again.stdout
        assert_same_run(undisturbed, Finished(disk, "x"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folder_that_goes_away_is_one_line_and_the_run_goes_on_once_it_is_back(undisturbed, tmp_path):
    process = start("--run-name", "x", *SHORT, cwd=tmp_path)
    wait_for(process, 100)
    (tmp_path / "samples").rename(tmp_path / "away")
    (tmp_path / "samples").touch()
    _, error = process.communicate()
    assert process.returncode == 1 and "Traceback" not in error
    assert "samples" in error.splitlines()[-1]
    (tmp_path / "samples").unlink()
    (tmp_path / "away").rename(tmp_path / "samples")
    assert call("--resume", "x", cwd=tmp_path).returncode == 0
    assert_same_run(undisturbed, Finished(tmp_path, "x"))


def test_file_is_written_whole_or_not_at_all(tmp_path):
    def fail(part):
        part.write_text("half")
        raise OSError("no more")

    path = tmp_path / "file.json"
    with pytest.raises(OSError, match="no more"):
        train_ae.write_whole(path, fail)
    assert not list(tmp_path.iterdir())
    train_ae.write_whole(path, lambda part: part.write_text("whole"))
    with pytest.raises(OSError, match="no more"):
        train_ae.write_whole(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"] and path.read_text() == "whole"


def test_memory_does_not_grow_with_the_steps(tmp_path):
    peaks = []
    for steps in (3000, 60_000):
        command = [
            sys.executable,
            "-c",
            PEAK,
            *words("--steps", steps, "--dataset", "mnist_5k", "--run-name", f"x{steps}"),
        ]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        peaks.append(int(process.stdout.split()[-1]))
    assert peaks[1] < 1.05 * peaks[0]


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

NUMBERS = {field.name: field for field in train_ae.dataclasses.fields(Settings) if field.metadata["least"] is not None}


def bad_values(field):
    """Return a strategy for words that a numeric setting must refuse."""
    least, kind = field.metadata["least"], train_ae.value_type(field)
    words = strategies.text("abcxyz.,e+ ", min_size=1).filter(lambda word: not is_number(word, kind))
    below = strategies.integers(max_value=0 if least > 0 else -1)
    above = strategies.integers(min_value=field.metadata["most"] + 1)
    number = strategies.one_of(below, above, strategies.sampled_from([float("nan"), float("inf"), -float("inf")]))
    broken = strategies.floats(0.5, 1e6).filter(lambda x: not x.is_integer()) if kind is int else below
    return strategies.one_of(words, number.map(str), broken.map(str))


def is_number(word, kind):
    try:
        kind(word)
    except ValueError:
        return False
    return True


@given(
    strategies.sampled_from(sorted(NUMBERS)).flatmap(
        lambda n: strategies.tuples(strategies.just(n), bad_values(NUMBERS[n]))
    )
)
@example(("steps", "0"))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hundred_bad_command_lines_are_refused(tmp_path, capsys, drawn):
    name, value = drawn
    os.chdir(tmp_path)
    try:
        status = main([f"--{name.replace('_', '-')}={value}"])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and not said.out
    assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def spoil(kind, folder):
    """Prepare a small MNIST in a data folder, and spoil it."""
    prepare(folder, "mnist", "3.0.1", train=20, test=12)
    version = folder / "mnist" / "3.0.1"
    if kind == "another set":
        (folder / "fashion_mnist").mkdir()
        version.rename(folder / "fashion_mnist" / "3.0.1")
    elif kind == "no images":
        for path in version.glob("*tfrecord*"):
            path.unlink()
    else:
        path = next(version.glob({"info": "dataset_info.json", "images": "*test*tfrecord*"}[kind]))
        path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("kind", ["another set", "no images", "info", "images"])
def test_spoilt_data_folder_is_one_line(kind, tmp_path, monkeypatch, capsys):
    spoil(kind, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    name = "fashion_mnist" if kind == "another set" else "mnist"
    assert main(["--dataset", name, "--data-dir", "data", "--steps", "4001"]) in (1, 2)
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    assert "mnist" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_empty_data_folder_falls_back_to_the_shipped_digits(tmp_path, monkeypatch, capsys):
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert len(train_ae.load_data(Settings(steps=4001, data_dir=str(tmp_path))).train) == 4000
    assert "4,000 digits shipped" in capsys.readouterr().out


def test_run_is_resumed_from_within_its_folder_and_refused_where_its_pictures_are_not(run, monkeypatch, capsys):
    elsewhere = run.cwd / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["--resume", "../logs/x", "--steps", "150"]) == 2
    assert "pictures" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    monkeypatch.chdir(run.logs)
    assert main(["--resume", "."]) == 2  # the run is found; its pictures are elsewhere from here
    assert "pictures" in capsys.readouterr().err
    monkeypatch.chdir(run.cwd)
    (run.samples / "step_00000.png").unlink()
    assert main(["--resume", "x", "--steps", "150"]) == 0
    assert (run.samples / "summary.png").exists() and (run.samples / "step_00150.png").exists()


def test_ctrl_c_during_the_imports_gives_no_traceback(tmp_path):
    process = start("--run-name", "x", cwd=tmp_path)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in error


def test_settings_take_paths(tmp_path):
    folders = {"log_dir": tmp_path / "l", "sample_dir": tmp_path / "s"}
    train_ae.train(Settings(steps=2, run_name="x", **folders))
    assert json.loads((tmp_path / "l/x/config.json").read_text())["log_dir"] == str(tmp_path / "l")
