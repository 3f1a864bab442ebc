"""Resuming: kills, signals, faults and damage, and what a resumed run refuses or says."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    Finished,
    Job,
    assert_same_run,
    at_file,
    call,
    edited_copy,
    here,
    said,
    send,
)

from train_ae import Settings

SHORT = shlex.split("--run-name x --steps 100 --checkpoint-every 30")
LONGER = shlex.split("--run-name x --steps 150 --checkpoint-every 30")
LONG = shlex.split("--run-name x --steps 600 --checkpoint-every 200 --sample-every 600")
# All that makes a part of a run's state: several phases, tied kernels, noise, a rate that falls.
EVERYTHING = shlex.split(
    "--run-name x --steps 130 --checkpoint-every 60 --batch-size 7 --pretrain-steps 70 --tied"
    " --latent-dim 5 --noise 0.2 --schedule cosine"
)

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals, and no limits")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full and /proc")


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """A function that returns the run of these arguments, made once and left alone."""

    @cache
    def make(*arguments):
        job = Job(tmp_path_factory.mktemp("alone"), *tiny, *arguments)
        assert job.end()[:2] == (0, [])
        return Finished(job.folder)

    return make


@pytest.fixture
def run(alone, tmp_path, monkeypatch):
    """A copy of the short run, in the working folder."""
    shutil.copytree(alone(*SHORT).cwd, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Finished(tmp_path)


@pytest.fixture
def job(tiny, tmp_path):
    """A function that runs the script in the test's folder to its end."""
    return lambda *words, **options: Job(tmp_path, *tiny, *words, **options).end()


@pytest.fixture
def finish(job, alone, tmp_path):
    """A function that asserts that a run ends as if left alone; returns the output."""

    def finish(*arguments):
        status, errors, output = job(*arguments)
        assert (status, errors) == (0, [])
        assert_same_run(Finished(tmp_path), alone(*arguments))
        return output

    return finish


@pytest.fixture
def refuse(capsys):
    """A function that asserts that a run ends with a status and a line with these words."""

    def refuse(status, *words, arguments):
        before = bytes_in(Path.cwd())
        capsys.readouterr()
        assert here(*arguments) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert all(word in line for word in ("train_ae.py: ", *words)), line
        assert bytes_in(Path.cwd()) == before

    return refuse


def bytes_in(folder):
    """Return the content of all files below a folder, but for the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in paths}


def warnings(output, *words):
    """Return the warnings that have these words in them."""
    lines = [line for line in output.splitlines() if line.startswith("warning ")]
    for word in words:
        lines = [line for line in lines if word in line]
    return lines


def checkpoints(run):
    """Return the paths of a run's checkpoints, and their steps."""
    paths = sorted(run.logs.glob("checkpoints/step_*.npz"))
    return paths, [int(path.stem.removeprefix("step_")) for path in paths]


# --------------------------------------------------------------------------------------------------
# Kills and signals


# A file, the signals that come before it gets its name, and the status: one after the other in one
# run. The third leaves pretraining half done, and the fourth training. Once training is over, a
# signal ends the process at once.
STOPS = [
    ("config.json", "KILL", -9),
    ("step_*00060.npz", "KILL", -9),
    ("step_*00070.npz", "INT TERM INT", 130),
    ("step_00000.png", "TERM INT", 143),
    ("step_00050.png", "KILL", -9),
    ("step_*00270.npz", "KILL", -9),
    ("autoencoder.keras", "INT INT", -2),
    ("training.gif", "KILL", -9),
    ("metrics.json", "TERM", -15),
]


@posix
def test_stopped_at_every_file_a_run_ends_as_if_left_alone(job, finish, tiny, tmp_path):
    for file, names, status in STOPS:
        stop = partial(at_file, file, partial(send, names))
        found, errors, output = job(*EVERYTHING, before=stop)
        assert (file, found) == (file, status)
        assert errors == []
        assert ("repeat the command with --run-name x" in output) == (status in (130, 143))
        assert not (tmp_path / "logs" / "x" / "metrics.json").exists()
    assert "resumes  after step 270 of 270" in finish(*EVERYTHING)


def stop_unread():
    """Have a signal come when nobody reads standard error any more, as with `2>&1 | tee`."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    at_file("step_*00200.npz", partial(send, "INT"))


@posix
def test_stopped_though_nobody_reads_it(job, finish):
    assert job(*LONG, before=stop_unread)[:2] == (130, [])
    finish(*LONG)


@posix
@pytest.mark.stress
@pytest.mark.parametrize("turn", range(3))
def test_stopped_at_random_moments_too(turn, alone, tiny, tmp_path):
    seed = random.SystemRandom().randrange(10**9)
    print("seed", seed)
    draws = random.Random(seed)
    status = None
    while status != 0:
        job = Job(tmp_path, *tiny, *EVERYTHING)
        job.process.join(draws.uniform(0.5, 2.5))
        draws.choice([job.process.kill, job.process.terminate])()
        status, errors, _ = job.end()
        assert status in (0, -9, 143, -15)  # -15 before and after training
        assert errors == []
    assert_same_run(Finished(tmp_path), alone(*EVERYTHING))


IMPORT = """
import os, signal, time
for name in "{}".split():
    os.kill(os.getpid(), signal.Signals["SIG" + name])
    time.sleep(0.02)
time.sleep(60)
"""


@posix
@pytest.mark.parametrize(("names", "status"), [("INT", -2), ("TERM", -15)])
def test_signals_during_the_imports_end_the_process_at_once(names, status, tmp_path):
    (tmp_path / "keras.py").write_text(IMPORT.format(names))  # found before the real one
    process = call("--run-name", "x", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (process.returncode, said(process.stderr)) == (status, [])
    assert not (tmp_path / "logs").exists()


@posix
def test_a_process_that_trains_keeps_others_off_and_says_how_to_resume(
    alone, tiny, tmp_path, monkeypatch, refuse
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny[1], "it's a folder")  # which a shell would take apart
    arguments = ["--dataset", "it's a folder", *tiny[2:], *LONG[2:]]
    trains = Job(tmp_path, *arguments)
    trains.wait_for("step      0")
    os.kill(trains.process.pid, signal.SIGSTOP)
    (logs,) = Path("logs").iterdir()
    same = [*arguments, "--run-name", logs.name]
    refuse(2, "another process", str(logs), arguments=same)
    os.kill(trains.process.pid, signal.SIGTERM)
    os.kill(trains.process.pid, signal.SIGCONT)
    status, _, output = trains.end()
    assert status == 143
    assert f"to resume, repeat the command with --run-name {logs.name}\n" in output
    status, _, output = Job(tmp_path, *same).end()
    assert status == 0
    assert re.search("resumes  after step [1-5]00? of 600", output)
    assert_same_run(Finished(tmp_path, logs.name), alone(*LONG))


# --------------------------------------------------------------------------------------------------
# The same command, and others


def test_steps_may_grow_and_pictures_may_move(run, job, alone, tiny):
    assert checkpoints(run)[1] == [60, 90, 100]
    shutil.copytree(tiny[1], "elsewhere")
    assert "resumes  after step 100 of 150" in job(*LONGER, "--dataset", "elsewhere")[2]
    assert_same_run(run, alone(*LONGER))


OTHER = [
    "--steps 99",
    "--batch-size 2",
    "--learning-rate 0.002",
    "--schedule cosine",
    "--depth 2",
    "--latent-dim 3",
    "--tied",
    "--pretrain-steps 1",
    "--noise 0.1",
    "--initializer article",
    "--sample-every 51",
    "--checkpoint-every 31",
    "--seed 1",
    "--image-size 8",
]
PLACES = {"run_name", "log_dir", "sample_dir", "data_dir", "dataset"}


def test_other_settings_are_refused(run, tiny, refuse):
    names = [words.split()[0].removeprefix("--").replace("-", "_") for words in OTHER]
    assert {*names} == Settings.model_fields.keys() - PLACES
    for name, words in zip(names, OTHER, strict=True):
        arguments = [*tiny, *SHORT, *words.split()]
        refuse(2, "logs/x", f" {name} ", "--run-name", arguments=arguments)


def test_steps_of_a_rate_that_falls_may_not_grow(tiny, run_here, refuse):
    arguments = [*tiny, *shlex.split("--run-name x --schedule cosine --steps")]
    run_here(*arguments, 20)
    refuse(2, " steps 20,", arguments=[*arguments, 30])


def test_other_images_or_labels_are_refused(run_here, refuse):
    draws = np.random.default_rng(0)
    arrays = {"y_train": np.arange(20) % 2, "y_test": np.arange(10) % 2}
    arrays["x_train"] = draws.integers(0, 256, (20, 4, 4))
    arrays["x_test"] = draws.integers(0, 256, (10, 4, 4))
    np.savez("a.npz", **arrays)
    arguments = shlex.split("--run-name x --depth 1 --steps 1 --dataset a.npz")
    run_here(*arguments)
    others = {"x_train": "training images", "x_test": "test images", "y_test": "labels"}
    for name, what in others.items():
        np.savez("a.npz", **arrays | {name: arrays[name][::-1]})
        refuse(2, f"checksum of {what}", "logs/x", arguments=arguments)


def test_other_versions_are_said(run, finish, alone):
    now = run.json("config")
    names = [
        "checksum of the script",
        "devices",
        "keras",
        "onednn",
        "replicas",
        "tensorflow",
        "threads",
    ]
    other = {name: f"other {name}" for name in names}
    (run.logs / "config.json").write_text(json.dumps(now | other))
    output = finish(*LONGER)
    for name in names:
        assert len(warnings(output, f" {name} ", other[name], str(now[name]))) == 1
    assert run.json("config") == alone(*LONGER).json("config")


LOSS = "    return squared_error_per_pixel(images, outputs)\n"
NEW = ("    tied: bool", '    sharp: int = 1\n    """new"""\n    tied: bool')
EDITS = [
    (LOSS, "    return tf.reduce_mean(tf.abs(images - outputs))\n", [], 0, [" script "]),
    ("= (16, 32,", "= (8, 32,", [], 2, [" FILTERS ", "[16, 32,", "[8, 32,"]),
    (*NEW, [], 0, [" script "]),
    (*NEW, ["--sharp", "2"], 2, [" sharp ", " 1, ", " 2"]),
]


@pytest.mark.parametrize(("old", "new", "more", "status", "words"), EDITS)
def test_an_edited_script_says_what_differs(old, new, more, status, words, run, job):
    script = edited_copy(run.cwd / "edited", (old, new))
    before = bytes_in(run.logs)
    found, errors, output = job(*LONGER, *more, script=script)
    assert (found, len(errors)) == (status, status // 2)
    text = output + "".join(errors)
    assert all(word in text for word in words)
    assert (bytes_in(run.logs) == before) == (status == 2)


def test_a_run_begun_anew_has_no_pictures_of_the_one_before(run, job):
    shutil.rmtree("logs")
    half = ["--steps", "50"]
    assert job(*SHORT, *half)[:2] == job(*SHORT, *half, "--run-name", "y")[:2] == (0, [])
    for name in ("training.gif", "summary.png"):
        assert (run.samples / name).read_bytes() == Path("samples/y", name).read_bytes()


def test_pictures_of_a_finished_run_may_go_elsewhere(run, job):
    status, errors, output = job(*SHORT, "--sample-dir", "elsewhere")
    assert (status, errors) == (0, [])
    for step in ("00000", "00050", "00100"):
        missing = f"training.gif is made without elsewhere/x/step_{step}.png"
        assert len(warnings(output, missing)) == 1
    assert [path.name for path in Path("elsewhere/x").iterdir()] == ["summary.png"]


# --------------------------------------------------------------------------------------------------
# Damage

DAMAGE = {
    "cut short": lambda content: content[: len(content) // 3],
    "one bit": lambda content: content[:999] + bytes([content[999] ^ 16]) + content[1000:],
    "zeros": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "no zip": lambda content: b"Not a checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_gives_way_to_the_one_before(damage, run, finish):
    path = checkpoints(run)[0][-1]
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    output = finish(*LONGER)
    assert warnings(output, str(path.relative_to(run.cwd)))
    assert "resumes  after step 90 of 150" in output


BEYOND_REPAIR = [
    ("checkpoints/*", b"", 1),
    ("config.json", None, 2),
    ("config.json", b"", 2),
    ("config.json", b"5", 2),
    ("config.json", b"\xff", 2),
    ("config.json", b"[" * 10**5, 2),
    ("config.json", b'{"a":' * 10**5, 2),
]


@pytest.mark.parametrize(("pattern", "content", "status"), BEYOND_REPAIR)
def test_damage_beyond_repair_is_one_line(pattern, content, status, run, tiny, refuse):
    for path in run.logs.glob(pattern):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    named = "logs/x/config.json, " if status == 2 else "logs/x "
    refuse(status, named, "another --run-name", arguments=[*tiny, *LONGER])


def test_files_that_are_not_the_runs_own_are_left_alone(run, job, alone):
    first, *_ = checkpoints(run)[0]
    strays = [run.samples / "step_x.png", run.samples / "step_00050 (copy).png"]
    strays += [first.with_stem(f"{first.stem} (copy)"), first.with_stem("step_99999999")]
    strays += [first.with_name(f".part-{first.name}"), run.logs / "train" / "notes"]
    for path in strays:
        shutil.copy(first, path)
    cut, lost = (run.samples / f"step_{step:05}.png" for step in (50, 0))
    cut.write_bytes(cut.read_bytes()[:99])
    lost.unlink()
    status, errors, output = job(*LONGER)
    assert (status, errors) == (0, [])
    for path in (cut, lost):
        assert warnings(output, str(path.relative_to(run.cwd)))
    assert "resumes  after step 100 of 150" in output
    content = strays[0].read_bytes()
    for path in strays:
        assert path.read_bytes() == content, path
        path.unlink()
    for name in (cut.name, lost.name, "training.gif"):
        shutil.copy(alone(*LONGER).samples / name, run.samples)
    assert_same_run(run, alone(*LONGER))


@pytest.mark.parametrize("rate", ["1e18", "1e25", "1e39"])  # after some steps, two, and one
def test_what_is_not_finite_leaves_the_last_good_checkpoint(rate, job, tmp_path):
    status, errors, _ = job(*SHORT, "--learning-rate", rate, "--checkpoint-every", "1")
    (line,) = errors
    assert (status, "--learning-rate" in line) == (1, True)
    last = int(re.search(r"not finite by step (\d+)", line)[1])
    paths, steps = checkpoints(Finished(tmp_path))
    # The loss of a preview can overflow before the weights do: then the last step has been saved.
    assert steps in ([*range(1, last)][-3:], [*range(1, last + 1)][-3:])
    for path in paths:
        with np.load(path) as arrays:
            assert all(np.isfinite(arrays[name]).all() for name in arrays)


# --------------------------------------------------------------------------------------------------
# Disks, folders, memory


FILES = """
    logs/x/config.json samples/x/step_00000.png logs/x/checkpoints/step_000000000400.npz
    logs/x/autoencoder.keras samples/x/training.gif
"""


@linux
def test_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(job, finish, tmp_path):
    for name in shlex.split(FILES):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".part-{path.name}").symlink_to("/dev/full")
        status, (line,), _ = job(*LONG)
        assert status == 1
        assert line.lower().endswith(f"{name} cannot be written: no space left on device")
    finish(*LONG)


def limit_files(size):
    """Let no file of this process become larger."""
    import resource  # which Windows has not

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@posix
def test_full_disk_for_tensorboards_files_too(job, finish):
    status, lines, _ = job(*LONG, before=partial(limit_files, 22_000))  # no other is as large
    assert status == 1
    assert len([line for line in lines if line.startswith("train_ae.py: ")]) == 1
    assert not any("Traceback" in line for line in lines)
    finish(*LONG)


def take_away(folder):
    """Put a file where a folder was."""
    Path(folder).rename("away")
    Path(folder).touch()


@pytest.mark.parametrize("name", ["samples", "logs"])
def test_folder_that_goes_away_is_one_line(name, job, finish, tmp_path):
    before = partial(at_file, "step_*00400.npz", partial(take_away, name))
    status, (line,), _ = job(*LONG, before=before)
    assert status == 1
    assert name in line
    (tmp_path / name).unlink()
    (tmp_path / "away").rename(tmp_path / name)
    finish(*LONG)


def stop_and_take_away():
    """Have a signal come while a folder goes away."""
    send("INT")
    take_away("logs")


@posix
def test_signal_does_not_hide_that_the_run_could_not_be_saved(job):
    status, (line,), _ = job(*LONG, before=partial(at_file, "step_*00400.npz", stop_and_take_away))
    assert status == 1
    assert "logs" in line


def note_memory():
    """Add the pages of memory that this process holds to a file."""
    with Path("pages").open("a") as file:
        file.write(Path("/proc/self/statm").read_text().split()[1] + "\n")


@linux
@pytest.mark.stress
def test_memory_does_not_grow_with_the_steps(job, tmp_path):
    words = shlex.split("--sample-every 20000 --checkpoint-every 1000 --steps 100000")
    assert job(*words, before=partial(at_file, "step_*.png", note_memory))[0] == 0
    pages = [int(line) for line in (tmp_path / "pages").read_text().split()]
    print(pages)
    assert (pages[-1] - pages[1]) * 4096 < 80_000 * 50  # a loss in a list takes 32 bytes
