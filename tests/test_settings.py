"""The command line and Settings: what is refused, help, and what surroundings leave as it is."""

import itertools
import re
import shlex
import sys
import types
from pathlib import Path

import helpers
import matplotlib
import numpy as np
import pytest

from train_ae import Settings, parse_arguments

OPTIONS = {"--" + name.replace("_", "-"): field for name, field in Settings.model_fields.items()}
FLAGS = [option for option, field in OPTIONS.items() if field.annotation is bool]
DEFAULTS = {
    option: str(field.default)
    for option, field in OPTIONS.items()
    if option not in FLAGS and field.default_factory is None and field.default is not None
}

# Options, values that each of them must refuse, and what has to be said of it.
BAD_VALUES = [
    ("--steps --batch-size --sample-every --checkpoint-every", "0 -1", "or equal to 1"),
    ("--steps --seed --latent-dim", "1.5 nan x 1e3", "valid integer"),
    ("--steps --image-size", "99999999999999999999", "equal to 2147483647"),
    ("--seed --latent-dim --image-size --pretrain-steps --noise", "-1", "or equal to 0"),
    ("--learning-rate", "0 -0.1", "greater than 0"),
    ("--learning-rate --noise", "nan inf -inf", "finite"),
    ("--depth", "0", "or equal to 1"),
    ("--depth", "5", "or equal to 4"),
    ("--schedule", "linear", "'constant' or 'cosine'"),
    ("--initializer", "he", "'article' or 'glorot'"),
    ("--run-name", "a/b ../a . .x -x é x: " + 101 * "x", "not starting with"),
]
# Other words that must be refused, and what has to be said of them.
BAD_WORDS = {
    "--steps=": "valid integer",
    "--dataset=": "at least 1 character",
    "--steps": "--steps: expected one argument",
    "--tied=yes": "--tied",
    "--step=5": "unrecognized arguments: --step=5",
    "--no-such-option": "unrecognized arguments: --no-such-option",
    "surplus": "unrecognized arguments: surplus",
    "--run-name=a b": "letters, digits",
    "--run-name=x\n": "letters, digits",
    "--steps=two\nlines": "valid integer",
    "two\nlines": "unrecognized arguments: two lines",
}


def list_bad_words():
    """Yield words that must be refused, and what has to be said of them."""
    yield from BAD_WORDS.items()
    for options, values, reason in BAD_VALUES:
        for option, value in itertools.product(options.split(), values.split()):
            yield f"{option}={value}", reason


@pytest.mark.parametrize(("word", "reason"), list(list_bad_words()))
def test_bad_word_is_refused_in_one_line(word, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([word])
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("train_ae.py: ")
    assert re.split("[=\n]", word)[0] in line
    assert reason in line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def without_tensorflow(tmp_path):
    """A function that runs the script where TensorFlow cannot be imported, and under -OO."""
    (tmp_path / "tensorflow.py").write_text("raise ImportError")

    def run(*words):
        surroundings = {"PYTHONPATH": str(tmp_path), "PYTHONOPTIMIZE": "2", "COLUMNS": "100"}
        process = helpers.call(*words, cwd=tmp_path, **surroundings)
        assert [path.name for path in tmp_path.iterdir()] == ["tensorflow.py"]
        return process

    return run


@pytest.mark.parametrize("word", ["--steps=0", "--run-name=-x", "two\nlines"])
def test_script_refuses_before_it_imports_tensorflow(word, without_tensorflow):
    process = without_tensorflow(word)
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("train_ae.py: ")


def test_help_gives_every_option_with_its_default_before_tensorflow(without_tensorflow):
    process = without_tensorflow("--help")
    assert (process.returncode, process.stderr) == (0, "")
    *_, opening, options, example = process.stdout.split("\n\n")
    assert re.fullmatch("Train a convolutional autoencoder .*[.]", opening)
    words = shlex.split(example)
    assert words[:3] == ["example:", "python", "train_ae.py"]
    assert parse_arguments(words[3:]).image_size == 64
    entries = [entry.split() for entry in re.split(r"\n  (?=--)", options)[1:]]
    assert [entry[0] for entry in entries] == list(OPTIONS)
    for option, *text in entries:
        text = " ".join(text)
        if option not in FLAGS:
            assert text.count("(default: ") == 1, option
            assert f"(default: {DEFAULTS.get(option, '')}" in text, option
            assert "Undefined" not in text, option


def test_readme_gives_every_option_with_its_default():
    text = (helpers.ROOT / "README.md").read_text()
    _, table = text.split("| option | default | meaning |\n")
    found = {}
    for row in table.split("\n\n")[0].splitlines()[1:]:
        _, names, defaults, _ = row.replace("`", "").split("|", 3)
        found |= zip(names.strip().split(", "), defaults.strip().split(", "), strict=True)
    assert found.keys() == OPTIONS.keys()
    assert found == found | DEFAULTS


def test_settings_take_paths_and_refuse_unknown_names(tmp_path):
    paths = {name: tmp_path / name for name in ("dataset", "data_dir", "log_dir", "sample_dir")}
    found = Settings(**paths)
    texts = {name: str(path) for name, path in paths.items()}
    assert found == Settings(**texts, run_name=found.run_name)
    assert found.log_dir == paths["log_dir"]
    assert Settings(log_dir="~/x").log_dir == Path.home() / "x"
    assert Settings(dataset="~/x").dataset == str(Path.home() / "x")
    assert Settings(sample_dir="~nobody-has-this-name/x").sample_dir.name == "x"
    with pytest.raises(ValueError, match="no_such_name"):
        Settings(no_such_name=1)


def test_import_and_run_leave_matplotlib_alone_and_need_no_docstrings(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 7)
    before = dict(matplotlib.rcParams)
    module = types.ModuleType("train_ae")
    module.__file__ = str(helpers.SCRIPT)
    monkeypatch.setitem(sys.modules, "train_ae", module)
    # As `python -OO` compiles it.
    code = compile(helpers.SCRIPT.read_text(), helpers.SCRIPT, "exec", optimize=2)
    exec(code, vars(module))
    assert module.main.__doc__ is None
    assert module.main(module.parse_arguments([*tiny, "--run-name=x", "--steps=3"])) == 0
    assert helpers.Finished(tmp_path).json("metrics")["steps"] == 3
    assert dict(matplotlib.rcParams) == before


def test_what_is_printed_before_a_failure_reaches_a_pipe(tmp_path):
    for name in ("train", "test", "other"):
        (tmp_path / "set" / name).mkdir(parents=True)
    process = helpers.call("--dataset", "set", cwd=tmp_path, PYTHONUNBUFFERED="")
    assert process.returncode == 2
    assert process.stdout == "splits   train and test; not used: other\n"
    assert "no pictures in set" in process.stderr


def test_what_a_user_has_set_for_other_programs_changes_nothing(default_run, tmp_path):
    (tmp_path / "keras.json").write_text(
        '{"floatx": "float16", "image_data_format": "channels_first", "backend": "torch"}'
    )
    (tmp_path / "matplotlibrc").write_text("nonsense\ntext.usetex: True\nfigure.facecolor: red\n")
    process = helpers.call(
        *("--run-name=x", "--steps=50"),
        cwd=tmp_path,
        KERAS_HOME=str(tmp_path),
        KERAS_BACKEND="jax",
        MATPLOTLIBRC=str(tmp_path / "matplotlibrc"),
        MPLBACKEND="nonsense",
    )
    assert process.returncode == 0, process.stderr
    run = helpers.Finished(tmp_path)
    np.testing.assert_array_equal(run.losses(), default_run.losses()[:50])
    assert run.picture("summary.png")[0, 0].tolist() == [255, 255, 255, 255]
