"""Whole runs: the default command, the reference run, the README's code, and edits."""

import importlib.util
import json
import re

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf

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
    assert "test loss 0.0144" in default_run.output
    assert "test loss 0.0144" in README


def test_default_run_trains_one_image_a_step_at_the_articles_rate(default_run):
    config = default_run.json("config")
    chosen = {"steps": 3000, "batch_size": 1, "learning_rate": 0.001, "sample_every": 50}
    assert chosen.items() <= config.items()
    assert config["initializer"] == "article"
    assert len(default_run.losses()) == 3000
    assert len(list(default_run.samples.glob("step_*.png"))) == 61


def test_first_lines_are_those_of_the_readme(default_run):
    block = README.split("```\ndevice")[1].split("```")[0]
    dated = re.sub(r"\d{4}-\d\d-\d\d_[\d_-]+", "x", f"device{block}").splitlines()
    printed = [line for line in default_run.output.splitlines() if not line.startswith("step ")]
    assert printed == [line for line in dated if line != "…"]


def test_same_command_gives_the_same_bits(default_run, run_here):
    again = run_here("--steps", 300)
    np.testing.assert_array_equal(again.losses(), default_run.losses()[:300])
    for step in (0, 150, 300):
        name = f"step_{step:05}.png"
        assert (again.samples / name).read_bytes() == (default_run.samples / name).read_bytes()


def test_another_seed_gives_another_run(short_run, run_here):
    other = run_here("--steps", 20, "--seed", 1)
    assert not np.isclose(other.losses(), short_run.losses()[:20]).any()


def test_train_returns_what_it_writes(tmp_path, tiny):
    folders = {"log_dir": tmp_path / "logs", "sample_dir": tmp_path / "samples"}
    settings = train_ae.Settings(dataset=tiny[1], depth=1, steps=10, run_name="x", **folders)
    metrics = train_ae.train(settings)
    assert metrics == helpers.Finished(tmp_path).json("metrics")
    assert metrics.keys() == {"test_loss", "squared_error", "psnr", "steps", "seconds"}
    assert metrics["steps"] == 10


def test_a_finished_run_is_finished_again_with_the_same_numbers(short_run, run_here):
    first = run_here("--steps", 120)
    before = first.json("metrics")
    (first.logs / "metrics.json").unlink()
    (first.samples / "summary.png").unlink()
    again = run_here("--steps", 120)
    assert again.json("metrics") | {"seconds": 0} == before | {"seconds": 0}
    helpers.assert_same_run(again, short_run)


# --------------------------------------------------------------------------------------------------
# The run that comes with the repository


def test_reference_run_is_the_default_run(default_run):
    ours, theirs = REFERENCE.json("metrics"), default_run.json("metrics")
    for name in ("test_loss", "squared_error", "psnr"):
        # Other processors round otherwise, which 3,000 steps amplify.
        assert ours[name] == pytest.approx(theirs[name], rel=0.02)
    assert ours["steps"] == theirs["steps"] == 3000
    shown = helpers.shown(REFERENCE.logs)
    assert [step for step, _ in shown["train", "loss"]] == [*range(3000)]
    assert [step for step, _ in shown["preview", "reconstructions"]] == [*range(0, 3001, 50)]
    for path in REFERENCE.samples.glob("step_*.png"):
        difference = REFERENCE.picture(path.name) - default_run.picture(path.name).astype(float)
        assert np.abs(difference).mean() < 2


def test_reference_run_says_nothing_of_the_machine_that_made_it():
    config = REFERENCE.json("config")
    assert config["run_name"] == "reference"
    assert (config["log_dir"], config["sample_dir"]) == ("logs", "samples")


# --------------------------------------------------------------------------------------------------
# The README's code, and edits


def test_readmes_code_reconstructs_a_picture(tmp_path, run_here):
    code = README.split("```python\nimport keras")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 9
    draws = np.random.default_rng(0)
    for index in range(12):
        image = draws.integers(0, 256, (64, 64, 3))
        helpers.save_picture(tmp_path / "my-pictures" / f"{index}.png", image)
    helpers.save_picture(tmp_path / "my-pictures" / "one.png", image)
    run = run_here("--dataset", "my-pictures", "--steps", 3, name="RUN")
    names = {}
    exec("import keras" + code, names)
    outputs, _ = reconstruct(run.model(), image[None].astype(np.uint8))
    with train_ae.Image.open(tmp_path / "reconstruction.png") as picture:
        np.testing.assert_allclose(np.asarray(picture), outputs[0].clip(0, 1) * 255, atol=1.01)
    assert names["latents"].shape == (1, 4, 4, 128)


LAYER = "        encoded.append(layer(encoded[-1]))\n"
FOLLOWED = "        encoded.append(layers.{}({})(layer(encoded[-1])))\n"
OBJECTIVE = "    return squared_error_per_pixel(images, outputs)\n"
SSIM = "    return 1 - tf.reduce_mean(tf.image.ssim(images, outputs, 1, filter_size=5))\n"
FILTERS = "FILTERS = (16, 32, 64, 128)"
EVERYTHING = ["--depth", "2", "--tied", "--latent-dim", "5", "--pretrain-steps", "10"]
EDITS = {  # what is replaced, by what, and the options of a run
    "absolute error": (OBJECTIVE, README.split("```python\n")[2].split("```")[0], []),
    "one more layer": (FILTERS, README.split("```python\n")[3].split("\n```")[0], []),
    "other filters": (FILTERS, "FILTERS = (8, 24, 40)", ["--tied", "--latent-dim", "5"]),
    "batch normalization": (LAYER, FOLLOWED.format("BatchNormalization", ""), EVERYTHING),
    "dropout": (LAYER, FOLLOWED.format("Dropout", "0.5"), EVERYTHING),
    "structural similarity": (OBJECTIVE, SSIM, EVERYTHING),
}


def load_edited(folder, name):
    """Import a copy of the script with an edit, beside the script itself."""
    old, new, _ = EDITS[name]
    indented = f"    {new}" if new.startswith("return") else new
    path = helpers.edited_copy(folder, (old, indented))
    spec = importlib.util.spec_from_file_location("edited_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(params=EDITS)
def edited(request, tmp_path, monkeypatch):
    """A name of an edit, and a function that runs the edited script with further options."""
    script = load_edited(tmp_path / "copy", request.param)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, name="x"):
        options = ["--run-name", name, "--sample-every", "10", *EDITS[request.param][2]]
        words = [*options, *map(str, arguments)]
        assert script.main(script.parse_arguments(words)) == 0
        return helpers.Finished(tmp_path, name)

    return request.param, run


def expected_loss(name, images, outputs):
    """Return the loss that an edited script minimizes."""
    if name == "structural similarity":
        return 1 - tf.image.ssim(images, outputs, 1, filter_size=5).numpy().mean()
    error = np.abs(outputs - images) if name == "absolute error" else np.square(outputs - images)
    return error.sum(axis=-1).mean()


def test_an_edited_script_trains_with_everything_on_and_resumes(edited, digits):
    name, run = edited
    part = run("--steps", 10)
    before = part.model()
    resumed = run("--steps", 20)
    whole = run("--steps", 20, name="whole")
    helpers.assert_same_run(resumed, whole)
    model = resumed.model()
    outputs, images = reconstruct(model, digits["x_test"])
    loss = expected_loss(name, images, outputs)
    assert resumed.json("metrics")["test_loss"] == pytest.approx(loss, rel=1e-4)
    for old, new in zip(before.trainable_variables, model.trainable_variables, strict=True):
        assert not np.array_equal(old, new), new.path
    statistics = [v for v in model.variables if "moving" in v.path]
    assert bool(statistics) == (name == "batch normalization")
    for variable in statistics:
        fresh = 0 if "mean" in variable.path else 1
        assert not np.isclose(variable, fresh).any(), variable.path


def test_hidden_layers_learn_by_the_squared_error_whatever_the_objective(tmp_path, monkeypatch):
    script = load_edited(tmp_path / "copy", "absolute error")
    monkeypatch.chdir(tmp_path)
    losses = []
    for module, name in ((script, "edited"), (train_ae, "plain")):
        words = ["--run-name", name, "--pretrain-steps", "10", "--steps", "5"]
        assert module.main(module.parse_arguments(words)) == 0
        run = helpers.Finished(tmp_path, name)
        losses.append((run.losses("pretrain/conv2"), run.losses("train")))
    np.testing.assert_array_equal(losses[0][0], losses[1][0])
    assert not np.isclose(losses[0][1], losses[1][1]).any()


def test_saved_model_opens_without_the_script(short_run, digits, tmp_path):
    code = """
import json, sys, keras, numpy as np
model = keras.models.load_model(sys.argv[1])
images = np.load(sys.argv[2])["x_test"][:5] / np.float32(255)
print(json.dumps(np.asarray(model(images)).tolist()))
"""
    paths = [str(short_run.logs / "autoencoder.keras"), str(train_ae.BUNDLED)]
    words = [helpers.sys.executable, "-c", code, *paths]
    process = helpers.subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    expected, _ = reconstruct(short_run.model(), digits["x_test"][:5])
    np.testing.assert_allclose(json.loads(process.stdout), expected, atol=1e-5)
    assert isinstance(short_run.model(), keras.Model)
