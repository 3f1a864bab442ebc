"""The command line: its help, its errors, its progress bar, and where it finds itself run."""

import ast
import dataclasses
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies
from runs import (
    ROOT,
    Finished,
    Run,
    assert_same_run,
    call,
    call_here,
    environment,
    made,
    said,
    start,
    wait_for,
    words,
)

import train_ae
from train_ae import Settings, SettingsError

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
NUMBERS = {name: field for name, field in FIELDS.items() if field.metadata["range"][0] is not None}


def flag(name):
    return "--" + name.replace("_", "-")


def test_help_gives_every_setting_with_its_default(capsys):
    assert call_here("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    shown = text[text.index("options:") :]
    assert re.findall(r" (--[a-z-]+) [^-]", shown)[1:] == [flag(name) for name in FIELDS]
    for name, field in FIELDS.items():
        words = re.search(rf"{flag(name)} (.+?)(?= --|$)", shown)[1]
        assert field.metadata["help"] in words
        if field.default is not False:
            assert re.search(rf"\(default: {re.escape(str(field.default)) or '[^()]+'}\)$", words), name
    assert "{constant,cosine}" in shown


BAD = [
    *(
        f"--{name} {value}"
        for name in ("steps", "batch-size", "sample-every", "checkpoint-every")
        for value in ("0", "-1", "1.5", "nan", "x", "''", "99999999999999999999")
    ),
    *(f"--learning-rate {value}" for value in ("0", "-0.1", "nan", "inf", "-inf", "x", "1e-10")),
    *(f"--seed {value}" for value in ("-1", "0.5", "x", "99999999999")),
    *(f"--depth {value}" for value in ("0", "5", "x")),
    *(f"--{name} {value}" for name in ("latent-dim", "image-size") for value in ("-1", "4097", "x")),
    "--pretrain-steps -1",
    "--schedule linear",
    "--tied yes",
    *(f"--run-name {name}" for name in ("a/b", "../a", "/tmp/a", ".", "..", "a\\ b", "x" * 101, "'x\n'", "é", "-x")),
    "--dataset no_such_set",
    "--dataset mnist_5k --batch-size 4001",
    "--no-such-option 1",
    "--step 5",
    "--steps",
    "surplus",
    "'two\nlines'",
    "--steps 'two\nlines'",
    "--dataset 'two\nlines'",
]


@pytest.mark.parametrize("arguments", BAD)
def test_bad_call_is_refused_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert call_here(*shlex.split(arguments)) == 2
    text = capsys.readouterr()
    assert not text.out
    assert len(text.err.splitlines()) == 1 and len(text.err) > 20
    assert not list(tmp_path.iterdir())  # nothing was begun


def bad_values(field):
    """Return a strategy for words that a numeric setting must refuse."""
    (least, most), kind = field.metadata["range"], type(field.default)
    words = strategies.text("abcxyz.,e+ \n", min_size=1).filter(lambda word: not is_number(word, kind))
    below = strategies.integers(max_value=0 if least > 0 else -1)
    above = strategies.integers(min_value=most + 1)
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
        lambda name: strategies.tuples(strategies.just(name), bad_values(NUMBERS[name]))
    )
)
@example(("steps", "0"))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hundred_bad_command_lines_are_refused(tmp_path, capsys, drawn):
    name, value = drawn
    assert call_here(f"{flag(name)}={value}", "--log-dir", tmp_path / "l", "--sample-dir", tmp_path / "s") == 2
    text = capsys.readouterr()
    assert not text.out
    assert len(text.err.splitlines()) == 1 and flag(name) in text.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": "5"},
        {"steps": 1.5},
        {"steps": 5.0},
        {"steps": True},
        {"steps": np.float32(5)},
        {"steps": np.array([1, 2])},
        {"batch_size": None},
        {"learning_rate": float("nan")},
        {"learning_rate": "0.1"},
        {"learning_rate": True},
        {"learning_rate": 1j},
        {"schedule": "Cosine"},
        {"schedule": None},
        {"tied": "no"},
        {"tied": 1},
        {"tied": None},
        {"run_name": 5},
        {"run_name": "a/b"},
        {"run_name": None},
        {"run_name": b"x"},
        {"log_dir": None},
        {"dataset": ["mnist"]},
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_python_too(bad):
    with pytest.raises(SettingsError, match=flag(*bad)):
        Settings(**bad)


def test_settings_take_paths_and_numpys_numbers(tmp_path):
    given = Settings(
        steps=np.int64(7), seed=np.uint8(3), learning_rate=np.float64(0.5), log_dir=tmp_path, run_name=Path("x")
    )
    assert given == Settings(steps=7, seed=3, learning_rate=0.5, log_dir=str(tmp_path), run_name="x")
    kinds = {name: type(value) for name, value in vars(given).items()}
    assert kinds == {name: type(field.default) for name, field in FIELDS.items()}
    assert Settings(learning_rate=1).learning_rate == 1


def test_unnamed_runs_have_names_of_their_own_that_tell_the_time():
    names = [Settings().run_name for _ in range(100)]
    assert len(set(names)) == 100 and names == sorted(names)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}", name) for name in names)


def test_bad_call_of_the_script_is_one_line_with_its_name(tmp_path):
    process = call("--steps", 0, cwd=tmp_path)
    assert process.returncode == 2 and not process.stdout
    assert said(process) == ["train_ae.py: --steps must be int from 1 to 2147483647, not 0"]


@pytest.mark.parametrize("option", ["--log-dir", "--sample-dir"])
def test_folder_that_cannot_be_made_is_refused_and_none_is_left_behind(option, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert call_here(*tiny, option, Path("file", "deeper"), "--run-name", "x") == 2
    error = capsys.readouterr().err
    assert str(Path("file", "deeper", "x")) in error and "Not a directory" in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_bug_shows_its_traceback(tiny, tmp_path, monkeypatch):
    def broken(*_):
        raise AttributeError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_ae, "compute_metrics", broken)
    with pytest.raises(AttributeError, match="a bug"):
        call_here(*tiny, "--steps", 1)


# --- where it is run ---
class Terminal:
    """Standard output on a terminal of some rows and columns, for the time of a `with`; then what it showed."""

    def __init__(self, monkeypatch, rows, columns):
        pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        self.monkeypatch, self.text = monkeypatch, b""
        self.reader = threading.Thread(target=self.read)

    def read(self):
        try:
            while block := os.read(self.ours, 65536):
                self.text += block
        except OSError:  # Linux's way to say that the other side has closed
            pass

    def __enter__(self):
        self.reader.start()
        stream = os.fdopen(self.theirs, "w")
        self.monkeypatch.setattr(sys, "stdout", stream)
        self.monkeypatch.setattr(sys, "__stdout__", stream)  # the one of which shutil asks the size
        for name in ("COLUMNS", "LINES"):
            self.monkeypatch.delenv(name, raising=False)
        return self

    def __exit__(self, *_):
        sys.stdout.close()
        self.monkeypatch.undo()
        self.reader.join()
        os.close(self.ours)

    def lines(self):
        """Return what each line and each state of the bar showed, without colors."""
        return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.text.decode()))


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (0, 0), (24, 20)])
def test_terminal_of_any_size_shows_one_bar_and_no_plain_lines(rows, columns, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Terminal(monkeypatch, rows, columns) as terminal:
        arguments = [*tiny, "--steps", "120", "--log-dir", str(tmp_path / "l"), "--sample-dir", str(tmp_path / "s")]
        assert call_here(*arguments, "--run-name", "bar") == 0
    lines = terminal.lines()
    assert not any(line.startswith("step ") for line in lines)
    begin = next(place for place, line in enumerate(lines) if line.startswith("view")) + 1
    bars = lines[begin : lines.index(next(line for line in lines if line.startswith("test_loss ")))]
    assert bars[0].startswith("  0%|") and bars[-1].startswith("100%|")
    assert max(map(len, bars)) <= (columns or 80)
    if columns != 20:
        assert re.search(r" 120/120 \[.*loss \d\.\d{4}  test loss \d\.\d{4}", bars[-1])


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """A run with nothing special about it."""
    return made(tmp_path_factory, "plain", ["--run-name", "x", *tiny, "--steps", 60])


def test_what_a_user_has_set_for_other_programs_changes_nothing(plain, tiny, tmp_path):
    home = tmp_path / "home"
    (home / ".keras").mkdir(parents=True)
    (home / ".keras" / "keras.json").write_text(
        '{"floatx": "float64", "image_data_format": "channels_first", "backend": "jax"}'
    )
    (home / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 31\naxes.facecolor: red\n")
    environment = {"HOME": str(home), "KERAS_HOME": str(home / ".keras"), "MATPLOTLIBRC": str(home / "matplotlibrc")}
    environment |= {"MPLBACKEND": "nonsense", "KERAS_BACKEND": "torch", "COLUMNS": "0"}
    other = Run(tmp_path, "x", *tiny, "--steps", 60, env=environment)
    assert_same_run(plain, other)
    assert said(other.process) == []


def test_closed_output_changes_nothing(plain, tiny, tmp_path):
    command = shlex.join(words("--run-name", "x", *tiny, "--steps", 60)) + " >&-"
    options = {"cwd": tmp_path, "env": environment({}), "stderr": subprocess.PIPE, "text": True}
    process = subprocess.run(["sh", "-c", command], **options)
    assert (process.returncode, said(process)) == (0, [])
    assert_same_run(plain, Finished(tmp_path, "x"))


def test_script_needs_neither_its_docstrings_nor_asserts(tiny, tmp_path, monkeypatch, capsys):
    """As `python -OO` leaves it."""
    module = types.ModuleType("bare")
    module.__file__ = train_ae.__file__
    monkeypatch.setitem(sys.modules, "bare", module)
    monkeypatch.chdir(tmp_path)
    source = Path(train_ae.__file__).read_text()
    exec(compile(source, train_ae.__file__, "exec", optimize=2), vars(module))
    assert module.__doc__ is None and module.main.__doc__ is None
    assert module.main(["--run-name", "x", *tiny, "--steps", "3"]) == 0
    assert (tmp_path / "logs" / "x" / "metrics.json").is_file()
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert "--learning-rate" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_is_full_is_one_line_and_status_1(tiny, tmp_path):
    with Path("/dev/full").open("w") as full:
        command = words("--run-name", "x", *tiny, "--steps", 60)
        options = {"cwd": tmp_path, "env": environment({}), "stdout": full, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.run(command, **options)
    assert process.returncode == 1
    assert len(said(process)) == 1 and said(process)[0].startswith("train_ae.py: ")


# --- signals before training has begun ---
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_the_imports_ends_it_without_a_traceback(number, tmp_path):
    (tmp_path / "filelock.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    with start("--run-name", "x", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}) as process:
        wait_for(process, "importing")
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (-number, "")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") in ([], ["__pycache__"])


def test_download_that_stalls_ends_at_the_first_ctrl_c(tmp_path):
    """A proxy that answers whether there is anything, and then never sends it."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), address)
        environment |= {"no_proxy": "", "NO_PROXY": ""}
        arguments = ("--dataset", "kmnist", "--data-dir", tmp_path / "data", "--run-name", "x")
        with start(*arguments, cwd=tmp_path, env=environment) as process:
            proxy.settimeout(120)
            asked = []
            while not asked or not asked[-1].startswith(b"GET "):
                connection, _ = proxy.accept()
                asked.append(connection.recv(4096))
                if asked[-1].startswith(b"HEAD "):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=30)
            connection.close()
    assert process.returncode == -signal.SIGINT and "Traceback" not in error
    assert not (tmp_path / "logs").exists()


# --- other systems ---
def test_nothing_is_used_that_only_posix_has():
    """Windows lacks these; there, a use of one would be an AttributeError."""
    tree = ast.parse((ROOT / "train_ae.py").read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "curses"}
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert {name for name in used if name.startswith("signal.")} <= {
        "signal.SIGINT", "signal.SIGTERM", "signal.SIG_DFL", "signal.SIG_IGN", "signal.signal", "signal.getsignal",
    }  # fmt: skip
    assert {name for name in used if name.startswith("os.")} <= {"os.environ", "os.PathLike", "os.path", "os.cpu_count"}
    assert {name for name in used if name.startswith("time.")} <= {"time.perf_counter", "time.strftime", "time.time"}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"symlink_to", "hardlink_to", "chmod", "owner", "fork", "set_blocking", "getloadavg"}
