"""Whole runs: the default command, the reference run, other ways to start it, and edits."""

import cProfile
import re
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest

import train_ae

README = (helpers.ROOT / "README.md").read_text()
REFERENCE = helpers.Finished(helpers.ROOT, "reference")


def reconstruct(model, images):
    """Return what a model makes of uint8 images, and the images in [0, 1]."""
    inputs = images / np.float32(255)
    return np.asarray(model(inputs)), inputs


# --------------------------------------------------------------------------------------------------
# The default run


def test_default_run_reaches_the_test_loss_that_the_readme_promises(default_run, digits):
    outputs, images = reconstruct(default_run.model(), digits["x_test"])
    loss = np.square(outputs - images).sum(axis=-1).mean()
    assert default_run.json("metrics")["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert f"test loss {loss:.4f}" == "test loss 0.0144"
    assert "test loss 0.0144" in README


def test_default_run_trains_one_image_a_step_at_the_articles_rate(default_run):
    config = default_run.json("config")
    settings = {
        "batch_size": 1,
        "learning_rate": 0.001,
        "initializer": "article",
    }
    machine = {"onednn": "0", "threads": 1}
    for section, chosen in [("settings", settings), ("machine", machine)]:
        assert config[section] == config[section] | chosen


def test_first_lines_are_those_of_the_readme(default_run):
    block = re.search("```\n(device .*?)…\n(.*?)```", README, re.DOTALL)
    expected = re.sub(r"\d{4}-\d\d-\d\d_[\d_-]+", "x", block[1] + block[2])
    printed = default_run.output.splitlines(keepends=True)
    lines = [line for line in printed if not line.startswith("step ")]
    assert "".join(lines) == expected


def test_another_process_and_length_give_the_same_bits(default_run, short_run):
    first = default_run.losses()[:120]
    np.testing.assert_array_equal(short_run.losses(), first)


def test_another_seed_gives_another_run(short_run, run_here):
    other = run_here("--steps", 20, "--seed", 1)
    first = short_run.losses()[:20]
    assert not np.isclose(other.losses(), first).any()


def test_train_returns_what_it_writes(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as pythonw has it
    settings = train_ae.Settings(
        dataset=tiny[1],
        depth=1,
        steps=10,
        run_name="x",
        log_dir=tmp_path / "logs",
        sample_dir=tmp_path / "samples",
    )
    metrics = train_ae.train(settings)
    assert metrics == helpers.Finished(tmp_path).json("metrics")
    assert " ".join(metrics) == "test_loss mean_image_loss squared_error psnr steps seconds"


def test_a_finished_run_is_finished_again_with_the_same_numbers(short_run, run_here):
    first = run_here("--steps", 120)
    (first.logs / "metrics.json").unlink()
    (first.samples / "summary.png").unlink()
    helpers.assert_same_run(run_here("--steps", 120), short_run)


# --------------------------------------------------------------------------------------------------
# The run that comes with the repository


def test_reference_run_is_the_default_run(default_run):
    ours = REFERENCE.json("metrics")
    theirs = default_run.json("metrics")
    for name in ("test_loss", "squared_error", "psnr"):
        # Other processors round otherwise, which 3,000 steps amplify.
        assert ours[name] == pytest.approx(theirs[name], rel=0.02)
    charts = helpers.shown(REFERENCE.logs)
    steps = {
        ("train", "loss"): range(3000),
        ("preview", "reconstructions"): range(0, 3001, 50),
    }
    for tag, expected in steps.items():
        assert [step for step, _ in charts[tag]] == [*expected]
    for path in REFERENCE.samples.glob("step_*.png"):
        picture = REFERENCE.picture(path.name).astype(float)
        difference = picture - default_run.picture(path.name)
        assert np.abs(difference).mean() < 2


def test_reference_run_says_nothing_of_the_machine_that_made_it():
    config = REFERENCE.json("config")["settings"]
    own = {"run_name": "reference", "log_dir": "logs", "sample_dir": "samples"}
    assert config == config | own


# --------------------------------------------------------------------------------------------------
# Other ways to start, and what becomes of the model


def test_a_profiler_runs_the_script(tiny, tmp_path):
    words = [helpers.SCRIPT, *tiny, "--steps=2"]
    job = helpers.Job(tmp_path, *words, script=cProfile.__file__)
    status, errors, output = job.end()
    assert (status, errors) == (0, [])
    assert re.search("^model .*\n +[0-9]+ function calls", output, re.MULTILINE)


def test_ipython_runs_the_script_and_keeps_its_signals(tiny, tmp_path):
    ipython = pytest.importorskip("IPython", reason="IPython is not installed")
    line = " ".join(["%run", str(helpers.SCRIPT), *tiny, "--steps=2"])
    code = "import signal; print(signal.getsignal(signal.SIGINT).__name__)"
    (tmp_path / "x.ipy").write_text(f"{line}\n{code}")
    script = Path(ipython.__file__).with_name("__main__.py")
    job = helpers.Job(tmp_path, "x.ipy", script=script, IPYTHONDIR=str(tmp_path))
    status, errors, output = job.end()
    assert (status, errors) == (0, [])
    assert output.endswith("autoencoder.keras\ndefault_int_handler\n")


def test_saved_model_opens_without_the_script(short_run, tmp_path):
    code = "import sys, keras; keras.models.load_model(sys.argv[1])"
    words = [sys.executable, "-c", code, short_run.logs / "autoencoder.keras"]
    assert subprocess.run(words, cwd=tmp_path).returncode == 0


def test_readmes_loop_compares_runs(tiny, tmp_path, monkeypatch, capsys):
    code = re.search("```python\n(import train_ae\n\nfor .*?)```", README, re.DOTALL)[1]
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(code.replace("steps=1000", "steps=2"))
    printed = re.findall("rate-.*-depth-.: test loss 0[.].*", capsys.readouterr().out)
    assert len(printed) == 6


# --------------------------------------------------------------------------------------------------
# Edits

LATENT = "    features_shape = hidden.shape[1:]\n"
FOLLOWED = "    hidden = layers.{}({})(hidden)\n" + LATENT
OBJECTIVE = "tf.reduce_mean(tf.reduce_sum(tf.square(outputs - images), axis=-1))"
FILTERS = "FILTERS = (16, 32, 64, 128)"
EDITS = {  # what is replaced, and by what
    "absolute error": (OBJECTIVE, re.search("```python\nreturn (.*)", README)[1]),
    "other filters": (FILTERS, re.search("```python\n(FILTERS .*)", README)[1]),
    "batch normalization": (LATENT, FOLLOWED.format("BatchNormalization", "")),
    "dropout": (LATENT, FOLLOWED.format("Dropout", "0.5")),
}


def expected_loss(name, images, outputs):
    """Return the loss that an edited script minimizes."""
    error = outputs - images
    error = np.abs(error) if name == "absolute error" else np.square(error)
    return error.sum(axis=-1).mean()


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_script_trains_with_everything_on_and_resumes(name, tmp_path, digits):
    script = helpers.edited_copy(tmp_path / "copy", *EDITS[name])

    def run(name, steps):
        words = f"--tied --latent-dim 5 --sample-every 10 --run-name {name} --steps {steps}"
        job = helpers.Job(tmp_path, *words.split(), script=script)
        status, errors, _ = job.end()
        assert (status, errors) == (0, [])
        return helpers.Finished(tmp_path, name)

    before = run("x", 10).model()
    resumed = run("x", 20)
    helpers.assert_same_run(resumed, run("whole", 20))
    model = resumed.model()
    outputs, images = reconstruct(model, digits["x_test"])
    loss = expected_loss(name, images, outputs)
    assert resumed.json("metrics")["test_loss"] == pytest.approx(loss, rel=1e-4)
    for old, new in zip(before.variables, model.variables, strict=True):
        assert not np.array_equal(old, new), new.path
