"""Runs that are damaged, starved and diverge: each ends in one line or goes on, and none is lost."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from events import scalars
from PIL import Image
from runs import Finished, assert_same_run, assert_same_weights, call_here, made

import train_ae

SHORT = ["--run-name", "x", "--steps", "120", "--checkpoint-every", "50"]
LONGER = [*SHORT, "--steps", "150"]
DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": lambda path: path.write_bytes(flip(path.read_bytes())),
}


def flip(content):
    """Return bytes with one bit of their middle turned over."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """A run of 120 steps with checkpoints at 50, 100 and 120."""
    return made(tmp_path_factory, "whole", [*tiny, *SHORT])


@pytest.fixture(scope="session")
def longer(tiny, tmp_path_factory):
    return made(tmp_path_factory, "longer_150", [*tiny, *LONGER])


@pytest.fixture
def run(whole, tmp_path, monkeypatch):
    """A copy of the whole run, in the working folder."""
    shutil.copytree(whole.cwd, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Finished(tmp_path, "x")


def one_line(capsys):
    text = capsys.readouterr()
    assert len(text.err.splitlines()) == 1 and "Traceback" not in text.out
    return text.err


# --- damage ---
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_gives_way_to_the_one_before(damage, run, longer, tiny, capsys):
    path = Path("logs", "x", "checkpoints", "step_00000120.npz")
    DAMAGE[damage](path)
    assert call_here(*tiny, *LONGER) == 0
    text = capsys.readouterr()
    (line,) = (line for line in text.out.splitlines() if line.startswith("damaged"))
    assert str(path) in line and not text.err
    assert re.findall(r"^step +(\d+) ", text.out, re.MULTILINE) == ["100", "150"]
    assert_same_weights(run, longer)
    np.testing.assert_array_equal(scalars(run.logs / "train"), scalars(longer.logs / "train"))


def test_checkpoint_of_another_model_gives_way_too(run, longer, tiny, capsys):
    folder = Path("logs", "x", "checkpoints")
    with np.load(folder / "step_00000120.npz") as file:
        arrays = [file[name] for name in file.files]
    np.savez(folder / "step_00000120.npz", *arrays[:-1])
    with np.load(folder / "step_00000100.npz") as file:
        arrays = [file[name] for name in file.files]
    np.savez(folder / "step_00000100.npz", *[array[:1] if array.ndim else array for array in arrays])
    assert call_here(*tiny, *LONGER) == 0
    assert len(re.findall("^damaged ", capsys.readouterr().out, re.MULTILINE)) == 2
    assert_same_weights(run, longer)


@pytest.mark.parametrize("damage", DAMAGE)
def test_all_checkpoints_damaged_is_one_line(damage, run, tiny, capsys):
    for path in (run.logs / "checkpoints").glob("step_*"):
        DAMAGE[damage](path)
    assert call_here(*tiny, *LONGER) == 1
    assert str(Path("logs", "x", "checkpoints")) in one_line(capsys)


def test_no_checkpoints_at_all_is_a_run_that_begins_anew(run, longer, tiny):
    for path in (run.logs / "checkpoints").glob("step_*"):
        path.unlink()
    assert call_here(*tiny, *LONGER) == 0
    assert_same_weights(run, longer)


LACKING = [b'{"steps": 120}', b'{"steps": "120"}', b'{"seed": 0, "steps": 1}']


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"5", b"null", bytes(100), b"\xff\xfe", *LACKING])
def test_damaged_config_is_one_line_that_names_it(content, run, tiny, capsys):
    path = Path("logs", "x", "config.json")
    path.write_bytes(content)
    assert call_here(*tiny, *LONGER) == 2
    assert str(path) in one_line(capsys)
    assert path.read_bytes() == content


def test_checkpoints_without_their_config_are_not_resumed_under_other_settings(run, tiny, capsys):
    path = Path("logs", "x", "config.json")
    path.unlink()
    before = sorted(run.cwd.rglob("*"))
    assert call_here(*tiny, *LONGER, "--learning-rate", 0.1) == 2
    assert str(path) in one_line(capsys) and sorted(run.cwd.rglob("*")) == before


@pytest.mark.parametrize("value", [None, "many", [], -1])
@pytest.mark.parametrize("name", ["training_images", "steps", "learning_rate"])
def test_config_with_a_value_that_cannot_be_is_one_line_that_names_it(name, value, run, tiny, capsys):
    config = run.json("config.json")
    (run.logs / "config.json").write_text(json.dumps(config | {name: value}))
    assert call_here(*tiny, *LONGER) == 2
    error = one_line(capsys)
    assert str(Path("logs", "x")) in error and ("config.json" in error or name in error)


@pytest.mark.parametrize("content", [b"", b"[]", bytes(100), b'{"steps": 120}'])
def test_damaged_metrics_are_made_anew(content, run, whole, tiny):
    (run.logs / "metrics.json").write_bytes(content)
    assert call_here(*tiny, *SHORT) == 0
    assert_same_run(run, whole)


EVENTS = [("train", damage) for damage in ("cut short", "zeroed", "one bit", "missing")]


@pytest.mark.parametrize(("kind", "damage"), [*EVENTS, ("test", "one bit"), ("test", "empty")])
def test_damaged_events_are_one_line_and_the_summary_is_drawn(damage, kind, run, tiny, capsys):
    (path,) = (run.logs / kind).glob("events.*")
    (DAMAGE | {"missing": Path.unlink})[damage](path)
    (run.samples / "summary.png").unlink()
    capsys.readouterr()
    assert call_here(*tiny, *LONGER) == 0
    text = capsys.readouterr()
    lines = [line for line in text.out.splitlines() if "lacks" in line]
    if kind == "train":
        (line,) = lines
        number = int(re.search(r"lacks ([\d,]+) losses", line)[1])
        assert str(Path("logs", "x", "train")) in line and "summary.png" in line
        assert number == 120 if damage in ("missing", "empty", "zeroed") else 0 < number < 120
    assert not text.err
    Image.open(run.samples / "summary.png").verify()
    steps, _ = scalars(run.logs / "train")
    assert set(range(120, 150)) <= set(steps)


def test_missing_pictures_are_no_obstacle(run, tiny):
    shutil.rmtree(run.samples)
    assert call_here(*tiny, *LONGER) == 0
    assert {"summary.png", "latents.png", "training.gif", "step_00150.png"} <= {
        path.name for path in run.samples.iterdir()
    }


# --- what is not finite ---
def finite(folder):
    """Assert that a run's checkpoints are finite, and that no file of numbers holds what is not."""
    for path in (folder / "checkpoints").glob("*.npz"):
        with np.load(path) as file:
            assert all(np.isfinite(file[name]).all() for name in file.files), path
    for path in folder.glob("*.json"):
        assert not re.search("NaN|Infinity", path.read_text()), path


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_run_that_diverges_ends_in_one_line_whichever_update_does_it(
    steps, pictures, tmp_path, monkeypatch, capsys, recwarn
):
    monkeypatch.chdir(tmp_path)
    # so wide a step that four layers overflow after it
    arguments = ["--dataset", str(pictures), "--run-name", "x", "--learning-rate", "2e9", "--checkpoint-every", "1"]
    assert call_here(*arguments, "--steps", steps) == 1
    assert "not finite" in (line := one_line(capsys)) and "--learning-rate" in line
    finite(tmp_path / "logs" / "x")
    assert not (tmp_path / "logs" / "x" / "metrics.json").exists()
    assert not list(recwarn)  # of NumPy, which has them for what is not finite


def test_loss_that_is_not_finite_leaves_the_last_good_checkpoint(run, tiny, monkeypatch, capsys):
    kept = train_ae.make_train_steps

    def make(*arguments):
        train = kept(*arguments)

        def steps(first, last):
            losses = train(first, last)
            return losses * (np.nan if first <= 140 < last else 1)

        return steps

    before = sorted((run.logs / "checkpoints").iterdir())
    metrics = (run.logs / "metrics.json").read_bytes()
    monkeypatch.setattr(train_ae, "make_train_steps", make)
    assert call_here(*tiny, *LONGER) == 1
    assert "not finite" in one_line(capsys)
    assert sorted((run.logs / "checkpoints").iterdir()) == before
    assert (run.logs / "metrics.json").read_bytes() == metrics


@pytest.mark.parametrize("kind", ["weights", "moments"])
def test_weights_that_are_not_finite_after_the_last_update_are_not_saved(kind, run, tiny, monkeypatch, capsys):
    kept = train_ae.make_train_steps

    def make(phase, *others):
        train = kept(phase, *others)

        def steps(first, last):
            losses = train(first, last)
            if last == 150:  # the loss is that before the update
                variable = (phase.model.trainable_variables if kind == "weights" else phase.optimizer.variables)[-1]
                variable.assign(variable * np.nan)
            return losses

        return steps

    before = sorted((run.logs / "checkpoints").iterdir())
    monkeypatch.setattr(train_ae, "make_train_steps", make)
    assert call_here(*tiny, *LONGER) == 1
    assert "not finite" in (line := one_line(capsys)) and "--learning-rate" in line
    assert sorted((run.logs / "checkpoints").iterdir()) == before
    finite(run.logs)


# --- disks and folders ---
@pytest.mark.parametrize("part", [0.02, 0.4, 0.9])
def test_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(part, whole, tiny, tmp_path, monkeypatch, capsys):
    needed = sum(path.stat().st_size for path in whole.cwd.rglob("*") if path.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(part * needed)}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        monkeypatch.chdir(disk)
        assert call_here(*tiny, *SHORT) == 1
        assert "no space left on device" in one_line(capsys)
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert call_here(*tiny, *SHORT) == 0
        text = capsys.readouterr()
        assert "damaged" not in text.out and not text.err
        assert_same_run(whole, Finished(disk, "x"))
    finally:
        monkeypatch.chdir(tmp_path)
        gc.collect()
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def when(monkeypatch, step, what):
    """Have `what()` done just before the picture of a step is written."""
    kept = train_ae.Record.log_test

    def log_test(record, now):
        if now == step:
            what()
        return kept(record, now)

    monkeypatch.setattr(train_ae.Record, "log_test", log_test)


@pytest.mark.parametrize("folder", ["samples", "logs"])
def test_folder_that_goes_away_is_one_line_and_the_run_goes_on_once_it_is_back(
    folder, whole, tiny, tmp_path, monkeypatch, capsys
):
    def go_away():
        Path(folder).rename("away")
        Path(folder).touch()

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        when(patch, 100, go_away)
        assert call_here(*tiny, *SHORT) == 1
    assert folder in one_line(capsys)
    Path(folder).unlink()
    Path("away").rename(folder)
    assert call_here(*tiny, *SHORT) == 0
    assert_same_run(whole, Finished(tmp_path, "x"))


def test_file_is_written_whole_or_not_at_all(tmp_path):
    def fail(part):
        part.write_text("half")
        raise OSError("no more")

    path = tmp_path / "file.json"
    with pytest.raises(OSError, match="no more"):
        train_ae.write_atomically(path, fail)
    assert not path.exists()
    train_ae.write_atomically(path, lambda part: part.write_text("whole"))
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]
    with pytest.raises(OSError, match=re.escape(str(path))):
        train_ae.write_atomically(path, fail)
    assert path.read_text() == "whole"


def test_stop_leaves_nothing_that_a_kill_right_after_it_would_lose(tiny, tmp_path, monkeypatch):
    """What TensorBoard shows is on the disk before the checkpoint that says that it need not be computed again."""
    kept, arguments = train_ae.write_atomically, [*tiny, *SHORT, "--sample-every", "33"]
    stopped, folders = [], [tmp_path / name for name in ("alone", "stopped", "killed")]

    def write(path, save):
        kept(path, save)
        if path.suffix == ".npz" and stopped:
            shutil.copytree(folders[1], folders[2])

    def stop():
        stopped.append(True)
        raise KeyboardInterrupt(signal.SIGINT)

    for folder in folders[:2]:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    assert call_here(*arguments) == 0
    monkeypatch.chdir(folders[1])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train_ae.py"])
        patch.setattr(train_ae, "write_atomically", write)
        when(patch, 99, stop)
        assert call_here(*arguments) == 130
    monkeypatch.chdir(folders[2])
    assert call_here(*arguments) == 0
    assert_same_run(Finished(folders[0], "x"), Finished(folders[2], "x"))


# --- memory ---
def test_memory_does_not_grow_with_the_steps(tiny, tmp_path, monkeypatch):
    """Between 2,000 steps and 5,000, too little stays for a loss of each step, or an object of each stretch of 50.

    A loss in a list takes 32 bytes. TensorFlow itself keeps a few bytes a step: it remembers scalars that it was given.
    """
    kept, sizes, counts = train_ae.Record.log_test, {}, {}

    def log_test(record, step):
        loss = kept(record, step)
        gc.collect()
        sizes[step] = tracemalloc.get_traced_memory()[0]
        counts[step] = len(gc.get_objects())
        return loss

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_ae.Record, "log_test", log_test)
    with Path(os.devnull).open("w") as nowhere:  # where pytest would keep what is printed
        monkeypatch.setattr(sys, "stdout", nowhere)
        tracemalloc.start()
        try:
            often = ["--sample-every", "1000", "--checkpoint-every", "1000", "--run-name", "x"]
            assert call_here(*tiny, *often, "--steps", "5000") == 0
        finally:
            tracemalloc.stop()
            monkeypatch.undo()
    print(sizes, counts)
    assert sizes[5000] - sizes[2000] < 12 * 3000
    assert counts[5000] - counts[2000] < 30  # one a stretch would be 60
