"""The command line and Settings: what is refused, help, and what surroundings leave as it is."""

import itertools
import re
from pathlib import Path

import helpers
import numpy as np
import pytest
from pydantic import ValidationError

from train_ae import Settings, parse_arguments

OPTIONS = {"--" + name.replace("_", "-"): field for name, field in Settings.model_fields.items()}
DEFAULTS = {
    option: str(field.default)
    for option, field in OPTIONS.items()
    if option != "--tied" and field.default_factory is None and field.default is not None
}

# Options | values that each of them must refuse | what has to be said of it
BAD_VALUES = """\
--steps --batch-size --sample-every --checkpoint-every --depth | 0 -1 | or equal to 1
--steps --seed --latent-dim | 1.5 nan x 1e3 | valid integer
--steps --image-size | 99999999999999999999 | equal to 2147483647
--seed --latent-dim --image-size --noise | -1 | or equal to 0
--learning-rate | 0 -0.1 | greater than 0
--learning-rate --noise | nan inf -inf | finite
--depth | 5 | or equal to 4
--schedule | linear | 'constant' or 'cosine'
--initializer | he | 'article' or 'glorot'
--log-dir --sample-dir --data-dir --weights | gs://x/y | not a URL
--run-name | a/b ../a . .x -x é x: | not starting with"""
# Other words that must be refused, and what has to be said of them.
BAD_WORDS = {
    "--steps=": "valid integer",
    "--dataset=": "at least 1 character",
    "--steps": "--steps: expected one argument",
    "--tied=yes": "--tied",
    "--step=5": "unrecognized arguments: --step=5",
    "--run-name=a b": "letters, digits",
    "--run-name=x\n": "letters, digits",
    "--run-name=" + 101 * "x": "letters, digits",
    "--steps=two\nlines": "valid integer",
    "two\nlines": "unrecognized arguments: two lines",
}


def list_bad_words():
    """Yield words that must be refused, and what has to be said of them."""
    yield from BAD_WORDS.items()
    for line in BAD_VALUES.splitlines():
        options, values, reason = line.split(" | ")
        for option, value in itertools.product(options.split(), values.split()):
            yield f"{option}={value}", reason


@pytest.mark.parametrize(("word", "reason"), list(list_bad_words()))
def test_bad_word_is_refused_in_one_line(word, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([word])
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert re.split("[=\n]", word)[0] in line
    assert reason in line


@pytest.fixture
def start(tmp_path):
    """A function that runs the script until it imports TensorFlow, which here says the choice of
    oneDNN and ends the process.
    """
    (tmp_path / "tensorflow.py").write_text(
        "import os; print(os.environ['TF_ENABLE_ONEDNN_OPTS']); raise SystemExit"
    )

    def run(*words, **more):
        surroundings = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        process = helpers.call(*words, cwd=tmp_path, **surroundings, **more)
        assert [path.name for path in tmp_path.iterdir()] == ["tensorflow.py"]
        return process

    return run


def test_script_refuses_before_it_imports_tensorflow(start):
    process = start("--steps=0")
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("train_ae.py: ")


def test_large_steps_turn_onednn_on_unless_the_user_has_chosen(start):
    """Pictures count as 64x64 where --image-size does not tell."""
    rule = {
        "": "0",
        "--batch-size 52": "1",
        "--batch-size 51 --dataset mnist": "0",
        "--batch-size 9 --dataset x": "0",
        "--batch-size 10 --dataset x": "1",
        "--image-size 200": "0",
        "--image-size 201": "1",
    }
    for options, chosen in rule.items():
        assert start(*options.split()).stdout.split() == [chosen], options
    assert start("--batch-size=52", TF_ENABLE_ONEDNN_OPTS="0").stdout == "0\n"


def test_a_program_may_import_tensorflow_first_and_keeps_its_matplotlib(tiny, tmp_path):
    (tmp_path / "own.py").write_text("""
import sys, matplotlib, tensorflow
matplotlib.rcParams.update({"backend": "svg", "lines.linewidth": 7})
before = dict(matplotlib.rcParams)
import train_ae
train_ae.main(train_ae.parse_arguments())
sys.exit(matplotlib.rcParams != before)
""")
    quiet = {"PYTHONPATH": str(helpers.ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    words = [*tiny, "--run-name=x", "--steps=1"]
    process = helpers.call(*words, script=tmp_path / "own.py", cwd=tmp_path, **quiet)
    assert (process.returncode, helpers.said(process.stderr)) == (0, [])
    assert helpers.Finished(tmp_path).json("config")["machine"]["onednn"] == "default"


def test_help_gives_every_option_with_its_default_before_tensorflow(start):
    """Also where Python has dropped the docstrings."""
    process = start("--help", PYTHONOPTIMIZE="2", COLUMNS="100")
    assert (process.returncode, process.stderr) == (0, "")
    *_, options = process.stdout.split("\n\n")
    _, *entries = re.split(r"\n  (?=--)", options)
    for option, entry in zip(OPTIONS, entries, strict=True):
        text = " ".join(entry.split())
        assert text.startswith(option)
        if option not in ("--tied", "--weights"):
            assert text.count("(default: ") == 1, option
            assert f"(default: {DEFAULTS.get(option, '')}" in text, option


def test_settings_take_paths_and_text(tmp_path):
    names = "dataset weights data_dir log_dir sample_dir"
    paths = {name: tmp_path / name for name in names.split()}
    found = Settings(**paths)
    texts = {name: str(path) for name, path in paths.items()}
    assert found == Settings(**texts, run_name=found.run_name)
    assert Settings(log_dir="~/x").log_dir == Path.home() / "x"
    assert Settings(dataset="~/x").dataset == str(Path.home() / "x")
    assert Settings(sample_dir="~nobody-has-this-name/x").sample_dir.name == "x"


@pytest.mark.parametrize("name", ["no_such_name", "dataset", "log_dir"])
def test_bad_argument_is_a_validation_error(name):
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: 5})


def test_what_a_user_has_set_for_other_programs_changes_nothing(default_run, tmp_path):
    (tmp_path / "keras.json").write_text(
        '{"floatx": "float16", "image_data_format": "channels_first", "backend": "torch"}'
    )
    (tmp_path / "matplotlibrc").write_text("nonsense\ntext.usetex: True\nfigure.facecolor: red\n")
    process = helpers.call(
        "--run-name=x",
        "--steps=50",
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
