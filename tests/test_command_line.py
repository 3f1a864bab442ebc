"""The command line: its help, its errors, its progress bar."""

import dataclasses
import fcntl
import os
import platform
import pty
import re
import shlex
import struct
import sys
import termios

import keras
import pytest
import tensorflow as tf
from conftest import call, words

from train_ae import Settings, SettingsError, main, train


def test_help_gives_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        default = "[^()]+" if field.default is None else re.escape(str(field.default))
        shown = rf"{flag} [^ ]+ [^()]+ \(default: {default}\)" if field.type is not bool else rf"{flag} [^()]+"
        assert re.search(shown, text), flag


BAD = [
    *(
        f"--{name} {value}"
        for name in ("steps", "batch-size", "sample-every")
        for value in ("0", "-1", "1.5", "nan", "x")
    ),
    *(f"--learning-rate {value}" for value in ("0", "-0.1", "nan", "inf", "-inf", "x")),
    *(f"--seed {value}" for value in ("-1", "0.5", "x", "99999999999")),
    "--steps 99999999999999999999",
    "--device tpu",
    "--device ''",
    *(f"--run-name {name}" for name in ("a/b", "../a", "/tmp/a", ".", "..", "''", "a\\ b", "x" * 101)),
    "--dataset no_such_set",
    "--dataset mnist_5k --batch-size 4001",
    "--no-such-option 1",
    "--step 5",
    "--steps",
    "surplus",
]


@pytest.mark.parametrize("arguments", BAD)
def test_bad_call_is_refused_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(shlex.split(arguments))
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    assert not said.out
    assert len(said.err.splitlines()) == 1 and len(said.err) > 20
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    "bad", [{"steps": "5"}, {"steps": 1.5}, {"batch_size": None}, {"learning_rate": float("nan")}, {"run_name": "a/b"}]
)
def test_bad_settings_are_refused_in_python_too(bad):
    with pytest.raises(SettingsError):
        Settings(**bad)


def test_bad_call_of_the_script_ends_with_status_2_and_no_traceback(tmp_path):
    process = call("--steps", 0, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("train_ae.py: ")
    assert "Traceback" not in process.stderr


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU here")
def test_absent_gpu_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no GPU"):
        train(Settings(device="gpu", log_dir=str(tmp_path), sample_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_cpu_can_be_asked_for(tmp_path):
    process = call("--device", "cpu", "--steps", 1, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[:2] == ["device", "CPU"]


@pytest.mark.parametrize("option", ["--log-dir", "--sample-dir"])
def test_folder_that_cannot_be_written_is_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([option, "file", "--run-name", "x"]) == 2
    error = capsys.readouterr().err
    assert "file/x" in error and "Not a directory" in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@pytest.mark.parametrize("taken", ["logs", "samples"])
def test_name_that_exists_is_refused(taken, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / taken / "x").mkdir(parents=True)
    assert main(["--run-name", "x"]) == 2
    assert f"{taken}/x" in (error := capsys.readouterr().err) and "a run named x" in error
    assert list(tmp_path.rglob("x")) == [tmp_path / taken / "x"]


def test_failed_run_ends_with_status_1_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert main(["--dataset", "kmnist", "--data-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "kmnist" in said.err


def test_terminal_shows_one_progress_bar(tmp_path):
    """A terminal gets a bar with losses and ms a step, and none of the plain lines."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.execv(sys.executable, words("--steps", 120, "--run-name", "bar"))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    shown = b""
    try:
        while block := os.read(terminal, 65536):
            shown += block
    except OSError:  # Linux's way to say that the other side has closed
        pass
    assert os.waitpid(pid, 0)[1] == 0
    assert re.search(rb"\r120/120 [^\r\n]+, loss 0\.\d{4}  test loss 0\.\d{4}  \d+\.\d\d ms a step, 00:00 left", shown)
    assert b"\x1b[32m" in shown  # green
    plain = re.sub(r"\x1b\[\d*m", "", shown.decode())
    assert max(len(line) for line in re.split(r"[\r\n]", plain) if "120 |" in line) <= 80
    assert b"\nstep " not in shown


def test_version_names_what_a_bug_report_needs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name, version in {
        "Python": platform.python_version(),
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
    }.items():
        assert f"{name} {version}" in said


def test_start_is_silent_and_verbose_brings_the_noise_back(tmp_path):
    quiet, verbose = (
        call("--steps", 2, *more, cwd=tmp_path, env={"TF_CPP_MIN_LOG_LEVEL": "0"} if more else {})
        for more in ((), ("--verbose",))
    )
    assert (quiet.returncode, quiet.stderr, verbose.returncode) == (0, "", 0)
    assert "cpu_feature_guard" in verbose.stderr or "oneDNN" in verbose.stderr or "cuda" in verbose.stderr
    assert quiet.stdout.splitlines()[0].startswith("device") and "\x1b" not in quiet.stdout


def test_missing_package_is_not_silenced(tmp_path):
    (tmp_path / "filelock.py").write_text("raise ImportError('no filelock here')")
    process = call("--steps", 2, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert process.returncode == 1 and "no filelock here" in process.stderr
